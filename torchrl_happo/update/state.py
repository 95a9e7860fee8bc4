"""The state of an updater: collected, checked before any of it is loaded, and restored."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_happo.arguments import first_line
from torchrl_happo.transaction import load_generator_state
from torchrl_happo.versions import made_estimator, tensors_only

__all__ = ["check_state", "loss_state", "restore", "state_of"]

STATE_VERSION = 1


def check_state(state: object, own: Mapping[str, Any]) -> None:
    """Refuse a state that is not of the same version, architecture and team.

    Args:
        state (object): what is to be loaded.
        own (mapping): the ``state_dict`` of what it is to be loaded into.

    Raises:
        ValueError: in one sentence that says what differs.
    """
    if not isinstance(state, Mapping) or not own.keys() <= state.keys():
        raise ValueError(
            "The state is not one of a SequentialUpdater; it must be a dict that holds "
            f"{sorted(own)}."
        )
    if state["version"] != own["version"]:
        raise ValueError(
            f"The state has version {state['version']!r}, but this library reads version "
            f"{own['version']}; load it with the release that wrote it."
        )
    for name in ("loss", "steps"):
        if not isinstance(state[name], Mapping):
            raise ValueError(
                f"The state holds a {type(state[name]).__name__} under {name!r} in place of a "
                "dict; it is damaged, load another one."
            )
    if state["steps"].keys() != own["steps"].keys():
        raise ValueError(
            f"The state is from a team of {sorted(state['steps'])}, but this updater has "
            f"{sorted(own['steps'])}; build the same team before loading it."
        )
    _check_architecture(state["loss"], own["loss"])
    for name, step in own["steps"].items():
        _check_step(name, state["steps"][name], step)
    _check_generators(state["generators"], own["generators"])
    if not isinstance(state["num_updates"], int) or state["num_updates"] < 0:
        raise ValueError(
            f"The state counts {state['num_updates']!r} updates; it is damaged, load another one."
        )


def _check_architecture(state: Mapping[str, Any], own: Mapping[str, Tensor]) -> None:
    differing = sorted(own.keys() ^ state.keys()) or [
        key
        for key, value in own.items()
        if not isinstance(state[key], Tensor) or state[key].shape != value.shape
    ]
    if differing:
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise ValueError(
            f"The state is from another architecture: {differing[0]!r}{more} differs; build the "
            "same loss and networks before loading it."
        )


def _check_step(name: str, state: object, own: Mapping[str, Any]) -> None:
    got = sorted(state) if isinstance(state, Mapping) else [repr(state)]
    if got != sorted(own):
        raise ValueError(
            f"The state of {name!r} holds {got}, but its step in this updater holds {sorted(own)}; "
            "build the updater with the same optimizer and scheduler before loading it."
        )


def _check_generators(state: Any, own: list[Tensor]) -> None:
    fits = isinstance(state, list) and len(state) == len(own)
    if not fits or not all(
        isinstance(generator, Tensor) and generator.dtype == torch.uint8 for generator in state
    ):
        raise ValueError(
            f"The state must hold the states of {len(own)} random generators; it is damaged, load "
            "another one."
        )


def loss_state(loss: nn.Module) -> dict[str, Tensor]:
    """Return networks and coefficients of a loss."""
    with _critic_once(loss):
        return tensors_only(loss.state_dict())


@contextmanager
def _critic_once(loss: nn.Module) -> Iterator[None]:
    """Take the critic out of the value estimator, which holds it a second time."""
    estimator: Any = made_estimator(loss)
    network = getattr(estimator, "value_network", None)
    if network is not None:
        estimator.value_network = None
    try:
        yield
    finally:
        if network is not None:
            estimator.value_network = network


def state_of(updater: Any) -> dict[str, Any]:
    """Return everything that the next update of an updater depends on."""
    return {
        "version": STATE_VERSION,
        "num_updates": updater.num_updates,
        "loss": loss_state(updater.loss),
        "steps": {name: step.state_dict() for name, step in updater.steps.items()},
        "generators": [generator.get_state() for generator in updater.generators],
    }


def restore(updater: Any, state: dict[str, Any]) -> None:
    """Load a state into an updater, or leave the updater as it is.

    Raises:
        ValueError: if the state is from another version or architecture.
    """
    before = copy.deepcopy(state_of(updater))
    check_state(state, before)
    try:
        _load(updater, state)
    except Exception as error:
        _load(updater, before)
        raise ValueError(
            f"The state does not fit this updater, which is unchanged: {first_line(error)}."
        ) from error


def _load(updater: Any, state: dict[str, Any]) -> None:
    with _critic_once(updater.loss):
        own = updater.loss.state_dict()  # with what tensors_only has left out
        updater.loss.load_state_dict({**own, **state["loss"]}, strict=False)
    for name, step in updater.steps.items():
        step.load_state_dict(state["steps"][name])
    for generator, value in zip(updater.generators, state["generators"], strict=True):
        load_generator_state(generator, value)
    updater.num_updates = state["num_updates"]
