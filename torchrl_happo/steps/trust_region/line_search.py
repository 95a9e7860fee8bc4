"""Backtracking line searches along the direction of a trust-region step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "LINE_SEARCHES",
    "Common",
    "Evaluate",
    "LineSearch",
    "OneByOne",
    "batched_line_search",
    "sequential_line_search",
]

#: From parameters, as a vector, to the surrogate and the mean divergence.
Evaluate: TypeAlias = Callable[[Tensor], tuple[Tensor, ...]]

#: From such numbers of this process to those of all that search together.
Common: TypeAlias = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class OneByOne:
    """An :data:`Evaluate` that is called for one vector at a time, such as compiled code."""

    evaluate: Evaluate

    def __call__(self, theta: Tensor) -> tuple[Tensor, ...]:
        """Return surrogate and mean divergence."""
        return self.evaluate(theta)


class LineSearch(NamedTuple):
    """Outcome of a line search: scalars of the accepted step or, failing that, of the last tried.

    Attributes:
        success (Tensor): whether a step was accepted.
        fraction (Tensor): the accepted fraction of the full step, 0 if there is none.
        surrogate (Tensor): surrogate at the last step tried.
        kl (Tensor): mean divergence of the last step tried.
        expected (Tensor): improvement that the gradient promised for the last step tried.
    """

    success: Tensor
    fraction: Tensor
    surrogate: Tensor
    kl: Tensor
    expected: Tensor


def sequential_line_search(
    evaluate: Evaluate,
    theta: Tensor,
    step: Tensor,
    surrogate_before: Tensor,
    expected: Tensor,
    *,
    max_kl: float,
    backtrack_factor: float = 0.8,
    max_backtracks: int = 10,
    accept_ratio: float = 0.5,
    common: Common = list,
) -> LineSearch:
    r"""Backtracking line search that stops at the first acceptable step.

    The fractions :math:`c = 1, \beta, \beta^2, \dots` of the full step :math:`d` are tried in turn;
    :math:`\theta = \theta_0 + c d` is accepted if

    .. math::
        D_{KL} < \delta, \qquad
        L(\theta) - L(\theta_0) > 0, \qquad
        \frac{L(\theta) - L(\theta_0)}{c \, g^\top d} > \rho.

    A step whose divergence or surrogate is not finite is rejected. Reads one flag per try back from
    the device.

    Args:
        evaluate (callable): from parameters, as a vector, to surrogate and mean divergence.
        theta (Tensor): the present parameters :math:`\theta_0`.
        step (Tensor): the full step :math:`d`.
        surrogate_before (Tensor): the surrogate at ``theta``.
        expected (Tensor): first-order improvement :math:`g^\top d` of the full step.

    Keyword Args:
        max_kl (float): bound :math:`\delta` of the divergence.
        backtrack_factor (float): :math:`\beta`. Defaults to ``0.8``.
        max_backtracks (int): number of fractions to try, 1 included. Defaults to ``10``.
        accept_ratio (float): :math:`\rho`. Defaults to ``0.5``.
        common (callable): from the surrogate and divergence of this process to those of all that
            take the step together, see :mod:`torchrl_happo.distributed`. Defaults to ``list``:
            alone.

    Returns:
        LineSearch: the outcome.

    Example:
        >>> import torch
        >>> from torchrl_happo.steps.trust_region.line_search import sequential_line_search
        >>> search = sequential_line_search(
        ...     lambda x: (x.sum(), x.square().sum() / 2),
        ...     torch.zeros(1),
        ...     torch.ones(1),
        ...     torch.tensor(0.0),
        ...     torch.tensor(1.0),
        ...     max_kl=0.4,
        ... )
        >>> search.fraction, search.kl
        (tensor(0.8000), tensor(0.3200))
    """
    for fraction in _fractions(theta, backtrack_factor, max_backtracks):
        surrogate, kl = common(evaluate(theta + fraction * step))
        promised = fraction * expected
        success = _is_acceptable(surrogate - surrogate_before, promised, kl, max_kl, accept_ratio)
        if success:
            break
    return LineSearch(success, torch.where(success, fraction, 0), surrogate, kl, promised)


def batched_line_search(
    evaluate: Evaluate,
    theta: Tensor,
    step: Tensor,
    surrogate_before: Tensor,
    expected: Tensor,
    *,
    max_kl: float,
    backtrack_factor: float = 0.8,
    max_backtracks: int = 10,
    accept_ratio: float = 0.5,
    common: Common = list,
) -> LineSearch:
    """The result of :func:`sequential_line_search`, with all steps evaluated at once.

    The candidates are one batch of parameters (:func:`torch.vmap`) and the first acceptable one is
    selected by tensor operations. Networks that cannot be vectorised, such as
    :class:`torch.nn.GRU`, and compiled code are evaluated candidate by candidate, still without
    reading anything back from the device. It has the arguments and the result of the sequential
    search.
    """
    fractions = _fractions(theta, backtrack_factor, max_backtracks)
    candidates = theta + fractions.unsqueeze(-1) * step
    surrogates, kls = _evaluate_all(evaluate, candidates)
    surrogates, kls = common([surrogates, kls])
    promised = fractions * expected
    accepted = _is_acceptable(surrogates - surrogate_before, promised, kls, max_kl, accept_ratio)
    success = accepted.any()
    last_tried = torch.where(success, accepted.int().argmax(), max_backtracks - 1)
    fraction, surrogate, kl, promise = (
        values.take(last_tried) for values in (fractions, surrogates, kls, promised)
    )
    return LineSearch(success, torch.where(success, fraction, 0), surrogate, kl, promise)


def _evaluate_all(evaluate: Evaluate, candidates: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(evaluate, OneByOne):
        with suppress(RuntimeError):
            surrogates, kls = torch.vmap(evaluate)(candidates)
            return surrogates, kls
    outcomes = [evaluate(candidate) for candidate in candidates]
    surrogates, kls = (torch.stack(values) for values in zip(*outcomes, strict=True))
    return surrogates, kls


def _fractions(theta: Tensor, backtrack_factor: float, max_backtracks: int) -> Tensor:
    # Made on the device: a list would have to be copied there, and waited for.
    powers = torch.arange(max_backtracks, dtype=torch.float64, device=theta.device)
    return (backtrack_factor**powers).to(theta.dtype)


def _is_acceptable(
    improvement: Tensor, expected: Tensor, kl: Tensor, max_kl: float, accept_ratio: float
) -> Tensor:
    """The three conditions; the ratio implies an improvement where one is promised at all.

    Without a promise, rounding must not pass for an improvement. Comparisons with NaN are false,
    an infinite improvement needs a test of its own.
    """
    enough = (improvement > accept_ratio * expected) & improvement.isfinite()
    return (expected > 0) & enough & (kl < max_kl)


#: The line searches by the names of the setting.
LINE_SEARCHES = {"sequential": sequential_line_search, "batched": batched_line_search}
