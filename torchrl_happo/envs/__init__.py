"""What stands between an environment and the team's loss, and small exact games."""

from __future__ import annotations

from torchrl_happo.envs.matrix import MatrixGame
from torchrl_happo.envs.transforms import TeamReward

__all__ = ["MatrixGame", "TeamReward"]
