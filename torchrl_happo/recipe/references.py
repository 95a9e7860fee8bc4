"""Functions of the user's own that a configuration names: ``my_package.my_module:function``."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from torchrl.envs import EnvBase

from torchrl_happo.recipe.config import ConfigError


def resolve(reference: Any, option: str) -> Callable[..., Any]:
    """Return the function that an option names, or was given.

    Args:
        reference (str or callable): ``"package.module:function"``; modules of the working
            directory are found, too.
        option (str): named in the errors, for example ``"task.make_env"``.

    Raises:
        ConfigError: in one sentence, if it cannot be imported or called.

    Example:
        >>> resolve("torchrl_happo:make_actor", "model.make_actor").__name__
        'make_actor'
    """
    found = reference
    if isinstance(reference, str):
        module, _, name = reference.partition(":")
        here = os.getcwd()
        if here not in sys.path:
            sys.path.append(here)  # where a console script, unlike python -m, does not look
        try:
            found = importlib.import_module(module)
            for part in (name or "?").split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"{option} is {reference!r}, which cannot be imported ({error}): name a function "
                "as package.module:function, or pass the function itself in Python."
            ) from error
    if not callable(found):
        raise ConfigError(f"{option} is {reference!r}, but must be a function.")
    return found


def name_of(function: Any) -> Any:
    """Return the reference of a function, by which a checkpoint remembers it."""
    if not callable(function):
        return function
    inner = getattr(function, "func", function)  # of a partial
    return f"{inner.__module__}:{getattr(inner, '__qualname__', type(inner).__name__)}"


def accepted(function: Callable[..., Any], **offered: Any) -> dict[str, Any]:
    """Return those of the offered arguments that a function has."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in offered.items() if name in parameters}


def build_network(reference: Any, env: EnvBase, option: str) -> Any:
    """Call a network builder of the user's with an environment of the task."""
    built = resolve(reference, option)(env)
    for network in built.values() if isinstance(built, dict) else [built]:
        if not isinstance(network, nn.Module):
            raise ConfigError(
                f"{option} returned {type(network).__name__}, but must return a module, or for "
                "actors of several groups a dict of them."
            )
        network.to(env.device)
    return built
