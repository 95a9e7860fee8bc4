"""The joint actor as a function of the rows of its agents.

:class:`JointRow` evaluates the joint actor for one agent. :func:`gradients_in_rows` lets what is
differentiated through the joint actor leave its gradients in the rows of all agents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase
from torch import Tensor, nn
from torchrl.modules.models.multiagent import MultiAgentNetBase

from torchrl_happo.policy.rows import Tie
from torchrl_happo.versions import swapped

__all__ = ["JointRow", "gradients_in_rows", "row_of"]


class JointRow:
    """The row of one agent, evaluated as the joint actor evaluates it, with all other rows.

    Args:
        joint (ProbabilisticTensorDictSequential): the joint actor.
        single (ProbabilisticTensorDictSequential): the agent's actor, which holds its parameters.
        ties (iterable of Tie): which parameter of the agent is which row of the joint actor.
        index (int): the agent's row.
    """

    def __init__(
        self,
        joint: ProbabilisticTensorDictSequential,
        single: ProbabilisticTensorDictSequential,
        ties: Iterable[Tie],
        index: int,
    ) -> None:
        self.joint = joint
        self.index = index
        paths = {module: path for path, module in single.named_modules()}
        #: From the name of a parameter of the agent's to its path in the joint actor, and its row.
        self._places = {
            f"{paths[tie.module]}.{tie.name}" if paths[tie.module] else tie.name: (path, tie.index)
            for tie, path in _parameter_paths(joint, ties)
        }

    def outputs(
        self, modules: Iterable[TensorDictModuleBase], data: TensorDictBase, weights: Mapping
    ) -> TensorDictBase:
        """Run the networks of the joint actor with this agent's weights.

        Args:
            modules (iterable of TensorDictModuleBase): the joint actor's networks, in order.
            data (TensorDictBase): observations of the whole group; not modified.
            weights (mapping of str to Tensor): the agent's weights, by name in its actor.

        Returns:
            the data with the outputs of the networks for all agents.
        """
        own = {self._places[name]: weight for name, weight in weights.items()}
        rows = {path: (row, weight) for (path, row), weight in own.items()}
        joint = TensorDict.from_module(self.joint).named_apply(
            lambda path, stack: _with_row(stack, *rows[path]) if path in rows else stack.detach(),
            nested_keys=True,
        )
        scratch = data.copy()
        with swapped(joint, self.joint):
            for module in modules:
                scratch = module(scratch)
        return scratch


def row_of(value: Any, index: int, batch_dims: int) -> Any:
    """Return an agent's row of an entry of the joint actor, a tensor or a tensordict.

    Args:
        value (Tensor or TensorDictBase): ``[*B, n_agents, ...]``.
        index (int): the agent's row.
        batch_dims (int): number of dimensions of ``B``.
    """
    if isinstance(value, TensorDictBase):
        return value.apply(
            lambda leaf: leaf.select(batch_dims, index), batch_size=value.batch_size[:batch_dims]
        )
    return value.select(batch_dims, index)


def _with_row(stack: Tensor, row: int | None, weight: Tensor) -> Tensor:
    """Return a stack, held fixed but for one row, of which gradients reach the weight."""
    if row is None:
        return weight
    stack = stack.detach()
    return torch.cat([stack[:row], weight.unsqueeze(0), stack[row + 1 :]])


def _parameter_paths(
    joint: nn.Module, ties: Iterable[Tie]
) -> Iterator[tuple[Tie, tuple[str, ...]]]:
    """Yield the ties of parameters, each with the path of its tensor in the joint actor."""
    paths = {module: path for path, module in joint.named_modules()}
    for tie in ties:
        if tie.name in tie.module._parameters:
            inside = ("params",) if isinstance(tie.source, MultiAgentNetBase) else ()
            key = (tie.key,) if isinstance(tie.key, str) else tie.key
            yield tie, (*filter(None, paths[tie.source].split(".")), *inside, *key)


class _Shared(torch.autograd.Function):
    """A stack, whose gradient reaches the stack itself and the rows that agents hold of it."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor, indices: list[int], *rows: Tensor) -> Tensor:
        ctx.indices = indices
        return stack.view_as(stack)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        rows = (
            gradients[0][index] if wants else None
            for index, wants in zip(ctx.indices, wanted, strict=True)
        )
        return gradients[0], None, *rows


@contextmanager
def gradients_in_rows(joint: nn.Module, ties: Iterable[Tie]) -> Iterator[None]:
    """Let gradients through the joint actor reach the parameters of its agents as well.

    An agent's parameters share storage with rows of the joint actor, but are tensors of their own.
    Without this, ``backward()`` of the loss of the whole team would leave them without gradients,
    and an optimiser over ``agent.parameters()`` would move nothing.

    Args:
        joint (nn.Module): the joint actor; it computes the same numbers.
        ties (iterable of Tie): of all its agents.
    """
    rows: dict[tuple[str, ...], list[tuple[int, nn.Parameter]]] = {}
    for tie, path in _parameter_paths(joint, ties):
        parameter = tie.module._parameters[tie.name]
        if tie.index is not None and parameter is not None and parameter.requires_grad:
            rows.setdefault(path, []).append((tie.index, parameter))
    if not rows or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        yield
        return

    def share(path: tuple[str, ...], stack: Tensor) -> Tensor:
        if path not in rows or not stack.requires_grad:
            return stack
        indices, parameters = zip(*rows[path], strict=True)
        shared: Tensor = _Shared.apply(stack, list(indices), *parameters)
        return shared

    shared = TensorDict.from_module(joint).named_apply(share, nested_keys=True)
    with swapped(shared, joint):
        yield
