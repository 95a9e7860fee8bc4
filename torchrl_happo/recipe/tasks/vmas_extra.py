"""The cooperative ones among the scenarios that VMAS keeps apart, one typed dataclass each.

They are three of its particle environments and four of its debugging scenarios. Left out are
those where teams of learners compete (``simple_tag`` and the like), those with one agent, and
the demonstrations without a reward.
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from torchrl_happo.recipe.config import VmasTask, count


@dataclass
class SimpleReference(VmasTask):
    """Two agents tell each other where to go."""


@dataclass
class SimpleSpeakerListener(VmasTask):
    """A speaker tells a listener where to go: two unlike agents."""


@dataclass
class SimpleSpread(VmasTask):
    """Agents cover landmarks without collisions."""

    n_agents: int = count()
    obs_agents: bool = MISSING


@dataclass
class AsymJoint(VmasTask):
    """Two agents of different mass turn the link between them upright."""

    joint_length: float = MISSING
    random_start_angle: bool = MISSING
    observe_joint_angle: bool = MISSING
    joint_angle_obs_noise: float = MISSING
    asym_package: bool = MISSING
    mass_ratio: float = MISSING
    mass_position: float = MISSING
    max_speed_1: float | None = MISSING
    obs_noise: float = MISSING
    rot_shaping_factor: float = MISSING
    energy_reward_coeff: float = MISSING


@dataclass
class HetMass(VmasTask):
    """Two agents of different mass: the heavy one must save its energy."""

    green_mass: float = MISSING
    blue_mass: float = MISSING
    mass_noise: float = MISSING


@dataclass
class VelControl(VmasTask):
    """Agents hold a velocity through different controllers."""

    green_mass: float = MISSING


@dataclass
class Waterfall(VmasTask):
    """Agents slide between obstacles into place."""

    n_agents: int = count()
    joints: bool = MISSING
