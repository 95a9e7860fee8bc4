"""The networks of a critic: over all inputs at once, or one for each agent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrl.modules import MLP

from torchrl_happo.networks.architecture import Architecture
from torchrl_happo.networks.layer_norm import LayerNormMLP
from torchrl_happo.networks.observations import Entry, ObservationEncoder
from torchrl_happo.networks.specs import Group

__all__ = ["AgentFeatures", "AgentValues", "CentralizedMLP"]


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
        """Return the output for a batch of inputs.

        Args:
            *inputs (torch.Tensor): one tensor for each of ``event_dims``.

        Returns:
            a tensor ``[*B, out_features]``.
        """
        events = zip(inputs, self.event_dims, strict=True)
        return self.mlp(torch.cat([tensor.flatten(-dims) for tensor, dims in events], dim=-1))


class AgentFeatures(nn.Module):
    """The hidden layers of each agent of a team, whose groups may have unlike observations.

    Args:
        team (sequence of Group): the groups.
        architecture (Architecture): the hidden layers, at least one.

    Keyword Args:
        sees_team (bool): whether an agent sees its observation and the state, or its observation
            alone.
        state (Entry, optional): the environment's own state. Defaults to ``None``: the state is
            the concatenation of all observations.
        share_params (bool): whether agents of a group share the layers. Defaults to ``False``.
    """

    def __init__(
        self,
        team: Sequence[Group],
        architecture: Architecture,
        *,
        sees_team: bool,
        state: Entry | None = None,
        share_params: bool = False,
    ) -> None:
        super().__init__()
        self.has_agent_dim = [group.n_agents is not None for group in team]
        self.sees_team = sees_team
        encoders = [
            ObservationEncoder(
                group.entries, architecture, n_agents=group.n_agents, share_params=share_params
            )
            for group in team
        ]
        self.encoders: Any = nn.ModuleList(encoders)
        sizes = [encoder.n_features for encoder in encoders]
        n_state = sum(size * (group.n_agents or 1) for size, group in zip(sizes, team, strict=True))
        self.state_encoder = None
        if state is not None:
            self.state_encoder = ObservationEncoder([state], architecture)
            n_state = self.state_encoder.n_features
        self.hidden_layers = nn.ModuleList(
            architecture.hidden_layers(
                size + (n_state if sees_team else 0), group.n_agents or 1, share_params=share_params
            )
            for size, group in zip(sizes, team, strict=True)
        )
        for layers in self.hidden_layers:
            architecture.initialize(layers)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the agents' features.

        Args:
            *inputs (torch.Tensor): the entries of each group, ``[*B, n, *shape]`` or
                ``[*B, *shape]``, then the environment's state, if it is seen.

        Returns:
            a tensor ``[*B, n_total, num_cells[-1]]``, the agents in the order of the groups.
        """
        remaining, views = list(inputs), []
        for encoder, has_agent_dim in zip(self.encoders, self.has_agent_dim, strict=True):
            count = len(encoder.entries)
            view = encoder(*remaining[:count])
            views.append(view if has_agent_dim else view.unsqueeze(-2))
            del remaining[:count]
        if self.sees_team:
            if self.state_encoder is not None:
                state = self.state_encoder(*remaining)
            else:
                state = torch.cat([view.flatten(-2) for view in views], -1)
            views = [
                torch.cat([view, state.unsqueeze(-2).expand(*view.shape[:-1], -1)], -1)
                for view in views
            ]
        pairs = zip(self.hidden_layers, views, strict=True)
        return torch.cat([layers(view) for layers, view in pairs], -2)


class AgentValues(nn.Module):
    """A value for each agent of a team: its features, then the last layer of each agent.

    The last layers of all agents are one stack, so that PopArt rescales them in one place.

    Args:
        features (AgentFeatures): the hidden layers.
        values (nn.Module): the stack of last layers.
    """

    def __init__(self, features: AgentFeatures, values: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.values = values

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return values ``[*B, n_agents, 1]`` from the inputs of :class:`AgentFeatures`."""
        return self.values(self.features(*inputs))
