"""The choices that all networks of one builder share: layers, activation, initialisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchrl.modules import MLP, MultiAgentMLP

from torchrl_happo.networks.initialization import init_orthogonal
from torchrl_happo.networks.layer_norm import LayerNormMLP, MultiAgentLayerNormMLP

__all__ = ["Architecture"]


@dataclass(frozen=True)
class Architecture:
    """Builds the networks of an actor or a critic alike.

    Attributes:
        num_cells (sequence of int): widths of the hidden layers.
        activation_class (type of nn.Module): activation of the hidden layers.
        layer_norm (bool): whether the input and the output of each hidden layer are normalised.
        device (torch.device or str or None): device of the parameters.
        init (str): ``"orthogonal"``, or ``"torch"`` for torch's own. Defaults to ``"orthogonal"``.

    Example:
        >>> import torch
        >>> architecture = Architecture((8,), nn.Tanh, layer_norm=False, device=None)
        >>> architecture.mlp(4, 2)(torch.zeros(5, 4)).shape
        torch.Size([5, 2])
        >>> architecture.mlp(4, 2, n_agents=3)(torch.zeros(5, 3, 4)).shape
        torch.Size([5, 3, 2])
        >>> architecture.hidden_layers(4)(torch.zeros(5, 4)).shape
        torch.Size([5, 8])
    """

    num_cells: Sequence[int]
    activation_class: type[nn.Module]
    layer_norm: bool
    device: torch.device | str | None
    init: str = "orthogonal"

    def mlp(
        self, n_inputs: int, n_outputs: int, n_agents: int | None = None, **kwargs: Any
    ) -> nn.Module:
        """Build an MLP, or a stack of one MLP for each agent.

        Args:
            n_inputs (int): size of an agent's input.
            n_outputs (int): size of an agent's output.
            n_agents (int, optional): size of the agent dimension. Defaults to ``None``: the
                inputs have none.
            **kwargs: arguments of :class:`~torchrl.modules.MLP`, and ``share_params`` of a stack.
        """
        kwargs = {"num_cells": self.num_cells, **kwargs}
        kwargs["num_cells"] = list(kwargs["num_cells"])
        kwargs.update(activation_class=self.activation_class, device=self.device)
        if n_agents is None:
            kwargs.pop("share_params", None)
            single = LayerNormMLP if self.layer_norm else MLP
            return single(in_features=n_inputs, out_features=n_outputs, **kwargs)
        stack = MultiAgentLayerNormMLP if self.layer_norm else MultiAgentMLP
        kwargs = {"share_params": False, **kwargs}
        return stack(n_inputs, n_outputs, n_agents, centralized=False, **kwargs)

    def hidden_layers(self, n_inputs: int, n_agents: int | None = None, **kwargs: Any) -> nn.Module:
        """Build the hidden layers alone, of which there is at least one."""
        *num_cells, n_features = self.num_cells
        return self.mlp(
            n_inputs, n_features, n_agents, num_cells=num_cells, activate_last_layer=True, **kwargs
        )

    def initialize(self, net: nn.Module, output_gain: float | None = None) -> None:
        """Initialise a network in place; see :func:`init_orthogonal`."""
        if self.init == "orthogonal":
            init_orthogonal(net, self.activation_class, output_gain)
