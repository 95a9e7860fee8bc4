"""MAPPO (Yu et al., 2022) by TorchRL's ``MAPPOLoss``: all agents at once, a centralised critic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torchrl_happo.recipe.algorithms.simultaneous import SimultaneousConfig
from torchrl_happo.versions import MAPPOLoss


@dataclass
class Mappo(SimultaneousConfig):
    """Multi-agent PPO by TorchRL's ``MAPPOLoss``: all agents at once, a centralised critic."""

    loss_class: ClassVar[type[MAPPOLoss]] = MAPPOLoss
    centralized: ClassVar[bool] = True
