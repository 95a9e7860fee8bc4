"""How numbers are written for a reader: in a line, in a cell of a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def short(value: float, digits: int = 3) -> str:
    """Writes a number with so many significant digits, or with all of those before its point.

    Example:
        >>> [short(value) for value in (0.0171, -4.4231, 68.51, 2735.3)]
        ['0.0171', '-4.42', '68.5', '2735']
    """
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text else text


def listed(values: Sequence[float]) -> str:
    """Writes numbers one after the other."""
    return ", ".join(map(short, values))


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of a sample; 0 for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def cell(returns: Sequence[float], stderrs: Sequence[float]) -> str:
    """Writes the mean over seeds, its standard error, and each seed.

    Args:
        returns (sequence of float): the mean return of each seed's evaluation.
        stderrs (sequence of float): their standard errors, over episodes. Used for a single seed
            only, which has no spread over seeds.

    Returns:
        The cell; ``"-"`` if there is no seed.

    Example:
        >>> cell([2735.0, 2645.0], [3.0, 4.0])
        '2690 ± 45 (2735, 2645)'
        >>> cell([-4.423], [0.0404])
        '-4.42 ± 0.04 (-4.42)'
    """
    if not returns:
        return "-"
    error = standard_error(returns) if len(returns) > 1 else stderrs[0]
    return f"{short(statistics.fmean(returns))} ± {short(error, 2)} ({listed(returns)})"
