"""The initialisation of networks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torchrl.modules.models.multiagent import MultiAgentNetBase

__all__ = ["init_orthogonal"]


@torch.no_grad()
def init_orthogonal(
    net: nn.Module, activation_class: type[nn.Module], output_gain: float | None = None
) -> None:
    """Write orthogonal weights and zero biases in place; each agent of a stack draws its own.

    Recurrent cells (:class:`~torch.nn.GRU`, :class:`~torch.nn.LSTM`) get an orthogonal matrix for
    each gate, with gain 1. Each filter of a convolution is a row of its matrix.

    Args:
        net (nn.Module): linear layers and convolutions, stacked or not, and recurrent cells.
        activation_class (type of nn.Module): activation of the layers, which decides their gain.
        output_gain (float, optional): gain of the last layer. Defaults to ``None``: the gain of
            the others.

    Example:
        >>> net = nn.Linear(3, 3)
        >>> init_orthogonal(net, nn.Tanh, output_gain=1.0)
        >>> bool(torch.allclose(net.weight @ net.weight.T, torch.eye(3), atol=1e-6))
        True
    """
    stateful: Any = net.get_stateful_net() if isinstance(net, MultiAgentNetBase) else net
    layers = [layer for layer in stateful.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    hidden_gain = nn.init.calculate_gain("tanh") if activation_class is nn.Tanh else math.sqrt(2)
    for layer in layers:
        is_output = layer is layers[-1]
        gain = output_gain if is_output and output_gain is not None else hidden_gain
        one_agent = 2 if isinstance(layer, nn.Linear) else 4
        stack = layer.weight if layer.weight.ndim > one_agent else layer.weight.unsqueeze(0)
        for weight in stack:
            nn.init.orthogonal_(weight, gain)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for cell in stateful.modules():
        if isinstance(cell, nn.RNNBase):
            _init_cell(cell)


def _init_cell(cell: nn.RNNBase) -> None:
    for name, parameter in cell.named_parameters():
        if name.startswith("weight"):
            for gate in parameter.split(cell.hidden_size):
                nn.init.orthogonal_(gate)
        else:
            nn.init.zeros_(parameter)
