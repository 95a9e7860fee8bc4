"""Networks that normalise what each of their layers sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrl.modules import MLP, MultiAgentMLP

from torchrl_happo.arguments import check_counts

__all__ = ["LayerNormMLP", "MultiAgentLayerNormMLP"]


class LayerNormMLP(nn.Sequential):
    """An MLP with a layer normalisation of its input and one behind each activation.

    :class:`~torchrl.modules.MLP` can normalise before an activation, but neither behind it nor the
    input, which is what the authors of MAPPO and of HAPPO do.

    Args:
        in_features (int): size of the input.
        out_features (int or sequence of int): size of the output, or shape.

    Keyword Args:
        activate_last_layer (bool): whether activation and normalisation follow the last layer too.
            Defaults to ``False``.
        device (torch.device or str, optional): of the parameters. Defaults to torch's.
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
        """The outputs ``[*B, out_features]`` of inputs ``[*B, d]``, side by side if several."""
        x = torch.cat(inputs, -1) if len(inputs) > 1 else inputs[0]
        layers = iter(self)
        for layer in layers:
            behind = next(layers, None) if isinstance(layer, nn.LayerNorm) else None
            # What is more than a linear layer, a user's own, has a forward pass of its own, too.
            if _is_affine(layer, nn.LayerNorm) and _is_affine(behind, nn.Linear):
                x = _linear_of_normalized(x, layer, behind)
            else:
                x = layer(x) if behind is None else behind(layer(x))
        return _shaped(x, self.out_features)


def _is_affine(layer: nn.Module | None, kind: type[nn.Module]) -> TypeGuard[Any]:
    """Whether a layer is of this very kind, with a weight and a bias."""
    return type(layer) is kind and layer.bias is not None


def _shaped(x: Tensor, out_features: int | Sequence[int]) -> Tensor:
    return x if isinstance(out_features, int) else x.unflatten(-1, out_features)


def _linear_of_normalized(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    r"""A linear layer behind a normalisation, whose scale and shift it takes over.

    .. math:: W (\gamma \odot n + \beta) + b = (W \, \mathrm{diag}(\gamma)) n + (W \beta + b)

    Their gradients then come from those of a matrix. Taken one after the other, the layers would
    add up the batch for them once more, and go back as far as the network's input.
    """
    normalized = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
    bias = torch.addmv(linear.bias, linear.weight, norm.bias)
    return F.linear(normalized, linear.weight * norm.weight, bias)


class MultiAgentLayerNormMLP(MultiAgentMLP):
    """A :class:`~torchrl.modules.MultiAgentMLP` of :class:`LayerNormMLP`; takes what the two take.

    The size of the input must be known: a layer normalisation cannot wait for the first data.

    Networks that are not shared are evaluated as batched matrix products, one for each layer. That
    is what ``torch.vmap`` makes of them, too, in several times as long where a batch is small, as
    in a rollout.
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
        """The outputs of all agents ``[*B, n, d_out]`` from their inputs ``[*B, n, d_in]``."""
        if self.share_params or self.centralized:
            return super().forward(*inputs)
        x = self._pre_forward_check(torch.cat(inputs, -1) if len(inputs) > 1 else inputs[0])
        x = x.movedim(-2, 0)
        batch_size = x.shape[1:-1]
        x = x.reshape(self.n_agents, batch_size.numel(), x.shape[-1])
        with_parameters = set(self.params.keys())
        for name, layer in self._empty_net.named_children():
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
