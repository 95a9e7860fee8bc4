"""Networks with memory: recurrent actors and critics, and the transforms that keep their state.

The hidden state travels through the data like an observation: a network reads it under its key and
writes the new one under ``"next"``. The environment has to pass it on from step to step and set it
to zero at resets; the transforms of :func:`memory_transforms` do so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import Composite, Unbounded
from torchrl.envs import InitTracker, TensorDictPrimer, Transform
from torchrl.modules import GRUModule, LSTMModule, ProbabilisticActor

from torchrl_happo.networks.architecture import Architecture
from torchrl_happo.networks.heads import PolicyHead
from torchrl_happo.networks.initialization import init_orthogonal
from torchrl_happo.networks.observations import ObservationEncoder, encode_inputs
from torchrl_happo.policy.actor_list import ActorList
from torchrl_happo.policy.memory import next_key, state_specs
from torchrl_happo.team.entries import path_of

__all__ = ["CELLS", "add_memory", "make_recurrent_actor", "memory_transforms"]

#: Kinds of memory and the entries of their state.
CELLS: dict[str, tuple[type[TensorDictModuleBase], tuple[str, ...]]] = {
    "gru": (GRUModule, ("recurrent_state",)),
    "lstm": (LSTMModule, ("recurrent_state_h", "recurrent_state_c")),
}


def memory_transforms(
    actors: TensorDictModuleBase | Mapping[str, TensorDictModuleBase],
) -> list[Transform]:
    """Return the transforms by which an environment keeps the hidden states of a policy.

    TorchRL's own :func:`~torchrl.modules.utils.get_primers_from_module` does this for one policy;
    here the state of a group has an agent dimension, with a row for each actor of an
    :class:`~torchrl_happo.ActorList`.

    Args:
        actors (TensorDictModule or mapping of str to it): what :func:`~torchrl_happo.make_actor`
            or :func:`~torchrl_happo.joint_policy` returns, or actors of your own with
            :class:`~torchrl.modules.GRUModule` or :class:`~torchrl.modules.LSTMModule`. A critic
            with memory is part of the joint policy.

    Returns:
        :class:`~torchrl.envs.InitTracker` and :class:`~torchrl.envs.TensorDictPrimer`; an empty
        list for policies without memory. States are ``[*B, n_agents, num_layers, hidden_size]``
        in a group with an agent dimension, ``[*B, num_layers, hidden_size]`` in one without.

    Raises:
        ValueError: if the agents of a group have memories of unlike keys or sizes.

    Example:
        >>> from torchrl.envs import TransformedEnv, VmasEnv
        >>> from torchrl_happo import make_actor
        >>> env = VmasEnv("balance", num_envs=4)
        >>> actor = make_actor(env, recurrent="gru", hidden_size=16)
        >>> env = TransformedEnv(env)
        >>> for transform in memory_transforms(actor):
        ...     env = env.append_transform(transform)
        >>> env.rollout(3, actor)["agents", "recurrent_state"].shape
        torch.Size([4, 3, 3, 1, 16])
    """
    states: dict[NestedKey, Unbounded] = {}
    groups: dict[NestedKey, Composite] = {}
    for actor in actors.values() if isinstance(actors, Mapping) else _parts(actors):
        if not isinstance(actor, ActorList):
            states.update(state_specs(actor))
            continue
        rows = [state_specs(single) for single in actor.actors]
        if any(row != rows[0] for row in rows):
            raise ValueError(
                f"The agents of group {actor.group!r} have memories of unlike keys or sizes, but "
                "one entry of the environment holds the states of a group; give all of them the "
                "same kind of memory."
            )
        if rows[0]:
            n, depth = len(rows), len(path_of(actor.group))
            groups[actor.group] = Composite(
                {key[depth:]: _stacked(spec, n) for key, spec in rows[0].items()}, shape=(n,)
            )
    if not states and not groups:
        return []
    primers: dict[NestedKey, Composite | Unbounded] = {**states, **groups}
    return [InitTracker(), TensorDictPrimer(primers, expand_specs=True)]


def _parts(policy: TensorDictModuleBase) -> list[TensorDictModuleBase]:
    """Return the actors of a joint policy."""
    if type(policy) is TensorDictSequential:
        return [part for module in policy.module for part in _parts(module)]
    return [policy]


def _stacked(spec: Unbounded, n_agents: int) -> Unbounded:
    return Unbounded((n_agents, *spec.shape), device=spec.device, dtype=spec.dtype)


def make_recurrent_actor(
    head: PolicyHead,
    architecture: Architecture,
    *,
    cell: str,
    hidden_size: int,
    output_gain: float,
) -> ProbabilisticActor | ActorList:
    """Build a recurrent actor for each agent of a group; see :func:`~torchrl_happo.make_actor`.

    The hidden layers read the observation, the cell reads their output, and a linear layer reads
    the cell's.

    Args:
        head (PolicyHead): the distribution of the group's actions.
        architecture (Architecture): the hidden layers.

    Keyword Args:
        cell (str): kind of the memory, one of :data:`CELLS`.
        hidden_size (int): size of the memory.
        output_gain (float): gain of the last layer's initialisation.
    """
    if head.group.n_agents is None:
        return _recurrent_actor(head, architecture, cell, hidden_size, output_gain)
    return ActorList(
        [
            _recurrent_actor(head.of_agent(index), architecture, cell, hidden_size, output_gain)
            for index in range(head.group.n_agents)
        ]
    )


def _recurrent_actor(
    head: PolicyHead, architecture: Architecture, cell: str, hidden_size: int, output_gain: float
) -> ProbabilisticActor:
    """Build the actor of one agent, whose view of the data has no agent dimension."""
    group, device = head.group, architecture.device
    encoder = ObservationEncoder(group.entries, architecture)
    # Names that begin with an underscore do not go into the batch.
    embedding, memory = group.key("_embedding"), group.key("_memory")
    layers: list[TensorDictModuleBase] = []
    cell_in, n_inputs = group.in_keys[0], encoder.n_features
    features: nn.Module = encoder
    if architecture.num_cells:
        n_inputs = architecture.num_cells[-1]
        features = encode_inputs(architecture.hidden_layers(encoder.n_features), [encoder])
    if architecture.num_cells or not encoder.is_identity:
        cell_in = embedding
        layers.append(TensorDictModule(features, group.in_keys, [embedding]))
    module_class, states = CELLS[cell]
    recurrent = module_class(
        input_size=n_inputs,
        hidden_size=hidden_size,
        in_keys=[cell_in, *map(group.key, states)],
        out_keys=[memory, *(next_key(group.key(state)) for state in states)],
        device=device,
    )
    layers.append(recurrent)
    output: nn.Module = nn.Linear(hidden_size, head.n_outputs, device=device)
    if architecture.layer_norm:
        output = nn.Sequential(nn.LayerNorm(hidden_size, device=device), output)
    for layer in layers:
        architecture.initialize(layer)
    architecture.initialize(output, output_gain)
    layers.append(TensorDictModule(head.parametrize(output, (), device), [memory], head.keys))
    return head.actor(TensorDictSequential(*layers), device)


def add_memory(
    features: nn.Module,
    value: nn.Module,
    *,
    in_keys: Sequence[NestedKey],
    n_features: int,
    n_agents: int | None = None,
    cell: str,
    hidden_size: int,
    activation_class: type[nn.Module],
    out_key: NestedKey,
    device: torch.device | str | None,
) -> TensorDictSequential:
    """Build a critic with memory between its hidden layers and its last one.

    Args:
        features (nn.Module): maps observations to ``[*B, n_features]``, or to
            ``[*B, n_agents, n_features]``.
        value (nn.Module): maps ``[*B, hidden_size]``, or ``[*B, n_agents, hidden_size]``, to the
            value.

    Keyword Args:
        in_keys (sequence of NestedKey): keys of the observations.
        n_features (int): size of a memory's input.
        n_agents (int, optional): number of agents that have a memory each. Defaults to ``None``:
            there is one memory.
        cell (str): kind of the memory, one of :data:`CELLS`.
        hidden_size (int): size of the memory.
        activation_class (type of nn.Module): activation of the hidden layers.
        out_key (NestedKey): key of the value.
        device (torch.device or str, optional): device of the parameters.
    """
    rows = [""]
    if n_agents is not None:
        rows = [f"_{index}" for index in range(n_agents)]
        features, value = _Rows(features), _Stack(value)
    module_class, states = CELLS[cell]
    # Names that begin with an underscore do not go into the batch.
    embeddings: list[NestedKey] = [f"_critic_embedding{row}" for row in rows]
    outputs: list[NestedKey] = [f"_critic_memory{row}" for row in rows]
    layers: list[TensorDictModuleBase] = [TensorDictModule(features, in_keys, embeddings)]
    for row, embedding, output in zip(rows, embeddings, outputs, strict=True):
        own: list[NestedKey] = [f"critic_{state}{row}" for state in states]
        memory = module_class(
            input_size=n_features,
            hidden_size=hidden_size,
            in_keys=[embedding, *own],
            out_keys=[output, *map(next_key, own)],
            device=device,
        )
        init_orthogonal(memory, activation_class)
        layers.append(memory)
    return TensorDictSequential(*layers, TensorDictModule(value, outputs, [out_key]))


class _Rows(nn.Module):
    """A network whose output is a tensor for each agent."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.net(*inputs).unbind(-2)


class _Stack(nn.Module):
    """A network whose inputs are a tensor for each agent."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *rows: Tensor) -> Tensor:
        return self.net(torch.stack(rows, -2))
