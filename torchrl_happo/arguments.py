"""Arguments that cannot be meant, each refused in one sentence before anything is built."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

from torch import Tensor

__all__ = [
    "check_callables",
    "check_choice",
    "check_clip_epsilon",
    "check_counts",
    "check_critic",
    "check_entropy_coeff",
    "check_keys",
    "check_numbers",
    "check_positive",
    "check_seed",
    "first_line",
    "kind_of",
]

_FACTORIES = {
    "optimizer": (
        "a callable from parameters to their optimizer, e.g. partial(torch.optim.Adam, lr=3e-4)"
    ),
    "scheduler": (
        "a callable from an optimizer to its scheduler, e.g. partial(StepLR, step_size=100)"
    ),
}


def check_counts(*, at_least: int = 1, optional: bool = False, **values: Any) -> None:
    """Refuse whatever is not a whole number of at least ``at_least``.

    Keyword Args:
        at_least (int): the smallest that is taken. Defaults to ``1``.
        optional (bool): whether ``None`` is one of the choices. Defaults to ``False``.
        **values: the arguments by their names.

    Raises:
        TypeError: if a value is not a whole number.
        ValueError: if it is less than ``at_least``.

    Example:
        >>> check_counts(num_epochs=10)
        >>> check_counts(num_epochs=0)
        Traceback (most recent call last):
        ...
        ValueError: num_epochs must be at least 1, got 0.
    """
    for name, value in values.items():
        if value is None and optional:
            continue
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be a whole number of at least {at_least}, got {value!r}.")
        if int(value) < at_least:
            raise ValueError(f"{name} must be at least {at_least}, got {value}.")


def check_seed(seed: Any) -> None:
    """Refuse whatever does not seed a generator of torch."""
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed must be a whole number of at least 0, got {seed!r}.")
    if not 0 <= int(seed) < 2**63:
        raise ValueError(f"seed must be at least 0 and less than 2**63, got {seed}.")


def check_positive(**values: Any) -> None:
    """Refuse whatever is neither ``None`` nor a number above 0."""
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number above 0 or None, got {value!r}.")
        if not float(value) > 0:
            raise ValueError(f"{name} must be positive or None, got {value}.")


def check_numbers(*, at_least: float = -math.inf, optional: bool = False, **values: Any) -> None:
    """Refuse whatever is no finite number of at least ``at_least``, or ``None`` if optional."""
    wanted = "a finite number" + (f" of at least {at_least:g}" if at_least > -math.inf else "")
    for name, value in values.items():
        if value is None and optional:
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be {wanted}, got {value!r}.")
        if not (math.isfinite(value) and float(value) >= at_least):
            raise ValueError(f"{name} must be {wanted}, got {value}.")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise unless a value is one of the ``choices``; the message names the near ones."""
    if value in choices:
        return
    near = get_close_matches(str(value), choices)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    known = ", ".join(repr(choice) for choice in choices)
    raise ValueError(f"{name} must be one of {known}, got {value!r}{hint}")


def check_callables(*, optional: bool = False, **values: Any) -> None:
    """Refuse factories (of optimisers or schedulers) that cannot be called."""
    for name, value in values.items():
        if callable(value) or (value is None and optional):
            continue
        got = repr(value) if isinstance(value, str) else kind_of(value)
        raise TypeError(f"{name} must be {_FACTORIES[name.removeprefix('critic_')]}, got {got}.")


def check_clip_epsilon(value: Any) -> None:
    """Refuse a clipping threshold, or pair of thresholds, that leaves no range of ratios."""
    if isinstance(value, (tuple, list)):
        numbers = len(value) == 2 and all(isinstance(bound, Real) for bound in value)
        if not (numbers and 0 <= value[0] < 1 and 0 <= value[1] < math.inf and any(value)):
            raise ValueError(
                f"clip_epsilon must be a pair (low, high) with low in [0, 1) and high at least 0, "
                f"got {value}."
            )
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"clip_epsilon must be a number between 0 and 1 or a pair of them, got {value!r}."
        )
    elif not 0 < float(value) < 1:
        raise ValueError(f"clip_epsilon must lie between 0 and 1, got {value}.")


def check_entropy_coeff(value: Any) -> None:
    """Refuse a weight of the entropy, or of one head's entropy, that is no finite number."""
    for head, weight in (value if isinstance(value, Mapping) else {None: value}).items():
        name = "entropy_coeff" if head is None else f"entropy_coeff[{head!r}]"
        check_numbers(**{name: weight})


def check_critic(
    critic: Any,
    critic_coeff: Any,
    loss_critic_type: Any,
    clip_value: Any,
    reduction: Any,
) -> None:
    """Refuse what no critic's loss can be built of."""
    if critic is None and critic_coeff is not None:
        raise ValueError(
            f"critic_coeff is {critic_coeff!r}, but there is no critic; pass one or leave it out."
        )
    check_numbers(at_least=0, optional=True, critic_coeff=critic_coeff)
    check_choice("loss_critic_type", loss_critic_type, ("l1", "l2", "smooth_l1"))
    if not isinstance(clip_value, (bool, Tensor)):
        check_positive(clip_value=clip_value)
    if reduction is not None:
        check_choice("reduction", reduction, ("mean", "sum", "none"))


def check_keys(keys: Mapping[str, object], accepted: Collection[str]) -> None:
    """Refuse names of keys that a loss does not have, and says which are near."""
    for name in keys:
        if name not in accepted:
            near = get_close_matches(name, accepted)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(accepted)}."
            raise ValueError(f"The loss has no key {name!r} to set; {hint}")


def kind_of(value: object) -> str:
    """What a value is, as part of a sentence."""
    return "None" if value is None else f"a {type(value).__name__}"


def first_line(error: BaseException) -> str:
    """What an error says, as part of a sentence."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
