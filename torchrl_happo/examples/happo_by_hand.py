r"""HAPPO in a loop of one's own: where the factor is, and when it changes.

    python -m torchrl_happo.examples.happo_by_hand

The loop below does by hand, with public names only, what ``SequentialUpdater`` does for HAPPO: the
advantage is estimated and standardised once, each agent minimises its own loss, and then the
*factor* is multiplied by the ratio of its new to its old policy. The example plays a cooperative
matrix game and prints how often the team finds the best joint action.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from tensordict import TensorDictBase
from torch.optim import Adam, Optimizer
from torchrl.collectors import Collector

from torchrl_happo import HAPPOLoss, make_actor, make_critic
from torchrl_happo.envs import MatrixGame
from torchrl_happo.masked import standardize

PAYOFF = torch.tensor([[8.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 2.0]])


def update(
    loss: HAPPOLoss,
    optimizers: Mapping[str, Optimizer],
    batch: TensorDictBase,
    order: Iterable[int],
    num_epochs: int,
) -> None:
    """Update every agent in turn, then the critic, with one batch.

    Args:
        loss (HAPPOLoss): the team's loss.
        optimizers (mapping of str to Optimizer): of each agent by name, and of the ``"critic"``.
        batch (TensorDictBase): joint data of batch size ``[*B]``.
        order (iterable of int): positions of the agents.
        num_epochs (int): passes over the batch for each agent and for the critic.
    """
    batch = batch.clone()
    loss.value_estimator(batch)
    batch["advantage"] = standardize(batch["advantage"])
    batch["factor"] = batch["advantage"].new_ones(*batch.shape, 1)
    for position in order:
        agent = loss.agents[position]
        data = loss.agent_data(agent, batch)
        for _ in range(num_epochs):
            _step(optimizers[agent.name], loss.agent_loss(agent, data))
        with torch.no_grad():
            new_log_prob = agent.log_prob(agent.policy.parameters(data), data)
            ratio = (new_log_prob - data["old_log_prob"]).exp()
        batch["factor"] = batch["factor"] * ratio.unsqueeze(-1)
    for _ in range(num_epochs):
        _step(optimizers["critic"], loss.critics["critic"].objective(batch))


def _step(optimizer: Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def main(total_frames: int = 20_000) -> float:
    """Train a team on the matrix game; return the share of best joint actions at the end."""
    torch.manual_seed(0)
    env = MatrixGame(PAYOFF, num_envs=50)
    actor, critic = make_actor(env), make_critic(env)
    loss = HAPPOLoss(actor, critic, entropy_coeff=0.0)
    adam = partial(Adam, lr=3e-3)
    optimizers = {agent.name: adam(agent.parameters()) for agent in loss.agents}
    optimizers["critic"] = adam(critic.parameters())
    share = 0.0
    for batch in Collector(env, actor, frames_per_batch=500, total_frames=total_frames):
        update(loss, optimizers, batch, torch.randperm(2).tolist(), num_epochs=5)
        reward = batch["next", "reward"]
        share = (reward == PAYOFF.max()).float().mean().item()
    return share


if __name__ == "__main__":
    print(f"share of the best joint action: {main():.2f}")
