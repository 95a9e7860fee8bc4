"""The clipping range of ratios: of a whole team, or of each agent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_happo.arguments import check_clip_epsilon
from torchrl_happo.team.agent import Agent

__all__ = [
    "bounds_of_unit",
    "check_clipping",
    "check_names",
    "set_bounds",
    "spread_bounds",
    "value_of",
]

_BOUNDS = ("clip_epsilon_low", "clip_epsilon_high")


def check_names(setting: str, values: Mapping[str, Any], agents: Sequence[Agent]) -> None:
    """Refuse a mapping that does not name each agent, or its group, or names somebody else.

    Args:
        setting (str): name of the setting.
        values (mapping): by the names of agents or of groups.
        agents (sequence of Agent): the agents of the team.

    Raises:
        ValueError: naming both.
    """
    known = {agent.name: agent.group_name for agent in agents}
    missing = [name for name, group in known.items() if not {name, group} & values.keys()]
    unknown = values.keys() - known.keys() - set(known.values())
    if missing or unknown:
        raise ValueError(
            f"{setting} has values for {list(values)}, but the agents are {list(known)}; name "
            "each agent, or its group, once."
        )


def value_of(values: Mapping[str, Any], agent: Agent) -> Any:
    """Return an agent's own value, or that of its group."""
    return values[agent.name] if agent.name in values else values[agent.group_name]


def _bounds_of_agents(values: Any, agents: Sequence[Agent]) -> list[tuple[float, float]]:
    """Return the clipping thresholds (low, high) of each agent.

    Args:
        values (float, pair of float, or mapping): the threshold of all, or of each agent or group.
        agents (sequence of Agent): the agents of the team.

    Raises:
        TypeError: if a threshold is no number and no pair.
        ValueError: if a threshold leaves no range, or the names do not fit.
    """
    if isinstance(values, Mapping):
        check_names("clip_epsilon", values, agents)
        each = [value_of(values, agent) for agent in agents]
    else:
        each = [values] * len(agents)
    for value in each:
        check_clip_epsilon(value)
    return [tuple(v) if isinstance(v, (tuple, list)) else (v, v) for v in each]


def bounds_of_unit(bound: Tensor, unit: Agent | None, agents: Sequence[Agent]) -> Tensor:
    """Return the bounds of the members of a unit, for its ratios ``[*B]`` or ``[*B, n_members]``.

    Args:
        bound (Tensor): of the whole team, a scalar, or of each agent, ``[n]``.
        unit (Agent, optional): an agent, or a whole group. ``None``: the team.
        agents (sequence of Agent): the agents of the team.

    Returns:
        a scalar, or one bound for each member.
    """
    if bound.ndim == 0:
        return bound
    inside = [
        (agent, own)
        for agent, own in zip(agents, bound, strict=True)
        if unit is None or unit.position.start <= agent.position.start < unit.position.stop
    ]
    if len(inside) == 1:
        return inside[0][1]
    return torch.cat([own.expand(agent.num_members) for agent, own in inside])


def check_clipping(clip_epsilon: Any, clip_value: Any) -> None:
    """Raise if no loss can be built with a clipping threshold."""
    is_mapping = isinstance(clip_epsilon, Mapping)
    if not is_mapping:
        check_clip_epsilon(clip_epsilon)
    if clip_value is True and (is_mapping or isinstance(clip_epsilon, (tuple, list))):
        raise ValueError(
            "clip_value=True takes the threshold of clip_epsilon, which is a "
            f"{'mapping' if is_mapping else 'pair'}; give the critic a number, such as "
            "clip_value=0.2."
        )


def spread_bounds(loss: Any, clip_epsilon: Any, agents: Sequence[Agent]) -> None:
    """Put a pair of thresholds, or one for each agent, in place of the one of TorchRL's loss.

    They lie in two buffers, which TorchRL 0.14 has for a pair.
    """
    by_agent = isinstance(clip_epsilon, Mapping)
    pairs = _bounds_of_agents(clip_epsilon, agents if by_agent else agents[:1])
    for name, values in zip(_BOUNDS, zip(*pairs, strict=True), strict=True):
        bounds = loss.clip_epsilon.new_tensor(values)
        loss.register_buffer(name, bounds if by_agent else bounds[0])
    del loss.clip_epsilon


def set_bounds(loss: nn.Module, value: Any, agents: Sequence[Agent]) -> bool:
    """Set the clipping threshold anew, in the form that the loss was built with.

    Args:
        loss (nn.Module): the loss.
        value (float, Tensor, pair of float, or mapping): the new threshold.
        agents (sequence of Agent): the agents of the team.

    Returns:
        whether the bounds lie in two buffers, and were set. Otherwise the threshold lies in one.
    """
    has_pair = _BOUNDS[0] in loss._buffers
    by_agent = has_pair and getattr(loss, _BOUNDS[0]).ndim > 0
    is_pair = isinstance(value, (tuple, list))
    if (isinstance(value, Mapping) and not by_agent) or (is_pair and not has_pair):
        raise ValueError(
            f"The loss was not built for clip_epsilon={value!r}; build it with a pair, or with a "
            "mapping that names each agent, to set another one later."
        )
    if not has_pair:
        if not isinstance(value, Tensor):
            check_clip_epsilon(value)
        return False
    value = float(value) if isinstance(value, Tensor) else value
    pairs = _bounds_of_agents(value, agents if by_agent else agents[:1])
    for name, bounds in zip(_BOUNDS, zip(*pairs, strict=True), strict=True):
        buffer = getattr(loss, name)
        buffer.copy_(buffer.new_tensor(bounds).reshape(buffer.shape))
    return True
