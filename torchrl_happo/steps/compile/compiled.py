"""The first-order step as one compiled function: loss, backward pass, clipping and optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from itertools import islice
from typing import Any, Protocol, TypeAlias

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.adam import adam

from torchrl_happo.distributed import Learners
from torchrl_happo.steps.compile.code import Code
from torchrl_happo.steps.compile.flat import Layout
from torchrl_happo.steps.compile.graphs import TensorFunction

__all__ = ["CompiledStep", "Step"]

#: From a minibatch and its weight to the loss and the norm of its gradient.
Step: TypeAlias = Callable[[TensorDictBase, Tensor | float], tuple[Tensor, Tensor]]


class Compilable(Protocol):
    """A first-order step, as far as it is compiled."""

    objective: Callable[[TensorDictBase], Tensor]
    optimizer: Optimizer
    max_grad_norm: float
    learners: Learners

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are not frozen."""

    def step(self, minibatch: TensorDictBase, weight: Tensor | float) -> tuple[Tensor, Tensor]:
        """The whole step."""

    def descend(
        self, loss: Tensor, gradients: Sequence[Tensor | None], weight: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """The second half of the step, after the backward pass."""


class CompiledStep:
    """The step of :class:`~torchrl_happo.steps.FirstOrderStep` as a compiled function.

    Loss and backward pass are compiled, and with them clipping and an Adam where the gradient is
    this process's own. Another optimiser makes its step outside.

    The function is traced at the first minibatch, and again when something has changed that is no
    argument of it: the layout of the data, a setting of a module, a hyperparameter other than the
    learning rate. A step that cannot be traced or compiled (its Python reads numbers from tensors,
    say) is left as it is, with one warning. So are the very first one, after which the optimiser
    has its state, and those on one item, for which code would have to be compiled once more.

    Args:
        eager (FirstOrderStep): the step.
        code (Code): what its objective reads, and the compiler.
    """

    def __init__(self, eager: Compilable, code: Code) -> None:
        self.eager = eager
        self.code = code
        self._rates: list[Tensor] = []
        self._trained: list[int] = []

    @property
    def _is_whole(self) -> bool:
        """Whether clipping and optimiser are compiled, too."""
        return self.eager.learners.alone and type(self.eager.optimizer) in (Adam, AdamW)

    def begin(self) -> Step:
        """The step for all minibatches of one update.

        Returns:
            callable: from a minibatch to the loss and the gradient's norm before clipping.
        """
        compiled: Step | None = None

        def step(minibatch: TensorDictBase, weight: Tensor | float) -> tuple[Tensor, Tensor]:
            nonlocal compiled
            if compiled is not None and len(minibatch) > 1:
                return compiled(minibatch, weight)
            # After the first step of a parameter the optimiser has its state.
            is_new = self._trained != [id(p) for p in self.eager.parameters()]
            self._trained = [id(p) for p in self.eager.parameters()]
            if self.code.is_given_up or len(minibatch) < 2 or is_new:
                return self.eager.step(minibatch, weight)
            try:
                candidate = self._prepare(minibatch)
                result = candidate(minibatch, weight)
            except Exception as error:
                self.code.give_up(error)
                return self.eager.step(minibatch, weight)
            compiled = candidate
            return result

        return step

    def _prepare(self, minibatch: TensorDictBase) -> Step:
        """The step for minibatches like this one, until parameters or optimiser are replaced."""
        state = [tensor for state in self._states for tensor in state.values()]
        fixed = [*self.code.tensors(), *state, *self._learning_rates()]
        layout = Layout.of(minibatch)
        compiler = self.code.compiler

        def make() -> TensorFunction:
            batch = layout.tensors(minibatch)
            return compiler(
                self._as_function(layout),
                [*fixed, *batch],
                batched=[False] * len(fixed) + [True] * len(batch),
            )

        trained = tuple(self.code.places(self.eager.parameters()))
        key = (*self.code.key(layout), self._hyperparameters(), trained)
        function = compiler.bind(compiler.remember(key, make), fixed)

        def step(minibatch: TensorDictBase, weight: Tensor | float) -> tuple[Tensor, Tensor]:
            loss, *rest = function(layout.tensors(minibatch))
            if self._is_whole:
                return loss, rest[0]
            return self.eager.descend(loss, rest, weight)

        return step

    def _learning_rates(self) -> list[Tensor]:
        """One of each group, always in the same place."""
        like = [group["params"][0] for group in self._groups]
        if [(r.device, r.dtype) for r in self._rates] != [(p.device, p.dtype) for p in like]:
            self._rates = [p.new_zeros(()) for p in like]
        for rate, group in zip(self._rates, self._groups, strict=True):
            rate.fill_(group["lr"])
        return self._rates

    @property
    def _states(self) -> list[dict[str, Tensor]]:
        """What the optimiser keeps of each parameter, if it is compiled."""
        if not self._is_whole:
            return [{} for _ in self.eager.parameters()]
        return [self.eager.optimizer.state.get(p, {}) for p in self.eager.parameters()]

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.eager.optimizer.param_groups

    def _hyperparameters(self) -> Hashable:
        """Those of the optimiser that are no arguments."""
        left_out = ("params", "lr")
        return tuple(
            (k, v) for group in self._groups for k, v in group.items() if k not in left_out
        )

    def _as_function(self, layout: Layout) -> TensorFunction:
        """The step as a function of networks, optimiser state, learning rates and data."""
        num_tensors = len(self.code.tensors())
        trained = self.code.places(self.eager.parameters())
        names = [list(state) for state in self._states]
        place = {id(p): i for i, p in enumerate(self.eager.parameters())}
        groups = [
            [place[id(p)] for p in group["params"] if id(p) in place] for group in self._groups
        ]

        def function(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            remaining = iter(tensors)
            networks = list(islice(remaining, num_tensors))
            # Not strict: of the many that remain, each takes as many as it has names.
            states = [dict(zip(own, remaining, strict=False)) for own in names]
            rates = list(islice(remaining, len(groups)))
            data = layout.fill(list(remaining))
            parameters = [networks[i] for i in trained]
            leaves = [parameter.detach().requires_grad_() for parameter in parameters]
            for i, leaf in zip(trained, leaves, strict=True):
                networks[i] = leaf
            with torch.enable_grad(), self.code.reading(networks):
                loss = self.eager.objective(data)
                gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            if not self._is_whole:
                return loss.detach(), *gradients
            norm = get_total_norm([g for g in gradients if g is not None])
            if math.isfinite(self.eager.max_grad_norm):
                scale = (self.eager.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
                gradients = tuple(None if g is None else scale * g for g in gradients)
            for group, rate, members in zip(self._groups, rates, groups, strict=True):
                moving = [i for i in members if gradients[i] is not None]
                _adam_step(
                    [parameters[i] for i in moving],
                    [gradients[i] for i in moving],
                    [states[i] for i in moving],
                    rate,
                    group,
                )
            return loss.detach(), norm

        return function


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
