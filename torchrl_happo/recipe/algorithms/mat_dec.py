"""MAT-Dec (Wen et al., 2022): policies that act alone, values by an encoder over the team."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torchrl_happo.recipe.algorithms.mat import Mat


@dataclass
class MatDec(Mat):
    """MAT with decentralised policies: all agents at once, values by an encoder over the team."""

    decentralized: ClassVar[bool] = True

    share_policies: bool = True
    """One policy for the agents of a group; false: one for each agent."""
