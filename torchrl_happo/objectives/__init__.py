"""Loss modules of the sequential update."""

from torchrl_happo.objectives.happo import HAPPOLoss

__all__ = ["HAPPOLoss"]
