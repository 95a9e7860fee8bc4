"""Arguments of TorchRL's PPO losses that a loss here does not have, and what to write instead."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from torchrl_happo.steps.trust_region.step import TrustRegion

__all__ = ["refuse_arguments"]

_ESTIMATOR = "call loss.make_value_estimator(gamma=..., lmbda=...)"
_RADIUS = "take HATRPOLoss, whose max_kl bounds the divergence"

#: From an argument to its cure, which holds for every loss that has none of its own.
_CURES = {
    **dict.fromkeys(("gamma", "lmbda"), _ESTIMATOR),
    "actor": "pass the networks as actor_network",
    "critic": "pass the network as critic_network",
    "critic_coef": "write critic_coeff",
    "entropy_coef": "write entropy_coeff",
    "advantage_key": "call loss.set_keys(advantage=...)",
    "value_target_key": "call loss.set_keys(value_target=...)",
    "value_key": "call loss.set_keys(value=...)",
    "functional": "leave it out, as the networks are held as they are",
    "separate_losses": "leave it out, as actor and critic are trained apart",
    "delay_actor": "leave it out, as ratios start from the stored log-probabilities",
    "max_importance_ratio": "pass clip_epsilon, which bounds the ratio",
    "advantage_norm": "leave it out, as the updater standardises the advantage of each batch",
    **dict.fromkeys(("dtarg", "beta", "increment", "decrement", "samples_mc_kl"), _RADIUS),
    **dict.fromkeys((entry.name for entry in fields(TrustRegion)), _RADIUS),
    "kl_split": _RADIUS,
}


def refuse_arguments(loss: type, arguments: Mapping[str, Any], cures: Mapping[str, str]) -> None:
    """Refuse arguments that a loss does not have; the sentence says what to write instead.

    Args:
        loss (type): the class that is built.
        arguments (mapping): what it was given and does not have.
        cures (mapping of str to str): what to write instead of single arguments, where this loss
            has an answer of its own.

    Raises:
        TypeError: for the first of the arguments.

    Example:
        >>> refuse_arguments(dict, {"gamma": 0.9}, {})
        Traceback (most recent call last):
        ...
        TypeError: dict has no argument 'gamma'; call loss.make_value_estimator(gamma=...,
        lmbda=...).
    """
    for name in arguments:
        cure = {**_CURES, **cures}.get(name)
        near = get_close_matches(name, sorted(_accepted(loss)))
        if cure is None and near:
            raise TypeError(f"{loss.__name__} has no argument {name!r}; did you mean {near[0]!r}?")
        raise TypeError(f"{loss.__name__} has no argument {name!r}; {cure or 'leave it out'}.")


def _accepted(loss: type) -> set[str]:
    """Return the keywords that a loss and the classes that it extends have here."""
    builders = [vars(kind)["__init__"] for kind in loss.__mro__ if "__init__" in vars(kind)]
    own = [init for init in builders if getattr(init, "__module__", "").startswith("torchrl_happo")]
    parameters = [p for init in own for p in inspect.signature(init).parameters.values()]
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
