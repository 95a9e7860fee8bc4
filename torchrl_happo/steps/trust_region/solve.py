r"""The mathematics of a trust-region step, from top to bottom.

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
4. a line search shortens the step until the true divergence and the true surrogate agree.

:func:`find_direction` does the first two, :func:`take_step` the others. They see the policy through
two things alone: its :class:`.local_model.LocalModel`, which is the surrogate's gradient and the
product with :math:`F`, and a function from parameters to the true surrogate and divergence. Nothing
is modified in place and, with ``line_search="batched"``, nothing is read back from the device.
:class:`~torchrl_happo.steps.TrustRegionStep` makes both from a network.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchrl_happo.distributed import Average, own_mean
from torchrl_happo.steps.trust_region.line_search import LINE_SEARCHES, Evaluate
from torchrl_happo.steps.trust_region.local_model import LocalModel
from torchrl_happo.steps.trust_region.natural_gradient import (
    conjugate_gradient,
    step_length,
)

__all__ = ["Direction", "TrustRegionResult", "find_direction", "take_step"]


class Direction(NamedTuple):
    r"""The natural gradient, along which a step is taken.

    Attributes:
        x (Tensor): :math:`x \approx (F + \lambda I)^{-1} g`, one vector.
        product (Tensor): :math:`(F + \lambda I) x`.
        target (Tensor): the gradient :math:`g`; zero where it is not finite.
        residual (Tensor): ``target - product``.
        damping (float): :math:`\lambda`.
    """

    x: Tensor
    product: Tensor
    target: Tensor
    residual: Tensor
    damping: float

    @property
    def curvature(self) -> Tensor:
        r"""The number :math:`q = x^\top (F + \lambda I) x`, which is :math:`g^\top F^{-1} g`.

        For a radius :math:`\delta` the full step promises the gain :math:`\sqrt{2 \delta q}`, by
        which a common budget can compare the agents of a team.
        """
        return self.x.dot(self.product)

    def gain(self, max_kl: float) -> Tensor:
        """Return the improvement of the surrogate that the full step promises."""
        length, _ = step_length(self.x, self.product, max_kl)
        return length * self.x.dot(self.target)

    def divergence(self, max_kl: float) -> Tensor:
        """Return the divergence of the full step to second order: the radius, less damping."""
        length, _ = step_length(self.x, self.product, max_kl)
        return length.square() * (self.curvature - self.damping * self.x.dot(self.x)) / 2


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


def find_direction(
    model: LocalModel,
    *,
    damping: float,
    cg_iterations: int,
    cg_tolerance: float,
) -> Direction:
    r"""Solve :math:`(F + \lambda I) x = g` for the natural gradient :math:`x`.

    Args:
        model (LocalModel): gradient and Fisher-vector product at the present parameters.

    Keyword Args:
        damping (float): :math:`\lambda`.
        cg_iterations (int): iterations of conjugate gradient.
        cg_tolerance (float): squared norm of the residual at which they stop.

    Returns:
        Direction: the natural gradient; zero if the gradient is zero or not finite.

    Example:
        >>> model = LocalModel(torch.tensor(0.0), torch.ones(2), lambda v: 4 * v)
        >>> find_direction(model, damping=0.0, cg_iterations=2, cg_tolerance=0.0).x
        tensor([0.2500, 0.2500])
    """
    g = model.gradient
    # A gradient that is not finite is replaced by zero: every step below is then zero as well.
    target = torch.where(g.isfinite().all(), g, 0)
    x, residual = conjugate_gradient(
        model.fisher_product,
        target,
        damping=damping,
        num_iterations=cg_iterations,
        residual_tolerance=cg_tolerance,
    )
    # The residual is g - (F + damping I) x, so that this product costs nothing.
    return Direction(x, target - residual, target, residual, damping)


def take_step(
    theta: Tensor,
    model: LocalModel,
    direction: Direction,
    evaluate: Evaluate,
    *,
    max_kl: float,
    line_search: str,
    backtrack_factor: float,
    max_backtracks: int,
    accept_ratio: float,
    average: Average = own_mean,
) -> tuple[Tensor, TrustRegionResult]:
    r"""Step from ``theta`` along the natural gradient, as far as the trust region allows.

    .. math::
        \theta' = \theta + \beta^k \sqrt{\frac{2 \delta}{x^\top (F + \lambda I) x}} \, x

    Args:
        theta (Tensor): the present parameters, one vector.
        model (LocalModel): the policy at ``theta``.
        direction (Direction): :math:`x`.
        evaluate (callable): from parameters, as a vector, to surrogate and mean divergence.

    Keyword Args:
        max_kl (float): the radius :math:`\delta`, in nats.
        line_search (str): ``"sequential"`` or ``"batched"``.
        backtrack_factor (float): :math:`\beta`.
        max_backtracks (int): number of fractions to try, the full step included.
        accept_ratio (float): least accepted ratio of actual to expected improvement.
        average (callable): from means over this process's samples, and their number, to those over
            the samples of all processes that step together. Defaults to this process's own.

    Returns:
        the new parameters, which are ``theta`` bit for bit if no step was accepted, and the
        :class:`TrustRegionResult`.

    Example:
        >>> theta = torch.zeros(2)
        >>> model = LocalModel(theta.sum(), torch.ones(2), lambda v: v)
        >>> moved, result = take_step(
        ...     theta,
        ...     model,
        ...     find_direction(model, damping=0.0, cg_iterations=10, cg_tolerance=1e-10),
        ...     lambda theta: (theta.sum(), 0.499 * theta.square().sum()),
        ...     max_kl=0.01,
        ...     line_search="sequential",
        ...     backtrack_factor=0.8,
        ...     max_backtracks=10,
        ...     accept_ratio=0.5,
        ... )
        >>> moved
        tensor([0.1000, 0.1000])
    """
    x, product, target, residual, _ = direction
    # Without a positive and finite curvature there is no boundary to go to: no step at all.
    length, usable = step_length(x, product, max_kl)
    step = torch.where(usable, length * x, 0)
    with torch.no_grad():
        search = LINE_SEARCHES[line_search](
            evaluate,
            theta,
            step,
            model.surrogate,
            step.dot(target),
            max_kl=max_kl,
            backtrack_factor=backtrack_factor,
            max_backtracks=max_backtracks,
            accept_ratio=accept_ratio,
            common=lambda means: average(means, model.num_samples),
        )
        # A selection, not a sum: theta + 0 would turn -0.0 into 0.0.
        moved = torch.where(search.success, theta + search.fraction * step, theta)
    return moved, TrustRegionResult(
        success=search.success,
        step_fraction=search.fraction,
        kl=search.kl,
        surrogate_before=model.surrogate,
        improvement=search.surrogate - model.surrogate,
        expected_improvement=search.expected,
        gradient_norm=model.gradient.norm(),
        curvature=x.dot(product),
        cg_residual=residual.norm() / target.norm().clamp_min(torch.finfo(target.dtype).tiny),
    )
