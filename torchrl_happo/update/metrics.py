"""What an agent's update reports about itself, as tensors that nobody has read yet."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributions import Distribution

from torchrl_happo.distributed import Learners
from torchrl_happo.masked import count, largest, masked_mean
from torchrl_happo.objectives.surrogate import effective_sample_size, surrogate
from torchrl_happo.policy.distributions import kl_divergence

__all__ = ["agent_metrics", "factor_metrics", "ratio_range"]


def factor_metrics(log_factor: Tensor, valid: Tensor | None, learners: Learners) -> TensorDict:
    """Mean, largest value and effective sample size of the factor an agent starts from.

    Args:
        log_factor (Tensor): any shape.
        valid (Tensor, optional): boolean, same shape: where the agent acts. ``None``: everywhere.
        learners (Learners): over whose entries they are taken.
    """
    peak = learners.maximum(largest(log_factor, valid))
    (mean,) = learners.mean([masked_mean(log_factor.exp(), valid)], count(log_factor, valid))
    return TensorDict(
        {
            "factor_mean": mean,
            "factor_max": peak.exp(),
            "factor_ess": effective_sample_size(
                log_factor, valid, peak=peak, average=learners.mean
            ),
        }
    )


def ratio_range(log_ratio: Tensor, valid: Tensor | None) -> Tensor:
    """The largest ratio, and the negative of the smallest one."""
    ratio = log_ratio.exp()
    kept = ratio if valid is None else torch.where(valid, ratio, torch.ones_like(ratio))
    return torch.stack([kept.max(), -kept.min()])


def agent_metrics(
    old_dist: Distribution,
    new_dist: Distribution,
    log_ratio: Tensor,
    advantage: Tensor,
    entropy: Tensor,
    valid: Tensor | None,
) -> dict[str, Tensor]:
    r"""How far one agent's policy went, and what it gained.

    Args:
        old_dist (Distribution): the policy before the agent's update.
        new_dist (Distribution): the policy after it.
        log_ratio (Tensor): :math:`\log \pi_\text{new} / \pi_\text{old}` of the stored actions.
        advantage (Tensor): the factor times the advantage, same shape.
        entropy (Tensor): of the new policy, same shape.
        valid (Tensor, optional): which entries count.

    Returns:
        means over the valid entries: ``surrogate_before`` and ``surrogate`` (of :math:`M` and
        :math:`r M`), ``ratio_mean``, ``kl`` (exact, old to new; estimated by
        :math:`r - 1 - \log r` where the distribution has no known divergence) and ``entropy``.
    """
    ratio = log_ratio.exp()
    try:
        kl = kl_divergence(old_dist, new_dist, batch_ndim=log_ratio.ndim)
    except NotImplementedError:
        kl = ratio - 1 - log_ratio
    return {
        "surrogate_before": masked_mean(advantage, valid),
        "surrogate": masked_mean(surrogate(log_ratio, advantage), valid),
        "ratio_mean": masked_mean(ratio, valid),
        "kl": masked_mean(kl, valid),
        "entropy": masked_mean(entropy, valid),
    }
