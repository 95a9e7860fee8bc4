"""The private names of TorchRL, tensordict and the simulators that this library needs.

Each is wrapped by one function or constant here, with the version that it was checked against, so
that a new version is checked in one place.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn
from torch.distributions import Distribution
from torchrl.objectives.utils import _sum_td_features

__all__ = [
    "entropy_of",
    "mask_keys",
    "set_time_limit",
    "simulator",
    "single_network",
    "standardized",
    "sum_features",
    "weighted_entropy",
]

#: Sum the entries of a tensordict over their features (TorchRL 0.14.1).
sum_features = _sum_td_features


def mask_keys(loss: Any) -> tuple[NestedKey, ...]:
    """Return the keys of the validity masks that a loss reads (TorchRL 0.14.1)."""
    return tuple(loss._loss_mask_keys())


def standardized(loss: Any, advantage: Tensor, data: TensorDictBase, *, is_fresh: bool) -> Tensor:
    """Return the advantage as a PPO loss was told to normalise it (TorchRL 0.14.1)."""
    return loss._maybe_normalize_advantage(advantage, data, update_norm=is_fresh)


def entropy_of(loss: Any, dist: Distribution, shape: torch.Size) -> Tensor | TensorDictBase:
    """Return the entropy by a PPO loss, sampled where it has no closed form (TorchRL 0.14.1)."""
    return loss._get_entropy(dist, shape)


def weighted_entropy(loss: Any, entropy: Tensor | TensorDictBase) -> Tensor:
    """Return minus the entropy times the coefficients of a PPO loss (TorchRL 0.14.1)."""
    return loss._weighted_loss_entropy(entropy)


def simulator(env: Any) -> Any:
    """Return the simulator that an environment of TorchRL wraps (TorchRL 0.14.1)."""
    return env._env


def single_network(stack: nn.Module) -> nn.Module:
    """Return the network of one agent of a stack, without parameters (TorchRL 0.14.1)."""
    return stack._empty_net  # type: ignore[return-value]


def set_time_limit(env: Any, max_steps: int) -> None:
    """Set the steps after which level-based foraging ends an episode (lbforaging 2.0.0)."""
    env.unwrapped._max_episode_steps = max_steps
