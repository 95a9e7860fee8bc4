"""MACPO (Gu et al., 2021): agents in order, each within a trust region and a bound of a cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchrl_happo.objectives import MACPOLoss
from torchrl_happo.recipe.algorithms.costs import WithCosts
from torchrl_happo.recipe.algorithms.hatrpo import Hatrpo
from torchrl_happo.recipe.config import ConfigError, TrainConfig


@dataclass
class Macpo(WithCosts, Hatrpo):
    """Constrained policy optimisation of a team: each step keeps the cost below its bound."""

    def check(self, config: TrainConfig) -> None:
        """Refuse a budget of the team that compares gains."""
        super().check(config)
        if self.kl_split in ("weighted", "greedy"):
            raise ConfigError(
                f"algorithm.kl_split={self.kl_split} divides max_kl by gains, which a step of "
                "macpo may have to give up: take equal, or null."
            )

    def make_loss(self, actors: dict[str, Any], critic: Any, **settings: Any) -> MACPOLoss:
        """Build the loss of a team."""
        return MACPOLoss(
            actors,
            critic,
            max_kl=self.max_kl,
            kl_split="equal" if self.kl_split == "equal" else None,
            damping=self.damping,
            cg_iterations=self.cg_iterations,
            fisher_fraction=self.fisher_fraction,
            **settings,
        )
