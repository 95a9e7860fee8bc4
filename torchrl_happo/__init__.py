"""HAPPO and HATRPO for TorchRL: train a team of different agents, one after the other."""

from __future__ import annotations

from torchrl_happo.envs.team_reward import TeamReward
from torchrl_happo.networks.actors import joint_policy, make_actor, make_critic, memory_transforms
from torchrl_happo.objectives import HAPPOLoss, HATRPOLoss
from torchrl_happo.policy.actor_list import ActorList
from torchrl_happo.update.updater import SequentialUpdater

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
