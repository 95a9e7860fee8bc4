"""HAPPO-Lagrangian (Gu et al., 2021): agents in order, with a price on costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchrl_happo.objectives import HAPPOLagrangianLoss
from torchrl_happo.recipe.algorithms.costs import WithCosts
from torchrl_happo.recipe.algorithms.happo import Happo
from torchrl_happo.recipe.config import ConfigError, TrainConfig, choice, default_of, number


@dataclass
class HappoLagrangian(WithCosts, Happo):
    """HAPPO with a price on costs, which keeps the mean cost of an episode below a bound."""

    loss = HAPPOLagrangianLoss

    multiplier: str = choice(
        *("learned", "projected", "fixed"), default=default_of(HAPPOLagrangianLoss, "multiplier")
    )
    """How the price moves: by Adam, as in the paper, or not at all."""
    initial_multiplier: float = number(
        default_of(HAPPOLagrangianLoss, "initial_multiplier"), at_least=0
    )
    """The price at the start, in rewards per cost."""
    multiplier_lr: float = number(default_of(HAPPOLagrangianLoss, "multiplier_lr"), above=0)
    """Learning rate of the price."""

    def check(self, config: TrainConfig) -> None:
        """Refuse a learned price of 0."""
        super().check(config)
        if self.multiplier == "learned" and self.initial_multiplier == 0:
            raise ConfigError(
                "algorithm.initial_multiplier is 0.0, but a learned multiplier starts above 0: "
                "raise it, or take algorithm.multiplier=projected."
            )

    def own_settings(self) -> dict[str, Any]:
        """Return how the multipliers move."""
        return {
            "multiplier": self.multiplier,
            "initial_multiplier": self.initial_multiplier,
            "multiplier_lr": self.multiplier_lr,
        }
