"""Checks of the arguments of the builders of networks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase, mappings
from torch import nn
from torchrl.envs import EnvBase

from torchrl_happo.arguments import check_counts, check_numbers, check_positive, kind_of

__all__ = [
    "check_builder",
    "check_groups",
    "check_policies",
    "check_recurrent",
    "check_scale_mapping",
    "check_std",
]


def check_builder(
    env: Any, *, num_cells: Any, activation_class: Any, output_gain: Any, observation_key: Any
) -> None:
    """Refuse arguments that no network can be built from.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if it is out of range.
    """
    if not isinstance(env, EnvBase):
        raise TypeError(
            f"Networks are built from the specs of an environment, got {kind_of(env)}; pass an "
            "EnvBase, transforms included."
        )
    if isinstance(num_cells, str) or not isinstance(num_cells, Sequence):
        raise TypeError(
            f"num_cells must be a sequence of widths, such as (128, 128), got {num_cells!r}."
        )
    check_counts(**{f"num_cells[{layer}]": width for layer, width in enumerate(num_cells)})
    if not (isinstance(activation_class, type) and issubclass(activation_class, nn.Module)):
        raise TypeError(
            "activation_class must be a class of modules, such as torch.nn.Tanh, got "
            f"{activation_class!r}."
        )
    check_numbers(output_gain=output_gain)
    keys = observation_key if isinstance(observation_key, list) else [observation_key]
    if not keys or not all(map(_is_key, keys)):
        raise TypeError(
            "observation_key must be the name of an entry of a group, a tuple for a nested one, or "
            f"a list of several, got {observation_key!r}."
        )


def _is_key(key: Any) -> bool:
    parts = key if isinstance(key, tuple) else (key,)
    return bool(parts) and all(isinstance(part, str) for part in parts)


def check_recurrent(
    builder: str, recurrent: str | None, kinds: Collection[str], share_params: bool
) -> None:
    """Refuse a kind of memory that does not exist, and agents with memory that share a network.

    Args:
        builder (str): the function that builds the networks.
        recurrent (str, optional): the kind of memory.
        kinds (collection of str): the kinds that there are.
        share_params (bool): whether agents are to share parameters.

    Raises:
        ValueError: if they do not fit.
    """
    if recurrent is None:
        return
    if recurrent not in kinds:
        raise ValueError(f"recurrent must be one of {', '.join(kinds)} or None, got {recurrent!r}.")
    if share_params:
        raise ValueError(
            f"{builder} got recurrent={recurrent!r} and share_params=True, but agents with memory "
            "have a network each; leave share_params out."
        )


def check_scale_mapping(name: Any) -> None:
    """Refuse a mapping to positive numbers that tensordict does not know."""
    try:
        mappings(name)
    except (NotImplementedError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"scale_mapping must be the name of one of tensordict.nn.mappings, such as 'exp', "
            f"'softplus' or 'biased_softplus_1.0', got {name!r}."
        ) from error


def check_std(max_std: Any, scale_mapping: str, state_dependent_std: bool) -> None:
    """Refuse a bound of the standard deviation that has no effect, or is below the first value."""
    check_positive(max_std=max_std)
    if max_std is None:
        return
    if state_dependent_std:
        raise ValueError(
            f"max_std={max_std} bounds a standard deviation that is a parameter; pass "
            "state_dependent_std=False, or leave max_std out."
        )
    start = mappings(scale_mapping)(torch.zeros(())).item()
    if not 0 < start < max_std:
        raise ValueError(
            f"scale_mapping={scale_mapping!r} starts at the standard deviation {start:.4g}, which "
            f"is not below max_std={max_std}; raise max_std, or start lower."
        )


def check_groups(groups: Any) -> None:
    """Refuse a choice of groups that is no sequence of different names; ``None`` is all."""
    if groups is None:
        return
    if isinstance(groups, str) or not isinstance(groups, Sequence):
        raise TypeError(f"groups must be a sequence of names, such as ['agents'], got {groups!r}.")
    if not groups or len(set(groups)) < len(groups):
        raise ValueError(
            f"groups must name at least one group, and each of them once, got {list(groups)}."
        )


def check_policies(actors: Any) -> None:
    """Refuse actors that are no tensordict modules."""
    for name, actor in actors.items():
        if not isinstance(actor, TensorDictModuleBase):
            where = "" if name is None else f" for group {name!r}"
            raise TypeError(
                f"joint_policy got {kind_of(actor)}{where}; pass what make_actor returns."
            )


def check_critic(critic: Any) -> None:
    """Refuse a critic that is no tensordict module."""
    if not isinstance(critic, TensorDictModuleBase):
        raise TypeError(
            f"joint_policy got {kind_of(critic)} as the critic; pass what make_critic returns."
        )
