"""CoPPO (Wu et al., 2021): all agents at once, each in view of the others' present ratios."""

from __future__ import annotations

from dataclasses import dataclass

from torchrl_happo.objectives import CoPPOLoss
from torchrl_happo.recipe.algorithms.happo import Happo


@dataclass
class Coppo(Happo):
    """Coordinated PPO: all agents of a group at once, each in view of the others' ratios."""

    loss = CoPPOLoss
