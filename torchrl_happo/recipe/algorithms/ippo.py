"""IPPO (de Witt et al., 2020) by TorchRL's ``IPPOLoss``: all agents at once, a critic for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torchrl_happo.recipe.algorithms.simultaneous import SimultaneousConfig
from torchrl_happo.versions import IPPOLoss, MAPPOLoss


@dataclass
class Ippo(SimultaneousConfig):
    """Independent PPO by TorchRL's ``IPPOLoss``: all agents at once, a critic for each."""

    loss_class: ClassVar[type[MAPPOLoss]] = IPPOLoss
    centralized: ClassVar[bool] = False
