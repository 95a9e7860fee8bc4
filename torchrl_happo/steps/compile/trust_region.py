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
from torchrl_happo.steps.trust_region.local_model import (
    LocalModel,
    Objective,
    local_models,
    trial,
)
from torchrl_happo.steps.trust_region.natural_gradient import flatten, unflatten
from torchrl_happo.steps.trust_region.solve import Direction

__all__ = ["CompiledModel"]


class Compilable(Protocol):
    """A trust-region step, as far as it is compiled."""

    distribution: Callable[[Mapping[str, Tensor], TensorDictBase], Distribution]
    settings: Any
    problem: Problem

    @property
    def objectives(self) -> list[Objective]:
        """The functions of policy and data that the step knows near the parameters."""

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are not frozen."""

    def count(self, data: TensorDictBase) -> Tensor | float:
        """Return the number of samples."""

    def direction(self, model: LocalModel) -> Direction:
        """Return the natural gradient."""


class CompiledModel:
    r"""The functions of a policy that a trust-region step calls, compiled.

    One function computes each objective, its gradient and its natural gradient, all products with
    the Fisher matrix included; another one objectives and divergence at other parameters. Several
    processes average each product, which is then a function of its own.

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
    ) -> tuple[list[LocalModel], list[Direction], Evaluate]:
        """Return each objective near the parameters, its direction, and the trial of a step.

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
            flat = bind("solve")(both)
            size = len(flat) // len(self.step.objectives)
            solved = [flat[start : start + size] for start in range(0, len(flat), size)]
        else:
            flat = bind("slope")(batch)
            solved = list(zip(flat[::2], flat[1::2], strict=True))
        slope = solved[0][1]
        kind = slope.shape, slope.dtype, slope.device
        # Always in the same place, for graphs.
        room = torch.empty_like(slope), torch.empty_like(slope)
        vector, theta = self._vectors.setdefault(kind, room)
        evaluate, multiply = bind("trial", theta), bind("product", vector)

        def fisher_product(direction: Tensor) -> Tensor:
            vector.copy_(direction)
            return multiply(both)[0]

        def at(flat: Tensor) -> tuple[Tensor, ...]:
            theta.copy_(flat)
            return evaluate(batch)

        if key not in self._ready:
            # What cannot be compiled fails here, and by now torch has looked for the rule of the
            # divergence, in a way that the compiler does not know.
            with torch.no_grad():
                functions.trial(weights, torch.zeros_like(slope), batch)
            at(flatten(functions.leaves(weights).values()).detach())
            if not learners.alone:
                fisher_product(slope)
            self._ready.add(key)
        models = [LocalModel(value, own, fisher_product, *counts) for value, own, *_ in solved]
        if learners.alone:
            found = [Direction._make([*own, settings.damping]) for _, _, *own in solved]
        else:
            models = [model.common(learners.mean) for model in models]
            found = [self.step.direction(model) for model in models]
        return models, found, OneByOne(at)


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

    def models(self, weights: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> list[LocalModel]:
        """Return the local model of each objective."""
        size = len(self.layout.leaves)
        data = part = self.layout.fill(tensors[:size])
        if len(tensors) > size:
            part = self.layout.fill(tensors[size:])
        policy, leaves = partial(self.policy, weights), self.leaves(weights)
        batch_ndim = len(self.step.problem.sample_shape(data))
        return local_models(policy, leaves, data, part, self.step.objectives, batch_ndim)[1]

    def solve(self, weights: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return each objective, its gradient and its natural gradient, one after the other."""
        solved: list[Tensor] = []
        for model in self.models(weights, tensors):
            *direction, _damping = self.step.direction(model)
            solved += [model.surrogate, model.gradient, *direction]
        return tuple(solved)

    def slope(self, weights: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return each objective and its gradient, one after the other."""
        models = self.models(weights, tensors)
        return tuple(number for model in models for number in (model.surrogate, model.gradient))

    def product(
        self, weights: Mapping[str, Tensor], vector: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the product of the Fisher matrix and a vector."""
        return (self.models(weights, tensors)[0].fisher_product(vector),)

    def trial(
        self, weights: Mapping[str, Tensor], theta: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the objectives and the divergence at other parameters."""
        data, policy = self.layout.fill(tensors), partial(self.policy, weights)
        old, moved = policy({}, data), unflatten(theta, self.leaves(weights))
        batch_ndim = len(self.step.problem.sample_shape(data))
        return trial(policy, old, moved, data, self.step.objectives, batch_ndim)
