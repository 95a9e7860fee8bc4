"""Natural gradients: products with the Fisher matrix, equations in it, and the length of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributions import Distribution

from torchrl_happo.policy.fisher import distribution_parameters, fisher_product

__all__ = [
    "conjugate_gradient",
    "fisher_vector_product",
    "flatten",
    "gradient",
    "masked_samples",
    "step_length",
    "unflatten",
]

MatVec: TypeAlias = Callable[[Tensor], Tensor]


def fisher_vector_product(
    dist: Distribution,
    parameters: Mapping[str, Tensor],
    *,
    valid: Tensor | None = None,
    batch_ndim: int | None = None,
) -> MatVec:
    r"""Multiplication by the Fisher information matrix of a policy.

    .. math::
        F v = \frac{1}{N} \sum_{s \text{ valid}} J_s^\top M_s J_s v

    with the Jacobian :math:`J_s` of the distribution's parameters with respect to the network's,
    and the distribution's own Fisher matrix :math:`M_s`. At the policy that the data is drawn
    from this is the Hessian of the mean divergence, exactly (Schraudolph, 2002): the curvature of
    the network is multiplied by the divergence's gradient, which is zero there.

    The network is linearised once. :math:`J^\top` is its backward pass; that is linear in what it
    is given, so differentiating it once more, with the graph kept, gives :math:`J`. A product
    costs these two passes and no forward pass.

    Args:
        dist (Distribution): the policy at the batch, with its graph; built within
            ``linearizable``, which some networks need.
        parameters (mapping of str to Tensor): the tensors that ``dist`` was computed from; those
            that it does not depend on have zero products.

    Keyword Args:
        valid (Tensor, optional): booleans, the samples to average over. Defaults to ``None``: all.
        batch_ndim (int, optional): number of leading dimensions that count samples. Defaults to
            ``len(dist.batch_shape)``.

    Returns:
        callable: from a flat vector, in the order of ``parameters``, to its product.

    Example:
        >>> import torch
        >>> from torch.distributions import Normal
        >>> from torchrl_happo.steps.trust_region.natural_gradient import fisher_vector_product
        >>> loc = torch.zeros(4, requires_grad=True)
        >>> matvec = fisher_vector_product(Normal(loc, torch.full((4,), 0.5)), {"loc": loc})
        >>> matvec(torch.tensor([1.0, 0.0, 0.0, 2.0]))
        tensor([1., 0., 0., 2.])
    """
    outputs = distribution_parameters(dist)
    shape = dist.batch_shape[:batch_ndim]
    # Not numel(), which would make a number of a symbol.
    count = math.prod(shape) if valid is None else valid.sum().clamp_min(1)
    with torch.enable_grad():
        # Not by the keyword, which torch's compiler does not know.
        cotangents = [torch.zeros_like(output).requires_grad_() for output in outputs]
        pullback = gradient(outputs, parameters.values(), cotangents, create_graph=True)

    def matvec(vector: Tensor) -> Tensor:
        tangents = gradient(pullback, cotangents, unflatten(vector, parameters).values())
        products = fisher_product(dist, tangents)
        means = [masked_samples(product, valid) / count for product in products]
        return flatten(gradient(outputs, parameters.values(), means))

    return matvec


def conjugate_gradient(
    matvec: MatVec,
    b: Tensor,
    *,
    damping: float = 0.0,
    num_iterations: int = 10,
    residual_tolerance: float = 1e-10,
) -> tuple[Tensor, Tensor]:
    r"""Approximate solution of :math:`(A + \lambda I) x = b` for a positive definite matrix.

    From :math:`x = 0, r = p = b`, each iteration is (Hestenes and Stiefel, 1952)

    .. math::
        \alpha = \frac{r^\top r}{p^\top (A + \lambda I) p}, \quad x \leftarrow x + \alpha p, \quad
        r' = r - \alpha (A + \lambda I) p, \quad p \leftarrow r' + \frac{r'^\top r'}{r^\top r} p.

    The number of products is fixed, so that nothing is read back from the device: iterations after
    :math:`r^\top r` has fallen below the tolerance, or along a direction whose curvature is not
    positive, leave the solution as it is.

    Args:
        matvec (callable): multiplication by :math:`A`.
        b (Tensor): the right-hand side, a vector. Zero gives zero.

    Keyword Args:
        damping (float): :math:`\lambda`. Defaults to ``0.0``.
        num_iterations (int): number of iterations. Defaults to ``10``.
        residual_tolerance (float): tolerance of :math:`r^\top r`. Defaults to ``1e-10``.

    Returns:
        the solution :math:`x` and the residual :math:`r = b - (A + \lambda I) x`.

    Example:
        >>> import torch
        >>> from torchrl_happo.steps.trust_region.natural_gradient import conjugate_gradient
        >>> a = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> conjugate_gradient(lambda v: a @ v, torch.tensor([3.0, 4.0]), num_iterations=2)[0]
        tensor([1.0000, 1.0000])
    """
    x, r, p, rr = torch.zeros_like(b), b, b, b.dot(b)
    active = rr > 0
    for _ in range(num_iterations):
        product = torch.add(matvec(p), p, alpha=damping)
        curvature = p.dot(product)
        active = active & (curvature > 0)
        alpha = rr / curvature
        x = torch.where(active, torch.addcmul(x, alpha, p), x)
        r = torch.where(active, torch.addcmul(r, alpha, product, value=-1), r)
        rr_next = r.dot(r)
        p = torch.where(active, torch.addcmul(r, rr_next / rr, p), p)
        rr, active = rr_next, active & (rr_next >= residual_tolerance)
    return x, r


def step_length(x: Tensor, product: Tensor, max_kl: float) -> tuple[Tensor, Tensor]:
    r"""Length of the step along ``x`` whose quadratic divergence is ``max_kl``.

    .. math::
        \frac{1}{2} \beta^2 x^\top A x = \delta \quad \Rightarrow \quad
        \beta = \sqrt{\frac{2 \delta}{x^\top A x}}

    Args:
        x (Tensor): the direction.
        product (Tensor): :math:`A x`.
        max_kl (float): :math:`\delta`.

    Returns:
        the length, and whether there is one: ``False``, with length 0, unless the curvature
        :math:`x^\top A x` is positive and finite.

    Example:
        >>> import torch
        >>> from torchrl_happo.steps.trust_region.natural_gradient import step_length
        >>> step_length(torch.tensor([2.0]), torch.tensor([1.0]), max_kl=0.01)
        (tensor(0.1000), tensor(True))
    """
    curvature = x.dot(product)
    usable = (curvature > 0) & curvature.isfinite()
    length = (2 * max_kl / torch.where(usable, curvature, 1)).sqrt()
    return torch.where(usable, length, 0), usable


def gradient(
    outputs: Iterable[Tensor],
    inputs: Iterable[Tensor],
    cotangents: Iterable[Tensor] | None = None,
    *,
    create_graph: bool = False,
) -> list[Tensor]:
    """Gradient with zeros where there is no path from an input to an output; keeps the graph."""
    inputs, outputs = list(inputs), list(outputs)
    weights = [torch.ones_like(o) for o in outputs] if cotangents is None else list(cotangents)
    paths = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    if not inputs or not paths:
        return [torch.zeros_like(i) for i in inputs]
    gradients = torch.autograd.grad(
        [output for output, _ in paths],
        inputs,
        [weight for _, weight in paths],
        retain_graph=True,
        create_graph=create_graph,
        materialize_grads=True,
    )
    return list(gradients)


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """One vector of all elements, in order."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors] or [torch.zeros(0)])


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`flatten`: views of the vector with names and shapes of ``like``."""
    parts = vector.split([tensor.numel() for tensor in like.values()])
    shapes = zip(like.items(), parts, strict=True)
    return {name: part.view(tensor.shape) for (name, tensor), part in shapes}


def masked_samples(values: Tensor, valid: Tensor | None) -> Tensor:
    """Return zeros in place of samples that are not valid."""
    if valid is None:
        return values
    return torch.where(valid.reshape(valid.shape + (1,) * (values.ndim - valid.ndim)), values, 0)
