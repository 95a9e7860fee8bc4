"""The entropy bonus of policies with several heads: weights by head, and what is reported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tensordict import NestedKey, is_tensor_collection
from tensordict.utils import unravel_key

from torchrl_happo.policy.policy import Policy
from torchrl_happo.versions import set_head_weights

__all__ = ["mean_entropies", "weigh_heads"]


def mean_entropies(entropies: list[Any]) -> dict[str, Any]:
    """Return the mean entropy of the team and, where a group has several heads, of each."""
    report: dict[str, Any] = {}
    sums = []
    for entropy in entropies:
        if is_tensor_collection(entropy):
            report["composite_entropy"] = entropy.detach()
            entropy = entropy.sum(dim="feature", reduce=True)
        sums.append(entropy.detach())
    total = sum(entropy.sum() for entropy in sums)
    return {**report, "entropy": total / sum(entropy.numel() for entropy in sums)}


def weigh_heads(
    loss: Any, weights: float | Mapping[NestedKey, float], policies: Iterable[Policy]
) -> bool:
    """Weigh each head's entropy, by the key of its log-probability and TorchRL's own name.

    Args:
        loss (ClipPPOLoss): whose entropy bonus it is.
        weights (float or mapping of NestedKey to float): by either key; a number weighs all alike.
        policies (iterable of Policy): all of the team.

    Returns:
        whether there is a weight for each head.

    Raises:
        ValueError: if a head has no weight, or a weight no head.
    """
    if not isinstance(weights, Mapping):
        return False
    names: dict[NestedKey, NestedKey] = {}
    for policy in policies:
        for action, log_prob in zip(policy.action_keys, policy.log_prob_keys, strict=False):
            # What composite_entropy of TorchRL calls it.
            *group, name = (action,) if isinstance(action, str) else action
            names[unravel_key((*group, f"{name}_entropy"))] = log_prob
    given = {names.get(key, key): weight for key, weight in weights.items()}
    heads = list(dict.fromkeys(names.values()))
    if given.keys() != set(heads):
        raise ValueError(
            f"entropy_coeff has weights for {list(weights)}, but the heads of the actors are "
            f"{heads}; name a weight for each of them, or one number for all."
        )
    set_head_weights(loss, {**given, **{name: given[head] for name, head in names.items()}})
    return True
