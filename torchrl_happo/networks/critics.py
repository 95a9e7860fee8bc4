"""A team's critic: what it sees, and for whom it gives a value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.envs import EnvBase

from torchrl_happo.arguments import check_counts
from torchrl_happo.networks.checks import check_builder, check_groups
from torchrl_happo.networks.critic_networks import (
    AgentFeatures,
    AgentValues,
    CentralizedMLP,
    PerAgentMLP,
    team_inputs,
)
from torchrl_happo.networks.initialization import init_orthogonal
from torchrl_happo.networks.recurrent import CELLS, add_memory
from torchrl_happo.networks.specs import observation_shape, read_groups, select_groups

__all__ = ["CRITIC_INPUTS", "CentralizedMLP", "make_critic"]

#: What a critic may see.
CRITIC_INPUTS = ("observations", "state", "agent_specific", "own")


def make_critic(
    env: EnvBase,
    *,
    input: str | None = None,
    groups: Sequence[str] | None = None,
    state_key: NestedKey | None = None,
    share_params: bool = False,
    num_cells: Sequence[int] = (128, 128),
    activation_class: type[nn.Module] = nn.Tanh,
    layer_norm: bool = False,
    output_gain: float = 1.0,
    observation_key: str = "observation",
    out_key: NestedKey = "state_value",
    recurrent: str | None = None,
    hidden_size: int = 128,
    device: torch.device | str | None = None,
) -> TensorDictModule | TensorDictSequential:
    r"""Builds the critic of a team.

    ====================  =====================================================  ================
    ``input``             what the critic sees                                   ``out_key``
    ====================  =====================================================  ================
    ``"observations"``    the observations of all agents, concatenated           ``[*B, 1]``
    ``"state"``           the environment's own global state                     ``[*B, 1]``
    ``"agent_specific"``  the state and the agent's own observation; the state   ``[*B, n, 1]``
                          is the environment's, or else all observations
    ``"own"``             the agent's own observation alone                      ``[*B, n, 1]``
    ====================  =====================================================  ================

    The team's return is one number, so the first two write one number :math:`V(s)`, at the root.
    The others write a value for each agent, in the order of the groups; the advantage is then one
    for each agent, too, and standardised over all of them.

    Args:
        env (EnvBase): the environment, transforms included.

    Keyword Args:
        input (str, optional): what the critic sees. Defaults to ``None``: ``"state"`` if
            ``state_key`` is given, otherwise ``"observations"``.
        groups (sequence of str, optional): whose observations the critic sees. Defaults to all
            groups of the environment.
        state_key (NestedKey, optional): key of the environment's own global state. Defaults to
            ``None``: ``"state"``, where ``input`` asks for it.
        share_params (bool): whether agents with a value each share the network: those of one group
            the hidden layers, all of them the last layer. Defaults to ``False``.
        num_cells (sequence of int): widths of the hidden layers. Defaults to ``(128, 128)``.
        activation_class (type of nn.Module): activation of the hidden layers.
            Defaults to :class:`~torch.nn.Tanh`.
        layer_norm (bool): whether the input and the output of each hidden layer are normalised.
            Defaults to ``False``.
        output_gain (float): gain of the last layer's initialisation. Defaults to ``1.0``.
        observation_key (str): name of the observation in the groups.
            Defaults to ``"observation"``.
        out_key (NestedKey): where the value is written. Defaults to ``"state_value"``.
        recurrent (str, optional): memory behind the hidden layers, ``"gru"`` or ``"lstm"``; one
            for each agent, where agents have a value each. Defaults to ``None``: no memory.
        hidden_size (int): size of the memory. Defaults to ``128``.
        device (torch.device or str, optional): device of the parameters. Defaults to the
            environment's.

    Returns:
        a module that reads the state, the observations or both, and writes ``out_key``.

    Raises:
        KeyError: if the environment lacks a group, its observation or the state.
        ValueError: if the observations are not vectors of the default dtype, the agents of a
            group have unlike ones, or the arguments contradict each other.

    .. note::
        A critic with memory is not asked while data is collected. At the beginning of an update
        it is run over the batch, step by step, with the parameters it then has: from zero at the
        first step and wherever ``"is_init"`` says that an episode begins. What it puts out at a
        step is the value, and what it would put out at the *true* next observation, with the
        memory of all before, the next value, also at the end of an episode. The fit then goes
        over sequences (of ``sequence_length`` steps, or the whole length of the batch), each
        from the state which that run has left at its first step.

        Environments need :class:`~torchrl.envs.InitTracker`. An episode that goes on from one
        batch to the next begins the second with zero memory, unless the collector rolls out
        ``joint_policy(actors, critic)`` in an environment with the
        ``memory_transforms`` of that policy: its states are then in the data, and the run begins
        with the one at the first step.

    Example:
        >>> from torchrl.envs import VmasEnv
        >>> env = VmasEnv("simple_speaker_listener", num_envs=4)
        >>> make_critic(env)(env.reset())["state_value"].shape
        torch.Size([4, 1])
        >>> make_critic(env, input="agent_specific")(env.reset())["state_value"].shape
        torch.Size([4, 2, 1])
        >>> make_critic(env, recurrent="gru").in_keys[-2:]
        ['critic_recurrent_state', 'is_init']
    """
    check_builder(
        env,
        num_cells=num_cells,
        activation_class=activation_class,
        output_gain=output_gain,
        observation_key=observation_key,
    )
    check_groups(groups)
    if input is None:
        input = "observations" if state_key is None else "state"
    _check_arguments(input, groups, state_key, num_cells)
    _check_memory(recurrent, share_params, num_cells)
    check_counts(hidden_size=hidden_size)
    device = env.device if device is None else device
    mlp: dict[str, Any] = {
        "activation_class": activation_class,
        "layer_norm": layer_norm,
        "device": device,
    }
    memory: Any = None
    if recurrent is not None:
        memory = partial(
            add_memory,
            n_features=num_cells[-1],
            cell=recurrent,
            hidden_size=hidden_size,
            activation_class=activation_class,
            out_key=out_key,
            device=device,
        )
    if input in ("agent_specific", "own"):
        team = select_groups(read_groups(env, observation_key), groups)
        if input == "agent_specific" and state_key is None and "state" in _observations(env):
            state_key = "state"
        in_keys = [group.observation for group in team]
        state_shape: Sequence[int] = ()
        if input == "agent_specific" and state_key is not None:
            in_keys.append(state_key)
            state_shape = observation_shape(env, state_key)
        features = AgentFeatures(
            team,
            sees_team=input == "agent_specific",
            state_shape=state_shape,
            num_cells=num_cells,
            share_params=share_params,
            **mlp,
        )
        values = AgentValues(
            num_cells[-1] if recurrent is None else hidden_size,
            sum(group.n_agents or 1 for group in team),
            output_gain=output_gain,
            activation_class=activation_class,
            share_params=share_params,
            device=device,
        )
        if memory is not None:
            return memory(features, values, in_keys=in_keys, n_agents=values.n_agents)
        return TensorDictModule(PerAgentMLP(features, values), in_keys=in_keys, out_keys=[out_key])
    if input == "state":
        state_key = "state" if state_key is None else state_key
        shape = observation_shape(env, state_key)
        in_keys, event_dims, in_features = [state_key], [len(shape)], math.prod(shape)
    else:
        team = select_groups(read_groups(env, observation_key), groups)
        in_keys = [group.observation for group in team]
        event_dims = [1 if group.n_agents is None else 2 for group in team]
        in_features = team_inputs(team)
    if memory is None:
        net = CentralizedMLP(
            event_dims, in_features=in_features, out_features=1, num_cells=list(num_cells), **mlp
        )
        init_orthogonal(net.mlp, activation_class, output_gain)
        return TensorDictModule(net, in_keys=in_keys, out_keys=[out_key])
    trunk = CentralizedMLP(
        event_dims,
        in_features=in_features,
        out_features=num_cells[-1],
        num_cells=list(num_cells[:-1]),
        activate_last_layer=True,
        **mlp,
    )
    value = nn.Linear(hidden_size, 1, device=device)
    init_orthogonal(trunk.mlp, activation_class)
    init_orthogonal(value, activation_class, output_gain)
    return memory(trunk, value, in_keys=in_keys)


def _check_memory(recurrent: str | None, share_params: bool, num_cells: Sequence[int]) -> None:
    if recurrent is None:
        return
    if recurrent not in CELLS:
        raise ValueError(f"recurrent must be one of {', '.join(CELLS)} or None, got {recurrent!r}.")
    if share_params:
        raise ValueError(
            f"make_critic got recurrent={recurrent!r} and share_params=True, but agents with "
            "memory have a network each; leave share_params out."
        )
    if not num_cells:
        raise ValueError(
            f"make_critic got recurrent={recurrent!r} without num_cells, but a memory needs at "
            "least one hidden layer before it; pass its width."
        )


def _check_arguments(
    input: str,
    groups: Sequence[str] | None,
    state_key: NestedKey | None,
    num_cells: Sequence[int],
) -> None:
    if input not in CRITIC_INPUTS:
        raise ValueError(f"input must be one of {', '.join(CRITIC_INPUTS)}, got {input!r}.")
    if input == "state" and groups is not None:
        got = "state_key" if state_key is not None else "input='state'"
        raise ValueError(
            f"make_critic got both groups and {got}; pass groups to see observations, or "
            "the state alone to see the environment's state."
        )
    if input in ("observations", "own") and state_key is not None:
        raise ValueError(
            f"make_critic got input={input!r} and the state_key {state_key!r}, which that input "
            "does not see; leave it out, or pass input='state' or input='agent_specific'."
        )
    if input in ("agent_specific", "own") and not num_cells:
        raise ValueError(
            f"make_critic got input={input!r} without num_cells, but the agents' values need at "
            "least one hidden layer; pass its width."
        )


def _observations(env: EnvBase) -> list[NestedKey]:
    return list(env.full_observation_spec.keys(True, True))
