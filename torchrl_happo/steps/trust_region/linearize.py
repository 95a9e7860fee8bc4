"""Networks whose backward pass can be differentiated, and cheaply so.

The Fisher-vector product differentiates a network's backward pass with respect to what that pass is
given (:func:`~torchrl_happo.steps.trust_region.natural_gradient.fisher_vector_product`). Some of
torch's fused kernels have no such derivative, and that of layer normalisation costs more than all
the rest of a small network, as it comes with derivatives that are not wanted here.
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
    with recurrent, attention, _LinearizableLayerNorm():
        yield


class _LinearizableLayerNorm(TorchFunctionMode):
    """Puts :class:`_LayerNorm` in the place of :func:`torch.nn.functional.layer_norm`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.layer_norm:
            return _layer_norm(*args, **(kwargs or {}))
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
