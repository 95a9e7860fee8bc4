"""Means over the entries of a batch that count, and over those of all learners."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrl_happo.distributed import Average, own_mean

__all__ = ["count", "largest", "masked", "masked_mean", "moments"]


def masked(value: Tensor, valid: Tensor | None = None) -> Tensor:
    """Zeros in place of what is not valid.

    Before a function whose derivative may be infinite, such as ``exp``: zeros behind it would make
    the gradient NaN.

    Args:
        value (Tensor): any shape. Entries that are not valid may hold anything, NaN included.
        valid (Tensor, optional): boolean, same shape. ``None``: all entries are valid.

    Returns:
        a tensor of the same shape.

    Example:
        >>> masked(torch.tensor([1.0, float("nan")]), torch.tensor([True, False]))
        tensor([1., 0.])
    """
    return value if valid is None else torch.where(valid, value, torch.zeros_like(value))


def masked_mean(value: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over the valid entries; 0 if there is none.

    Args:
        value (Tensor): any shape. Entries that are not valid may hold anything, NaN included.
        valid (Tensor, optional): boolean, same shape. ``None``: all entries are valid.

    Returns:
        a scalar tensor.

    Example:
        >>> masked_mean(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([True, True, False]))
        tensor(1.5000)
    """
    if valid is None:
        return value.mean()
    return masked(value, valid).sum() / valid.sum().clamp_min(1)


def count(value: Tensor, valid: Tensor | None = None) -> Tensor | float:
    """Number of entries that :func:`masked_mean` averages over."""
    return value.numel() if valid is None else valid.sum()


def largest(value: Tensor, valid: Tensor | None = None) -> Tensor:
    """The largest valid entry; minus infinity if there is none.

    Args:
        value (Tensor): any shape.
        valid (Tensor, optional): boolean, same shape. ``None``: all entries are valid.

    Returns:
        a scalar tensor.

    Example:
        >>> largest(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, True, False]))
        tensor(2.)
    """
    kept = value if valid is None else value.masked_fill(~valid, -torch.inf)
    return kept.max()


def moments(
    value: Tensor, valid: Tensor | None = None, *, average: Average = own_mean
) -> tuple[Tensor, Tensor]:
    """Mean and population variance over the valid entries, of all learners if there are more.

    Args:
        value (Tensor): any shape.
        valid (Tensor, optional): boolean, same shape. ``None``: all entries are valid.

    Keyword Args:
        average (callable): see :data:`~torchrl_happo.distributed.Average`. Defaults to this
            process's own entries.

    Returns:
        two scalar tensors.

    Example:
        >>> moments(torch.tensor([1.0, 3.0]))
        (tensor(2.), tensor(1.))
    """
    weight = count(value, valid)
    (mean,) = average([masked_mean(value, valid)], weight)
    (variance,) = average([masked_mean((value - mean).square(), valid)], weight)
    return mean, variance
