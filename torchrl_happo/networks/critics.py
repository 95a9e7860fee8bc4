"""A team's critic: its inputs, and the agents for whom it outputs a value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.envs import EnvBase
from torchrl.modules import MultiAgentMLP

from torchrl_happo.arguments import check_counts
from torchrl_happo.networks.architecture import Architecture
from torchrl_happo.networks.checks import check_builder, check_groups, check_recurrent
from torchrl_happo.networks.critic_networks import AgentFeatures, AgentValues, CentralizedMLP
from torchrl_happo.networks.observations import Entry, ObservationEncoder, encode_inputs
from torchrl_happo.networks.recurrent import CELLS, add_memory
from torchrl_happo.networks.specs import Group, read_groups, read_state, select_groups

__all__ = ["CRITIC_INPUTS", "CentralizedMLP", "make_critic"]

#: The inputs that a critic may have.
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
    observation_key: NestedKey | list[NestedKey] = "observation",
    out_key: NestedKey = "state_value",
    recurrent: str | None = None,
    hidden_size: int = 128,
    device: torch.device | str | None = None,
) -> TensorDictModule | TensorDictSequential:
    r"""Build the critic of a team.

    ====================  =====================================================  ================
    ``input``             input of the critic                                    ``out_key``
    ====================  =====================================================  ================
    ``"observations"``    the observations of all agents, concatenated           ``[*B, 1]``
    ``"state"``           the environment's own global state                     ``[*B, 1]``
    ``"agent_specific"``  the state and the agent's own observation; the state   ``[*B, n, 1]``
                          is the environment's, or else all observations
    ``"own"``             the agent's own observation alone                      ``[*B, n, 1]``
    ====================  =====================================================  ================

    The team's return is one number, so the first two write one number :math:`V(s)`, at the root.
    The others write a value for each agent, in the order of the groups; the advantage is then one
    for each agent as well, and standardised over all of them. Observations are encoded as by
    :func:`~torchrl_happo.make_actor`; where a critic outputs one value, all agents of a group share
    the convolutions of an image.

    Args:
        env (EnvBase): the environment, transforms included.

    Keyword Args:
        input (str, optional): input of the critic. Defaults to ``None``: ``"state"`` if
            ``state_key`` is given, otherwise ``"observations"``.
        groups (sequence of str, optional): groups whose observations the critic sees. Defaults to
            all groups of the environment.
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
        observation_key (NestedKey or list of NestedKey): name of the observation in the groups,
            as for :func:`~torchrl_happo.make_actor`; of a dict, all entries but ``"action_mask"``.
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
        ValueError: if a network cannot read an observation, the agents of a group have unlike
            ones, or the arguments contradict each other.

    .. note::
        A critic with memory is not called while data is collected. At the beginning of an update
        it is run over the batch, step by step, with its parameters of that moment. Its hidden
        state is zero at the first step and wherever ``"is_init"`` marks the begin of an episode.
        Its output at a step is the value. Its output at the *true* next observation, with the
        hidden state of all steps before, is the next value, also at the end of an episode. The fit
        then goes over sequences (of ``sequence_length`` steps, or the whole length of the batch),
        each from the hidden state that the run has left at its first step.

        Environments need :class:`~torchrl.envs.InitTracker`. An episode that continues from one
        batch to the next begins the second with a zero hidden state, unless the collector rolls
        out ``joint_policy(actors, critic)`` in an environment with the ``memory_transforms`` of
        that policy: the data then holds the hidden states, and the run begins with the first.

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
    _check_arguments(input, groups, state_key, num_cells, recurrent)
    check_recurrent("make_critic", recurrent, CELLS, share_params)
    check_counts(hidden_size=hidden_size)
    device = env.device if device is None else device
    architecture = Architecture(num_cells, activation_class, layer_norm, device)
    team: list[Group] = []
    if input != "state":
        team = select_groups(read_groups(env, observation_key, "action_mask"), groups)
    has_state = "state" in env.full_observation_spec.keys(True, True)
    if state_key is None and (input == "state" or (input == "agent_specific" and has_state)):
        state_key = "state"
    state = None if state_key is None else read_state(env, state_key)
    in_keys = [key for group in team for key in group.in_keys]
    if state is not None:
        in_keys.append(state.key)
    n_agents: int | None = None
    features: nn.Module
    values: nn.Module
    if input in ("agent_specific", "own"):
        n_agents = sum(group.n_agents or 1 for group in team)
        sees_team = input == "agent_specific"
        features = AgentFeatures(
            team, architecture, sees_team=sees_team, state=state, share_params=share_params
        )
        values = MultiAgentMLP(
            num_cells[-1] if recurrent is None else hidden_size,
            1,
            n_agents,
            num_cells=[],
            centralized=False,
            share_params=share_params,
            device=device,
        )
        architecture.initialize(values, output_gain)
        if recurrent is None:
            return TensorDictModule(AgentValues(features, values), in_keys, [out_key])
    else:
        inputs = [(group.entries, group.n_agents) for group in team]
        inputs += [] if state is None else [((state,), None)]
        encoders = [ObservationEncoder(entries, architecture) for entries, _ in inputs]
        if recurrent is None:
            net = _centralized_mlp(inputs, encoders, architecture)
            architecture.initialize(net, output_gain)
            return TensorDictModule(encode_inputs(net, encoders), in_keys, [out_key])
        features = _centralized_mlp(inputs, encoders, architecture, only_hidden_layers=True)
        values = nn.Linear(hidden_size, 1, device=device)
        architecture.initialize(features)
        architecture.initialize(values, output_gain)
        features = encode_inputs(features, encoders)
    return add_memory(
        features,
        values,
        in_keys=in_keys,
        n_features=num_cells[-1],
        n_agents=n_agents,
        cell=recurrent,
        hidden_size=hidden_size,
        activation_class=activation_class,
        out_key=out_key,
        device=device,
    )


def _centralized_mlp(
    inputs: Sequence[tuple[Sequence[Entry], int | None]],
    encoders: Sequence[ObservationEncoder],
    architecture: Architecture,
    *,
    only_hidden_layers: bool = False,
) -> CentralizedMLP:
    """Build the MLP over all encoded inputs, each with its number of agents, if it has any."""
    event_dims, in_features = [], 0
    for (entries, n_agents), encoder in zip(inputs, encoders, strict=True):
        # A plain state of several dimensions reaches the network as it is.
        own_dims = len(entries[0].shape) if encoder.is_identity else 1
        event_dims.append(own_dims if n_agents is None else own_dims + 1)
        in_features += encoder.n_features * (n_agents or 1)
    num_cells = list(architecture.num_cells)
    return CentralizedMLP(
        event_dims,
        in_features=in_features,
        out_features=num_cells.pop() if only_hidden_layers else 1,
        num_cells=num_cells,
        activate_last_layer=only_hidden_layers,
        activation_class=architecture.activation_class,
        layer_norm=architecture.layer_norm,
        device=architecture.device,
    )


def _check_arguments(
    input: str,
    groups: Sequence[str] | None,
    state_key: NestedKey | None,
    num_cells: Sequence[int],
    recurrent: str | None,
) -> None:
    """Refuse arguments that contradict each other."""
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
    if recurrent is not None and not num_cells:
        raise ValueError(
            f"make_critic got recurrent={recurrent!r} without num_cells, but a memory needs at "
            "least one hidden layer before it; pass its width."
        )
