"""The surrogates of the sequential objectives, as pure functions of tensors."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

__all__ = ["clipped_surrogate", "corrected_advantage", "surrogate"]


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


def corrected_advantage(data: TensorDictBase, keys: Any) -> Tensor:
    """Return :math:`M`, the factor times the advantage; without a factor, the advantage.

    Args:
        data (TensorDictBase): an agent's data.
        keys (Any): names the entries ``advantage`` and ``factor``.

    Example:
        >>> from types import SimpleNamespace
        >>> from tensordict import TensorDict
        >>> keys = SimpleNamespace(advantage="advantage", factor="factor")
        >>> data = TensorDict({"advantage": torch.ones(1), "factor": torch.tensor([0.5])}, [1])
        >>> corrected_advantage(data, keys)
        tensor([0.5000])
    """
    advantage = data.get(keys.advantage)
    factor = data.get(keys.factor, None)
    return advantage if factor is None else factor * advantage
