"""HAA2C (Zhong et al., 2024): agents in order, each with an unclipped surrogate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchrl_happo.objectives import HAA2CLoss, HAPPOLoss
from torchrl_happo.recipe.algorithms.sequential import SequentialConfig
from torchrl_happo.recipe.config import default_of, number


@dataclass
class Haa2c(SequentialConfig):
    """Heterogeneous-agent A2C: agents in order, each with an unclipped surrogate."""

    entropy_coeff: float = number(default_of(HAPPOLoss, "entropy_coeff"), at_least=0)
    """Weight of the entropy bonus."""
    target_kl: float | None = number(None, above=0)
    """An agent whose policy has moved further than this many nats stops early; null: never."""

    def make_loss(self, actors: dict[str, Any], critic: Any, **critic_settings: Any) -> HAA2CLoss:
        """Build the loss of a team."""
        return HAA2CLoss(actors, critic, entropy_coeff=self.entropy_coeff, **critic_settings)

    def updater_settings(self) -> dict[str, Any]:
        """Return what the updater needs beyond the shared settings."""
        return {"target_kl": self.target_kl}
