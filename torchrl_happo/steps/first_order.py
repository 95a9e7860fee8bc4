"""The first-order inner step of one agent (or of the critic): epochs over minibatches."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.optim import Optimizer

from torchrl_happo.arguments import check_counts, check_positive
from torchrl_happo.distributed import Learners
from torchrl_happo.steps.compile.code import Code
from torchrl_happo.steps.compile.compiled import CompiledStep
from torchrl_happo.steps.minibatches import MinibatchSampler
from torchrl_happo.steps.optimizers import (
    OptimizerFactory,
    SchedulerFactory,
    build_optimizer,
    build_scheduler,
)
from torchrl_happo.transaction import Undo
from torchrl_happo.update.state import check_optimizer_state

__all__ = ["FirstOrderStep", "InnerStep", "OptimizerFactory", "SchedulerFactory"]


class InnerStep(Protocol):
    """What the updater asks of the step of one agent, whatever its algorithm."""

    def __call__(self, data: TensorDictBase) -> TensorDict:
        """Moves the agent's parameters; returns scalars to report."""

    def rebind(self) -> None:
        """Follows parameters whose objects were replaced."""

    def end_batch(self) -> Undo:
        """Goes on in a schedule, whether or not there was a step; returns how to take it back."""

    def snapshot(self) -> dict[str, Any]:
        """A copy of everything the step may change."""

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Goes back to a snapshot, bit for bit."""

    def state_dict(self) -> dict[str, Any]:
        """State beyond the network's parameters."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned."""


class FirstOrderStep:
    """Some epochs of gradient descent on one objective and the parameters it owns.

    Args:
        objective (callable): from a minibatch to a scalar loss.
        parameters (callable): returns the parameters this step may move, and no others.

    Keyword Args:
        optimizer (callable): from the parameters to their optimiser, e.g.
            ``partial(torch.optim.Adam, lr=3e-4)``.
        minibatches (callable): from the data to the minibatches of one epoch.
        num_epochs (int): passes over the data.
        max_grad_norm (float, optional): the gradient is scaled down to this Euclidean norm.
            Defaults to ``None``: no clipping.
        scheduler (callable, optional): from the optimiser to its learning-rate scheduler, which
            steps at :meth:`end_batch`. Defaults to ``None``.
        stop (callable, optional): asked after each epoch whether to stop early.
            Defaults to ``None``.
        learners (Learners, optional): whose gradients are averaged. Defaults to ``None``: alone.
        weight (callable): from a minibatch to the number of entries that the objective is a mean
            over, by which a learner's gradient counts. Defaults to ``len``.
        code (Code, optional): what the objective reads besides the data, to compile the step:
            loss, backward pass, clipping and, if it is an Adam, the optimiser. Defaults to
            ``None``: nothing is compiled.

    Raises:
        ValueError: if the optimiser holds other parameters than the ones it was given, or an
            argument is out of range.

    Example:
        >>> from functools import partial
        >>> from torchrl_happo.steps.minibatches import ShuffledMinibatches
        >>> weight = nn.Parameter(torch.zeros(()))
        >>> step = FirstOrderStep(
        ...     lambda data: (data["x"] - weight).square().mean(),
        ...     lambda: [weight],
        ...     optimizer=partial(torch.optim.SGD, lr=0.5),
        ...     minibatches=ShuffledMinibatches(None, torch.Generator()),
        ...     num_epochs=1,
        ... )
        >>> metrics = step(TensorDict({"x": torch.full((4,), 3.0)}, batch_size=[4]))
        >>> weight.item(), metrics["grad_norm"].item()
        (3.0, 6.0)
    """

    def __init__(
        self,
        objective: Callable[[TensorDictBase], Tensor],
        parameters: Callable[[], Iterable[nn.Parameter]],
        *,
        optimizer: OptimizerFactory,
        minibatches: MinibatchSampler,
        num_epochs: int,
        max_grad_norm: float | None = None,
        scheduler: SchedulerFactory | None = None,
        stop: Callable[[TensorDictBase], bool] | None = None,
        learners: Learners | None = None,
        weight: Callable[[TensorDictBase], Tensor | float] = len,
        code: Code | None = None,
    ) -> None:
        check_counts(num_epochs=num_epochs)
        check_positive(max_grad_norm=max_grad_norm)
        self.objective = objective
        self._source = parameters
        self.parameters = self._trainable()
        self.optimizer = _fuse(build_optimizer(optimizer, self.parameters))
        self.scheduler = build_scheduler(scheduler, self.optimizer)
        self.minibatches = minibatches
        self.num_epochs = num_epochs
        self.max_grad_norm = float("inf") if max_grad_norm is None else max_grad_norm
        self.stop = stop
        self.learners = Learners() if learners is None else learners
        self.weight = weight
        self._compiled = None if code is None else CompiledStep(self, code)

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self._source() if p.requires_grad]

    def rebind(self) -> None:
        """Lets the optimiser follow parameters that were replaced or moved.

        ``copy.deepcopy`` and ``load_state_dict(assign=True)`` put new objects into a network, and
        ``.to(...)`` changes their device or type. The optimiser's state goes with them.
        """
        current = self._trainable()
        if len(current) != len(self.parameters):
            raise ValueError(
                f"The optimizer holds {len(self.parameters)} parameters, but {len(current)} of the "
                "network require a gradient now; freeze parameters before the optimizer is built."
            )
        if any(old is not new for old, new in zip(self.parameters, current, strict=True)):
            self._replace(current)
        for group in self.optimizer.param_groups:
            # Otherwise torch counts the steps on the CPU.
            counts_there = group.get("fused") or group.get("capturable")
            for p in group["params"]:
                for name, value in self.optimizer.state.get(p, {}).items():
                    if name == "step":
                        moved = value.to(p.device) if counts_there else value
                    else:
                        moved = value.to(p) if _is_like(value, p) else value
                    self.optimizer.state[p][name] = moved

    def _replace(self, current: list[nn.Parameter]) -> None:
        successor = dict(zip(map(id, self.parameters), current, strict=True))
        for group in self.optimizer.param_groups:
            group["params"] = [successor[id(p)] for p in group["params"]]
        for old, new in zip(self.parameters, current, strict=True):
            if old in self.optimizer.state:
                self.optimizer.state[new] = self.optimizer.state.pop(old)
        self.parameters = current

    def __call__(self, data: TensorDictBase) -> TensorDict:
        """Runs the epochs.

        Args:
            data (TensorDictBase): everything the objective reads, items along the first dimension.

        Returns:
            scalars: mean ``loss`` and ``grad_norm`` (before clipping) over the steps, and the
            number of ``epochs``.
        """
        step = self.step if self._compiled is None else self._compiled.begin()
        losses, norms = [], []
        num_epochs = 0
        alone = self.learners.alone
        num_rounds = 0 if alone else self.learners.most(self.minibatches.count(data))
        while num_epochs < self.num_epochs:
            for minibatch, weight in self._rounds(data, num_rounds):
                loss, norm = step(minibatch, weight)
                losses.append(loss)
                norms.append(norm)
            num_epochs += 1
            if self.stop is not None and self.stop(data):
                break
        return TensorDict(
            {
                "loss": torch.stack(losses).mean(),
                "grad_norm": torch.stack(norms).mean(),
                "epochs": torch.tensor(float(num_epochs)),
            }
        )

    def _rounds(
        self, data: TensorDictBase, num_rounds: int
    ) -> Iterator[tuple[TensorDictBase, Tensor | float]]:
        """The minibatches of an epoch with their weights, as many on each learner.

        A learner that has run out of them computes its last one again, with weight 0: it would
        have to wait for the others anyway.
        """
        for minibatch in self.minibatches(data):
            num_rounds -= 1
            yield minibatch, 1.0 if self.learners.alone else self.weight(minibatch)
        for _ in range(num_rounds):
            yield minibatch, 0.0

    def step(
        self, minibatch: TensorDictBase, weight: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """One optimiser step; returns the loss and the gradient's norm before clipping."""
        loss = self.objective(minibatch)
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return self.descend(loss, gradients, weight)

    def descend(
        self, loss: Tensor, gradients: Sequence[Tensor | None], weight: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Makes the optimiser's step along the gradient of all learners (see :meth:`step`)."""
        loss, gradients = self._shared(loss, gradients, weight)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else _laid_out_as(parameter, gradient)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    def _shared(
        self, loss: Tensor, gradients: Sequence[Tensor | None], weight: Tensor | float
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Loss and gradient of all learners' minibatches together."""
        if self.learners.alone:
            return loss, gradients
        present = [gradient for gradient in gradients if gradient is not None]
        loss, *averaged = self.learners.mean([loss, *present], weight)
        rest = iter(averaged)
        return loss, [None if gradient is None else next(rest) for gradient in gradients]

    def end_batch(self) -> Undo:
        """Lets the scheduler make its step, whether or not the optimiser has made one."""
        if self.scheduler is None:
            return lambda: None
        undo = partial(self._restore_schedule, self._schedule())
        with warnings.catch_warnings():
            # An agent that has not acted yet follows its schedule all the same.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()
        return undo

    def snapshot(self) -> dict[str, Any]:
        """A copy of parameters and optimiser, from which :meth:`restore` goes back."""
        return {
            "parameters": [_copy(p) for p in self.parameters],
            "state": [
                {name: _copy(value) for name, value in self.optimizer.state[p].items()}
                if p in self.optimizer.state
                else None
                for p in self.parameters
            ],
            "schedule": self._schedule(),
        }

    def _schedule(self) -> dict[str, Any]:
        """A copy of what the scheduler has come to, and the settings of the optimiser."""
        return {
            "groups": [
                {name: _copy(value) for name, value in group.items() if name != "params"}
                for group in self.optimizer.param_groups
            ],
            "scheduler": self.scheduler and copy.deepcopy(self.scheduler.state_dict()),
        }

    def _restore_schedule(self, schedule: dict[str, Any]) -> None:
        for group, values in zip(self.optimizer.param_groups, schedule["groups"], strict=True):
            group.update({name: _copy(value) for name, value in values.items()})
        if self.scheduler is not None:
            self.scheduler.load_state_dict(schedule["scheduler"])

    @torch.no_grad()
    def restore(self, snapshot: dict[str, Any]) -> None:
        """Puts parameters and optimiser back to a :meth:`snapshot`, bit for bit."""
        for p, value, state in zip(
            self.parameters, snapshot["parameters"], snapshot["state"], strict=True
        ):
            p.copy_(value)
            p.grad = None
            if state is None:
                self.optimizer.state.pop(p, None)
            else:
                self.optimizer.state[p] = {name: _copy(v) for name, v in state.items()}
        self._restore_schedule(snapshot["schedule"])

    def state_dict(self) -> dict[str, Any]:
        """State of the optimiser and of the scheduler."""
        state = {"optimizer": self.optimizer.state_dict()}
        if self.scheduler is not None:
            state["scheduler"] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned."""
        check_optimizer_state(self.optimizer, state["optimizer"])
        # A copy: torch would share tensors with whoever's state it is.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])


def _fuse(optimizer: Optimizer) -> Optimizer:
    """Switches to torch's fused kernel where there is one and the user chose none.

    An agent's network is small, and a step of Adam then costs more in its many little kernels
    than in arithmetic: fused it takes a third of the time.
    """
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        for group in optimizer.param_groups:
            chosen = group.get("fused") is not None or group.get("foreach") is not None
            special = group.get("differentiable", False) or isinstance(group["lr"], Tensor)
            if not chosen and not special:
                group["fused"] = True
    return optimizer


def _is_like(value: Any, parameter: Tensor) -> bool:
    """Whether a part of an optimiser's state has a number for each of a parameter."""
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the memory layout of its parameter, as ``backward()`` would leave it.

    Torch's fused kernels go through both side by side, whatever their strides; the gradient of a
    stack of networks comes out transposed.
    """
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _copy(value: Any) -> Any:
    """A tensor's own copy; other things are not changed in place and need none."""
    return value.detach().clone() if isinstance(value, Tensor) else value
