"""HAPPO and HATRPO for TorchRL: train a team of different agents, one after the other."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrl_happo.envs.team_reward import TeamReward
    from torchrl_happo.networks.actors import (
        joint_policy,
        make_actor,
        make_critic,
        memory_transforms,
    )
    from torchrl_happo.objectives import (
        A2POLoss,
        CoPPOLoss,
        HAA2CLoss,
        HAPPOLagrangianLoss,
        HAPPOLoss,
        HATRPOLoss,
        MACPOLoss,
    )
    from torchrl_happo.policy.actor_list import ActorList
    from torchrl_happo.update.updater import SequentialUpdater

__all__ = [
    "A2POLoss",
    "ActorList",
    "CoPPOLoss",
    "HAA2CLoss",
    "HAPPOLagrangianLoss",
    "HAPPOLoss",
    "HATRPOLoss",
    "MACPOLoss",
    "SequentialUpdater",
    "TeamReward",
    "joint_policy",
    "make_actor",
    "make_critic",
    "memory_transforms",
]

__version__ = "0.1.0"

#: Where each name is at home. A name is imported when it is asked for: the command line can answer
#: ``--help`` and refuse a mistake without waiting for torch.
_HOMES = {
    "ActorList": "policy.actor_list",
    **dict.fromkeys(
        (
            *("A2POLoss", "CoPPOLoss", "HAA2CLoss"),
            *("HAPPOLagrangianLoss", "HAPPOLoss", "HATRPOLoss", "MACPOLoss"),
        ),
        "objectives",
    ),
    "SequentialUpdater": "update.updater",
    "TeamReward": "envs.team_reward",
    **dict.fromkeys(
        ("joint_policy", "make_actor", "make_critic", "memory_transforms"), "networks.actors"
    ),
}


def __getattr__(name: str) -> Any:
    """Import a public name."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
