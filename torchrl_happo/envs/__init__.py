"""What stands between an environment and the team's loss."""

from __future__ import annotations

from torchrl_happo.envs.transforms import TeamReward

__all__ = ["TeamReward"]
