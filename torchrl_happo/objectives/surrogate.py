"""The mathematics of the sequential objectives, as pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrl_happo.distributed import Average, own_mean
from torchrl_happo.masked import count, largest, masked_mean, moments

__all__ = [
    "clipped_surrogate",
    "effective_sample_size",
    "standardize",
    "surrogate",
]


def surrogate(log_ratio: Tensor, advantage: Tensor) -> Tensor:
    r"""Importance-weighted advantage :math:`r M` with :math:`r = \pi_\theta / \pi_\text{old}`.

    The objective of HATRPO (Kuba et al., 2022, https://arxiv.org/abs/2109.11251, eq. 11).

    Args:
        log_ratio (Tensor): :math:`\log r`, of any shape.
        advantage (Tensor): :math:`M`, the joint advantage times the factor; broadcastable.

    Returns:
        the surrogate, elementwise.

    Example:
        >>> surrogate(torch.tensor([0.0]), torch.tensor([3.0]))
        tensor([3.])
    """
    return log_ratio.exp() * advantage


def clipped_surrogate(
    log_ratio: Tensor, advantage: Tensor, log_low: Tensor, log_high: Tensor
) -> Tensor:
    r"""Clipped surrogate :math:`\min(r M, \mathrm{clip}(r, 1-\epsilon, 1+\epsilon) M)`.

    The objective of HAPPO (Kuba et al., 2022, eq. 13). The ratio is clipped in log space, as
    :class:`~torchrl.objectives.ClipPPOLoss` does.

    Args:
        log_ratio (Tensor): :math:`\log r`, of any shape.
        advantage (Tensor): :math:`M`, the joint advantage times the factor; broadcastable.
        log_low (Tensor): :math:`\log(1 - \epsilon_\text{low})`.
        log_high (Tensor): :math:`\log(1 + \epsilon_\text{high})`.

    Returns:
        the surrogate, elementwise.

    Example:
        >>> log_ratio = torch.tensor([0.5, 1.0, 1.5]).log()
        >>> low, high = torch.tensor(0.8).log(), torch.tensor(1.2).log()
        >>> clipped_surrogate(log_ratio, torch.ones(3), low, high)
        tensor([0.5000, 1.0000, 1.2000])
    """
    clipped = torch.maximum(torch.minimum(log_ratio, log_high), log_low)
    return torch.minimum(log_ratio.exp() * advantage, clipped.exp() * advantage)


def standardize(
    advantage: Tensor,
    valid: Tensor | None = None,
    eps: float = 1e-5,
    *,
    average: Average = own_mean,
) -> Tensor:
    r"""Standardises the advantage: :math:`(A - \mu) / (\sigma + \epsilon)`.

    Mean and (population) standard deviation are those of the valid entries. HAPPO does this once
    per batch and before the factor: a second standardisation of ``factor * advantage`` would undo
    the importance weights of the agents that were updated before.

    Args:
        advantage (Tensor): any shape.
        valid (Tensor, optional): boolean, same shape. ``None``: all entries are valid.
        eps (float): added to the standard deviation. Defaults to ``1e-5``.

    Keyword Args:
        average (callable): of :func:`~torchrl_happo.masked.moments`.

    Returns:
        the standardised advantage, same shape.

    Example:
        >>> standardize(torch.tensor([1.0, 3.0]))
        tensor([-1.0000,  1.0000])
    """
    mean, variance = moments(advantage, valid, average=average)
    return (advantage - mean) / (variance.sqrt() + eps)


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
        average (callable): of :func:`~torchrl_happo.masked.moments`.

    Returns:
        a scalar tensor in :math:`[1/K, 1]`.

    Example:
        >>> effective_sample_size(torch.zeros(10))
        tensor(1.)
    """
    peak = largest(log_weight, valid) if peak is None else peak
    weight = (log_weight - peak).exp()
    means = [masked_mean(weight, valid), masked_mean(weight.square(), valid)]
    mean, mean_square = average(means, count(weight, valid))
    return mean.square() / mean_square
