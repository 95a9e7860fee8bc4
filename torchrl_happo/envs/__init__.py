"""What stands between an environment and the team's loss."""

from __future__ import annotations
