"""Arguments of the builders of networks and of small environments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase, mappings
from torch import Tensor, nn
from torchrl.envs import EnvBase

from torchrl_happo.arguments import check_counts, check_numbers, check_positive, kind_of

__all__ = [
    "check_builder",
    "check_groups",
    "check_payoff",
    "check_policies",
    "check_scale_mapping",
    "check_std",
]


def check_builder(
    env: Any, *, num_cells: Any, activation_class: Any, output_gain: Any, observation_key: Any
) -> None:
    """Refuses what no network can be built from.

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
    if not isinstance(observation_key, str):
        raise TypeError(
            f"observation_key must be the name of an entry of a group, got {observation_key!r}."
        )


def check_scale_mapping(name: Any) -> None:
    """Refuses a mapping to positive numbers that tensordict does not know."""
    try:
        mappings(name)
    except (NotImplementedError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"scale_mapping must be the name of one of tensordict.nn.mappings, such as 'exp', "
            f"'softplus' or 'biased_softplus_1.0', got {name!r}."
        ) from error


def check_std(max_std: Any, scale_mapping: str, state_dependent_std: bool) -> None:
    """Refuses a bound of the standard deviation that goes unused, or is passed at the start."""
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
    """Refuses a choice of groups that is no sequence of different names; ``None`` is all."""
    if groups is None:
        return
    if isinstance(groups, str) or not isinstance(groups, Sequence):
        raise TypeError(f"groups must be a sequence of names, such as ['agents'], got {groups!r}.")
    if not groups or len(set(groups)) < len(groups):
        raise ValueError(
            f"groups must name at least one group, and each of them once, got {list(groups)}."
        )


def check_policies(actors: Any) -> None:
    """Refuses what is to act in an environment and cannot."""
    for name, actor in actors.items():
        if not isinstance(actor, TensorDictModuleBase):
            where = "" if name is None else f" for group {name!r}"
            raise TypeError(
                f"joint_policy got {kind_of(actor)}{where}; pass what make_actor returns."
            )


def check_critic(critic: Any) -> None:
    """Refuses what is to be asked for values and cannot."""
    if not isinstance(critic, TensorDictModuleBase):
        raise TypeError(
            f"joint_policy got {kind_of(critic)} as the critic; pass what make_critic returns."
        )


def check_payoff(payoff: Any) -> None:
    """Refuses payoffs that are no finite tensor with one dimension per agent, all of one size."""
    if not isinstance(payoff, Tensor):
        raise TypeError(
            f"The payoff must be a tensor with one dimension per agent, got {kind_of(payoff)}."
        )
    if payoff.ndim < 1 or len(set(payoff.shape)) != 1 or payoff.numel() == 0:
        raise ValueError(
            f"The payoff has shape {list(payoff.shape)}; it needs one dimension per agent, all "
            "of the same size, the number of actions."
        )
    if not bool(torch.isfinite(payoff).all()):
        raise ValueError("The payoff holds NaN or infinite numbers; all payoffs must be finite.")
