"""The mean cost of the episodes that end in a batch, which a bound is about."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from torchrl_happo.masked import masked_mean
from torchrl_happo.objectives.costs import WithCosts, episode_key
from torchrl_happo.objectives.critic import Critic
from torchrl_happo.team.entries import has, next_key
from torchrl_happo.team.values import fill_next
from torchrl_happo.update.batch import TeamBatch

__all__ = ["episode_costs"]


def episode_costs(batch: TeamBatch, loss: WithCosts) -> Tensor:
    """Return the mean cost of the episodes that ended in a batch, for each cost and agent.

    Args:
        batch (TeamBatch): the batch of the update.
        loss (WithCosts): names the costs.

    Returns:
        ``[n_costs, n_agents]`` over the units of the update; NaN where no episode ended, here or
        with another learner. If the loss bootstraps truncated costs, what the critic of a cost
        expects after a truncation counts as well.

    Raises:
        KeyError: if the batch does not say what an episode has cost.
    """
    dims, team, rows = batch.batch.batch_dims, batch.team, []
    for name, key in loss.cost_keys.items():
        place = episode_key(key)
        if not has(batch.source, place):
            path = place[1:] if len(place) > 2 else place[1]
            raise KeyError(
                f"The batch has no entry {place!r}, which the bound of the cost {name!r} needs; "
                f"append RewardSum(in_keys=[{key!r}], out_keys=[{path!r}]) to the environment's "
                "transforms."
            )
        total = batch.source.get(place)
        if loss.bootstrap_truncated:
            total = _with_cost_to_come(total, batch.source, batch.critics[name])
        done = batch.source.get(next_key(batch.critics[name].keys.done))
        done = done.reshape(*done.shape[:dims], -1).any(-1)
        if batch.masks is not None and batch.masks.steps is not None:
            done = done & batch.masks.steps
        means = []
        for agent in team.agents:
            own = agent.share_of(total, dims)
            own = own.flatten(dims).mean(-1) if own.ndim > dims else own
            means.append(masked_mean(own, done))
        number = done.sum()
        means = batch.learners.mean(means, number)
        known = batch.learners.maximum(number.reshape(1).to(total)) > 0
        rows.append(torch.where(known, torch.stack(means), float("nan")))
    return torch.stack(rows)


@torch.no_grad()
def _with_cost_to_come(total: Tensor, batch: TensorDictBase, critic: Critic) -> Tensor:
    """Add what the critic expects after a truncation to the sum of an episode so far."""
    reads = critic.keys.observations
    # Collectors may leave out the observations behind a truncation (compact_obs).
    seen = fill_next(batch.select(*reads, *map(next_key, reads)), reads)["next"]
    value = critic.with_values()(seen).get(critic.keys.value)
    done, terminated = (
        batch.get(next_key(key)) for key in (critic.keys.done, critic.keys.terminated)
    )
    # The team's entries beside those of each agent.
    entries = [total, value, done, terminated]
    ndim = max(entry.ndim for entry in entries)
    total, value, done, terminated = (
        entry if entry.ndim == ndim else entry.unsqueeze(-2) for entry in entries
    )
    return total + torch.where(done & ~terminated, value, 0)
