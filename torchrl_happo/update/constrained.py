"""Give MACPO's agents the advantage of the cost and its excess, besides the factor."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from tensordict import NestedKey, TensorDict
from torch import Tensor

from torchrl_happo.masked import count, masked_mean
from torchrl_happo.objectives.macpo import COST_ADVANTAGE, COST_EXCESS, MACPOLoss
from torchrl_happo.team.agent import Agent
from torchrl_happo.update.batch import TeamBatch
from torchrl_happo.update.correction import RatioFactor
from torchrl_happo.update.episode_costs import episode_costs

__all__ = ["BoundedCost"]


class BoundedCost(RatioFactor):
    r"""The correction of MACPO: the factor, :math:`A_C`, and the excess of the cost.

    The excess is :math:`(1 - \gamma)(J_C - d) + \mathbb{E}[(M - 1) A_C]`: what the agents before
    have added to the cost by their ratios, whose product is :math:`M`, is not left for the next.

    Args:
        batch (TeamBatch): the batch of the update.

    Keyword Args:
        loss (MACPOLoss): has the bound, and remembers the cost that was last known.
    """

    def __init__(self, batch: TeamBatch, *, loss: MACPOLoss) -> None:
        super().__init__(batch)
        self.loss = loss
        ((self.name, limit),) = loss.cost_limits.items()
        costs = episode_costs(batch, loss)
        self.costs = torch.where(costs.isnan(), loss.last_costs, costs)
        gamma = getattr(loss.value_estimator, "gamma", 0.99)
        # As long as nothing is known the bound counts as reached: the cost may not grow.
        self.excess = (1 - gamma) * (self.costs - limit).nan_to_num(nan=0.0)[0]

    def entries(self, agent: Agent) -> Mapping[NestedKey, Tensor]:
        """Return the factor, the agent's advantage of the cost and the excess."""
        batch = self.batch
        cost = batch.batch.get(batch.critics[self.name].keys.advantage)
        own = batch.items(agent.share_of(cost, batch.batch.batch_dims))
        excess = self.excess[batch.team.agents.index(agent)]
        return {
            **super().entries(agent),
            COST_ADVANTAGE: own,
            COST_EXCESS: excess.expand_as(self.log_factor).to(self.log_factor),
        }

    def include(self, agent: Agent, log_ratio: Tensor) -> None:
        """Multiply the factor by an agent's ratio, and count what that adds to the cost."""
        batch, before = self.batch, self.log_factor.exp()
        super().include(agent, log_ratio)
        moved = self.log_factor.exp() - before
        steps = None if batch.masks is None or batch.masks.steps is None else batch.masks.steps
        steps = None if steps is None else batch.items(steps)
        added = [masked_mean(moved * own, steps) for own in self._cost_advantages]
        self.excess = self.excess + torch.stack(batch.learners.mean(added, count(moved, steps)))

    @cached_property
    def _cost_advantages(self) -> list[Tensor]:
        """The advantage of each agent's cost at each item, averaged over a block's members.

        A cost of the team has one for all.
        """
        batch, dims = self.batch, self.batch.batch.batch_dims
        cost = batch.batch.get(batch.critics[self.name].keys.advantage)
        agents = batch.team.agents if cost.ndim > dims + 1 else batch.team.agents[:1]
        own = [batch.items(agent.share_of(cost, dims)) for agent in agents]
        return [each.mean(-1) if each.ndim > self.log_factor.ndim else each for each in own]

    def report(self, agent: Agent) -> TensorDict:
        """Return the metrics of the factor, and the cost of an episode."""
        report, index = super().report(agent), self.batch.team.agents.index(agent)
        return report.set(f"episode_{self.name}", self.costs[0, index])

    def end_batch(self) -> None:
        """Remember the cost of an episode."""
        self.loss.last_costs.copy_(self.costs)
