"""CoPPO (Wu et al., 2021): all agents at once, each in view of the others' present ratios."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchrl_happo.objectives import CoPPOLoss
from torchrl_happo.recipe.algorithms.happo import Happo


@dataclass
class Coppo(Happo):
    """Coordinated PPO: all agents of a group at once, each in view of the others' ratios."""

    def make_loss(self, actors: dict[str, Any], critic: Any, **critic_settings: Any) -> CoPPOLoss:
        """Build the loss of a team."""
        return CoPPOLoss(
            actors,
            critic,
            clip_epsilon=self.clipping,
            entropy_coeff=self.entropy_coeff,
            **critic_settings,
        )
