"""Distributions of discrete actions that torch and TorchRL do not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, Independent
from torchrl.modules import MaskedCategorical, MaskedOneHotCategorical

__all__ = ["IntMaskedCategorical", "IntMaskedOneHotCategorical", "MultiCategorical"]


class MultiCategorical(Independent):
    r"""A product of independent categorical distributions, one for each component of an action.

    .. math:: \log \pi(a) = \sum_{k=1}^{K} \log \pi_k(a_k)

    It is an :class:`~torch.distributions.Independent`, so divergences, entropies and Fisher
    products are sums over the components, each of them exact.

    Args:
        logits (Tensor): unnormalised log-probabilities of the choices of all components one after
            the other, ``[*B, sum(nvec)]``.

    Keyword Args:
        nvec (sequence of int): number of choices of each of the ``K`` components.
        mask (Tensor, optional): ``True`` or nonzero where a choice is available, shaped like
            ``logits``. Defaults to ``None``: all are.

    Example:
        >>> dist = MultiCategorical(torch.zeros(4, 5), nvec=(2, 3))
        >>> dist.log_prob(torch.tensor([1, 2]).expand(4, 2)).exp()
        tensor([0.1667, 0.1667, 0.1667, 0.1667])
        >>> dist.sample().shape
        torch.Size([4, 2])
    """

    def __init__(self, logits: Tensor, *, nvec: Sequence[int], mask: Tensor | None = None) -> None:
        if mask is not None:
            logits = logits.masked_fill(~mask.bool(), -torch.inf)
        # Components with fewer choices are padded by choices of probability zero.
        widest = max(nvec)
        rows = [
            F.pad(part, (0, widest - part.shape[-1]), value=-torch.inf)
            for part in logits.split(list(nvec), -1)
        ]
        super().__init__(Categorical(logits=torch.stack(rows, -2)), 1)


class IntMaskedCategorical(MaskedCategorical):
    """A :class:`~torchrl.modules.MaskedCategorical` whose mask is of numbers, zero where forbidden.

    Args:
        logits (Tensor): unnormalised log-probabilities ``[*B, n]``.

    Keyword Args:
        mask (Tensor): nonzero where an action is available, shaped like ``logits``.
        **kwargs: arguments of :class:`~torchrl.modules.MaskedCategorical`.
    """

    def __init__(self, logits: Tensor, *, mask: Tensor, **kwargs: Any) -> None:
        super().__init__(logits, mask=mask.bool(), **kwargs)


class IntMaskedOneHotCategorical(MaskedOneHotCategorical):
    """A :class:`~torchrl.modules.MaskedOneHotCategorical` whose mask is of numbers.

    Args:
        logits (Tensor): unnormalised log-probabilities ``[*B, n]``.

    Keyword Args:
        mask (Tensor): nonzero where an action is available, shaped like ``logits``.
        **kwargs: arguments of :class:`~torchrl.modules.MaskedOneHotCategorical`.
    """

    def __init__(self, logits: Tensor, *, mask: Tensor, **kwargs: Any) -> None:
        super().__init__(logits, mask=mask.bool(), **kwargs)
