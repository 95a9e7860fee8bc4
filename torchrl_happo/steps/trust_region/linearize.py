"""Networks whose backward pass can be differentiated, and cheaply so.

The Fisher-vector product differentiates a network's backward pass with respect to what that pass is
given (:func:`~torchrl_happo.steps.trust_region.natural_gradient.fisher_vector_product`). Some of
torch's fused kernels have no such derivative. Two others cost more than all the rest of a small
network: that of layer normalisation comes with derivatives that are not wanted here, and that of a
recurrent network over packed sequences fills a tensor of the size of the batch at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

__all__ = ["linearizable"]


@contextmanager
def linearizable() -> Iterator[None]:
    r"""Forward passes in this context have a backward pass :math:`w \mapsto J^\top w` to linearise.

    Its derivative in :math:`w` is exact. Its derivative in the point at which :math:`J` is taken is
    *not*: a Hessian must not be computed from such a graph.

    Example:
        >>> import torch
        >>> from torchrl_happo.steps.trust_region.linearize import linearizable
        >>> x = torch.randn(5, 3, requires_grad=True)
        >>> with linearizable():
        ...     y = torch.nn.LayerNorm(3)(x)
        >>> w = torch.zeros_like(y, requires_grad=True)
        >>> (pullback,) = torch.autograd.grad(y, x, w, create_graph=True)
        >>> (pushforward,) = torch.autograd.grad(pullback, w, torch.ones_like(x))
        >>> torch.allclose(
        ...     pushforward, torch.zeros(5, 3), atol=1e-5
        ... )  # a shift of x changes nothing
        True
    """
    recurrent = torch.backends.cudnn.flags(enabled=False)
    attention = sdpa_kernel(SDPBackend.MATH)
    with recurrent, attention, _LinearizableLayers():
        yield


class _LinearizableLayers(TorchFunctionMode):
    """Evaluates layer normalisations and packed sequences by the functions of this module."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.layer_norm:
            return _layer_norm(*args, **(kwargs or {}))
        if func in (torch.gru, torch.lstm) and _is_packed(*args):
            return _packed_sequences(func, *args)
        return func(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _LayerNorm.apply(input, list(normalized_shape), weight, bias, eps)


class _LayerNorm(torch.autograd.Function):
    """Layer normalisation whose backward pass is differentiable in the incoming gradient alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shape: list[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd, (x - mean) * rstd)
        ctx.shape = shape
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [ctx.needs_input_grad[index] for index in (0, 2, 3)]
        dx, dw, db = _LayerNormPullback.apply(gradient, ctx.shape, wanted, *ctx.saved_tensors)
        return dx, None, dw, db, None


class _LayerNormPullback(torch.autograd.Function):
    r"""The backward pass of a layer normalisation, a linear map of the incoming gradient.

    With :math:`n = (x - \mu) / \sigma` and the projection :math:`P` that takes the mean, and the
    part along :math:`n`, out of a vector, it is :math:`g \mapsto P(w g) / \sigma`. As :math:`P` is
    symmetric, its transpose is :math:`v \mapsto w \, P(v) / \sigma`: the same fused kernel again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gradient: Tensor,
        shape: list[int],
        wanted: list[bool],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        normed: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, mean, rstd, normed)
        ctx.shape = shape
        return torch.ops.aten.native_layer_norm_backward(
            gradient, x, shape, mean, rstd, weight, bias, wanted
        )

    @staticmethod
    def backward(
        ctx: Any, dx: Tensor | None, dw: Tensor | None, db: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, normed = ctx.saved_tensors
        transposed = torch.zeros_like(x)
        if dx is not None:
            transposed, _, _ = torch.ops.aten.native_layer_norm_backward(
                dx, x, ctx.shape, mean, rstd, None, None, [True, False, False]
            )
            if weight is not None:
                transposed = transposed * weight
        if dw is not None:
            transposed = torch.addcmul(transposed, normed, dw)
        if db is not None:
            transposed = transposed + db
        return transposed, *[None] * 8


def _is_packed(data: Tensor, batch_sizes: object, *rest: Any) -> bool:
    """Whether a recurrent network runs forward, without dropout, along packed sequences."""
    has_bias, _, dropout, training, bidirectional = rest[2:]
    dropped = dropout and training
    return isinstance(batch_sizes, Tensor) and has_bias and not (dropped or bidirectional)


def _packed_sequences(
    kind: Callable[..., Any],
    data: Tensor,
    batch_sizes: Tensor,
    state: Tensor | tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    has_bias: bool,
    n_layers: int,
    *_: Any,
) -> tuple[Tensor, ...]:
    """Evaluate a GRU or an LSTM along packed sequences, cell by cell.

    Sequences are sorted by length, so that the first ``batch_sizes[t]`` of them have a step ``t``.
    Torch takes each step as a slice of ``data``, whose derivative is a tensor of the size of
    ``data``; all steps cut at once have one derivative in all, a concatenation.

    Args:
        kind (callable): :func:`torch.gru` or :func:`torch.lstm`.
        data (Tensor): inputs, all sequences' first steps first, ``[sum(batch_sizes), n_inputs]``.
        batch_sizes (Tensor): numbers of sequences that have a step, on the CPU.
        state (Tensor or tuple of Tensor): first states, ``[n_layers, n_sequences, hidden_size]``.
        weights (sequence of Tensor): four tensors a layer, as :class:`torch.nn.GRU` holds them.
        has_bias (bool): always ``True`` here.
        n_layers (int): number of layers.

    Returns:
        outputs ``[sum(batch_sizes), hidden_size]``, then the last states.
    """
    cell: Callable[..., Any] = torch.gru_cell if kind is torch.gru else torch.lstm_cell
    sizes: list[int] = batch_sizes.tolist()
    states = (state,) if isinstance(state, Tensor) else state
    lasts = []
    for layer in range(n_layers):
        own = [s[layer] for s in states]
        outputs, ended = [], []
        for x in data.split(sizes):
            if len(x) < len(own[0]):
                cut = [s.split([len(x), len(s) - len(x)]) for s in own]
                own = [running for running, _ in cut]
                ended.append([done for _, done in cut])
            new = cell(x, own if len(own) > 1 else own[0], *weights[4 * layer : 4 * layer + 4])
            own = [new] if isinstance(new, Tensor) else list(new)
            outputs.append(own[0])
        data = torch.cat(outputs)
        # The shortest sequences ended first and stand last.
        lasts.append([torch.cat(parts) for parts in zip(own, *reversed(ended), strict=True)])
    return data, *(torch.stack(last) for last in zip(*lasts, strict=True))
