"""Means over the entries of a batch that count, and over those of all learners."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrl_happo.distributed import Average, own_mean

__all__ = [
    "VALID",
    "count",
    "effective_sample_size",
    "largest",
    "masked",
    "masked_mean",
    "moments",
    "standardize",
    "standardize_members",
]

#: Entry of an agent's or a critic's data that marks the entries that count; absent: all of them.
VALID = "valid"


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


def standardize(
    advantage: Tensor,
    valid: Tensor | None = None,
    eps: float = 1e-5,
    *,
    average: Average = own_mean,
) -> Tensor:
    r"""Standardise an advantage: :math:`(A - \mu) / (\sigma + \epsilon)`.

    Mean and (population) standard deviation are those of the valid entries. HAPPO does this once
    per batch and before the factor: a second standardisation of ``factor * advantage`` would undo
    the importance weights of the agents that were updated before.

    Args:
        advantage (Tensor): any shape.
        valid (Tensor, optional): boolean, same shape. ``None``: all entries are valid.
        eps (float): added to the standard deviation. Defaults to ``1e-5``.

    Keyword Args:
        average (callable): of :func:`moments`.

    Returns:
        the standardised advantage, same shape.

    Example:
        >>> standardize(torch.tensor([1.0, 3.0]))
        tensor([-1.0000,  1.0000])
    """
    mean, variance = moments(advantage, valid, average=average)
    return (advantage - mean) / (variance.sqrt() + eps)


def standardize_members(
    advantage: Tensor, valid: Tensor | None = None, *, average: Average = own_mean
) -> Tensor:
    """Standardise the advantages of several agents, ``[*B, n]``, each over its own valid entries.

    Args:
        advantage (Tensor): agents along the last dimension.
        valid (Tensor, optional): boolean, same shape. ``None``: all entries are valid.

    Keyword Args:
        average (callable): of :func:`moments`.

    Example:
        >>> standardize_members(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
        tensor([[-1.0000, -1.0000],
                [ 1.0000,  1.0000]])
    """
    members = advantage.unbind(-1)
    masks = [None] * len(members) if valid is None else valid.unbind(-1)
    own = [standardize(a, v, average=average) for a, v in zip(members, masks, strict=True)]
    return torch.stack(own, -1)


def effective_sample_size(
    log_weight: Tensor,
    valid: Tensor | None = None,
    *,
    peak: Tensor | None = None,
    average: Average = own_mean,
) -> Tensor:
    r"""Effective sample size of importance weights as a share of the samples.

    .. math:: \frac{(\sum_k w_k)^2}{K \sum_k w_k^2}

    1 if all weights are equal, :math:`1/K` if one of them carries everything.

    Args:
        log_weight (Tensor): :math:`\log w`, any shape.
        valid (Tensor, optional): boolean, same shape. ``None``: all entries are valid.

    Keyword Args:
        peak (Tensor, optional): the largest valid one, over all that ``average`` is over. Defaults
            to ``None``: the largest of these.
        average (callable): of :func:`moments`.

    Returns:
        a scalar tensor in :math:`[1/K, 1]`.

    Example:
        >>> effective_sample_size(torch.zeros(10))
        tensor(1.)
    """
    # Of eight bits of precision a share above 1 could come.
    log_weight = log_weight.to(torch.promote_types(log_weight.dtype, torch.float32))
    peak = largest(log_weight, valid) if peak is None else peak
    weight = (log_weight - peak).exp()
    means = [masked_mean(weight, valid), masked_mean(weight.square(), valid)]
    mean, mean_square = average(means, count(weight, valid))
    return mean.square() / mean_square
