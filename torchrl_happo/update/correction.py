r"""What the agents that have moved change for the next one.

HAPPO and HATRPO multiply the advantage by the *factor*, the product of the importance ratios of
the agents that were updated before. :class:`RatioFactor` keeps it. Another correction, such as an
advantage that is estimated again for each agent, is another class with the same methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from tensordict import NestedKey, TensorDict
from torch import Tensor

from torchrl_happo.masked import count, effective_sample_size, largest, masked, masked_mean
from torchrl_happo.team.agent import Agent
from torchrl_happo.update.batch import TeamBatch

__all__ = ["Correction", "CorrectionFactory", "RatioFactor"]


@runtime_checkable
class Correction(Protocol):
    """Entries of an agent's data that depend on the agents updated before, for one batch."""

    def entries(self, agent: Agent) -> Mapping[NestedKey, Tensor]:
        """Return the entries of an agent's data that are corrected.

        Args:
            agent (Agent): the agent whose turn it is.

        Returns:
            tensors by key, items first: the factor under ``team.keys.factor``, an advantage under
            ``team.keys.advantage``.
        """

    def include(self, agent: Agent, log_ratio: Tensor) -> None:
        """Take note that an agent has moved.

        Args:
            agent (Agent): the agent whose update is done.
            log_ratio (Tensor): log of its new over its old policy, at the items of its data.
        """

    def report(self, agent: Agent) -> TensorDict:
        """Return scalars to report of an agent's corrections, before its step."""

    def end_batch(self) -> None:
        """Keep what shall last beyond the batch; called when the update has succeeded."""


#: Builds the correction of one batch, before any agent has moved.
CorrectionFactory: TypeAlias = Callable[[TeamBatch], Correction]


class RatioFactor:
    r"""The factor :math:`\prod_{j<m} \pi_\text{new}^{i_j} / \pi_\text{old}^{i_j}`, in log space.

    Each ratio is that of an agent's policy just after over just before its own update. A step at
    which an agent does not act contributes ratio 1. The factor is neither clipped nor standardised
    (Kuba et al., 2022, https://arxiv.org/abs/2109.11251, eq. 10).

    Args:
        batch (TeamBatch): the batch of the update.

    Attributes:
        log_factor (Tensor): log of the product over the agents updated so far, at each item.
    """

    def __init__(self, batch: TeamBatch) -> None:
        self.batch = batch
        self.log_factor = batch.zeros()

    def entries(self, agent: Agent) -> Mapping[NestedKey, Tensor]:
        """Return the factor under its documented key."""
        return {self.batch.team.keys.factor: self.log_factor.exp()}

    def include(self, agent: Agent, log_ratio: Tensor) -> None:
        """Multiply the factor by an agent's ratio, which is 1 where the agent does not act."""
        rows = self.batch.rows(agent)
        log_ratio = masked(log_ratio, self.batch.valid_rows(agent))
        if log_ratio.ndim > self.log_factor.ndim:
            log_ratio = log_ratio.sum(-1)  # a block's ratio is the product over its members
        # An impossible action (log-probability minus infinity) must not spoil the others' factor.
        log_ratio = torch.where(log_ratio.isfinite(), log_ratio, 0.0)
        if rows is None:
            self.log_factor = self.log_factor + log_ratio
        else:
            # Under autocast a ratio may have fewer digits than the factor.
            own = log_ratio.to(self.log_factor.dtype)
            self.log_factor = self.log_factor.index_add(0, rows.positions, own)

    def report(self, agent: Agent) -> TensorDict:
        """Return mean, largest value and effective sample size of the factor where it is used."""
        log_factor, learners = self.log_factor, self.batch.learners
        valid = self.batch.valid(agent) if self.batch.acts(agent) else None
        if valid is not None:
            valid = self.batch.items(valid)
            valid = valid.any(-1) if valid.ndim > log_factor.ndim else valid
            # Of an agent that acts nowhere the factor is reported everywhere.
            valid = valid | ~valid.any() if self.batch.pads else valid
        peak = learners.maximum(largest(log_factor, valid))
        (mean,) = learners.mean([masked_mean(log_factor.exp(), valid)], count(log_factor, valid))
        ess = effective_sample_size(log_factor, valid, peak=peak, average=learners.mean)
        return TensorDict({"factor_mean": mean, "factor_max": peak.exp(), "factor_ess": ess})

    def end_batch(self) -> None:
        """Keep nothing: the next batch starts from the factor 1."""
