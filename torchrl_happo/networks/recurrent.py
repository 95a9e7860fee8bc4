"""Networks with memory: recurrent actors and critics, and what keeps their state.

The hidden state travels through the data like an observation: a network reads it under its key and
writes the new one under ``"next"``. An environment must hand it over from step to step and set it
to zero at resets; :func:`memory_transforms` makes it do so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import Composite, Unbounded
from torchrl.envs import InitTracker, TensorDictPrimer, Transform
from torchrl.modules import MLP, GRUModule, LSTMModule, ProbabilisticActor

from torchrl_happo.networks.heads import ParameterHead
from torchrl_happo.networks.initialization import init_orthogonal
from torchrl_happo.networks.layer_norm import LayerNormMLP
from torchrl_happo.networks.specs import ActionHead, Group
from torchrl_happo.policy.actor_list import ActorList
from torchrl_happo.policy.memory import next_key, state_specs

__all__ = ["CELLS", "add_memory", "make_recurrent_actor", "memory_transforms"]

#: Kinds of memory and the entries of their state.
CELLS: dict[str, tuple[type[TensorDictModuleBase], tuple[str, ...]]] = {
    "gru": (GRUModule, ("recurrent_state",)),
    "lstm": (LSTMModule, ("recurrent_state_h", "recurrent_state_c")),
}


def memory_transforms(
    actors: TensorDictModuleBase | Mapping[str, TensorDictModuleBase],
) -> list[Transform]:
    """The transforms that an environment needs to keep the hidden states of a policy.

    TorchRL's own :func:`~torchrl.modules.utils.get_primers_from_module` does this for one policy;
    here the state of a group has an agent dimension, with a row for each actor of an
    :class:`~torchrl_happo.ActorList`.

    Args:
        actors (TensorDictModule or mapping of str to it): what :func:`~torchrl_happo.make_actor`
            or :func:`~torchrl_happo.joint_policy` returns, or actors of your own with
            :class:`~torchrl.modules.GRUModule` or :class:`~torchrl.modules.LSTMModule`. A critic
            with memory is part of the joint policy.

    Returns:
        :class:`~torchrl.envs.InitTracker` and :class:`~torchrl.envs.TensorDictPrimer`; nothing for
        policies without memory. States are ``[*B, n_agents, num_layers, hidden_size]`` in a group
        with an agent dimension, ``[*B, num_layers, hidden_size]`` in one without.

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
    groups: dict[str, Composite] = {}
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
            n = len(rows)
            groups[str(actor.group)] = Composite(
                {key[1:]: _stacked(spec, n) for key, spec in rows[0].items()}, shape=(n,)
            )
    if not states and not groups:
        return []
    primers: dict[NestedKey, Composite | Unbounded] = {**states, **groups}
    return [InitTracker(), TensorDictPrimer(primers, expand_specs=True)]


def _parts(policy: TensorDictModuleBase) -> list[TensorDictModuleBase]:
    """The actors of a joint policy."""
    if type(policy) is TensorDictSequential:
        return [part for module in policy.module for part in _parts(module)]
    return [policy]


def _stacked(spec: Unbounded, n_agents: int) -> Unbounded:
    return Unbounded((n_agents, *spec.shape), device=spec.device, dtype=spec.dtype)


def make_recurrent_actor(
    group: Group,
    head: ActionHead,
    *,
    cell: str,
    hidden_size: int,
    num_cells: Sequence[int],
    activation_class: type[nn.Module],
    layer_norm: bool,
    state_dependent_std: bool,
    scale_mapping: str,
    max_std: float | None,
    output_gain: float,
    init: str,
    device: torch.device | str | None,
) -> ProbabilisticActor | ActorList:
    """A recurrent actor for each agent of a group; see :func:`~torchrl_happo.make_actor`.

    An MLP reads the observation, the memory its output, and a linear layer the memory's.
    """
    parameters = ParameterHead(
        group,
        head,
        state_dependent_std=state_dependent_std,
        scale_mapping=scale_mapping,
        max_std=max_std,
    )
    trunk_class = LayerNormMLP if layer_norm else MLP
    actors = []
    for index in range(group.n_agents or 1):
        layers: list[TensorDictModuleBase] = []
        # Names that begin with an underscore do not go into the batch.
        embedding, memory = group.key("_embedding"), group.key("_memory")
        if num_cells:
            trunk = trunk_class(
                in_features=group.n_inputs,
                out_features=num_cells[-1],
                num_cells=list(num_cells[:-1]),
                activation_class=activation_class,
                activate_last_layer=True,
                device=device,
            )
            layers.append(TensorDictModule(trunk, [group.observation], [embedding]))
        module_class, states = CELLS[cell]
        recurrent = module_class(
            input_size=num_cells[-1] if num_cells else group.n_inputs,
            hidden_size=hidden_size,
            in_keys=[embedding if num_cells else group.observation, *map(group.key, states)],
            out_keys=[memory, *(next_key(group.key(state)) for state in states)],
            device=device,
        )
        output: nn.Module = nn.Linear(hidden_size, parameters.n_outputs, device=device)
        if layer_norm:
            output = nn.Sequential(nn.LayerNorm(hidden_size, device=device), output)
        layers.append(recurrent)
        if init == "orthogonal":
            for layer in layers:
                init_orthogonal(layer, activation_class)
            init_orthogonal(output, activation_class, output_gain)
        net = parameters.split(output, (), device)
        layers.append(TensorDictModule(net, [memory], parameters.keys))
        own = {
            name: bound if group.n_agents is None else bound[index]
            for name, bound in head.bounds.items()
        }
        actors.append(parameters.actor(TensorDictSequential(*layers), own, device))
    return actors[0] if group.n_agents is None else ActorList(actors)


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
    """A critic with memory between its hidden layers and its last one.

    Args:
        features (nn.Module): from the observations to ``[*B, n_features]``, or to
            ``[*B, n_agents, n_features]``.
        value (nn.Module): from ``[*B, hidden_size]``, or ``[*B, n_agents, hidden_size]``, to the
            value.

    Keyword Args:
        in_keys (sequence of NestedKey): the observations.
        n_features (int): input of a memory.
        n_agents (int, optional): how many agents have a memory each. Defaults to ``None``: there
            is one memory.
        cell (str): its kind, one of :data:`CELLS`.
        hidden_size (int): its size.
        activation_class (type of nn.Module): of the hidden layers.
        out_key (NestedKey): where the value is written.
        device (torch.device or str, optional): of the parameters.
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
    """A network, its output apart for each agent."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.net(*inputs).unbind(-2)


class _Stack(nn.Module):
    """A network that is given a tensor for each agent."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *rows: Tensor) -> Tensor:
        return self.net(torch.stack(rows, -2))
