"""The cooperative particle environments of mpe2, one typed dataclass each.

The fields are the arguments of the environment, as mpe2 names them; their values, mpe2's own
defaults, are in ``conf/task/pettingzoo``. In the others teams of learners compete.
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from torchrl_happo.recipe.config import PettingZooTask, count, number


@dataclass
class CollectTreasure(PettingZooTask):
    """Collectors bring treasures to the deposits of their kind, which move as well."""

    num_collectors: int = count()
    num_deposits: int = count()
    num_treasures: int = count()


@dataclass
class SimpleFormation(PettingZooTask):
    """Agents stand in a circle around a landmark."""

    N: int = count()
    terminate_on_success: bool = MISSING


@dataclass
class SimpleLine(PettingZooTask):
    """Agents stand in a line between two landmarks."""

    N: int = count()
    terminate_on_success: bool = MISSING


@dataclass
class SimpleReference(PettingZooTask):
    """Two agents tell each other where to go."""

    local_ratio: float = number(at_least=0, at_most=1)


@dataclass
class SimpleSpeakerListener(PettingZooTask):
    """A speaker tells a listener where to go: two unlike agents."""


@dataclass
class SimpleSpread(PettingZooTask):
    """Agents cover landmarks without collisions."""

    N: int = count()
    local_ratio: float = number(at_least=0, at_most=1)
