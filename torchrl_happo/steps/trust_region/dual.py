r"""The dual of a trust region with one linear constraint, solved in closed form.

Constrained policy optimisation (Achiam et al., 2017, https://arxiv.org/abs/1705.10528) asks for
the step :math:`d` that gains most,

.. math::
    \max_d \, g^\top d \quad \text{such that} \quad
    b^\top d + c \le 0, \quad \tfrac12 d^\top H d \le \delta,

with the gradients :math:`g` of the surrogate and :math:`b` of the cost's, and the excess :math:`c`
of the cost over its bound. Its solution is :math:`d = (H^{-1} g - \nu H^{-1} b) / \lambda`. What
it needs of vectors are the numbers :math:`q = g^\top H^{-1} g`, :math:`r = -g^\top H^{-1} b` and
:math:`s = b^\top H^{-1} b`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Case", "Combination", "solve_dual"]

_NO_SLOPE = 1e-8


class Case:
    """The limits of a step, as the metric ``case`` reports them."""

    RECOVERY = 0
    """The bound cannot be kept in the trust region: the cost falls as far as it may."""
    RESTORING = 1
    """The bound is exceeded, and the trust region reaches back to it."""
    BOTH = 2
    """The bound is kept, and may limit the step beside the trust region."""
    INSIDE = 3
    """The bound is kept all over the trust region."""
    FLAT = 4
    """The cost does not change with the parameters, and the bound is kept."""


class Combination(NamedTuple):
    r"""How a step is made of two natural gradients: :math:`d = \alpha H^{-1} g - \beta H^{-1} b`.

    Attributes:
        gain (Tensor): :math:`\alpha`, a scalar; 0 in recovery.
        retreat (Tensor): :math:`\beta`, a scalar.
        case (Tensor): one of :class:`Case`, a scalar.
        multiplier (Tensor): :math:`\lambda` of the trust region; infinite in recovery.
        price (Tensor): :math:`\nu` of the cost.
    """

    gain: Tensor
    retreat: Tensor
    case: Tensor
    multiplier: Tensor
    price: Tensor


def solve_dual(
    q: Tensor, r: Tensor, s: Tensor, excess: Tensor, max_kl: Tensor | float
) -> Combination:
    r"""Return the best step within the trust region and the bound of the cost.

    Args:
        q (Tensor): :math:`g^\top H^{-1} g`, a scalar.
        r (Tensor): :math:`-g^\top H^{-1} b`.
        s (Tensor): :math:`b^\top H^{-1} b`.
        excess (Tensor): :math:`c`, cost less its bound, in units of the cost's surrogate.
        max_kl (Tensor or float): :math:`\delta`, in nats.

    Returns:
        Combination: without a slope of surrogate and cost, no step at all.

    Example:
        >>> one = torch.ones(())
        >>> gain, retreat, case, *_ = solve_dual(one, -one, 2 * one, -0.5 * one, 0.5)
        >>> case.item(), round(gain.item(), 6), round(retreat.item(), 6)
        (2, 1.322876, 0.411438)
    """
    tiny = torch.finfo(q.dtype).tiny
    radius = 2 * max_kl
    keeps, has_slope = excess < 0, s > _NO_SLOPE
    slope = torch.where(has_slope, s, 1)
    room = radius - excess.square() / slope
    # Where the bound binds, lambda is that of a problem with one dimension less.
    rest = (q - r.square() / slope).clamp_min(0)
    # The dual has two pieces, which meet where the price is zero: below r/c the bound binds if the
    # cost keeps it, above r/c if not. On the bound itself take an excess just below it.
    keeps_or_meets = excess <= 0
    meeting = r / torch.where(excess == 0, -tiny, excess)
    has_lower_piece = meeting > 0
    edge = meeting.clamp_min(0)
    zero, far = torch.zeros_like(q), torch.full_like(q, float("inf"))
    lower, upper = (zero, edge), (edge, far)
    binding = [torch.where(keeps_or_meets, *pair) for pair in zip(lower, upper, strict=True)]
    others = [torch.where(keeps_or_meets, *pair) for pair in zip(upper, lower, strict=True)]
    # Where the two gradients are parallel, what is left of the gain is rounding: it is not followed
    # any further than this.
    least = torch.finfo(q.dtype).eps ** 0.5 * (q / radius).sqrt() + tiny
    bound = (rest / room.clamp_min(tiny)).sqrt().clamp(*binding).maximum(least)
    free = (q / radius).sqrt().clamp(*others).maximum(least)
    value_bound = -(rest / bound + room * bound) / 2 - r * excess / slope
    value_free = -(q / free + radius * free) / 2
    value_bound = torch.where(has_lower_piece | ~keeps_or_meets, value_bound, -far)
    value_free = torch.where(has_lower_piece | keeps_or_meets, value_free, -far)
    multiplier = torch.where(value_bound > value_free, bound, free)
    price = (multiplier * excess - r).clamp_min(0) / slope

    recovers = has_slope & ~keeps & (room < 0)
    ignores = keeps & (~has_slope | (room < 0))
    multiplier = torch.where(ignores | ~has_slope, (q / radius).sqrt(), multiplier)
    price = torch.where(ignores | ~has_slope, 0, price)
    gain = torch.where(multiplier > 0, 1 / multiplier.clamp_min(tiny), 0)
    retreat = price * gain
    gain = torch.where(recovers, 0, gain)
    retreat = torch.where(recovers, (radius / slope).sqrt(), retreat)
    case = torch.where(keeps, Case.BOTH, Case.RESTORING)
    case = torch.where(keeps & (room < 0), Case.INSIDE, case)
    case = torch.where(keeps & ~has_slope, Case.FLAT, case)
    case = torch.where(recovers, Case.RECOVERY, case)
    multiplier = torch.where(recovers, float("inf"), multiplier)
    return Combination(gain, retreat, case, multiplier, torch.where(recovers, retreat, price))
