"""The private names of TorchRL, tensordict and the simulators that this library needs.

Each is wrapped by one function or constant here, with the version that it was checked against, so
that a new version is checked in one place.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn
from torch.distributions import Distribution
from torchrl.modules import TanhNormal
from torchrl.objectives.utils import _sum_td_features

__all__ = [
    "SquashedNormals",
    "entropy_of",
    "filling_in_place",
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


@contextmanager
def filling_in_place(estimator: Any) -> Iterator[None]:
    """Let an estimator fill in missing next observations without looking whether any is missing.

    TorchRL puts the observation of a step in the place of a next one that is NaN, as a collector
    with ``compact_obs=True`` leaves it at the end of a trajectory. It reads back from the device
    whether there is one, and then works on a copy, in which its values get lost (TorchRL 0.14.1).
    """
    estimator._sanitize_next_obs_nan = _fill_next
    try:
        yield
    finally:
        del estimator._sanitize_next_obs_nan


def _fill_next(data: TensorDictBase, keys: Sequence[NestedKey]) -> TensorDictBase:
    for key in keys:
        next_key = ("next", *key) if isinstance(key, tuple) else ("next", key)
        now, after = data.get(key, None), data.get(next_key, None)
        if now is None or after is None or now.shape != after.shape:
            continue
        if now.is_floating_point():
            data.set(next_key, torch.where(after.isnan(), now, after))
    return data


def simulator(env: Any) -> Any:
    """Return the simulator that an environment of TorchRL wraps (TorchRL 0.14.1)."""
    return env._env


def single_network(stack: nn.Module) -> nn.Module:
    """Return the network of one agent of a stack, without parameters (TorchRL 0.14.1)."""
    return stack._empty_net  # type: ignore[return-value]


def set_time_limit(env: Any, max_steps: int) -> None:
    """Set the steps after which level-based foraging ends an episode (lbforaging 2.0.0)."""
    env.unwrapped._max_episode_steps = max_steps


class SquashedNormals:
    """Builds the squashed normals of one policy, with the arguments of their class.

    :class:`~torchrl.modules.TanhNormal` copies its bounds to the device and reads back whether they
    are the trivial ones, each time that it is built. Here it is built once for each device, and
    then given other parameters (TorchRL 0.14.1).

    Example:
        >>> build = SquashedNormals()
        >>> dist = build(loc=torch.zeros(2), scale=torch.ones(2), high=2.0)
        >>> dist.high, build(loc=torch.ones(2), scale=dist.scale, high=2.0).loc
        (tensor(2.), tensor([1., 1.]))
    """

    def __init__(self) -> None:
        self._built: dict[torch.device, tuple[dict[str, Any], TanhNormal]] = {}

    def __reduce__(self) -> tuple[type[SquashedNormals], tuple[()]]:
        return SquashedNormals, ()  # transforms cannot be copied

    def __call__(self, *, loc: Tensor, scale: Tensor, **settings: Any) -> TanhNormal:
        """Return the distribution with these parameters and settings."""
        if loc.ndim == 0 or torch.compiler.is_compiling():
            return TanhNormal(loc=loc, scale=scale, **settings)
        before, built = self._built.get(loc.device, ({}, None))
        same = before.keys() == settings.keys() and all(before[n] is settings[n] for n in before)
        if built is None or not same:
            built = TanhNormal(loc=loc.detach()[:0], scale=scale.detach()[:0], **settings)
            self._built[loc.device] = settings, built
        dist = copy.copy(built)
        del dist.base_dist  # a normal that the copies would share
        dist.update(loc, scale)
        return dist
