"""The advantage less the price of costs, and the multipliers that set the price."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import NestedKey, TensorDict
from torch import Tensor

from torchrl_happo.masked import count, masked_mean
from torchrl_happo.objectives.lagrangian import (
    HAPPOLagrangianLoss,
    adam_ascent,
    projected_ascent,
)
from torchrl_happo.team.agent import Agent
from torchrl_happo.update.batch import TeamBatch
from torchrl_happo.update.correction import RatioFactor
from torchrl_happo.update.episode_costs import episode_costs

__all__ = ["PricedCosts"]


class PricedCosts(RatioFactor):
    r"""The correction of HAPPO-Lagrangian: :math:`A - \sum_k \lambda_k A_{C_k}`, and the factor.

    Learned multipliers make their step before the first agent moves. What has become of the
    multipliers is written to the loss when the update has succeeded.

    Args:
        batch (TeamBatch): the batch of the update.

    Keyword Args:
        loss (HAPPOLagrangianLoss): has the bounds and the multipliers.
    """

    def __init__(self, batch: TeamBatch, *, loss: HAPPOLagrangianLoss) -> None:
        super().__init__(batch)
        self.loss = loss
        self.costs = episode_costs(batch, loss)
        limits = [loss.cost_limits[name] for name in loss.cost_keys]
        self.excess = self.costs - self.costs.new_tensor(limits).unsqueeze(-1)
        self.state = loss.multiplier_state.clone()
        if loss.multiplier == "learned":
            excess = self.excess if loss.by_agent else self.excess.nanmean(-1, keepdim=True)
            self.state = adam_ascent(self.state, excess, loss.multiplier_lr)
        self.multipliers = loss.multipliers_of(self.state)

    def entries(self, agent: Agent) -> Mapping[NestedKey, Tensor]:
        """Return the factor, and the agent's advantage less the price of its costs."""
        batch, key = self.batch, self.batch.team.keys.advantage
        priced = batch.advantage(agent, self._priced(agent))
        return {**super().entries(agent), key: batch.items(priced)}

    def _priced(self, agent: Agent) -> Tensor:
        """Return the priced advantage before it is standardised, ``[*B, 1]`` or of each agent."""
        batch, team = self.batch, self.batch.team
        advantage = batch.batch.get(team.keys.advantage)
        for prices, name in zip(self.multipliers, self.loss.cost_keys, strict=True):
            cost = batch.batch.get(batch.critics[name].keys.advantage)
            if max(advantage.ndim, cost.ndim) == batch.batch.batch_dims + 1:
                price = prices[team.agents.index(agent)]
            else:  # one for each agent: standardised together, each by its own price
                sizes = torch.tensor([a.num_members for a in team.agents], device=prices.device)
                price = prices.repeat_interleave(sizes, output_size=team.num_agents).unsqueeze(-1)
                own = advantage.ndim - batch.batch.batch_dims, cost.ndim - batch.batch.batch_dims
                advantage = advantage.unsqueeze(-2) if own[0] == 1 else advantage
                cost = cost.unsqueeze(-2) if own[1] == 1 else cost
            advantage = advantage - price * cost
        return advantage

    def include(self, agent: Agent, log_ratio: Tensor) -> None:
        """Multiply the factor by an agent's ratio, and move projected multipliers."""
        if self.loss.multiplier == "projected":
            column = self.batch.team.agents.index(agent) if self.loss.by_agent else slice(None)
            gamma = getattr(self.loss.value_estimator, "gamma", 0.99)
            excess = (1 - gamma) * self.excess[:, column] + self._moved_costs(agent, log_ratio)
            own = self.state[0, :, column if self.loss.by_agent else 0]
            excess = excess if self.loss.by_agent else excess.mean(-1)
            moved = projected_ascent(own, excess, self.loss.multiplier_lr)
            self.state[0, :, column if self.loss.by_agent else 0] = moved
        super().include(agent, log_ratio)

    def _moved_costs(self, agent: Agent, log_ratio: Tensor) -> Tensor:
        """Return the mean of the ratio times the advantage of each cost, ``[n_costs]``."""
        batch, means = self.batch, []
        rows, valid = batch.rows(agent), batch.valid_rows(agent)
        for name in self.loss.cost_keys:
            cost = batch.batch.get(batch.critics[name].keys.advantage)
            own = batch.items(agent.share_of(cost, batch.batch.batch_dims))
            own = own if rows is None else own[rows.positions]
            means.append(masked_mean(log_ratio.exp() * own, valid))
        return torch.stack(batch.learners.mean(means, count(log_ratio, valid)))

    def report(self, agent: Agent) -> TensorDict:
        """Return the metrics of the factor, the multipliers of the agent and the episode costs."""
        report, index = super().report(agent), self.batch.team.agents.index(agent)
        for place, name in enumerate(self.loss.cost_keys):
            report[f"multiplier_{name}"] = self.multipliers[place, index]
            report[f"episode_{name}"] = self.costs[place, index]
        return report

    def end_batch(self) -> None:
        """Write the multipliers to the loss."""
        self.loss.multiplier_state.copy_(self.state)
