"""The two lives of a stacked network: rolled out as a stack, trained as slices.

:func:`cut_actor` makes the actor of one agent from the joint actor of a group. The parameters of
the single actor share storage with their row of the stack; a :class:`Tie` for each of them finds
the row again after the stack has been moved.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from tensordict import NestedKey
from tensordict.nn import AddStateIndependentNormalScale, ProbabilisticTensorDictSequential
from torch import Tensor, nn
from torchrl.modules.models.multiagent import MultiAgentNetBase

__all__ = ["Tie", "cut_actor", "num_agents", "same_distribution", "shared_part"]

#: Arguments of a distribution of which a copy is as good.
_PLAIN = (bool, int, float, str)


@dataclass
class Tie:
    """One tensor of an agent's network and where its storage lies in the joint actor's.

    Attributes:
        module (nn.Module): the agent's (sub)module that owns the tensor.
        name (str): the tensor's name in it.
        source (nn.Module): the joint actor's module.
        key (str or tuple of str): the tensor's key in ``source``.
        index (int or None): row of the stack; ``None`` shares a whole buffer.
    """

    module: nn.Module
    name: str
    source: nn.Module
    key: NestedKey
    index: int | None

    def __call__(self) -> None:
        """Points the tensor at its row of the stack, wherever that lies now, frozen or not."""
        stack = _tensor_of(self.source, self.key)
        row = stack.detach() if self.index is None else stack.detach()[self.index]
        slot = self.module._parameters.get(self.name)
        if slot is None:
            self.module._buffers[self.name] = row
        elif slot.data_ptr() != row.data_ptr() or slot.dtype != row.dtype:
            slot.data = row
            slot.grad = None
        if slot is not None and slot.requires_grad != stack.requires_grad:
            slot.requires_grad_(stack.requires_grad)


def _tensor_of(source: nn.Module, key: NestedKey) -> Tensor:
    if isinstance(source, MultiAgentNetBase):
        return source.params.get(key)
    return getattr(source, key)


def _set_tensor(module: nn.Module, name: str, stack: Tensor, index: int) -> None:
    for slots in (module._parameters, module._buffers, module.__dict__):
        slots.pop(name, None)
    row = stack.detach()[index]
    if isinstance(stack, nn.Parameter):
        module.register_parameter(name, nn.Parameter(row, requires_grad=stack.requires_grad))
    else:
        module.register_buffer(name, row)


def _cut_multi_agent_net(net: MultiAgentNetBase, index: int) -> tuple[nn.Module, list[Tie]]:
    """The network of one agent, with the row ``index`` of each tensor of the stack."""
    single = copy.deepcopy(net._empty_net)
    ties = []
    for key, stack in net.params.items(include_nested=True, leaves_only=True):
        path = (key,) if isinstance(key, str) else key
        owner = single.get_submodule(".".join(path[:-1]))
        _set_tensor(owner, path[-1], stack, index)
        ties.append(Tie(owner, path[-1], net, key, index))
    return single, ties


def _cut_normal_scale(
    scale: AddStateIndependentNormalScale, index: int
) -> tuple[nn.Module, list[Tie]]:
    """The standard deviation of one agent, from a scale of shape ``[n_agents, action_dim]``."""
    single = copy.deepcopy(scale)
    name = "state_independent_scale"
    single.scale_shape = scale.scale_shape[1:]
    _set_tensor(single, name, getattr(scale, name), index)
    return single, [Tie(single, name, scale, name, index)]


def _stacked_modules(actor: nn.Module) -> list[MultiAgentNetBase]:
    return [m for m in actor.modules() if isinstance(m, MultiAgentNetBase)]


def num_agents(actor: nn.Module, group: str) -> int | None:
    """Number of agents in the actor's stacks; ``None`` if it has no stack."""
    sizes = {net.n_agents for net in _stacked_modules(actor)}
    if len(sizes) > 1:
        raise ValueError(
            f"The networks of group {group!r} are built for {sorted(sizes)} agents; build all of "
            "them with the same n_agents."
        )
    return sizes.pop() if sizes else None


def shared_part(actor: nn.Module, n_agents: int) -> str | None:
    """Names a part of the joint actor that several agents use; ``None`` if there is none."""
    for net in _stacked_modules(actor):
        if net.centralized:
            return f"a {type(net).__name__} with centralized=True, which sees all observations"
        if net.share_params:
            return f"a {type(net).__name__} with share_params=True"
    for path, module in _outside_stacks(actor, n_agents):
        for name, _ in module.named_parameters(recurse=False):
            return f"one parameter {path}.{name} for all agents"
    return None


def _outside_stacks(
    module: nn.Module, n_agents: int, path: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """The modules of an actor that belong to no stack, with their paths."""
    if isinstance(module, MultiAgentNetBase) or _is_stacked_scale(module, n_agents):
        return
    yield path, module
    for name, child in module.named_children():
        yield from _outside_stacks(child, n_agents, f"{path}.{name}" if path else name)


def _is_stacked_scale(module: nn.Module, n_agents: int) -> bool:
    return (
        isinstance(module, AddStateIndependentNormalScale)
        and len(module.scale_shape) >= 2
        and module.scale_shape[0] == n_agents
    )


def cut_actor(
    actor: ProbabilisticTensorDictSequential, n_agents: int, index: int
) -> tuple[ProbabilisticTensorDictSequential, list[Tie]]:
    """A copy of the joint actor in which each stack is replaced by the row of one agent."""
    memo: dict[int, object] = {}
    ties: list[Tie] = []
    for module in actor.modules():
        if isinstance(module, MultiAgentNetBase):
            single, own_ties = _cut_multi_agent_net(module, index)
        elif _is_stacked_scale(module, n_agents):
            single, own_ties = _cut_normal_scale(module, index)
        else:
            continue
        # deepcopy takes what stands in the memo instead of copying: the copy of the joint actor
        # gets the single network wherever the joint one has the stack.
        memo[id(module)] = single
        ties += own_ties
    single_actor = copy.deepcopy(actor, memo)
    for path, module in _outside_stacks(actor, n_agents):
        for name, _ in module.named_buffers(recurse=False):
            ties.append(Tie(single_actor.get_submodule(path), name, module, name, None))
    distribution = single_actor[-1]
    distribution.distribution_kwargs = _row_of_bound(
        distribution.distribution_kwargs, n_agents, index
    )
    return single_actor, ties


def same_distribution(
    one: ProbabilisticTensorDictSequential, other: ProbabilisticTensorDictSequential
) -> bool:
    """Whether two agents cut from one actor share its distribution's arguments, such as bounds."""
    return _equal(one[-1].distribution_kwargs, other[-1].distribution_kwargs)


def _equal(one: object, other: object) -> bool:
    """Whether two arguments of distributions, perhaps copies, say the same."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return one is other or (isinstance(one, _PLAIN) and one == other)


def _row_of_bound(value: object, n_agents: int, index: int) -> object:
    """The row of a distribution argument of shape ``[..., n_agents, action_dim]``.

    The heads of a composite distribution have arguments of their own, in a mapping.
    """
    if isinstance(value, Mapping):
        return {key: _row_of_bound(argument, n_agents, index) for key, argument in value.items()}
    if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[-2] == n_agents:
        return value.select(-2, index)
    return value
