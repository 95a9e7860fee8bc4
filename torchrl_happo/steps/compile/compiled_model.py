"""The local model of a trust-region step, and the trial of a step, as compiled functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.distributions import Distribution

from torchrl_happo.masked import masked_mean
from torchrl_happo.policy.distributions import kl_divergence
from torchrl_happo.steps.compile.code import Code
from torchrl_happo.steps.compile.cut import split
from torchrl_happo.steps.compile.flat import Layout
from torchrl_happo.steps.compile.graphs import TensorFunction, trace
from torchrl_happo.steps.step import VALID, Problem
from torchrl_happo.steps.trust_region.line_search import Evaluate
from torchrl_happo.steps.trust_region.linearize import linearizable
from torchrl_happo.steps.trust_region.natural_gradient import (
    Iteration,
    Solution,
    fisher_vector_product,
    flatten,
    gradient,
    iterate,
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
        """The parameters that are not frozen."""

    def count(self, data: TensorDictBase) -> Tensor | float:
        """The number of samples."""


class _Functions(NamedTuple):
    """What is compiled for one layout of the data.

    The first three take the networks' tensors, a vector, parameters to try, the data, and perhaps
    the rows of the Fisher matrix; two of them also take what :attr:`at_point` computed for them.

    Attributes:
        at_point (callable): surrogate, gradient, and what the other two need besides.
        product (callable): the product of the Fisher matrix and the vector.
        trial (callable): surrogate and divergence at the parameters to try.
        iteration (callable): from the tensors of a :class:`Solution`, and the product of the Fisher
            matrix and its direction, to the next one.
    """

    at_point: TensorFunction
    product: TensorFunction
    trial: TensorFunction
    iteration: TensorFunction


class CompiledModel:
    r"""What :class:`~torchrl_happo.steps.TrustRegionStep` asks of the policy, compiled.

    The graph of surrogate, gradient, :math:`F v` and the trial of parameters :math:`\theta` is
    traced once, for symbolic :math:`v` and :math:`\theta`, and cut in three. What depends on
    neither is computed once for a batch: the present policy's forward pass, and all that a
    linearisation of the network keeps. What depends on :math:`v` is computed at each iteration of
    conjugate gradient, whose own arithmetic is compiled, too, and what depends on :math:`\theta` at
    each try of the line search.

    Args:
        step (TrustRegionStep): the step.
        code (Code): what its policy and surrogate read, and the compiler.
    """

    def __init__(self, step: Compilable, code: Code) -> None:
        self.step = step
        self.code = code

    def at(
        self, theta: Tensor, data: TensorDictBase, rows: Tensor | None
    ) -> tuple[LocalModel, Evaluate, Iteration]:
        """The policy near its present parameters, the trial of others, and the way to them.

        Args:
            theta (Tensor): the trainable parameters as a vector.
            data (TensorDictBase): the batch.
            rows (Tensor, optional): rows that the Fisher matrix is averaged over. ``None``: all.

        Returns:
            the local model, a callable from a vector of parameters to the surrogate and the mean
            divergence from the present policy, and one iteration of conjugate gradient.
        """
        networks, compiler = self.code.tensors(), self.code.compiler
        layout = Layout.of(data)
        batch = layout.tensors(data)
        if rows is not None:
            batch.append(rows)
        functions = compiler.remember(
            (
                rows is None,
                self.step.settings.damping,
                self.step.settings.cg_tolerance,
                tuple(self.code.places(self.step.trained().values())),
                *self.code.key(layout),
            ),
            lambda: self._compile(layout, theta, networks, batch, has_rows=rows is not None),
        )
        at_point, product, trial = (compiler.bind(f, networks) for f in functions[:3])
        advance = compiler.bind(functions.iteration, [])
        surrogate, slope, *saved = at_point([theta, theta, *batch])

        def fisher_product(vector: Tensor) -> Tensor:
            return product([vector, theta, *batch, *saved])[0]

        def evaluate(flat: Tensor) -> tuple[Tensor, Tensor]:
            surrogate, kl = trial([theta, flat, *batch, *saved])
            return surrogate, kl

        def iteration(solution: Solution, product: Tensor, *_: float) -> Solution:
            return Solution(*advance([*solution, product]))

        counts = [self.step.count(part) for part in (data, data if rows is None else data[rows])]
        return LocalModel(surrogate, slope, fisher_product, *counts), evaluate, iteration

    def _compile(
        self,
        layout: Layout,
        theta: Tensor,
        networks: Sequence[Tensor],
        batch: Sequence[Tensor],
        *,
        has_rows: bool,
    ) -> _Functions:
        """Traces and compiles, and calls each function once, so that what fails fails here."""
        named = self.step.trained()
        trained = dict(zip(named, self.code.places(named.values()), strict=True))

        def function(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            parts, (vector, flat, *rest) = list(tensors[: len(networks)]), tensors[len(networks) :]
            rows = rest.pop() if has_rows else None
            data = layout.fill(rest)
            valid, batch_ndim = data.get(VALID, None), self._batch_ndim(data)
            leaves = {name: parts[i].detach().requires_grad_() for name, i in trained.items()}
            with torch.enable_grad(), self.code.reading(parts), linearizable():
                old = self.step.distribution(leaves, data)
                surrogate = self.step.surrogate(old, data)
                sample = old if rows is None else self.step.distribution(leaves, data[rows])
            slope = flatten(gradient([surrogate], leaves.values()))
            counted = valid if valid is None or rows is None else valid[rows]
            fisher = fisher_vector_product(sample, leaves, valid=counted, batch_ndim=batch_ndim)
            with self.code.reading(parts):
                new = self.step.distribution(unflatten(flat, leaves), data)
            kl = masked_mean(kl_divergence(old, new, batch_ndim=batch_ndim), valid)
            return surrogate, slope, fisher(vector), self.step.surrogate(new, data), kl

        tensors = [*networks, theta, theta, *batch]
        batched = [False] * (len(networks) + 2) + [True] * len(batch)
        graph = trace(function, tensors, batched)
        vector, flat = len(networks), len(networks) + 1
        parts = split(graph, arguments=[vector, flat], outputs=[2, 1, 2])
        at_point, product, trial = map(self.code.compiler.compile_graph, parts)
        functions = _Functions(at_point, product, trial, self._compile_iteration(theta))
        _, slope, *saved = functions.at_point(tensors)
        functions.product([*tensors, *saved])
        functions.trial([*tensors, *saved])
        functions.iteration([*Solution.begin(slope), torch.zeros_like(slope)])
        return functions

    def _compile_iteration(self, theta: Tensor) -> TensorFunction:
        settings = self.step.settings

        def function(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            *solution, product = tensors
            return iterate(Solution(*solution), product, settings.damping, settings.cg_tolerance)

        tensors = [*Solution.begin(theta), theta]
        return self.code.compiler(function, tensors, batched=[False] * len(tensors))

    def _batch_ndim(self, data: TensorDictBase) -> int:
        """Number of leading dimensions that count samples."""
        return len(self.step.problem.sample_shape(data))
