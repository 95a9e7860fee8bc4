"""The first-order step as one compiled function: loss, backward pass, clipping and optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.adam import adam

from torchrl_happo.steps.compile.code import Code, Function
from torchrl_happo.steps.compile.layout import Layout
from torchrl_happo.steps.step import Problem

__all__ = ["CompiledStep", "Step"]

#: From a minibatch and its weight to the loss and the norm of its gradient.
Step: TypeAlias = Callable[[TensorDictBase, Tensor | float], tuple[Tensor, Tensor]]


class Compilable(Protocol):
    """A first-order step, as far as it is compiled."""

    objective: Callable[[TensorDictBase], Tensor]
    optimizer: Optimizer
    max_grad_norm: float
    problem: Problem

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are not frozen."""

    def step(self, minibatch: TensorDictBase, weight: Tensor | float) -> tuple[Tensor, Tensor]:
        """Take the whole step."""

    def descend(
        self, loss: Tensor, gradients: Sequence[Tensor | None], weight: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Take the second half of the step, after the backward pass."""


class CompiledStep:
    """The step of :class:`~torchrl_happo.steps.FirstOrderStep` as a compiled function.

    Loss and backward pass are compiled, and with them clipping and an Adam or AdamW where the
    gradient is this process's own. Another optimiser makes its step outside.

    The function is compiled at the second minibatch, and again when something has changed that is
    no argument of it: the layout of the data, a setting of a module, a hyperparameter other than
    the learning rate. A step that cannot be compiled (its Python reads numbers from tensors, say)
    is left as it is, with one warning. So are the very first one, after which the optimiser has its
    state, and steps on one item, for which code would have to be compiled once more.

    Args:
        eager (FirstOrderStep): the step.
        code (Code): the network that its objective reads, and the compiler.
    """

    def __init__(self, eager: Compilable, code: Code) -> None:
        self.eager = eager
        self.code = code
        self._rates: list[Tensor] = []
        self._trained: list[int] = []

    def begin(self) -> Step:
        """Return the step for all minibatches of one update."""
        compiled: Step | None = None
        eager = self.eager

        def step(minibatch: TensorDictBase, weight: Tensor | float) -> tuple[Tensor, Tensor]:
            nonlocal compiled
            # After its first step the optimiser has its state, also of a parameter that is new.
            trained = [id(p) for p in eager.parameters()]
            is_new, self._trained = self._trained != trained, trained
            is_new = is_new or (self._is_whole and not eager.optimizer.state)
            if self.code.is_given_up or len(minibatch) < 2 or is_new:
                return eager.step(minibatch, weight)
            try:
                compiled = compiled or self._prepare(minibatch)
                return compiled(minibatch, weight)
            except Exception as error:
                self.code.give_up(error)
                return eager.step(minibatch, weight)

        return step

    @property
    def _is_whole(self) -> bool:
        """Whether clipping and optimiser are compiled as well."""
        kind = type(self.eager.optimizer)
        return self.eager.problem.learners.alone and kind in (Adam, AdamW)

    def _prepare(self, minibatch: TensorDictBase) -> Step:
        """Return the step for minibatches like this one, until parameters are replaced."""
        eager, layout = self.eager, Layout.of(minibatch)
        groups = eager.optimizer.param_groups
        is_whole = self._is_whole
        trained = {n: p for n, p in eager.problem.named_parameters() if p.requires_grad}
        names = {id(p): name for name, p in trained.items()}
        # Of each group: its hyperparameters and the names of its parameters.
        settings = [
            (
                tuple((k, v) for k, v in group.items() if k not in ("params", "lr")),
                tuple(names[id(p)] for p in group["params"] if id(p) in names),
            )
            for group in groups
        ]
        state = eager.optimizer.state if is_whole else {}
        moments = {name: dict(state.get(p, {})) for name, p in trained.items()}
        key = ("step", layout, tuple(trained), tuple(settings), eager.max_grad_norm, is_whole)
        run = self.code.bind(
            key,
            lambda: self._function(layout, list(trained), settings, is_whole),
            self.code.weights(),
            moments,
            self._learning_rates(),
        )

        def step(minibatch: TensorDictBase, weight: Tensor | float) -> tuple[Tensor, Tensor]:
            loss, *rest = run(layout.tensors(minibatch))
            return (loss, rest[0]) if is_whole else eager.descend(loss, rest, weight)

        return step

    def _learning_rates(self) -> list[Tensor]:
        """Return one of each group, always in the same place."""
        groups = self.eager.optimizer.param_groups
        like = [group["params"][0] for group in groups]
        if [(r.device, r.dtype) for r in self._rates] != [(p.device, p.dtype) for p in like]:
            self._rates = [p.new_zeros(()) for p in like]
        for rate, group in zip(self._rates, groups, strict=True):
            rate.fill_(group["lr"])
        return self._rates

    def _function(
        self, layout: Layout, trained: list[str], settings: list[Any], is_whole: bool
    ) -> Function:
        """Return the step as a function of weights, moments, learning rates and data."""
        objective = self.code.reading(self.eager.objective)
        max_norm = self.eager.max_grad_norm

        def step(
            weights: Mapping[str, Tensor],
            moments: Mapping[str, dict[str, Tensor]],
            rates: Sequence[Tensor],
            tensors: Sequence[Tensor],
        ) -> tuple[Tensor, ...]:
            leaves = [weights[name] for name in trained]
            with torch.enable_grad():
                loss = objective(weights, layout.fill(tensors))
                gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            if not is_whole:
                return loss.detach(), *gradients
            present = {
                name: gradient
                for name, gradient in zip(trained, gradients, strict=True)
                if gradient is not None
            }
            norm = get_total_norm(list(present.values()))
            scale = 1.0 if math.isinf(max_norm) else (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for (hyperparameters, members), rate in zip(settings, rates, strict=True):
                moving = [name for name in members if name in present]
                _adam_step(
                    [weights[name].detach() for name in moving],
                    [scale * present[name] for name in moving],
                    [moments[name] for name in moving],
                    rate,
                    dict(hyperparameters),
                )
            return loss.detach(), norm

        return step


def _adam_step(
    parameters: list[Tensor],
    gradients: list[Tensor],
    states: list[dict[str, Tensor]],
    rate: Tensor,
    group: dict[str, Any],
) -> None:
    """Torch's Adam in elementary operations, which the compiler joins."""
    # As in the fused kernel: 1 - 0.999 has few digits in single precision.
    steps = [state["step"].double() for state in states]
    adam(
        parameters,
        gradients,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [state["max_exp_avg_sq"] for state in states if group["amsgrad"]],
        steps,
        foreach=False,
        fused=False,
        differentiable=True,  # reads no number back from the steps taken
        decoupled_weight_decay=group.get("decoupled_weight_decay", False),
        amsgrad=group["amsgrad"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=rate,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
    for state, step in zip(states, steps, strict=True):
        state["step"].copy_(step)
