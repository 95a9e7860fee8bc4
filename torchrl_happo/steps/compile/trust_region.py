"""The local model of a trust-region step, and the trial of a step, as compiled functions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.distributions import Distribution

from torchrl_happo.steps.compile.code import Code
from torchrl_happo.steps.compile.layout import Layout
from torchrl_happo.steps.step import Problem
from torchrl_happo.steps.trust_region.line_search import Evaluate, OneByOne
from torchrl_happo.steps.trust_region.local_model import LocalModel, local_models, trial
from torchrl_happo.steps.trust_region.natural_gradient import flatten, unflatten
from torchrl_happo.steps.trust_region.solve import Direction

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

    def direction(self, model: LocalModel) -> Direction:
        """Return the natural gradient."""


class CompiledModel:
    r"""The functions of a policy that a trust-region step calls, compiled.

    One function computes surrogate, gradient and natural gradient, all products with the Fisher
    matrix included; another one surrogate and divergence at other parameters. Several processes
    average each product, which is then a function of its own.

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
    ) -> tuple[LocalModel, Direction, Evaluate]:
        """Return the policy near its present parameters, the direction, and the trial of a step.

        Args:
            data (TensorDictBase): the batch.
            rows (Tensor, optional): rows that the Fisher matrix is averaged over. ``None``: all.

        Raises:
            NotImplementedError: if the policy is a stack of networks.
        """
        if self.code.is_stacked and self.code.compiler.options is not None:
            raise NotImplementedError(
                "torch.compile cannot call a stack of networks with other weights, as the trust "
                "region of a block does; only the passes before and after it are compiled."
            )
        layout, weights = Layout.of(data), self.code.weights()
        functions = _Functions(self.step, self.code, layout)
        settings = self.step.settings
        solver = settings.damping, settings.cg_iterations, settings.cg_tolerance
        key = (layout, functions.trained, solver)

        def bind(name: str, *fixed: Any) -> Callable[..., tuple[Any, ...]]:
            return self.code.bind((name, *key), lambda: getattr(functions, name), weights, *fixed)

        part = data if rows is None else data[rows]
        batch = self.code.settle(layout.tensors(data))
        both = batch if rows is None else self.code.settle([*batch, *layout.tensors(part)])
        counts = self.step.count(data), self.step.count(part)
        learners = self.step.problem.learners
        if learners.alone:
            surrogate, slope, *found = bind("solve")(both)
            direction = Direction._make([*found, settings.damping])
        else:
            surrogate, slope = bind("slope")(batch)
        kind = slope.shape, slope.dtype, slope.device
        # Always in the same place, for graphs.
        room = torch.empty_like(slope), torch.empty_like(slope)
        vector, theta = self._vectors.setdefault(kind, room)
        evaluate, multiply = bind("trial", theta), bind("product", vector)

        def fisher_product(direction: Tensor) -> Tensor:
            vector.copy_(direction)
            return multiply(both)[0]

        def at(flat: Tensor) -> tuple[Tensor, Tensor]:
            theta.copy_(flat)
            surrogate, divergence = evaluate(batch)
            return surrogate, divergence

        if key not in self._ready:
            # What cannot be compiled fails here, and by now torch has looked for the rule of the
            # divergence, in a way that the compiler does not know.
            with torch.no_grad():
                functions.trial(weights, torch.zeros_like(slope), batch)
            at(flatten(functions.leaves(weights).values()).detach())
            if not learners.alone:
                fisher_product(slope)
            self._ready.add(key)
        model = LocalModel(surrogate, slope, fisher_product, *counts)
        if not learners.alone:
            model = model.common(learners.mean)
            direction = self.step.direction(model)
        return model, direction, OneByOne(at)


class _Functions:
    """Functions of weights and data, for one layout of the data."""

    def __init__(self, step: Compilable, code: Code, layout: Layout) -> None:
        self.step = step
        self.layout = layout
        self.trained = tuple(step.trained())
        # The weights are in place already, or given to the policy of a stack by name.
        self.swaps = code.template is not None
        self.read = code.reading(partial(step.distribution, {}))

    def policy(
        self, weights: Mapping[str, Tensor], own: Mapping[str, Tensor], data: TensorDictBase
    ) -> Distribution:
        """Return the policy with these weights, some of them replaced."""
        if self.swaps:
            return self.read({**weights, **own}, data)
        return self.step.distribution({**weights, **own}, data)

    def leaves(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights that are not frozen."""
        return {name: weights[name] for name in self.trained}

    def model(self, weights: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> LocalModel:
        """Return the local model of the surrogate."""
        size, objectives = len(self.layout.leaves), [self.step.surrogate]
        data = part = self.layout.fill(tensors[:size])
        if len(tensors) > size:
            part = self.layout.fill(tensors[size:])
        policy, leaves = partial(self.policy, weights), self.leaves(weights)
        batch_ndim = len(self.step.problem.sample_shape(data))
        return local_models(policy, leaves, data, part, objectives, batch_ndim)[1][0]

    def solve(self, weights: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the surrogate, its gradient and the natural gradient."""
        model = self.model(weights, tensors)
        direction = self.step.direction(model)
        return model.surrogate, model.gradient, *direction[:-1]

    def slope(self, weights: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the surrogate and its gradient."""
        model = self.model(weights, tensors)
        return model.surrogate, model.gradient

    def product(
        self, weights: Mapping[str, Tensor], vector: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the product of the Fisher matrix and a vector."""
        return (self.model(weights, tensors).fisher_product(vector),)

    def trial(
        self, weights: Mapping[str, Tensor], theta: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return surrogate and divergence at other parameters."""
        data, policy = self.layout.fill(tensors), partial(self.policy, weights)
        old, moved = policy({}, data), unflatten(theta, self.leaves(weights))
        batch_ndim = len(self.step.problem.sample_shape(data))
        return trial(policy, old, moved, data, [self.step.surrogate], batch_ndim)
