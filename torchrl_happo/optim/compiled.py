"""The first-order step as one compiled function: loss, backward pass, clipping and optimiser."""

from __future__ import annotations

import logging
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

from torchrl_happo.learners import Learners
from torchrl_happo.optim.flat import (
    data_keys,
    data_layout,
    data_of,
    network_tensors,
    network_with,
    settings,
)
from torchrl_happo.optim.graphs import GraphCompiler, TensorFunction
from torchrl_happo.validation.arguments import first_line

__all__ = ["CompiledStep", "Step"]

logger = logging.getLogger(__name__)

#: From a minibatch and its weight to the loss and the norm of its gradient.
Step: TypeAlias = Callable[[TensorDictBase, Tensor | float], tuple[Tensor, Tensor]]


class Compilable(Protocol):
    """A first-order step, as far as it is compiled."""

    objective: Callable[[TensorDictBase], Tensor]
    parameters: list[nn.Parameter]
    optimizer: Optimizer
    max_grad_norm: float
    learners: Learners

    def step(self, minibatch: TensorDictBase, weight: Tensor | float) -> tuple[Tensor, Tensor]:
        """The whole step."""

    def descend(
        self, loss: Tensor, gradients: Sequence[Tensor | None], weight: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """The second half of the step, after the backward pass."""


class CompiledStep:
    """The step of :class:`~torchrl_happo.optim.FirstOrderStep` as a compiled function.

    Loss and backward pass are compiled, and with them clipping and an Adam where the gradient is
    this process's own. Another optimiser makes its step outside.

    The function is traced at the first minibatch, and again when something has changed that is no
    argument of it: the layout of the data, a setting of a module, a hyperparameter other than the
    learning rate. A step that cannot be traced or compiled (its Python reads numbers from tensors,
    say) is left as it is, with one warning. So are the very first one, after which the optimiser
    has its state, and those on one item, for which code would have to be compiled once more.

    Args:
        eager (FirstOrderStep): the step.

    Keyword Args:
        networks (sequence of nn.Module): the modules whose parameters and buffers the objective
            reads.
        owner (nn.Module, optional): a module whose own settings and buffers it reads as well.
        compiler (GraphCompiler): shared by the agents of a team.
        template (nn.Module, optional): stands for the code of the objective: steps with the same
            template are the same but for their tensors. Defaults to ``None``: no other is.
    """

    def __init__(
        self,
        eager: Compilable,
        *,
        networks: Sequence[nn.Module],
        owner: nn.Module | None,
        compiler: GraphCompiler,
        template: nn.Module | None = None,
    ) -> None:
        self.eager = eager
        self.networks = nn.ModuleList(networks)
        self.owner = owner
        self.compiler = compiler
        self.template = self.networks if template is None else template
        self._gave_up = False
        self._rates: list[Tensor] = []

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
            if self._gave_up or len(minibatch) < 2 or not self.eager.optimizer.state:
                return self.eager.step(minibatch, weight)
            try:
                candidate = self._prepare(minibatch)
                result = candidate(minibatch, weight)
            except Exception as error:
                self._gave_up = True
                logger.warning(
                    "A step is not compiled, and slower than it could be: %s", first_line(error)
                )
                return self.eager.step(minibatch, weight)
            compiled = candidate
            return result

        return step

    def _prepare(self, minibatch: TensorDictBase) -> Step:
        """The step for minibatches like this one, until parameters or optimiser are replaced."""
        networks = network_tensors(self.networks)
        state = [tensor for state in self._states for tensor in state.values()]
        rates = self._learning_rates()
        fixed = [tensor.detach() for tensor in (*networks, *state, *rates)]
        keys = data_keys(minibatch)

        def make() -> TensorFunction:
            batch = [minibatch.get(key) for key in keys]
            return self.compiler(
                self._as_function(minibatch),
                [*fixed, *batch],
                batched=[False] * len(fixed) + [True] * len(batch),
            )

        key = (self.template, data_layout(minibatch), self._settings())
        function = self.compiler.remember(key, make)
        function = self.compiler.bind(function, fixed)

        def step(minibatch: TensorDictBase, weight: Tensor | float) -> tuple[Tensor, Tensor]:
            loss, *rest = function(list(map(minibatch.get, keys)))
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
            return [{} for _ in self.eager.parameters]
        return [self.eager.optimizer.state.get(p, {}) for p in self.eager.parameters]

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.eager.optimizer.param_groups

    def _settings(self) -> Hashable:
        """Whatever is no argument of the compiled function, and may yet change."""
        modules = list(self.networks.modules())
        hyperparameters = [
            (name, value)
            for group in self._groups
            for name, value in group.items()
            if name not in ("params", "lr")
        ]
        if self.owner is None:
            return settings(modules), tuple(hyperparameters)
        # A buffer is read where it is; one that was replaced is another.
        buffers = tuple(id(buffer) for _, buffer in self.owner.named_buffers(recurse=False))
        return settings([*modules, self.owner]), tuple(hyperparameters), buffers

    def _as_function(self, like: TensorDictBase) -> TensorFunction:
        """The step as a function of networks, optimiser state, learning rates and data."""
        position = {id(t): i for i, t in enumerate(network_tensors(self.networks))}
        trained = [position[id(p)] for p in self.eager.parameters]
        names = [list(state) for state in self._states]
        place = {id(p): i for i, p in enumerate(self.eager.parameters)}
        groups = [[place[id(p)] for p in group["params"]] for group in self._groups]

        def function(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            remaining = iter(tensors)
            networks = list(islice(remaining, len(position)))
            # Not strict: of the many that remain, each takes as many as it has names.
            states = [dict(zip(own, remaining, strict=False)) for own in names]
            rates = list(islice(remaining, len(groups)))
            data = data_of(list(remaining), like)
            parameters = [networks[i] for i in trained]
            leaves = [parameter.detach().requires_grad_() for parameter in parameters]
            for i, leaf in zip(trained, leaves, strict=True):
                networks[i] = leaf
            with torch.enable_grad(), network_with(self.networks, networks):
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
