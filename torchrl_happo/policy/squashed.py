"""Squashed normals whose bounds are checked, and brought to the device, once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torchrl.modules import TanhNormal

__all__ = ["Distributions"]


class Distributions:
    """Builds the distributions of one policy.

    :class:`~torchrl.modules.TanhNormal` copies its bounds to the device and reads back whether they
    are the trivial ones, each time that it is built. Here it is built once for each device, and
    then given other parameters.

    Example:
        >>> build = Distributions()
        >>> dist = build(TanhNormal, {"loc": torch.zeros(2), "scale": torch.ones(2)}, {"high": 2.0})
        >>> dist.high, build(TanhNormal, {"loc": torch.ones(2), "scale": dist.scale}, {}).loc
        (tensor(2.), tensor([1., 1.]))
    """

    def __init__(self) -> None:
        self._built: dict[torch.device, tuple[dict[str, Any], TanhNormal]] = {}

    def __reduce__(self) -> tuple[type[Distributions], tuple[()]]:
        return Distributions, ()  # transforms cannot be copied

    def __call__(
        self, kind: Any, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> Distribution:
        """Return the distribution of a kind with these parameters and settings."""
        plain = kind is not TanhNormal or parameters.keys() != {"loc", "scale"}
        if plain or parameters["loc"].ndim == 0 or torch.compiler.is_compiling():
            return kind(**parameters, **settings)
        device = parameters["loc"].device
        before, built = self._built.get(device, ({}, None))
        if built is None or not _same(before, settings):
            empty = {name: value.detach()[:0] for name, value in parameters.items()}
            built = kind(**empty, **settings)
            self._built[device] = dict(settings), built
        dist = copy.copy(built)
        del dist.base_dist  # a normal that the copies would share
        dist.update(**parameters)
        return dist


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(one[name] is other[name] for name in one)
