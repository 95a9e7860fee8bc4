"""The contract between the sequential update and whatever moves one set of parameters.

A *step factory* (:class:`StepFactory`) is called once for each agent, and once for each critic,
with its :class:`Problem`. It returns a :class:`Step`, which lives as long as the updater. For each
batch the updater asks the step to ``propose`` a move and then applies the :class:`Proposal`, so
that a common trust-region budget can look at the proposals of several agents before one moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.distributions import Distribution

from torchrl_happo.distributed import Learners
from torchrl_happo.masked import VALID

__all__ = ["VALID", "ByName", "Problem", "Proposal", "Step", "StepFactory", "setting_of"]

T = TypeVar("T")
#: One setting for all, or one for each agent by its name or its group's name.
ByName: TypeAlias = T | Mapping[str, T]


@dataclass(frozen=True, eq=False)
class Problem:
    """What a step is to improve, as functions of the data and the parameters.

    Attributes:
        name (str): the agent's name, or the critic's.
        group (str, optional): the agent's group; ``None`` for a critic.
        loss (callable): from a minibatch to the scalar to minimise, a mean over valid entries.
        named_parameters (callable): returns names and parameters that the step may move.
        weight (callable): from a minibatch to the number of entries that ``loss`` averages over,
            by which the processes of a group weigh their gradients.
        distribution (callable, optional): from parameters by name and data to the agent's policy.
        surrogate (callable, optional): from such a policy and data to the scalar to maximise.
        divergence (callable, optional): from data to an estimate of the mean divergence of the
            agent's policy from the one that acted, over the entries of this process.
        sample_shape (callable): from data to the leading dimensions of the policy that count
            samples.
        names (tuple of str): names of all agents, groups and critics, by which settings may be
            given. Empty: not known.
        learners (Learners): the processes that take the step together.
        generator (torch.Generator): draws minibatches.
        module (nn.Module, optional): what ``distribution`` runs, whose hooks a step may refuse.
        code (Any): what ``loss`` and ``distribution`` read besides their arguments, for the
            compiler; ``None``: nothing is compiled.
    """

    name: str
    loss: Callable[[TensorDictBase], Tensor]
    named_parameters: Callable[[], Iterable[tuple[str, nn.Parameter]]]
    group: str | None = None
    weight: Callable[[TensorDictBase], Tensor | float] = len
    distribution: Callable[[Mapping[str, Tensor], TensorDictBase], Distribution] | None = None
    surrogate: Callable[[Distribution, TensorDictBase], Tensor] | None = None
    divergence: Callable[[TensorDictBase], Tensor] | None = None
    sample_shape: Callable[[TensorDictBase], torch.Size] = lambda data: data.batch_size
    names: tuple[str, ...] = ()
    learners: Learners = field(default_factory=Learners)
    generator: torch.Generator = field(default_factory=torch.Generator)
    module: nn.Module | None = None
    code: Any = None

    def refuse_hooks(self) -> None:
        """Refuse hooks on gradients, of modules and of parameters, for steps that call none."""
        modules = () if self.module is None else self.module.modules()
        hooked: list[Any] = [*modules, *(parameter for _, parameter in self.named_parameters())]
        if any(h._backward_hooks or getattr(h, "_backward_pre_hooks", None) for h in hooked):
            raise ValueError(
                f"The networks of {self.name!r} have a hook on a gradient, which a trust-region "
                "step cannot take account of; remove it, or take a first-order loss."
            )


def setting_of(problem: Problem, name: str, value: ByName[Any], default: Any) -> Any:
    """Return a setting's value for one problem.

    Args:
        problem (Problem): of an agent, or of a critic.
        name (str): the setting's name, for errors.
        value (Any): one value for all, or a mapping of values by name of agent or group.
        default (Any): the value of a critic that the mapping does not name.

    Returns:
        the value: under the agent's own name, or else under its group's.

    Raises:
        ValueError: if the mapping names nobody, or does not name this agent.

    Example:
        >>> problem = Problem("agents_1", loss=len, named_parameters=list, group="agents")
        >>> setting_of(problem, "num_epochs", {"agents": 5, "agents_0": 3}, 10)
        5
    """
    if not isinstance(value, Mapping):
        return value
    known = problem.names
    if known and (unknown := sorted(set(value) - set(known))):
        raise ValueError(
            f"{name} has values for {unknown}, but there are only {list(known)}; leave out the "
            "others."
        )
    for own in (problem.name, problem.group):
        if own is not None and own in value:
            return value[own]
    if problem.divergence is None:  # a critic's
        return default
    raise ValueError(
        f"{name} has values for {list(value)}, but none for the agent {problem.name!r}; name it, "
        f"or its group {problem.group!r}."
    )


class Proposal(Protocol):
    """A move that a step could make, while the parameters stay where they are."""

    @property
    def gain(self) -> Tensor | None:
        """Improvement of the surrogate that the step expects, a scalar; ``None``: not known."""

    @property
    def divergence(self) -> Tensor | None:
        """Mean divergence that the step expects, a scalar, in nats; ``None``: not known."""

    def apply(self, max_kl: float | None = None) -> TensorDict:
        """Move the parameters.

        Args:
            max_kl (float, optional): radius to keep to, in place of the step's own; 0: stay.

        Returns:
            scalars to report, among them ``grad_norm``.
        """


@runtime_checkable
class Step(Protocol):
    """How one set of parameters moves. The updater rolls parameters and state back by itself."""

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the step may move."""

    def propose(self, data: TensorDictBase) -> Proposal:
        """Look at the data of one batch, items along the first dimension; move nothing yet."""

    def follow(self) -> None:
        """Follow parameters that were moved, copied, reloaded, frozen or unfrozen since."""

    def end_batch(self) -> None:
        """Advance the schedule, whether or not the step moved in this batch."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state beyond the parameters."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; refuse a state that does not fit."""


class StepFactory(Protocol):
    """Makes the step of one agent, or of a critic."""

    def __call__(self, problem: Problem) -> Step:
        """Build the step that solves a problem."""
