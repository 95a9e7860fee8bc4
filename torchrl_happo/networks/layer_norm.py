"""Networks that normalise the input of each of their layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrl.modules import MLP, MultiAgentMLP

from torchrl_happo.arguments import check_counts
from torchrl_happo.versions import single_network

__all__ = ["LayerNormMLP", "MultiAgentLayerNormMLP"]


class LayerNormMLP(nn.Sequential):
    """An MLP with a layer normalisation of its input and one behind each activation.

    :class:`~torchrl.modules.MLP` can normalise before an activation, but neither behind it nor the
    input, which is what the authors of MAPPO and of HAPPO do.

    Args:
        in_features (int): size of the input.
        out_features (int or sequence of int): size of the output, or shape.

    Keyword Args:
        activate_last_layer (bool): whether activation and normalisation follow the last layer.
            Defaults to ``False``.
        device (torch.device or str, optional): device of the parameters. Defaults to torch's.
        **kwargs: other arguments of :class:`~torchrl.modules.MLP`, such as ``num_cells`` and
            ``activation_class``; a ``layer_class`` must be a kind of linear layer.

    Example:
        >>> LayerNormMLP(3, 2, num_cells=[4], activation_class=nn.ReLU)
        LayerNormMLP(
          (0): LayerNorm((3,), eps=1e-05, elementwise_affine=True, bias=True)
          (1): Linear(in_features=3, out_features=4, bias=True)
          (2): ReLU()
          (3): LayerNorm((4,), eps=1e-05, elementwise_affine=True, bias=True)
          (4): Linear(in_features=4, out_features=2, bias=True)
        )
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | Sequence[int],
        *,
        activate_last_layer: bool = False,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> None:
        check_counts(in_features=in_features)
        kwargs.update(activate_last_layer=activate_last_layer, device=device)
        mlp = MLP(in_features, out_features, **kwargs)
        layers: list[nn.Module] = []
        for layer in mlp:
            if isinstance(layer, nn.Linear):
                layers.append(nn.LayerNorm(layer.in_features, device=device))
                n_outputs = layer.out_features
            layers.append(layer)
        if activate_last_layer:
            layers.append(nn.LayerNorm(n_outputs, device=device))
        super().__init__(*layers)
        self.out_features = out_features

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return outputs ``[*B, out_features]`` of inputs ``[*B, d]``, concatenated if several."""
        x = torch.cat(inputs, -1) if len(inputs) > 1 else inputs[0]
        layers = iter(self)
        for layer in layers:
            behind = next(layers, None) if isinstance(layer, nn.LayerNorm) else None
            # A subclass of a linear layer, a user's own, has a forward pass of its own.
            if _is_affine(layer, nn.LayerNorm) and _is_affine(behind, nn.Linear):
                x = _linear_of_normalized(x, layer, behind)
            else:
                x = layer(x) if behind is None else behind(layer(x))
        return _shaped(x, self.out_features)


def _is_affine(layer: nn.Module | None, kind: type[nn.Module]) -> TypeGuard[Any]:
    """Return whether a layer is of this very class, with a weight and a bias."""
    return type(layer) is kind and layer.bias is not None


def _shaped(x: Tensor, out_features: int | Sequence[int]) -> Tensor:
    return x if isinstance(out_features, int) else x.unflatten(-1, out_features)


def _linear_of_normalized(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    r"""Compute a linear layer behind a normalisation, whose scale and shift it absorbs.

    .. math:: W (\gamma \odot n + \beta) + b = (W \, \mathrm{diag}(\gamma)) n + (W \beta + b)

    The gradients of scale and shift then follow from those of a matrix. Computed one after the
    other, the layers would sum over the batch for them once more, and differentiate as far as the
    network's input.
    """
    normalized = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
    bias = torch.addmv(linear.bias, linear.weight, norm.bias)
    return F.linear(normalized, linear.weight * norm.weight, bias)


class MultiAgentLayerNormMLP(MultiAgentMLP):
    """A :class:`~torchrl.modules.MultiAgentMLP` of :class:`LayerNormMLP`, with their arguments.

    The size of the input must be known: a layer normalisation cannot wait for the first data.

    Networks that are not shared are evaluated as batched matrix products, one for each layer.
    ``torch.vmap`` computes the same, but takes several times as long where a batch is small, as in
    a rollout.
    """

    def _build_single_net(self, *, device: Any, **kwargs: Any) -> LayerNormMLP:
        check_counts(n_agent_inputs=self.n_agent_inputs)
        return LayerNormMLP(
            self.n_agent_inputs * (self.n_agents if self.centralized else 1),
            self.n_agent_outputs,
            depth=self.depth,
            num_cells=self.num_cells,
            activation_class=self.activation_class,
            device=device,
            **kwargs,
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the agents' outputs ``[*B, n, d_out]`` from their inputs ``[*B, n, d_in]``."""
        if self.share_params or self.centralized:
            return super().forward(*inputs)
        x = torch.cat(inputs, -1) if len(inputs) > 1 else inputs[0]
        if x.ndim < 2 or x.shape[-2] != self.n_agents:
            raise ValueError(
                f"The input of a stack of {self.n_agents} networks has shape {tuple(x.shape)}, but "
                f"must be [*B, {self.n_agents}, d], a row for each agent."
            )
        x = x.movedim(-2, 0)
        batch_size = x.shape[1:-1]
        x = x.reshape(self.n_agents, batch_size.numel(), x.shape[-1])
        with_parameters = set(self.params.keys())
        for name, layer in single_network(self).named_children():
            if name not in with_parameters:
                x = layer(x)
                continue
            if not (_is_affine(layer, nn.LayerNorm) or _is_affine(layer, nn.Linear)):
                each = self.vmap_func_module(layer, (0, 0), randomness=self.vmap_randomness)
                x = each(self.params[name], x)
                continue
            weight, bias = self.params[name, "weight"], self.params[name, "bias"].unsqueeze(1)
            if isinstance(layer, nn.Linear):
                x = torch.baddbmm(bias, x, weight.mT)
            else:
                x = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
                x = torch.addcmul(bias, x, weight.unsqueeze(1))
        x = x.reshape(self.n_agents, *batch_size, x.shape[-1]).movedim(0, -2)
        return _shaped(x, self.n_agent_outputs)
