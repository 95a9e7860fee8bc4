"""The groups of agents that the specs of an environment describe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from tensordict import NestedKey
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase

from torchrl_happo.networks.observations import Entry, read_entry

__all__ = ["Group", "agent_specs", "read_groups", "read_state", "select_groups", "unlike_agents"]


@dataclass(frozen=True)
class Group:
    """A group of agents as the specs describe it.

    Attributes:
        prefix (tuple of str): first parts of its keys; empty at the root.
        action (NestedKey): key of its action.
        entries (tuple of Entry): what each of its agents observes.
        n_agents (int or None): size of its agent dimension, ``None`` if it has none.
    """

    prefix: tuple[str, ...]
    action: NestedKey
    entries: tuple[Entry, ...]
    n_agents: int | None

    @property
    def name(self) -> str:
        """The name by which users call it: the prefix of its keys."""
        return ".".join(self.prefix)

    @property
    def in_keys(self) -> list[NestedKey]:
        """The keys of all entries that its agents observe."""
        return [entry.key for entry in self.entries]

    @property
    def observation(self) -> NestedKey:
        """The key of its observation, which must be one vector."""
        return self._vector().key

    @property
    def n_inputs(self) -> int:
        """The size of an agent's observation, which must be one vector."""
        return self._vector().size

    def _vector(self) -> Entry:
        if len(self.entries) != 1 or not self.entries[0].is_plain:
            raise ValueError(
                f"The agents of group {self.name!r} observe {self.in_keys}, but one vector of "
                f"{torch.get_default_dtype()} is needed; choose one by observation_key, or append "
                "transforms that cast and concatenate the entries."
            )
        return self.entries[0]

    def key(self, leaf: NestedKey) -> NestedKey:
        """Return the key of one of its entries."""
        return _key((*self.prefix, *_parts(leaf)))


def read_groups(
    env: EnvBase,
    observation_key: NestedKey | list[NestedKey],
    mask_key: NestedKey | None = None,
) -> list[Group]:
    """Return the groups in the environment's own order: each action belongs to one.

    Args:
        env (EnvBase): the environment.
        observation_key (NestedKey or list of NestedKey): the observation inside each group, or
            several; a dict of entries counts as all of them.
        mask_key (NestedKey, optional): mask of actions, which is no part of a dict of
            observations. Defaults to ``None``.

    Raises:
        KeyError: if a group has no such observation.
        ValueError: if a group has several actions, or a network cannot read the observation.
    """
    groups: dict[tuple[str, ...], Group] = {}
    for action in env.full_action_spec.keys(True, True):
        prefix = action[:-1] if isinstance(action, tuple) else ()
        if prefix in groups:
            raise ValueError(
                f"The group {'.'.join(prefix)!r} has the actions {groups[prefix].action!r} and "
                f"{action!r}, but one action per agent is supported; build its actor by hand."
            )
        keys = _observation_keys(env, prefix, observation_key, mask_key)
        n_agents = _count_agents(env, prefix, keys[0])
        entries = tuple(read_entry(key, _one_agent(env, key, n_agents is not None)) for key in keys)
        groups[prefix] = Group(prefix, action, entries, n_agents)
    return list(groups.values())


def read_state(env: EnvBase, key: NestedKey) -> Entry:
    """Return the environment's global state, which has any shape.

    Raises:
        KeyError: if the environment has no such entry.
        ValueError: if a network cannot read it.
    """
    known = list(env.full_observation_spec.keys(True, True))
    if key not in known:
        raise KeyError(f"The environment has no observation {key!r}; choose among {known}.")
    return read_entry(key, _one_agent(env, key, False), is_state=True)


def _observation_keys(
    env: EnvBase,
    prefix: tuple[str, ...],
    observation_key: NestedKey | list[NestedKey],
    mask_key: NestedKey | None,
) -> list[NestedKey]:
    """Return the full keys of the entries that a group observes, in the order asked for."""
    # Among entries without a prefix there are those of all groups: only the root's own are left.
    known = [
        key
        for key in env.full_observation_spec.keys(True, True)
        if (key[: len(prefix)] == prefix if prefix else isinstance(key, str))
    ]
    found: list[NestedKey] = []
    wanted = observation_key if isinstance(observation_key, list) else [observation_key]
    for own in map(_parts, wanted):
        full = (*prefix, *own)
        inside = [key for key in map(_parts, known) if key[: len(full)] == full]
        if len(inside) > 1 or inside not in ([], [full]):
            mask = None if mask_key is None else _parts(mask_key)[-1]
            inside = [key for key in inside if key[-1] != mask]
        if not inside:
            options = [_key(_parts(key)[len(prefix) :]) for key in known]
            raise KeyError(
                f"The environment has no observation {_key(full)!r}; choose among {options} for "
                f"group {'.'.join(prefix)!r} by observation_key."
            )
        found += map(_key, inside)
    return found


def _count_agents(env: EnvBase, prefix: tuple[str, ...], key: NestedKey) -> int | None:
    """Return the size of a group's agent dimension, ``None`` if it has none."""
    batch_dims = len(env.batch_size)
    group = env.full_observation_spec[prefix] if prefix else env.full_observation_spec
    shape = group.shape[batch_dims:]
    if not shape:
        # The group's own batch size lacks it: an entry of one agent is a vector or an image.
        shape = env.full_observation_spec[key].shape[batch_dims:]
        shape = shape if len(shape) in (2, 4) else ()
    return shape[0] if shape else None


def _one_agent(env: EnvBase, key: NestedKey, has_agents: bool) -> TensorSpec:
    spec = env.full_observation_spec[key]
    return agent_specs(env, key, spec, has_agents, "observations of unlike sizes")[0]


def agent_specs(
    env: EnvBase, key: NestedKey, spec: TensorSpec, has_agents: bool, what: str
) -> list[TensorSpec]:
    """Return the spec of each agent of a group, without the batch; all of one kind and size."""
    batch_dims = len(env.batch_size)
    if -1 in spec.shape:
        raise unlike_agents(key, what)
    batched = spec.unbind(batch_dims) if has_agents else [spec]
    agents = [agent[(0,) * batch_dims] if batch_dims else agent for agent in batched]
    if len({_signature(agent) for agent in agents}) > 1:
        raise unlike_agents(key, what)
    return agents


def _signature(spec: TensorSpec) -> tuple[object, ...]:
    """Return what the specs of a group's agents must have in common: all but bounds."""
    nvec = getattr(spec, "nvec", None)
    choices = getattr(spec.space, "n", None) if nvec is None else tuple(map(int, nvec))
    return type(spec), spec.shape, choices


def unlike_agents(key: NestedKey, what: str) -> ValueError:
    """Return the error that the agents of one group differ in an entry."""
    return ValueError(
        f"The agents of one group have {what} under {key!r}, so no stack of networks serves them; "
        "build the environment with group_map=MarlGroupMapType.ONE_GROUP_PER_AGENT."
    )


def select_groups(groups: list[Group], names: Sequence[str] | None) -> list[Group]:
    """Return the groups of these names, or all of them."""
    if names is None:
        return groups
    by_name = {group.name: group for group in groups}
    for name in names:
        if name not in by_name:
            near = get_close_matches(name, by_name) or list(by_name)
            raise KeyError(f"The environment has no group {name!r}; did you mean one of {near}?")
    return [by_name[name] for name in names]


def _parts(key: NestedKey) -> tuple[str, ...]:
    return key if isinstance(key, tuple) else (key,)


def _key(parts: tuple[str, ...]) -> NestedKey:
    return parts if len(parts) > 1 else parts[0]
