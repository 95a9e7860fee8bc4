"""The local model of a trust-region step, and the trial of a step, as compiled functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import vjp

from torchrl_happo.masked import masked_mean
from torchrl_happo.policy.distributions import kl_divergence
from torchrl_happo.policy.fisher import distribution_parameters, fisher_product
from torchrl_happo.steps.compile.code import Code
from torchrl_happo.steps.compile.layout import Layout
from torchrl_happo.steps.step import VALID, Problem
from torchrl_happo.steps.trust_region.line_search import Evaluate, OneByOne
from torchrl_happo.steps.trust_region.natural_gradient import (
    Iteration,
    flatten,
    gradient,
    iterate,
    masked_samples,
    unflatten,
)
from torchrl_happo.steps.trust_region.solve import LocalModel

__all__ = ["CompiledModel"]


class Compilable(Protocol):
    """A trust-region step, as far as it is compiled."""

    distribution: Callable[[Mapping[str, Tensor], TensorDictBase], Distribution]
    surrogate: Callable[[Distribution, TensorDictBase], Tensor]
    settings: Any
    problem: Problem

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are not frozen."""

    def count(self, data: TensorDictBase) -> Tensor | float:
        """Return the number of samples."""


class CompiledModel:
    r"""The functions of a policy that a trust-region step calls, compiled.

    Three functions: surrogate and gradient; the product of the Fisher matrix and a vector, by a
    Jacobian-vector and a vector-Jacobian product; surrogate and divergence at other parameters.
    Each computes the forward pass that it needs anew. Of stacked networks, as of a block, dynamo
    cannot trace the call with other weights: their step runs as it is.

    Args:
        step (TrustRegionStep): the step.
        code (Code): the network that its policy reads, and the compiler.
    """

    def __init__(self, step: Compilable, code: Code) -> None:
        self.step = step
        self.code = code
        self._vectors: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self._ready: set[Hashable] = set()

    def at(
        self, data: TensorDictBase, rows: Tensor | None
    ) -> tuple[LocalModel, Evaluate, Iteration]:
        """Return the policy near its present parameters, the trial of others, and an iteration.

        Args:
            data (TensorDictBase): the batch.
            rows (Tensor, optional): rows that the Fisher matrix is averaged over. ``None``: all.
        """
        layout, weights = Layout.of(data), self.code.weights()
        functions = _Functions(self.step, self.code, layout)
        key = (layout, functions.trained)

        def bind(name: str, *fixed: Any) -> Callable[..., tuple[Any, ...]]:
            return self.code.bind((name, *key), lambda: getattr(functions, name), weights, *fixed)

        batch = self.code.settle(layout.tensors(data))
        part = data if rows is None else data[rows]
        chosen = batch if rows is None else self.code.settle(layout.tensors(part))
        surrogate, slope = bind("slope")(batch)
        kind = slope.shape, slope.dtype, slope.device
        # Always in the same place, for graphs.
        room = torch.empty_like(slope), torch.empty_like(slope)
        vector, theta = self._vectors.setdefault(kind, room)
        multiply, evaluate = bind("product", vector), bind("trial", theta)

        def fisher_product(direction: Tensor) -> Tensor:
            vector.copy_(direction)
            return multiply(chosen)[0]

        def trial(flat: Tensor) -> tuple[Tensor, Tensor]:
            theta.copy_(flat)
            surrogate, divergence = evaluate(batch)
            return surrogate, divergence

        if key not in self._ready:
            # What cannot be compiled fails here, and by now torch has looked for the rule of the
            # divergence, in a way that the compiler does not know.
            with torch.no_grad():
                functions.trial(weights, torch.zeros_like(slope), batch)
            fisher_product(slope)
            trial(flatten(functions.leaves(weights).values()).detach())
            self._ready.add(key)
        counts = self.step.count(data), self.step.count(part)
        return LocalModel(surrogate, slope, fisher_product, *counts), OneByOne(trial), iterate


class _Functions:
    """Functions of weights and data, for one layout of the data."""

    def __init__(self, step: Compilable, code: Code, layout: Layout) -> None:
        self.step = step
        self.layout = layout
        self.trained = tuple(step.trained())
        # The weights are in place already, or given to the policy of a stack by name.
        self.swaps = code.template is not None
        self.read = code.reading(partial(step.distribution, {}))

    def policy(self, weights: Mapping[str, Tensor], data: TensorDictBase) -> Distribution:
        """Return the policy with these weights."""
        if self.swaps:
            return self.read(weights, data)
        return self.step.distribution(weights, data)

    def leaves(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights that are not frozen."""
        return {name: weights[name] for name in self.trained}

    def slope(self, weights: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the surrogate and its gradient."""
        data, leaves = self.layout.fill(tensors), self.leaves(weights)
        with torch.enable_grad():
            surrogate = self.step.surrogate(self.policy(weights, data), data)
            slopes = gradient([surrogate], leaves.values())
        return surrogate.detach(), flatten(slopes)

    def product(
        self, weights: Mapping[str, Tensor], vector: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the product of the Fisher matrix and a vector."""
        data = self.layout.fill(tensors)
        leaves = {name: leaf.detach() for name, leaf in self.leaves(weights).items()}

        dist: Any = None  # of the pass that is differentiated: another one would be computed anew

        def outputs(own: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            nonlocal dist
            dist = self.policy({**weights, **own}, data)
            return distribution_parameters(dist)

        # Forward-mode differentiation would fix the number of items. The backward pass is linear in
        # what it is given, so that its own backward pass is the forward one.
        values, pullback, *_ = vjp(outputs, leaves)
        zeros = tuple(torch.zeros_like(value) for value in values)
        _, pushforward, *_ = vjp(lambda given: pullback(given)[0], zeros)
        (tangents,) = pushforward(unflatten(vector, leaves))
        valid = data.get(VALID, None)
        shape = self.step.problem.sample_shape(data)
        count = math.prod(shape) if valid is None else valid.sum().clamp_min(1)
        products = fisher_product(dist, tangents)
        (product,) = pullback(tuple(masked_samples(p, valid) / count for p in products))
        return (flatten(product.values()),)

    def trial(
        self, weights: Mapping[str, Tensor], theta: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return surrogate and divergence at other parameters."""
        data, moved = self.layout.fill(tensors), unflatten(theta, self.leaves(weights))
        old, new = self.policy(weights, data), self.policy({**weights, **moved}, data)
        batch_ndim = len(self.step.problem.sample_shape(data))
        divergence = kl_divergence(old, new, batch_ndim=batch_ndim)
        return self.step.surrogate(new, data), masked_mean(divergence, data.get(VALID, None))
