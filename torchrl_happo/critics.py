"""A team's critic: what it sees, and for whom it gives a value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.envs import EnvBase
from torchrl.modules import MLP, MultiAgentMLP

from torchrl_happo.initialization import init_orthogonal
from torchrl_happo.layer_norm import LayerNormMLP, MultiAgentLayerNormMLP
from torchrl_happo.specs import Group, observation_shape, read_groups, select_groups
from torchrl_happo.validation.builders import check_builder, check_groups

__all__ = ["CRITIC_INPUTS", "CentralizedMLP", "PerAgentMLP", "make_critic"]

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
    device: torch.device | str | None = None,
) -> TensorDictModule:
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
        device (torch.device or str, optional): device of the parameters. Defaults to the
            environment's.

    Returns:
        a module that reads the state, the observations or both, and writes ``out_key``.

    Raises:
        KeyError: if the environment lacks a group, its observation or the state.
        ValueError: if the observations are not vectors of the default dtype, the agents of a
            group have unlike ones, or the arguments contradict each other.

    Example:
        >>> from torchrl.envs import VmasEnv
        >>> env = VmasEnv("simple_speaker_listener", num_envs=4)
        >>> make_critic(env)(env.reset())["state_value"].shape
        torch.Size([4, 1])
        >>> make_critic(env, input="agent_specific")(env.reset())["state_value"].shape
        torch.Size([4, 2, 1])
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
    device = env.device if device is None else device
    mlp: dict[str, Any] = {
        "activation_class": activation_class,
        "layer_norm": layer_norm,
        "device": device,
    }
    if input in ("agent_specific", "own"):
        team = select_groups(read_groups(env, observation_key), groups)
        if input == "agent_specific" and state_key is None and "state" in _observations(env):
            state_key = "state"
        in_keys = [group.observation for group in team]
        state_shape: Sequence[int] = ()
        if input == "agent_specific" and state_key is not None:
            in_keys.append(state_key)
            state_shape = observation_shape(env, state_key)
        per_agent = PerAgentMLP(
            team,
            sees_team=input == "agent_specific",
            state_shape=state_shape,
            num_cells=num_cells,
            share_params=share_params,
            **mlp,
        )
        per_agent.init_orthogonal(activation_class, output_gain)
        return TensorDictModule(per_agent, in_keys=in_keys, out_keys=[out_key])
    if input == "state":
        state_key = "state" if state_key is None else state_key
        shape = observation_shape(env, state_key)
        in_keys, event_dims, in_features = [state_key], [len(shape)], math.prod(shape)
    else:
        team = select_groups(read_groups(env, observation_key), groups)
        in_keys = [group.observation for group in team]
        event_dims = [1 if group.n_agents is None else 2 for group in team]
        in_features = _team_inputs(team)
    critic = CentralizedMLP(
        event_dims, in_features=in_features, out_features=1, num_cells=list(num_cells), **mlp
    )
    init_orthogonal(critic.mlp, activation_class, output_gain)
    return TensorDictModule(critic, in_keys=in_keys, out_keys=[out_key])


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


def _team_inputs(team: Sequence[Group]) -> int:
    """Size of the concatenated observations of all agents."""
    return sum(group.n_inputs * (group.n_agents or 1) for group in team)


class CentralizedMLP(nn.Module):
    """An MLP over several inputs, flattened and concatenated.

    Args:
        event_dims (sequence of int): for each input its number of dimensions after those of the
            batch: 1 for a vector ``[*B, d]``, 2 for a group's observations ``[*B, n, d]``.

    Keyword Args:
        layer_norm (bool): whether the input and the output of each hidden layer are normalised.
            Defaults to ``False``.
        **kwargs: arguments of :class:`~torchrl.modules.MLP`.

    Example:
        >>> net = CentralizedMLP([2, 1], in_features=3 * 4 + 5, out_features=1, num_cells=[8])
        >>> net(torch.zeros(7, 3, 4), torch.zeros(7, 5)).shape
        torch.Size([7, 1])
    """

    def __init__(
        self, event_dims: Sequence[int], *, layer_norm: bool = False, **kwargs: Any
    ) -> None:
        super().__init__()
        self.event_dims = tuple(event_dims)
        self.mlp = LayerNormMLP(**kwargs) if layer_norm else MLP(**kwargs)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The output for a batch of inputs.

        Args:
            *inputs (torch.Tensor): one tensor for each of ``event_dims``.

        Returns:
            a tensor ``[*B, out_features]``.
        """
        events = zip(inputs, self.event_dims, strict=True)
        return self.mlp(torch.cat([tensor.flatten(-dims) for tensor, dims in events], dim=-1))


class PerAgentMLP(nn.Module):
    """A value for each agent of a team, whose groups may observe unlike things.

    Each group has hidden layers of its own and all agents one last layer, stacked, so that
    whoever rescales a critic's last layer (PopArt) finds it in one place.

    Args:
        team (sequence of Group): the groups.

    Keyword Args:
        sees_team (bool): whether an agent's view is its observation and the state, or its
            observation alone.
        state_shape (sequence of int): of the environment's own state. Empty: the state is the
            concatenation of all observations.
        num_cells (sequence of int): widths of the hidden layers, at least one.
        share_params (bool): whether agents share the network. Defaults to ``False``.
        layer_norm (bool): whether inputs and the output of each hidden layer are normalised.
            Defaults to ``False``.
        **kwargs: arguments of :class:`~torchrl.modules.MultiAgentMLP`.
    """

    def __init__(
        self,
        team: Sequence[Group],
        *,
        sees_team: bool,
        state_shape: Sequence[int] = (),
        num_cells: Sequence[int],
        share_params: bool = False,
        layer_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.has_agent_dim = [group.n_agents is not None for group in team]
        self.sees_team = sees_team
        self.state_dims = len(state_shape)
        n_state = math.prod(state_shape) if state_shape else _team_inputs(team)
        shared = {"centralized": False, "share_params": share_params, **kwargs}
        trunk_class = MultiAgentLayerNormMLP if layer_norm else MultiAgentMLP
        self.trunks = nn.ModuleList(
            trunk_class(
                n_agent_inputs=group.n_inputs + (n_state if sees_team else 0),
                n_agent_outputs=num_cells[-1],
                n_agents=group.n_agents or 1,
                num_cells=list(num_cells[:-1]),
                activate_last_layer=True,
                **shared,
            )
            for group in team
        )
        self.head = MultiAgentMLP(
            n_agent_inputs=num_cells[-1],
            n_agent_outputs=1,
            n_agents=sum(group.n_agents or 1 for group in team),
            num_cells=[],
            **shared,
        )

    def init_orthogonal(self, activation_class: type[nn.Module], output_gain: float) -> None:
        """Initialises all layers; see :func:`~torchrl_happo.initialization.init_orthogonal`."""
        for trunk in self.trunks:
            init_orthogonal(trunk, activation_class)
        init_orthogonal(self.head, activation_class, output_gain)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The agents' values.

        Args:
            *inputs (torch.Tensor): the observations of each group, ``[*B, n, d]`` or ``[*B, d]``,
                then the environment's state, if it is seen.

        Returns:
            a tensor ``[*B, n_total, 1]``, the agents in the order of the groups.
        """
        views = [
            tensor if has_agent_dim else tensor.unsqueeze(-2)
            for tensor, has_agent_dim in zip(inputs, self.has_agent_dim, strict=False)
        ]
        if self.sees_team:
            if self.state_dims:
                state = inputs[-1].flatten(-self.state_dims)
            else:
                state = torch.cat([view.flatten(-2) for view in views], -1)
            views = [
                torch.cat([view, state.unsqueeze(-2).expand(*view.shape[:-1], -1)], -1)
                for view in views
            ]
        features = [trunk(view) for trunk, view in zip(self.trunks, views, strict=True)]
        return self.head(torch.cat(features, -2))
