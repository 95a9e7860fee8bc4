r"""How far each agent may move: alone, or by its share of one divergence for the whole team.

A team whose agents may move by :math:`\sum_i \delta_i \le \delta` in all gains most, with a linear
surrogate and a quadratic divergence, by :math:`\delta_i = \delta q_i / \sum_j q_j` with
:math:`q_i = g_i^\top F_i^{-1} g_i` (https://arxiv.org/abs/2508.10340): the natural gradient of all
parameters together. The factor changes :math:`q`, so the agents that are left share again what is
left before each turn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from torchrl_happo.objectives.base import SequentialLoss
from torchrl_happo.objectives.hatrpo import HATRPOLoss
from torchrl_happo.steps.step import Step
from torchrl_happo.team.agent import Agent
from torchrl_happo.transaction import clone_state
from torchrl_happo.update.batch import TeamBatch
from torchrl_happo.update.correction import Correction
from torchrl_happo.update.metrics import Passes
from torchrl_happo.update.order import OrderLike

__all__ = ["Budget", "LargestGainFirst", "OwnRadii", "TeamBudget", "make_budget"]


class Budget(Protocol):
    """Says before each turn how far the agents may move."""

    def order(self, order: OrderLike) -> OrderLike:
        """Return the order of the agents, given the one that the updater was asked for."""

    def begin(self) -> None:
        """Begin a batch."""

    def look(self, remaining: Sequence[Agent], batch: TeamBatch, correction: Correction) -> None:
        """Look at what the agents that are left would gain, before one of them moves."""

    def radius(self, agent: Agent) -> float | None:
        """Return the bound of an agent's divergence, in nats; ``None``: its step's own."""

    def spend(self, kl: Tensor) -> None:
        """Take note of the measured divergence of an agent that has moved."""


class OwnRadii:
    """No common budget: each agent's step has a bound of its own, or none."""

    def order(self, order: OrderLike) -> OrderLike:
        """Return the order as it is."""
        return order

    def begin(self) -> None:
        """Do nothing."""

    def look(self, remaining: Sequence[Agent], batch: TeamBatch, correction: Correction) -> None:
        """Do nothing."""

    def radius(self, agent: Agent) -> float | None:
        """Return ``None``."""
        return None

    def spend(self, kl: Tensor) -> None:
        """Do nothing."""


class TeamBudget:
    """One bound of the divergence for the whole team.

    ``"weighted"``: the agents that are left share what is left in proportion to :math:`q`.
    ``"greedy"``: the agent with the largest gain per divergence goes first, and may move by all
    that is left. An agent without a gradient may not move. The measured divergence of each agent is
    subtracted before the next one moves. Reads two numbers for each agent that is left back from
    the device before each turn, and the divergence after it.

    Args:
        loss (HATRPOLoss): says the ``kl_split``, and before each batch the ``max_kl`` of the team.
        passes (mapping of str to Passes): of each agent.
        steps (mapping of str to Step): of each agent; their proposals say gain and divergence.

    Attributes:
        left (float): nats that are left in this batch.
        scores (dict of str to float): gain per divergence of the agents that are left, by name.
    """

    def __init__(
        self, loss: HATRPOLoss, passes: Mapping[str, Passes], steps: Mapping[str, Step]
    ) -> None:
        self.loss = loss
        self.passes = passes
        self.steps = steps
        self.left = 0.0
        self.scores: dict[str, float] = {}
        self._radii: dict[str, float] = {}

    def order(self, order: OrderLike) -> OrderLike:
        """Return the order as it is, but a greedy one's own."""
        if self.loss.kl_split != "greedy":
            return order
        if order != "random":
            raise ValueError(
                f'kl_split="greedy" chooses the order of the agents by their gains, so order='
                f"{order!r} would not act; leave it out."
            )
        return LargestGainFirst(self)

    def begin(self) -> None:
        """Put the whole budget at the team's disposal."""
        if not isinstance(self.loss.max_kl, float | int):
            raise TypeError(f"max_kl must be one number for the team, got {self.loss.max_kl!r}.")
        self.left = float(self.loss.max_kl)

    def look(self, remaining: Sequence[Agent], batch: TeamBatch, correction: Correction) -> None:
        """Divide what is left among the agents that are left.

        Args:
            remaining (sequence of Agent): the agents that are left.
            batch (TeamBatch): the batch of the update.
            correction (Correction): what the agents that have moved have changed.

        Raises:
            ValueError: if a step does not say its gain.
        """
        names = [agent.name for agent in remaining if batch.acts(agent)]
        if len(names) == 1:  # has all that is left, whatever it gains
            self.scores, self._radii = {names[0]: 0.0}, {names[0]: self.left}
            return
        # One after the other: a proposal holds the graphs of a policy.
        promises = [self._promise(name, batch, correction) for name in names]
        pairs = torch.stack(promises).tolist() if promises else []
        gains = [gain if math.isfinite(gain) else 0.0 for gain, _ in pairs]
        costs = [cost for _, cost in pairs]
        self.scores = {
            name: gain / cost if gain > 0 and cost > 0 else 0.0
            for name, gain, cost in zip(names, gains, costs, strict=True)
        }
        if self.loss.kl_split == "greedy":
            shares = [float(gain > 0) for gain in gains]
        else:
            shares = weighted_shares(gains)
        self._radii = {n: self.left * share for n, share in zip(names, shares, strict=True)}

    def _promise(self, name: str, batch: TeamBatch, correction: Correction) -> Tensor:
        """Return gain and divergence of a step, which is then as if it had not been asked."""
        step, passes = self.steps[name], self.passes[name]
        before = clone_state(step.state_dict())
        try:
            data = passes.ready(batch, correction, read_values=False)
            proposal = step.propose(passes.step_data(data))
        finally:
            step.load_state_dict(before)
        if proposal.gain is None or proposal.divergence is None:
            raise ValueError(
                f"kl_split={self.loss.kl_split!r} compares the gains of the agents, which the step "
                f"of {name!r} does not tell; take TrustRegion steps."
            )
        return torch.stack([proposal.gain, proposal.divergence])

    def radius(self, agent: Agent) -> float:
        """Return an agent's share of what is left, in nats; 0: it may not move."""
        return self._radii[agent.name]

    def spend(self, kl: Tensor) -> None:
        """Subtract a measured divergence."""
        self.left = max(self.left - max(float(kl), 0.0), 0.0)


class LargestGainFirst:
    """The order of a greedy budget: the largest gain per divergence first.

    Args:
        budget (TeamBudget): has looked at the agents that are left.
    """

    def __init__(self, budget: TeamBudget) -> None:
        self.budget = budget

    def next_agents(
        self, remaining: Sequence[Agent], batch: TeamBatch, correction: Correction
    ) -> Sequence[Agent]:
        """Return the agent whose step gains most per divergence; those that do not act are last."""
        scores = self.budget.scores
        return [max(remaining, key=lambda agent: scores.get(agent.name, -1.0))]


def weighted_shares(gains: Sequence[float]) -> list[float]:
    r"""Return the shares :math:`q_i / \sum_j q_j` of agents that step with equal radii.

    Args:
        gains (sequence of float): improvement :math:`\sqrt{2 \delta q_i}` that each promises.

    Returns:
        the shares; 0 for an agent that promises nothing, and for all if none does.

    Example:
        >>> [round(0.05 * share, 4) for share in weighted_shares([2.0, 1.0])]
        [0.04, 0.01]
    """
    squares = [max(gain, 0.0) ** 2 for gain in gains]
    return [square / (sum(squares) or 1.0) for square in squares]


def make_budget(
    loss: SequentialLoss, passes: Mapping[str, Passes], steps: Mapping[str, Step]
) -> Budget:
    """Return the budget that a loss asks for."""
    if isinstance(loss, HATRPOLoss) and loss.kl_split in ("weighted", "greedy"):
        return TeamBudget(loss, passes, steps)
    return OwnRadii()
