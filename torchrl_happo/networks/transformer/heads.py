"""The distribution of a whole team's actions, the last part of its policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from tensordict import NestedKey
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    TensorDictModule,
    composite_lp_aggregate,
)
from torch import Tensor
from torch.distributions import Distribution

from torchrl_happo.networks.heads import PolicyHead
from torchrl_happo.networks.transformer.parts import TeamPart
from torchrl_happo.policy.side_by_side import SideBySide

__all__ = ["distribution_of", "team_head"]


def distribution_of(
    head: PolicyHead, parameters: Sequence[Tensor], mask: Tensor | None, member: int | None = None
) -> Distribution:
    """Return the distribution of a group's actions, or of those of one of its agents.

    Args:
        head (PolicyHead): of the group.
        parameters (sequence of Tensor): the tensors of ``head.keys``.
        mask (Tensor, optional): of the actions that are available.
        member (int, optional): which agent of the group. Defaults to ``None``: all of them.
    """
    one = head.of_agent(member) if member is not None and head.group.n_agents is not None else head
    device = parameters[0].device
    arguments: dict[str, Any] = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in one.arguments.items()
    }
    if mask is not None:
        arguments["mask"] = mask
    names = [key if isinstance(key, str) else str(key[-1]) for key in head.keys]
    arguments.update(zip(names, parameters, strict=True))
    return head.distribution(**arguments)


class TeamDistribution:
    """Builds the distribution of several groups' actions from the parameters of all.

    Args:
        team (sequence of TeamPart): the groups.
    """

    def __init__(self, team: Sequence[TeamPart]) -> None:
        self.heads = [part.head for part in team]

    @property
    def entries(self) -> dict[str, NestedKey]:
        """The keys of all parameters and masks, by the names of the arguments of a call."""
        named: dict[str, NestedKey] = {}
        for index, head in enumerate(self.heads):
            named.update({f"parameter_{index}_{i}": key for i, key in enumerate(head.keys)})
            if head.mask is not None:
                named[f"mask_{index}"] = head.mask
        return named

    def __call__(self, **values: Tensor) -> SideBySide:
        """Return the distribution; arguments are named as in :attr:`entries`."""
        parts: dict[NestedKey, Distribution] = {}
        for index, head in enumerate(self.heads):
            own = [values[f"parameter_{index}_{i}"] for i in range(len(head.keys))]
            parts[head.group.action] = distribution_of(head, own, values.get(f"mask_{index}"))
        first = values["parameter_0_0"].ndim - (1 if self.heads[0].group.n_agents is None else 2)
        return SideBySide(parts, first)


def team_head(
    network: TensorDictModule, team: Sequence[TeamPart], device: torch.device | str | None
) -> ProbabilisticTensorDictModule:
    """Return the distribution of the actions of all groups, as the last module of an actor.

    Args:
        network (TensorDictModule): writes the parameters of all groups' distributions.
        team (sequence of TeamPart): the groups.
        device (torch.device or str, optional): device of the bounds.
    """
    if len(team) == 1:
        return cast(Any, team[0].head.actor(network, device))[-1]
    build = TeamDistribution(team)
    aggregates = composite_lp_aggregate(nowarn=True)
    name: dict[str, Any] = {"log_prob_keys": ["action_log_prob"]}
    return ProbabilisticTensorDictModule(
        in_keys=build.entries,
        out_keys=[part.head.group.action for part in team],
        distribution_class=cast(Any, build),
        return_log_prob=True,
        **({"log_prob_key": "action_log_prob"} if aggregates else name),
    )
