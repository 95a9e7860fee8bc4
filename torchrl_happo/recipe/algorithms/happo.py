"""HAPPO (Kuba et al., 2022): agents in order, each with a network and an Adam of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torchrl_happo.objectives import HAPPOLoss
from torchrl_happo.recipe.algorithms.sequential import SequentialConfig
from torchrl_happo.recipe.config import default_of, number


@dataclass
class Happo(SequentialConfig):
    """Heterogeneous-agent PPO: agents in order, each with a network and an Adam of its own."""

    loss: ClassVar[type[HAPPOLoss]] = HAPPOLoss

    clip_epsilon: float = number(default_of(HAPPOLoss, "clip_epsilon"), above=0, below=1)
    """How far a ratio may go from 1 and still gain by it."""
    clip_epsilon_high: float | None = number(None, above=0)
    """Threshold for ratios above 1; null: clip_epsilon, which is for those below."""
    entropy_coeff: float = number(default_of(HAPPOLoss, "entropy_coeff"), at_least=0)
    """Weight of the entropy bonus."""
    target_kl: float | None = number(None, above=0)
    """An agent whose policy has moved further than this many nats stops early; null: never."""

    @property
    def clipping(self) -> float | tuple[float, float]:
        """How far a ratio may go below and above 1."""
        high = self.clip_epsilon_high
        return self.clip_epsilon if high is None else (self.clip_epsilon, high)

    def own_settings(self) -> dict[str, Any]:
        """Return the arguments of the loss that an algorithm has besides HAPPO's."""
        return {}

    def make_loss(self, actors: dict[str, Any], critic: Any, **settings: Any) -> HAPPOLoss:
        """Build the loss of a team."""
        return self.loss(
            actors,
            critic,
            clip_epsilon=self.clipping,
            entropy_coeff=self.entropy_coeff,
            **self.own_settings(),
            **settings,
        )

    def updater_settings(self) -> dict[str, Any]:
        """Return what the updater needs beyond the shared settings."""
        return {"target_kl": self.target_kl}
