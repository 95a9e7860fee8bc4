"""Entries for a block that owns its critic: returns and old values, beside its own data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import NestedKey
from torch import Tensor

from torchrl_happo.objectives.mat import OLD_DIMENSIONS, MATLoss
from torchrl_happo.team.agent import Agent
from torchrl_happo.update.batch import TeamBatch
from torchrl_happo.update.correction import RatioFactor

__all__ = ["OwnedCritic"]


class OwnedCritic(RatioFactor):
    """The correction of MAT: nobody moves before the block, which also fits its critic.

    Args:
        batch (TeamBatch): the batch of the update.

    Keyword Args:
        loss (MATLoss): the loss of the block.
    """

    def __init__(self, batch: TeamBatch, *, loss: MATLoss) -> None:
        super().__init__(batch)
        self.loss = loss

    def entries(self, agent: Agent) -> Mapping[NestedKey, Tensor]:
        """Return everything that the critic reads and is fitted to, if the block owns it."""
        entries: dict[NestedKey, Tensor] = {}
        for name, critic in self.batch.critics.items():
            if critic.is_owned and critic.is_fitted:
                own, keys = self.batch.critic_batches[name], critic.keys
                further = [key for key in keys.reads if key not in agent.update_keys]
                for key in (*further, keys.value_target, keys.value):
                    value = own.get(key, None)
                    if value is not None:
                        entries[key] = self.batch.items(value)
        if self.loss.ratio == "dimensions":
            entries[OLD_DIMENSIONS] = self._dimensions(agent)
        return entries

    @torch.no_grad()
    def _dimensions(self, agent: Agent) -> Tensor:
        """Return the log-probability of each dimension of the actions, before the block moves."""
        own = agent.view(self.batch.batch, agent.update_keys)
        agent.policy.prepare(own)
        return self.batch.items(self.loss.dimension_log_prob(agent, own))
