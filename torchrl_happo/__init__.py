"""HAPPO and HATRPO for TorchRL: train a team of different agents, one after the other."""

from __future__ import annotations

from torchrl_happo.actor_list import ActorList
from torchrl_happo.envs.transforms import TeamReward
from torchrl_happo.networks import joint_policy, make_actor, make_critic, memory_transforms
from torchrl_happo.objectives import HAPPOLoss, HATRPOLoss
from torchrl_happo.updater import SequentialUpdater

__all__ = [
    "ActorList",
    "HAPPOLoss",
    "HATRPOLoss",
    "SequentialUpdater",
    "TeamReward",
    "joint_policy",
    "make_actor",
    "make_critic",
    "memory_transforms",
]

__version__ = "0.1.0"
