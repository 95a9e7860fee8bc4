"""The advantage estimated again for each agent, as the agents that have moved leave it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import NestedKey
from torch import Tensor

from torchrl_happo.objectives.a2po import CLIP_SCALE, A2POLoss
from torchrl_happo.team.agent import Agent
from torchrl_happo.team.entries import next_key
from torchrl_happo.update.batch import TeamBatch
from torchrl_happo.update.correction import RatioFactor

__all__ = ["Reestimated", "reestimate"]


def reestimate(
    advantage: Tensor,
    trace: Tensor,
    done: Tensor,
    *,
    gamma: float | Tensor,
    lmbda: float | Tensor,
) -> Tensor:
    r"""Estimate the advantage of other policies from that of GAE.

    GAE says :math:`\delta_t = A_t - \gamma \lambda A_{t+1}`; the new advantage is
    :math:`A'_t = \delta_t + \gamma c_{t+1} A'_{t+1}`. Neither looks beyond the end of a trajectory,
    nor of the batch.

    Args:
        advantage (Tensor): :math:`A`, time along the last dimension.
        trace (Tensor): :math:`c`, same shape.
        done (Tensor): whether a trajectory ends with a step, same shape.

    Keyword Args:
        gamma (float or Tensor): :math:`\gamma`.
        lmbda (float or Tensor): :math:`\lambda`.

    Example:
        >>> advantage, end = torch.tensor([1.5, 1.0]), torch.tensor([False, True])
        >>> reestimate(advantage, torch.tensor([1.0, 0.0]), end, gamma=1.0, lmbda=0.5)
        tensor([1., 1.])
    """
    goes_on = (~done).to(advantage.dtype)
    steps = list(advantage.unbind(-1))
    new = steps[-1]
    made = [new]
    for t in range(len(steps) - 2, -1, -1):
        delta = steps[t] - gamma * lmbda * goes_on[..., t] * steps[t + 1]
        new = delta + gamma * trace[..., t + 1] * goes_on[..., t] * new
        made.append(new)
    return torch.stack(made[::-1], -1)


class Reestimated(RatioFactor):
    r"""The correction of A2PO: another advantage for each agent, besides the factor.

    The trace is :math:`c = \lambda \min(\bar c, \rho)` with the factor :math:`\rho`, which is 1 for
    the first agent: it has the advantage of GAE. Each agent's is standardised over its own valid
    decisions.

    Args:
        batch (TeamBatch): the batch of the update.

    Keyword Args:
        loss (A2POLoss): says discount, trace, and how the clipping threshold grows.
    """

    def __init__(self, batch: TeamBatch, *, loss: A2POLoss) -> None:
        super().__init__(batch)
        self.loss = loss
        self.num_moved = 0
        critic = batch.critics.get("critic")
        estimator: Any = critic.estimator() if critic is not None and critic.estimator else None
        if critic is None or not (hasattr(estimator, "gamma") and hasattr(estimator, "lmbda")):
            raise ValueError(
                "A2PO estimates the advantage of GAE again and needs its gamma and lmbda; pass a "
                "critic, and call loss.make_value_estimator(ValueEstimators.GAE)."
            )
        # As precise as numbers of Python, which would be read back from the device.
        self.gamma, self.lmbda = (
            torch.as_tensor(setting).double() for setting in (estimator.gamma, estimator.lmbda)
        )
        self.done = batch.critic_batches["critic"].get(next_key(critic.keys.done))

    def entries(self, agent: Agent) -> Mapping[NestedKey, Tensor]:
        """Return the factor, the agent's advantage, and the scale of its clipping threshold."""
        batch, keys = self.batch, self.batch.team.keys
        scale = torch.full_like(self.log_factor, self.loss.clip_scale(self.num_moved))
        advantage = batch.items(self.advantage(agent))
        return {**super().entries(agent), keys.advantage: advantage, CLIP_SCALE: scale}

    def advantage(self, agent: Agent) -> Tensor:
        """Return an agent's advantage, ``[*B]`` or ``[*B, n_members]``."""
        batch, dims = self.batch, self.batch.batch.batch_dims
        own = agent.share_of(batch.batch.get(batch.team.keys.advantage), dims)
        done = agent.share_of(self.done, dims)
        ratio = self.log_factor.exp().clamp_max(self.loss.c_thresh).reshape(batch.batch.batch_size)
        twice = self.loss.trace == "code" and self.num_moved > 0
        trace = ratio * self.lmbda ** (2 if twice else 1)
        if own.ndim > dims:  # time last
            members = (own.movedim(-1, 0), trace, done.movedim(-1, 0))
            new = reestimate(*members, gamma=self.gamma, lmbda=self.lmbda).movedim(0, -1)
        else:
            new = reestimate(own, trace, done, gamma=self.gamma, lmbda=self.lmbda)
        return batch.standardized(agent, new)

    def include(self, agent: Agent, log_ratio: Tensor) -> None:
        """Multiply the factor by an agent's ratio, and count the agent."""
        super().include(agent, log_ratio)
        self.num_moved += 1
