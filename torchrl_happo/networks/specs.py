"""What the specs of an environment say about its agents: groups, sizes and actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

import torch
from tensordict import NestedKey
from torch import Tensor
from torch.distributions import Categorical, Distribution
from torchrl.data import Categorical as CategoricalSpec
from torchrl.data import OneHot, TensorSpec, Unbounded
from torchrl.envs import EnvBase
from torchrl.modules import (
    IndependentNormal,
    MaskedCategorical,
    MaskedOneHotCategorical,
    OneHotCategorical,
    TanhNormal,
)

__all__ = [
    "ActionHead",
    "Group",
    "observation_shape",
    "read_action_head",
    "read_groups",
    "select_groups",
]

# By kind of spec, and by whether there is a mask of available actions.
_DISCRETE: dict[tuple[type[TensorSpec], bool], type[Distribution]] = {
    (CategoricalSpec, False): Categorical,
    (CategoricalSpec, True): MaskedCategorical,
    (OneHot, False): OneHotCategorical,
    (OneHot, True): MaskedOneHotCategorical,
}


@dataclass(frozen=True)
class Group:
    """A group of agents as the specs describe it.

    Attributes:
        prefix (tuple of str): what its keys begin with; empty at the root.
        action (NestedKey): key of its action.
        observation (NestedKey): key of its observation.
        n_agents (int or None): size of its agent dimension, ``None`` if it has none.
        n_inputs (int): size of an agent's observation.
    """

    prefix: tuple[str, ...]
    action: NestedKey
    observation: NestedKey
    n_agents: int | None
    n_inputs: int

    @property
    def name(self) -> str:
        """What users call it: the prefix of its keys."""
        return ".".join(self.prefix)

    def key(self, leaf: str) -> NestedKey:
        """The key of one of its entries."""
        return (*self.prefix, leaf) if self.prefix else leaf


def read_groups(env: EnvBase, observation_key: str) -> list[Group]:
    """The groups in the environment's own order: wherever there is an action, there is a group."""
    groups: dict[tuple[str, ...], Group] = {}
    for action in env.full_action_spec.keys(True, True):
        prefix = action[:-1] if isinstance(action, tuple) else ()
        if prefix in groups:
            raise ValueError(
                f"The group {'.'.join(prefix)!r} has the actions {groups[prefix].action!r} and "
                f"{action!r}, but one action per agent is supported; build its actor by hand."
            )
        observation = (*prefix, observation_key) if prefix else observation_key
        shape = observation_shape(env, observation)
        if len(shape) not in (1, 2):
            raise ValueError(
                f"The observation {observation!r} has shape {tuple(shape)} without the batch, but "
                "an MLP takes a vector per agent ([d], or [n, d] for a group of n agents); flatten "
                "it by a transform, or build the network by hand."
            )
        n_agents = shape[0] if len(shape) == 2 else None
        groups[prefix] = Group(prefix, action, observation, n_agents, shape[-1])
    return list(groups.values())


def observation_shape(env: EnvBase, key: NestedKey) -> torch.Size:
    """Shape of an observation without the batch, once it is known that a network can take it."""
    known = list(env.full_observation_spec.keys(True, True))
    if key not in known:
        raise KeyError(f"The environment has no observation {key!r}; choose among {known}.")
    spec = env.full_observation_spec[key]
    shape = spec.shape[len(env.batch_size) :]
    if -1 in shape:
        raise ValueError(_unlike(key, "observations of unlike sizes"))
    if spec.dtype != torch.get_default_dtype():
        raise ValueError(
            f"The observation {key!r} is of {spec.dtype}, but the networks are of "
            f"{torch.get_default_dtype()}; append a transform that casts it, such as DoubleToFloat."
        )
    return shape


def select_groups(groups: list[Group], names: Sequence[str] | None) -> list[Group]:
    """The groups of these names, or all of them."""
    if names is None:
        return groups
    by_name = {group.name: group for group in groups}
    for name in names:
        if name not in by_name:
            near = get_close_matches(name, by_name) or list(by_name)
            raise KeyError(f"The environment has no group {name!r}; did you mean one of {near}?")
    return [by_name[name] for name in names]


@dataclass(frozen=True)
class ActionHead:
    """What a network has to say about an agent's action, and the distribution it parametrises.

    Attributes:
        distribution (type of Distribution): the distribution of the action.
        size (int): number of an agent's actions, or of its dimensions if it is continuous.
        continuous (bool): whether the network outputs ``loc`` and ``scale``, or ``logits``.
        bounds (dict): ``low`` and ``high`` of a bounded action, each ``[n_agents, size]``, or
            ``[size]`` for a group without an agent dimension.
        mask (NestedKey or None): key of the mask of available actions.
    """

    distribution: type[Distribution]
    size: int
    continuous: bool
    bounds: dict[str, Tensor] = field(default_factory=dict)
    mask: NestedKey | None = None


def read_action_head(env: EnvBase, group: Group, mask_key: str | None) -> ActionHead:
    """Chooses the distribution that fits the action spec of a group."""
    agents = _action_specs(env, group)
    spec = agents[0]
    discrete = (type(spec), spec.ndim) in ((CategoricalSpec, 0), (OneHot, 1))
    if discrete:
        known = env.full_observation_spec.keys(True, True)
        mask = group.key(mask_key) if mask_key is not None else None
        if mask is not None and mask not in known:
            mask = None
        distribution = _DISCRETE[type(spec), mask is not None]
        return ActionHead(distribution, spec.space.n, False, mask=mask)
    if spec.domain == "continuous" and spec.ndim == 1:
        if isinstance(spec, Unbounded):
            return ActionHead(IndependentNormal, spec.shape[-1], True)
        low = torch.stack([agent.space.low for agent in agents])
        high = torch.stack([agent.space.high for agent in agents])
        if bool((low.isfinite() & high.isfinite()).all()):
            bounds = {"low": low, "high": high}
            if group.n_agents is None:
                bounds = {"low": low[0], "high": high[0]}
            return ActionHead(TanhNormal, spec.shape[-1], True, bounds)
    raise ValueError(
        f"The action {group.action!r} has the spec {type(spec).__name__} of shape "
        f"{tuple(spec.shape)} per agent, but a vector without bounds or between finite ones, a "
        "categorical or a one-hot action is supported; transform it, or build the actor by hand."
    )


def _action_specs(env: EnvBase, group: Group) -> list[TensorSpec]:
    """The action spec of each agent of a group, without the batch; all of one kind and size."""
    spec, batch_dims = env.full_action_spec[group.action], len(env.batch_size)
    batched = [spec] if group.n_agents is None else spec.unbind(batch_dims)
    agents = [agent[(0,) * batch_dims] if batch_dims else agent for agent in batched]
    kinds = {(type(agent), agent.shape, getattr(agent.space, "n", None)) for agent in agents}
    if len(kinds) > 1:
        raise ValueError(_unlike(group.action, "unlike action spaces"))
    return agents


def _unlike(key: NestedKey, what: str) -> str:
    return (
        f"The agents of one group have {what} under {key!r}, so no stack of networks serves them; "
        "build the environment with group_map=MarlGroupMapType.ONE_GROUP_PER_AGENT."
    )
