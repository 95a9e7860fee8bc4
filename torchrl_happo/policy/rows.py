"""The rows of a stack of networks: rolled out together, trained one by one.

:func:`cut_actor` makes the actor of one agent from the joint actor of a group. The parameters of
the single actor share storage with their row of the stack; a :class:`Tie` for each of them finds
the row again after the stack has been moved. All modules outside the stacks are the joint actor's
own, so that what changes in them later changes for the agents as well.

A row evaluates the single network of a stack, without the other agents. Where that is not what the
joint actor computes (a subclass with a ``forward`` of its own, a hook, a module that uses the
agent dimension), :class:`~torchrl_happo.policy.joint_row.JointRow` evaluates the joint actor itself
and takes the agent's row.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from tensordict import NestedKey
from tensordict.nn import (
    AddStateIndependentNormalScale,
    ProbabilisticTensorDictSequential,
)
from torch import Tensor, nn
from torchrl.modules.models.multiagent import MultiAgentNetBase

from torchrl_happo.versions import single_network

__all__ = [
    "Tie",
    "cut_actor",
    "follow_settings",
    "num_agents",
    "same_distribution",
    "shared_part",
    "signature",
]

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
        index (int or None): row of the stack; ``None`` shares the whole tensor.
    """

    module: nn.Module
    name: str
    source: nn.Module
    key: NestedKey
    index: int | None

    def __post_init__(self) -> None:
        self._was_trained = _tensor_of(self.source, self.key).requires_grad

    def __call__(self) -> None:
        """Point the tensor at its row of the stack, wherever that lies now.

        Hooks on the stack's gradient are refused: its rows are parameters of their own. When the
        stack is frozen or unfrozen, its rows are; a single row may be frozen by itself.
        """
        stack = _tensor_of(self.source, self.key)
        if self.index is not None and (stack._backward_hooks or _accumulation_hooks(stack)):
            raise ValueError(
                f"The stack {self.key!r} of the agents' parameters has a hook on its "
                "gradient, which the step of one agent would not call; remove it, or register it "
                "on the parameters of each of loss.agents."
            )
        row = stack.detach() if self.index is None else stack.detach()[self.index]
        slot = self.module._parameters.get(self.name)
        if slot is None:
            self.module._buffers[self.name] = row
        elif slot.data_ptr() != row.data_ptr() or slot.dtype != row.dtype:
            slot.data = row
            slot.grad = None
        if slot is not None and self._was_trained != stack.requires_grad:
            slot.requires_grad_(stack.requires_grad)
        self._was_trained = stack.requires_grad


def _tensor_of(source: nn.Module, key: NestedKey) -> Tensor:
    if isinstance(source, MultiAgentNetBase):
        return source.params.get(key)
    return getattr(source, key)


def _set_tensor(module: nn.Module, name: str, stack: Tensor, index: int | None) -> None:
    for slots in (module._parameters, module._buffers, module.__dict__):
        slots.pop(name, None)
    row = stack.detach() if index is None else stack.detach()[index]
    if isinstance(stack, nn.Parameter):
        module.register_parameter(name, nn.Parameter(row, requires_grad=stack.requires_grad))
    else:
        module.register_buffer(name, row)


def _cut_multi_agent_net(net: MultiAgentNetBase, index: int) -> tuple[nn.Module, list[Tie]]:
    """The network of one agent, with the row ``index`` of each tensor of the stack."""
    single = copy.deepcopy(single_network(net))
    ties = []
    row = None if net.share_params else index
    for key, stack in net.params.items(include_nested=True, leaves_only=True):
        path = (key,) if isinstance(key, str) else key
        owner = single.get_submodule(".".join(path[:-1]))
        _set_tensor(owner, path[-1], stack, row)
        ties.append(Tie(owner, path[-1], net, key, row))
    return single, ties


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
    """Name a part of the joint actor that several agents train; ``None`` if there is none.

    A part that is frozen may be shared.
    """
    for net in _stacked_modules(actor):
        if net.centralized:
            return f"a {type(net).__name__} with centralized=True, which sees all observations"
        if net.share_params and any(p.requires_grad for p in net.parameters()):
            return f"a {type(net).__name__} with share_params=True"
    for path, module in _outside_stacks(actor):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and not _has_rows(module, name, n_agents):
                return f"one parameter {path}.{name} for all agents"
    return None


def _outside_stacks(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of an actor that belong to no stack of networks, with their paths."""
    if isinstance(module, MultiAgentNetBase):
        return
    yield path, module
    for name, child in module.named_children():
        yield from _outside_stacks(child, f"{path}.{name}" if path else name)


def _has_rows(module: nn.Module, name: str, n_agents: int) -> bool:
    """Whether a parameter beside the stacks has a row for each agent, such as ``log_std [n, d]``.

    The weights of torch's own layers are no such rows, whatever their shape.
    """
    parameter = module._parameters[name]
    is_layer = type(module).__module__.startswith("torch.nn.modules")
    has_rows = parameter is not None and parameter.ndim >= 2 and parameter.shape[0] == n_agents
    return has_rows and not is_layer


def cut_actor(
    actor: ProbabilisticTensorDictSequential, n_agents: int, index: int
) -> tuple[ProbabilisticTensorDictSequential, list[Tie]]:
    """Return the joint actor with the row of one agent in the place of each stack.

    Args:
        actor (ProbabilisticTensorDictSequential): the joint actor.
        n_agents (int): number of agents in its stacks.
        index (int): the agent's row.

    Returns:
        the agent's actor, which shares all modules without rows with the joint actor, and the ties
        of its parameters.
    """
    memo: dict[int, object] = {}
    ties: list[Tie] = []
    for module in actor.modules():
        if isinstance(module, MultiAgentNetBase):
            # deepcopy takes what stands in the memo instead of copying: the copy of the joint
            # actor gets the single network wherever the joint one has the stack.
            memo[id(module)], own = _cut_multi_agent_net(module, index)
            ties += own
    kept = [module for _, module in _outside_stacks(actor)]
    for module in kept:
        if module is not actor[-1] and not _contains_rows(module, n_agents):
            memo[id(module)] = module
    single_actor = copy.deepcopy(actor, memo)
    for path, module in _outside_stacks(actor):
        single = single_actor.get_submodule(path)
        if single is module:
            continue
        for name in [*module._parameters, *module._buffers]:
            tensor = getattr(module, name)
            if tensor is None:
                continue
            row = (
                index if name in module._parameters and _has_rows(module, name, n_agents) else None
            )
            _set_tensor(single, name, tensor, row)
            ties.append(Tie(single, name, module, name, row))
        if isinstance(module, AddStateIndependentNormalScale) and len(module.scale_shape) > 1:
            single.scale_shape = module.scale_shape[1:]
    distribution = single_actor[-1]
    distribution.distribution_kwargs = _row_of_bound(
        distribution.distribution_kwargs, n_agents, index
    )
    return single_actor, ties


def _contains_rows(module: nn.Module, n_agents: int) -> bool:
    """Whether a module holds a stack, or a parameter with a row for each agent."""
    return any(
        isinstance(part, MultiAgentNetBase)
        or any(_has_rows(part, name, n_agents) for name in part._parameters)
        for part in module.modules()
    )


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


def follow_settings(single: nn.Module, joint: ProbabilisticTensorDictSequential) -> None:
    """Copy the plain attributes of the joint actor's modules to their copies in an agent's actor.

    Modules without rows are shared. Those around a stack are copies, whose settings may change in
    the joint actor later: a temperature, the mode of training.
    """
    for path, module in _outside_stacks(joint):
        own = single.get_submodule(path)
        if own is not module and module is not joint[-1]:
            for name, value in vars(module).items():
                if not name.startswith("_") and name not in ("scale_shape",):
                    vars(own)[name] = value


def signature(joint: nn.Module) -> tuple[tuple[nn.Module, bool, int], ...]:
    """Return the modules of an actor, their modes and their numbers of hooks."""
    return tuple((m, m.training, sum(map(len, _hooks(m)))) for m in joint.modules())


def _hooks(module: nn.Module) -> Iterator[Mapping[int, object]]:
    yield from (module._forward_hooks, module._forward_pre_hooks)
    yield from (module._backward_hooks, module._backward_pre_hooks)


def _accumulation_hooks(tensor: Tensor) -> object:
    return getattr(tensor, "_post_accumulate_grad_hooks", None)
