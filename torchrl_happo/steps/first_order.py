"""The first-order step: some epochs of gradient descent over minibatches.

:class:`FirstOrder` holds the settings and builds one :class:`FirstOrderStep` for each agent, and
for each critic. Their optimisers have nothing in common: after one agent's step, the parameters and
the optimiser state of every other agent are bit-identical.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.data import ReplayBuffer

from torchrl_happo.arguments import check_callables, check_counts, check_positive
from torchrl_happo.steps.compile.first_order import CompiledStep
from torchrl_happo.steps.minibatches import (
    MinibatchSampler,
    ReplayBufferMinibatches,
    ShuffledMinibatches,
)
from torchrl_happo.steps.optimizers import (
    OptimizerFactory,
    SchedulerFactory,
    build_optimizer,
    build_scheduler,
    check_optimizer_state,
    laid_out_as,
)
from torchrl_happo.steps.step import ByName, Problem, setting_of
from torchrl_happo.transaction import uncached_autocast

__all__ = ["FirstOrder", "FirstOrderStep", "OptimizerFactory", "SchedulerFactory"]

_ADAM: OptimizerFactory = partial(torch.optim.Adam, lr=3e-4)


@dataclass(frozen=True)
class FirstOrder:
    """Settings of a first-order step; called with a problem, they build its step.

    Each setting but ``replay_buffer`` may be a mapping from names of agents, or of groups, to
    values; an agent's own name goes before its group's. Every agent must find a value. A critic
    that a mapping does not name (``"critic"``) has the default.

    Args:
        optimizer (callable): from parameters to their optimiser, any of :mod:`torch.optim` but
            LBFGS. Called once for each agent; a learning rate that is a tensor is copied.
            Defaults to ``partial(torch.optim.Adam, lr=3e-4)``.
        num_epochs (int): passes over the batch. Defaults to ``10``.
        minibatch_size (int, optional): environment steps in a minibatch (on accelerators, of an
            agent that dies, also the steps without it). Defaults to ``None``: the whole batch.
        max_grad_norm (float, optional): the gradient is scaled down to this Euclidean norm.
            Defaults to ``None``: no clipping.
        scheduler (callable, optional): from the optimiser to its learning-rate scheduler, which
            makes a step for each batch. Defaults to ``None``.
        target_kl (float, optional): an agent stops after the epoch in which its mean divergence
            from the policy that acted passes this. Reads a number back after each epoch. A critic
            has no divergence and does not stop. Defaults to ``None``: no early stopping.
        replay_buffer (ReplayBuffer, optional): draws the minibatches with its own sampler, in
            place of ``minibatch_size``. Defaults to ``None``.

    Raises:
        TypeError: if a setting is of the wrong type.
        ValueError: if a setting is out of range.

    Example:
        >>> weight = nn.Parameter(torch.zeros(()))
        >>> problem = Problem(
        ...     "agent",
        ...     loss=lambda data: (data["x"] - weight).square().mean(),
        ...     named_parameters=lambda: [("weight", weight)],
        ... )
        >>> step = FirstOrder(partial(torch.optim.SGD, lr=0.5), num_epochs=1)(problem)
        >>> data = TensorDict({"x": torch.full((4,), 3.0)}, batch_size=[4])
        >>> metrics = step.propose(data).apply()
        >>> weight.item(), metrics["grad_norm"].item()
        (3.0, 6.0)
    """

    optimizer: ByName[OptimizerFactory] = _ADAM
    num_epochs: ByName[int] = 10
    minibatch_size: ByName[int | None] = None
    max_grad_norm: ByName[float | None] = None
    scheduler: ByName[SchedulerFactory | None] = None
    target_kl: ByName[float | None] = None
    replay_buffer: ReplayBuffer | None = None

    def __post_init__(self) -> None:
        checks: dict[str, Callable[..., None]] = {
            "optimizer": check_callables,
            "num_epochs": check_counts,
            "minibatch_size": partial(check_counts, optional=True),
            "max_grad_norm": check_positive,
            "scheduler": partial(check_callables, optional=True),
            "target_kl": check_positive,
        }
        for name, check in checks.items():
            given = getattr(self, name)
            for value in given.values() if isinstance(given, Mapping) else [given]:
                check(**{name: value})
        if self.replay_buffer is not None:
            ReplayBufferMinibatches(self.replay_buffer)

    def __call__(self, problem: Problem) -> FirstOrderStep:
        """Build the step of one agent, or of a critic.

        Raises:
            ValueError: if a mapping has no value for the agent, or one for a name that nobody has;
                or if the optimiser holds other parameters than it was given.
        """
        values = {
            field.name: setting_of(problem, field.name, getattr(self, field.name), field.default)
            for field in fields(self)
        }
        size, buffer = values.pop("minibatch_size"), values.pop("replay_buffer")
        values["minibatches"] = (
            ShuffledMinibatches(size, problem.generator)
            if buffer is None
            else ReplayBufferMinibatches(buffer)
        )
        return FirstOrderStep(problem, **values)


class FirstOrderStep:
    """Some epochs of gradient descent on one problem; built by :class:`FirstOrder`.

    Args:
        problem (Problem): the loss and the parameters.

    Keyword Args:
        optimizer, num_epochs, max_grad_norm, scheduler, target_kl: as for :class:`FirstOrder`, of
            this problem.
        minibatches (callable): from the data to the minibatches of one epoch.

    Attributes:
        objective (callable): the loss of a minibatch.
        optimizer (torch.optim.Optimizer): holds all parameters, the frozen ones included, so that
            its state survives freezing and unfreezing.
        scheduler (LRScheduler, optional): makes a step in :meth:`end_batch`.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        optimizer: OptimizerFactory,
        minibatches: MinibatchSampler,
        num_epochs: int,
        max_grad_norm: float | None,
        scheduler: SchedulerFactory | None,
        target_kl: float | None,
    ) -> None:
        self.problem = problem
        self.objective = problem.loss
        self.minibatches = minibatches
        self.num_epochs = num_epochs
        self.max_grad_norm = float("inf") if max_grad_norm is None else max_grad_norm
        self.target_kl = None if problem.divergence is None else target_kl
        self.learners = problem.learners
        self._factory = optimizer
        self._named = dict(problem.named_parameters())
        self._trained = [p for p in self._named.values() if p.requires_grad]
        self._kinds = _kinds(self._named)
        self.optimizer = build_optimizer(optimizer, list(self._named.values()))
        self.scheduler = build_scheduler(scheduler, self.optimizer)
        self._compiled = None if problem.code is None else CompiledStep(self, problem.code)

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are not frozen."""
        return self._trained

    def propose(self, data: TensorDictBase) -> Epochs:
        """Look at nothing yet: neither gain nor divergence is known before the epochs."""
        return Epochs(self, data)

    def follow(self) -> None:
        """Let the optimiser follow parameters that were replaced, moved, frozen or unfrozen.

        ``copy.deepcopy`` and ``load_state_dict(assign=True)`` put new objects into a network, and
        ``.to(...)`` changes their device or type. The optimiser's state goes with them. A frozen
        parameter keeps its state, but has no gradient, by which every optimiser leaves it alone.

        Raises:
            ValueError: if a parameter that the optimiser holds is gone.
        """
        current = dict(self.problem.named_parameters())
        if gone := self._named.keys() - current.keys():
            raise ValueError(
                f"The network of {self.problem.name!r} has lost the parameter {min(gone)!r} since "
                "its optimizer was built; build a new updater for a new architecture."
            )
        groups, state = self.optimizer.param_groups, self.optimizer.state
        successor = {id(old): current[name] for name, old in self._named.items()}
        held = set()
        for group in groups:
            for position, old in enumerate(group["params"]):
                new = group["params"][position] = successor.get(id(old), old)
                held.add(id(new))
                if new is not old and old in state:
                    state[new] = state.pop(old)
        self._named = current
        self._trained = [p for p in current.values() if p.requires_grad]
        # A factory may have left out what was frozen when it was called.
        groups[0]["params"] += [p for p in self._trained if id(p) not in held]
        if (kinds := _kinds(current)) != self._kinds:
            # Torch's own rules of what goes where, such as the step count of a fused kernel.
            self.optimizer.load_state_dict(self.optimizer.state_dict())
            self._kinds = kinds

    def run(self, data: TensorDictBase, target_kl: float | None) -> TensorDict:
        """Run the epochs (see :meth:`Epochs.apply`)."""
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
            if target_kl is not None and self._divergence(data) > target_kl:
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
        """Yield the minibatches of an epoch with their weights, as many in each process.

        A process that has run out of minibatches computes its last one again, with weight 0: it
        would have to wait for the others anyway.
        """
        for minibatch in self.minibatches(data):
            num_rounds -= 1
            yield minibatch, 1.0 if self.learners.alone else self.problem.weight(minibatch)
        for _ in range(num_rounds):
            yield minibatch, 0.0

    def _divergence(self, data: TensorDictBase) -> float:
        """Return the mean divergence over the entries of all processes."""
        assert self.problem.divergence is not None
        with torch.no_grad():
            own = self.problem.divergence(data)
        return float(self.learners.mean([own], self.problem.weight(data))[0])

    def step(
        self, minibatch: TensorDictBase, weight: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Take one optimiser step; return the loss and the gradient's norm before clipping."""
        loss = self.objective(minibatch)
        gradients: Sequence[Tensor | None] = ()
        if self._trained:
            gradients = torch.autograd.grad(loss, self._trained, allow_unused=True)
        return self.descend(loss, gradients, weight)

    def descend(
        self, loss: Tensor, gradients: Sequence[Tensor | None], weight: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Take the optimiser's step along the mean gradient of all processes."""
        if not self.learners.alone:
            present = [gradient for gradient in gradients if gradient is not None]
            loss, *averaged = self.learners.mean([loss, *present], weight)
            rest = iter(averaged)
            gradients = [None if gradient is None else next(rest) for gradient in gradients]
        try:
            for parameter, gradient in zip(self._trained, gradients, strict=True):
                parameter.grad = None if gradient is None else laid_out_as(parameter, gradient)
            norm = nn.utils.clip_grad_norm_(self._trained, self.max_grad_norm)
            self.optimizer.step()
        finally:
            # Gradients are there for the length of a step, also of one that fails.
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    def end_batch(self) -> None:
        """Let the scheduler make its step, whether or not the optimiser has made one."""
        if self.scheduler is None:
            return
        with warnings.catch_warnings():
            # An agent that has not acted yet follows its schedule all the same.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimiser and of the scheduler."""
        state = {"optimizer": self.optimizer.state_dict()}
        if self.scheduler is not None:
            state["scheduler"] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Raises:
            ValueError: if the state is another optimiser's, or of other parameters.
        """
        check_optimizer_state(self.optimizer, state["optimizer"], self._factory)
        # A copy: torch would share tensors with whoever's state it is.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        if self.scheduler is not None:
            self.scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))


@dataclass(frozen=True, eq=False)
class Epochs:
    """The proposal of a first-order step.

    Attributes:
        step (FirstOrderStep): whose epochs they are.
        data (TensorDictBase): the data of the batch.
        gain, divergence (None): not known before the epochs.
    """

    step: FirstOrderStep
    data: TensorDictBase
    gain: None = None
    divergence: None = None

    def apply(self, max_kl: float | None = None) -> TensorDict:
        """Run the epochs.

        Args:
            max_kl (float, optional): divergence after which to stop, in place of ``target_kl``.

        Returns:
            scalars: mean ``loss`` and ``grad_norm`` (before clipping) over the steps, and the
            number of ``epochs``.
        """
        with uncached_autocast():
            return self.step.run(self.data, self.step.target_kl if max_kl is None else max_kl)


def _kinds(parameters: Mapping[str, Tensor]) -> list[tuple[torch.device, torch.dtype]]:
    return [(p.device, p.dtype) for p in parameters.values()]
