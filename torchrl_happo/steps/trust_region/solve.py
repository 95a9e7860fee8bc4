r"""The trust-region step of one agent, as pure functions from top to bottom.

Maximise the surrogate :math:`L` without leaving a ball of radius :math:`\delta` around the present
policy (Schulman et al., 2015, https://arxiv.org/abs/1502.05477; HATRPO repeats it agent by agent,
Kuba et al., 2022, https://arxiv.org/abs/2109.11251):

.. math::
    \max_\theta L(\theta) \quad \text{such that} \quad
    E[D_{KL}(\pi_{\theta_0} \| \pi_\theta)] \le \delta.

To second order the divergence is :math:`\frac{1}{2} (\theta - \theta_0)^\top F (\theta - \theta_0)`
with the Fisher information matrix :math:`F`. With the gradient :math:`g` of the surrogate,

1. :func:`fisher_vector_product` multiplies by :math:`F` without forming it,
2. :func:`conjugate_gradient` solves :math:`(F + \lambda I) x = g`,
3. :func:`step_length` stretches :math:`x` to the boundary of the ball,
4. a line search shortens the step until the true divergence and the true surrogate agree,

and :func:`step_within_trust_region` does one after the other. It sees the policy through two
things alone: its :class:`LocalModel`, which is the surrogate's gradient and the product with
:math:`F`, and a function from parameters to the true surrogate and divergence.
:func:`trust_region_step` makes both from a network that enters only through ``distribution_fn``,
from named parameters to the policy's distribution at the batch. Nothing is modified in place and,
with ``line_search="batched"``, nothing is read back from the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.distributions import Distribution

from torchrl_happo.distributed import Average, own_mean
from torchrl_happo.masked import masked_mean
from torchrl_happo.policy.distributions import kl_divergence
from torchrl_happo.steps.minibatches import draw_rows
from torchrl_happo.steps.trust_region.line_search import (
    Evaluate,
    batched_line_search,
    sequential_line_search,
)
from torchrl_happo.steps.trust_region.linearize import linearizable
from torchrl_happo.steps.trust_region.natural_gradient import (
    Iteration,
    MatVec,
    conjugate_gradient,
    fisher_vector_product,
    flatten,
    gradient,
    iterate,
    step_length,
    unflatten,
)

__all__ = [
    "LocalModel",
    "TrustRegion",
    "TrustRegionResult",
    "batched_line_search",
    "conjugate_gradient",
    "fisher_vector_product",
    "sequential_line_search",
    "step_length",
    "step_within_trust_region",
    "trust_region_step",
]

Params: TypeAlias = Mapping[str, Tensor]

_LINE_SEARCHES = {"sequential": sequential_line_search, "batched": batched_line_search}


@dataclass(frozen=True)
class TrustRegion:
    r"""Settings of the trust-region step.

    Args:
        max_kl (float): bound :math:`\delta` of the mean divergence, in nats. Defaults to ``0.01``.
        damping (float): :math:`\lambda`, added to the diagonal of the Fisher matrix.
            Defaults to ``0.1``.
        cg_iterations (int): iterations of conjugate gradient. Defaults to ``10``.
        cg_tolerance (float): conjugate gradient stops once the squared norm of the residual is
            below this. Defaults to ``1e-10``.
        backtrack_factor (float): ratio of a step fraction to the one tried before, in (0, 1).
            Defaults to ``0.8``.
        max_backtracks (int): number of step fractions to try, the full step included.
            Defaults to ``10``.
        accept_ratio (float): least accepted ratio of actual to expected improvement, in [0, 1).
            Defaults to ``0.5``.
        fisher_fraction (float): share of the batch's rows, drawn at random, that the Fisher matrix
            is averaged over, in (0, 1]. Defaults to ``1.0``.
        line_search (str): ``"sequential"`` tries one fraction after the other and stops at the
            first that is acceptable, which reads one flag per try; ``"batched"`` evaluates all at
            once without reading anything, for accelerators. Defaults to ``"sequential"``.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> from torchrl_happo.steps.trust_region.solve import TrustRegion
        >>> TrustRegion(max_kl=0.005).damping
        0.1
        >>> TrustRegion(max_kl=0.0)
        Traceback (most recent call last):
        ...
        ValueError: max_kl must be positive and finite, got 0.0.
    """

    max_kl: float = 0.01
    damping: float = 0.1
    cg_iterations: int = 10
    cg_tolerance: float = 1e-10
    backtrack_factor: float = 0.8
    max_backtracks: int = 10
    accept_ratio: float = 0.5
    fisher_fraction: float = 1.0
    line_search: Literal["sequential", "batched"] = "sequential"

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            ("max_kl", 0 < self.max_kl < math.inf, "positive and finite"),
            ("damping", 0 <= self.damping < math.inf, "non-negative and finite"),
            ("cg_iterations", self.cg_iterations >= 1, "at least 1"),
            ("cg_tolerance", self.cg_tolerance >= 0, "non-negative"),
            ("backtrack_factor", 0 < self.backtrack_factor < 1, "between 0 and 1, exclusively"),
            ("max_backtracks", self.max_backtracks >= 1, "at least 1"),
            ("accept_ratio", 0 <= self.accept_ratio < 1, "at least 0 and less than 1"),
            ("fisher_fraction", 0 < self.fisher_fraction <= 1, "greater than 0 and at most 1"),
            ("line_search", self.line_search in _LINE_SEARCHES, "'sequential' or 'batched'"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}.")


class LocalModel(NamedTuple):
    """What a trust-region step knows of the policy near the present parameters.

    Attributes:
        surrogate (Tensor): the surrogate at the present parameters, a scalar.
        gradient (Tensor): its gradient, one vector.
        fisher_product (callable): from a vector to its product with the Fisher matrix.
        num_samples (Tensor or float): samples that surrogate and gradient are means over.
            Defaults to ``1``; it matters where processes with unlike numbers step together.
        num_fisher_samples (Tensor or float): samples that the Fisher matrix is a mean over.
    """

    surrogate: Tensor
    gradient: Tensor
    fisher_product: MatVec
    num_samples: Tensor | float = 1.0
    num_fisher_samples: Tensor | float = 1.0

    def common(self, average: Average) -> LocalModel:
        """The model of all processes that step together."""
        surrogate, gradient = average([self.surrogate, self.gradient], self.num_samples)

        def fisher_product(vector: Tensor) -> Tensor:
            return average([self.fisher_product(vector)], self.num_fisher_samples)[0]

        return self._replace(surrogate=surrogate, gradient=gradient, fisher_product=fisher_product)


class TrustRegionResult(NamedTuple):
    """What happened in a trust-region step, as scalar tensors.

    Attributes:
        success (Tensor): whether the parameters were moved.
        step_fraction (Tensor): accepted fraction of the full step, 0 without success.
        kl (Tensor): mean divergence of the last step tried, which is the accepted one on success.
        surrogate_before (Tensor): the surrogate at the old parameters.
        improvement (Tensor): increase of the surrogate by the last step tried.
        expected_improvement (Tensor): what the gradient promised for that step.
        gradient_norm (Tensor): Euclidean norm of the surrogate's gradient.
        curvature (Tensor): :math:`x^T (F + damping I) x` along the search direction.
        cg_residual (Tensor): norm of the residual of conjugate gradient relative to the gradient's.
    """

    success: Tensor
    step_fraction: Tensor
    kl: Tensor
    surrogate_before: Tensor
    improvement: Tensor
    expected_improvement: Tensor
    gradient_norm: Tensor
    curvature: Tensor
    cg_residual: Tensor


def trust_region_step(
    distribution_fn: Callable[[Params, Tensor | None], Distribution],
    surrogate_fn: Callable[[Distribution], Tensor],
    params: Params,
    settings: TrustRegion | None = None,
    *,
    valid: Tensor | None = None,
    batch_ndim: int | None = None,
    generator: torch.Generator | None = None,
    average: Average = own_mean,
) -> tuple[dict[str, Tensor], TrustRegionResult]:
    r"""One trust-region step from ``params``.

    .. math::
        \theta = \theta_0 + \beta^k \sqrt{\frac{2 \delta}{x^\top (F + \lambda I) x}} \, x,
        \quad x \approx (F + \lambda I)^{-1} g

    with the smallest :math:`k` that the line search accepts. If there is none, if the gradient is
    zero or not finite, or if the curvature is not positive, the parameters are returned as they
    were, bit for bit.

    Args:
        distribution_fn (callable): from parameters named as in ``params``, and the indices of the
            rows wanted (``None``: all), to the policy's distribution at these rows of the batch.
            Rows are entries of the first dimension: samples, or whole sequences.
        surrogate_fn (callable): from the distribution at the whole batch to the scalar to increase.
        params (mapping of str to Tensor): the present parameters. Those that do not require a
            gradient are held fixed.
        settings (TrustRegion, optional): defaults to ``TrustRegion()``.

    Keyword Args:
        valid (Tensor, optional): booleans of the shape of ``batch_ndim`` leading dimensions;
            divergence and Fisher matrix are averaged over the ``True`` ones. Defaults to ``None``:
            all count.
        batch_ndim (int, optional): number of leading dimensions of the distribution that count
            samples. Defaults to those of ``batch_shape``.
        generator (torch.Generator, optional): draws the rows if ``fisher_fraction < 1``.
        average (callable): see :func:`step_within_trust_region`.

    Returns:
        the new parameters, detached, and the :class:`TrustRegionResult`.

    Example:
        >>> import torch
        >>> from torch.distributions import Categorical
        >>> from torchrl_happo.steps.trust_region.solve import TrustRegion, trust_region_step
        >>> advantage = torch.tensor([1.0, -1.0])
        >>> params, result = trust_region_step(
        ...     lambda params, rows: Categorical(logits=params["logits"]),
        ...     lambda dist: (dist.probs * advantage).sum(),
        ...     {"logits": torch.zeros(1, 2, requires_grad=True)},
        ...     TrustRegion(max_kl=0.01, damping=0.0),
        ... )
        >>> params["logits"], result.kl
        (tensor([[ 0.1414, -0.1414]]), tensor(0.0100))
    """
    settings = TrustRegion() if settings is None else settings
    leaves = {name: p.detach().requires_grad_() for name, p in params.items() if p.requires_grad}
    theta = flatten(leaves.values()).detach()

    def differentiable_policy(rows: Tensor | None) -> Distribution:
        with torch.enable_grad(), linearizable():
            return distribution_fn({**params, **leaves}, rows)

    old = differentiable_policy(None)
    with torch.enable_grad():
        surrogate = surrogate_fn(old)
    sample, counted = old, valid
    if settings.fisher_fraction < 1:
        rows = draw_rows(old.batch_shape[0], valid, settings.fisher_fraction, generator)
        sample, counted = differentiable_policy(rows), None if valid is None else valid[rows]
    model = LocalModel(
        surrogate.detach(),
        flatten(gradient([surrogate], leaves.values())),
        fisher_vector_product(sample, leaves, valid=counted, batch_ndim=batch_ndim),
        _count(old, valid, batch_ndim),
        _count(sample, counted, batch_ndim),
    )

    def evaluate(flat: Tensor) -> tuple[Tensor, Tensor]:
        new = distribution_fn({**params, **unflatten(flat, leaves)}, None)
        kl = kl_divergence(old, new, batch_ndim=batch_ndim)
        return surrogate_fn(new), masked_mean(kl, valid)

    moved, result = step_within_trust_region(theta, model, evaluate, settings, average=average)
    return {**params, **unflatten(moved, leaves)}, result


def step_within_trust_region(
    theta: Tensor,
    model: LocalModel,
    evaluate: Evaluate,
    settings: TrustRegion,
    *,
    average: Average = own_mean,
    iteration: Iteration = iterate,
) -> tuple[Tensor, TrustRegionResult]:
    r"""One trust-region step from ``theta``, for a policy that is known by its local model.

    .. math::
        \theta' = \theta + \beta^k \sqrt{\frac{2 \delta}{x^\top (F + \lambda I) x}} \, x,
        \quad x \approx (F + \lambda I)^{-1} g

    Args:
        theta (Tensor): the present parameters, one vector.
        model (LocalModel): surrogate, gradient and Fisher-vector product at ``theta``.
        evaluate (callable): from parameters, as a vector, to surrogate and mean divergence.
        settings (TrustRegion): bound, damping, iterations, line search.

    Keyword Args:
        average (callable): from means over this process's samples, and their number, to those over
            the samples of all processes that take the step together (see
                        ``torchrl_happo.distributed.Average``). Surrogate, gradient, divergence and
            products pass through it. Defaults to this process's own.
        iteration (callable): see :func:`conjugate_gradient`.

    Returns:
        the new parameters, which are ``theta`` bit for bit if no step was accepted, and the
        :class:`TrustRegionResult`.

    Example:
        >>> import torch
        >>> from torchrl_happo.steps.trust_region.solve import (
        ...     LocalModel,
        ...     TrustRegion,
        ...     step_within_trust_region,
        ... )
        >>> theta = torch.zeros(2)
        >>> moved, result = step_within_trust_region(
        ...     theta,
        ...     LocalModel(theta.sum(), torch.ones(2), lambda v: v),
        ...     lambda theta: (theta.sum(), 0.499 * theta.square().sum()),
        ...     TrustRegion(max_kl=0.01, damping=0.0),
        ... )
        >>> moved
        tensor([0.1000, 0.1000])
    """
    model = model.common(average)
    g = model.gradient
    # A gradient that is not finite is replaced by zero: every step below is then zero as well.
    target = torch.where(g.isfinite().all(), g, 0)
    x, residual = conjugate_gradient(
        model.fisher_product,
        target,
        damping=settings.damping,
        num_iterations=settings.cg_iterations,
        residual_tolerance=settings.cg_tolerance,
        iteration=iteration,
    )
    product = target - residual  # (F + damping I) x, for free
    length, usable = step_length(x, product, settings.max_kl)
    step = torch.where(usable, length * x, 0)
    with torch.no_grad():
        search = _LINE_SEARCHES[settings.line_search](
            evaluate,
            theta,
            step,
            model.surrogate,
            step.dot(target),
            max_kl=settings.max_kl,
            backtrack_factor=settings.backtrack_factor,
            max_backtracks=settings.max_backtracks,
            accept_ratio=settings.accept_ratio,
            common=lambda means: average(means, model.num_samples),
        )
        moved = torch.where(search.success, theta + search.fraction * step, theta)
    return moved, TrustRegionResult(
        success=search.success,
        step_fraction=search.fraction,
        kl=search.kl,
        surrogate_before=model.surrogate,
        improvement=search.surrogate - model.surrogate,
        expected_improvement=search.expected,
        gradient_norm=g.norm(),
        curvature=x.dot(product),
        cg_residual=residual.norm() / target.norm().clamp_min(torch.finfo(target.dtype).tiny),
    )


def _count(dist: Distribution, valid: Tensor | None, batch_ndim: int | None) -> Tensor | float:
    """Number of samples that means are taken over."""
    return dist.batch_shape[:batch_ndim].numel() if valid is None else valid.sum()
