"""A2PO (Wang et al., 2023): agents in order, each with an advantage estimated again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchrl_happo.objectives import A2POLoss
from torchrl_happo.recipe.algorithms.happo import Happo
from torchrl_happo.recipe.config import choice, default_of, number


@dataclass
class A2po(Happo):
    """Agent-by-agent policy optimisation: agents in order, each with its own new advantage."""

    loss = A2POLoss

    order: str = choice("semi_greedy", "random", "fixed", default="semi_greedy")
    """Of the agents: the best and a random one in turns, drawn anew, or as they are named."""
    clip_growth: float = number(default_of(A2POLoss, "clip_growth"), at_least=0, at_most=1)
    """By how much less than the last the first agent may move."""
    trace: str = choice("paper", "code", default=default_of(A2POLoss, "trace"))
    """code: lambda twice from the second agent on, as the authors' code has it."""

    c_thresh: float = number(default_of(A2POLoss, "c_thresh"), at_least=1)
    """Largest ratio that a trace takes; 1e9: all of it, without a bias and with more variance."""

    def own_settings(self) -> dict[str, Any]:
        """Return how clipping grows, and which trace."""
        names = ("clip_growth", "trace", "c_thresh")
        return {name: getattr(self, name) for name in names}
