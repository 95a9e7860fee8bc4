"""HATRPO (Kuba et al., 2022): agents in order, each within a trust region of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torchrl_happo.objectives import HATRPOLoss
from torchrl_happo.objectives.hatrpo import Split
from torchrl_happo.recipe.algorithms.sequential import SequentialConfig
from torchrl_happo.recipe.config import choice, count, default_of, number


@dataclass
class Hatrpo(SequentialConfig):
    """Heterogeneous-agent TRPO: agents in order, each within a trust region of its own.

    Epochs, minibatches, learning rate and gradient norm are the critic's alone.
    """

    max_kl: float = number(default_of(HATRPOLoss, "max_kl"), above=0)
    """Nats that each agent's update may move its policy."""
    kl_split: str | None = choice("equal", "weighted", "greedy", default=None)
    """The agents share max_kl: equally, by their gains, or the largest gain first; null: each has
    it to itself."""
    damping: float = number(default_of(HATRPOLoss, "damping"), at_least=0)
    """Added to the diagonal of the Fisher matrix."""
    cg_iterations: int = count(default_of(HATRPOLoss, "cg_iterations"))
    """Of conjugate gradient."""
    fisher_fraction: float = number(default_of(HATRPOLoss, "fisher_fraction"), above=0, at_most=1)
    """Share of the samples in the Fisher matrix."""

    def make_loss(self, actors: dict[str, Any], critic: Any, **critic_settings: Any) -> HATRPOLoss:
        """Build the loss of a team."""
        return HATRPOLoss(
            actors,
            critic,
            max_kl=self.max_kl,
            kl_split=cast(Split | None, self.kl_split),
            damping=self.damping,
            cg_iterations=self.cg_iterations,
            fisher_fraction=self.fisher_fraction,
            **critic_settings,
        )
