"""The networks of a critic: over all inputs at once, or one for each agent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrl.modules import MLP, MultiAgentMLP

from torchrl_happo.networks.initialization import init_orthogonal
from torchrl_happo.networks.layer_norm import LayerNormMLP, MultiAgentLayerNormMLP
from torchrl_happo.networks.specs import Group

__all__ = ["AgentFeatures", "AgentValues", "CentralizedMLP", "PerAgentMLP", "team_inputs"]


def team_inputs(team: Sequence[Group]) -> int:
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


class AgentFeatures(nn.Module):
    """The hidden layers of each agent of a team, whose groups may observe unlike things.

    Args:
        team (sequence of Group): the groups.

    Keyword Args:
        sees_team (bool): whether an agent's view is its observation and the state, or its
            observation alone.
        state_shape (sequence of int): of the environment's own state. Empty: the state is the
            concatenation of all observations.
        num_cells (sequence of int): widths of the hidden layers, at least one.
        activation_class (type of nn.Module): behind each of them.
        share_params (bool): whether agents of a group share the layers. Defaults to ``False``.
        layer_norm (bool): whether inputs and the output of each hidden layer are normalised.
            Defaults to ``False``.
        device (torch.device or str, optional): of the parameters.
    """

    def __init__(
        self,
        team: Sequence[Group],
        *,
        sees_team: bool,
        state_shape: Sequence[int] = (),
        num_cells: Sequence[int],
        activation_class: type[nn.Module],
        share_params: bool = False,
        layer_norm: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.has_agent_dim = [group.n_agents is not None for group in team]
        self.sees_team = sees_team
        self.state_dims = len(state_shape)
        n_state = math.prod(state_shape) if state_shape else team_inputs(team)
        trunk_class = MultiAgentLayerNormMLP if layer_norm else MultiAgentMLP
        self.trunks = nn.ModuleList(
            trunk_class(
                n_agent_inputs=group.n_inputs + (n_state if sees_team else 0),
                n_agent_outputs=num_cells[-1],
                n_agents=group.n_agents or 1,
                num_cells=list(num_cells[:-1]),
                activation_class=activation_class,
                activate_last_layer=True,
                centralized=False,
                share_params=share_params,
                device=device,
            )
            for group in team
        )
        for trunk in self.trunks:
            init_orthogonal(trunk, activation_class)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The agents' features.

        Args:
            *inputs (torch.Tensor): the observations of each group, ``[*B, n, d]`` or ``[*B, d]``,
                then the environment's state, if it is seen.

        Returns:
            a tensor ``[*B, n_total, num_cells[-1]]``, the agents in the order of the groups.
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
        return torch.cat([trunk(view) for trunk, view in zip(self.trunks, views, strict=True)], -2)


class AgentValues(nn.Module):
    """The last layer of each agent of a team, stacked.

    Whoever rescales a critic's last layer (PopArt) finds that of all agents in one place.

    Args:
        n_features (int): of each agent.
        n_agents (int): agents of the team.

    Keyword Args:
        output_gain (float): gain of the initialisation.
        activation_class (type of nn.Module): before this layer.
        share_params (bool): whether agents share the layer. Defaults to ``False``.
        device (torch.device or str, optional): of the parameters.
    """

    def __init__(
        self,
        n_features: int,
        n_agents: int,
        *,
        output_gain: float,
        activation_class: type[nn.Module],
        share_params: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.n_agents = n_agents
        self.layer = MultiAgentMLP(
            n_agent_inputs=n_features,
            n_agent_outputs=1,
            n_agents=n_agents,
            num_cells=[],
            centralized=False,
            share_params=share_params,
            device=device,
        )
        init_orthogonal(self.layer, activation_class, output_gain)

    def forward(self, features: Tensor) -> Tensor:
        """Values ``[*B, n_agents, 1]`` from features ``[*B, n_agents, n_features]``."""
        return self.layer(features)


class PerAgentMLP(nn.Module):
    """A value for each agent of a team.

    Args:
        features (AgentFeatures): the hidden layers.
        values (AgentValues): the last one.
    """

    def __init__(self, features: AgentFeatures, values: AgentValues) -> None:
        super().__init__()
        self.features = features
        self.values = values

    def forward(self, *inputs: Tensor) -> Tensor:
        """Values ``[*B, n_agents, 1]`` from what :class:`AgentFeatures` reads."""
        return self.values(self.features(*inputs))
