"""The base of losses that move all agents of a team at once, as one unit with one optimiser."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torch.distributions import Distribution

from torchrl_happo.objectives.base import Actors
from torchrl_happo.objectives.happo import HAPPOLoss
from torchrl_happo.policy.actor_list import ActorList
from torchrl_happo.policy.distributions import entropy
from torchrl_happo.policy.side_by_side import SideBySide
from torchrl_happo.team.split import split_units
from torchrl_happo.versions import ValueNorm

__all__ = ["BlockLoss"]


class BlockLoss(HAPPOLoss):
    """A clipped PPO loss of agents that move together.

    Args:
        actor_network (ProbabilisticTensorDictSequential or mapping of str to it): the joint actor
            of the only group.
        critic_network (TensorDictModule): as for :class:`HAPPOLoss`.

    Keyword Args:
        **kwargs: as for :class:`HAPPOLoss`, without ``blocks``.

    Raises:
        TypeError: if ``blocks`` is passed.
        ValueError: if there are several actors, or an ActorList.
    """

    def __init__(
        self,
        actor_network: Actors,
        critic_network: TensorDictModule | None = None,
        **kwargs: Any,
    ) -> None:
        name = type(self).__name__
        if "blocks" in kwargs:
            raise TypeError(f"{name} moves all agents at once: blocks would not act; leave it out.")
        if isinstance(actor_network, Mapping) and len(actor_network) > 1:
            raise ValueError(
                f"{name} moves the agents of one group at once, each in view of the others, but "
                f"there are the groups {list(actor_network)}; put all agents into one group, or "
                "take HAPPOLoss."
            )
        parts = actor_network.values() if isinstance(actor_network, Mapping) else [actor_network]
        if any(isinstance(part, ActorList) for part in parts):
            raise ValueError(
                f"{name} moves the agents of a group at once, but an ActorList has an actor for "
                "each; give the group one ProbabilisticActor, or take HAPPOLoss."
            )
        super().__init__(actor_network, critic_network, **kwargs)

    def _init_team(
        self, actors: Actors, blocks: Collection[str], value_norm: ValueNorm | None, popart: bool
    ) -> None:
        """Take the whole group as one unit."""
        named = actors if isinstance(actors, Mapping) else [split_units(actors)[0].group_name]
        super()._init_team(actors, list(named), value_norm, popart)

    def _agent_entropy(self, dist: Distribution, batch_size: torch.Size) -> Tensor | TensorDictBase:
        """Return the entropy of each agent; that of several groups side by side is exact."""
        if isinstance(dist, SideBySide):
            return entropy(dist).unsqueeze(-1)
        return super()._agent_entropy(dist, batch_size)
