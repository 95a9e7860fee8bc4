"""The words of a command line: what is meant by them, and one sentence for what Hydra refuses."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.errors import (
    ConfigCompositionException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from torchrl_happo.recipe.algorithms import ALGORITHMS
from torchrl_happo.recipe.config import (
    CheckpointConfig,
    CriticConfig,
    EvaluationConfig,
    RecurrentModel,
    TaskConfig,
    TrainConfig,
)
from torchrl_happo.recipe.validation import near, no_option

UNITS = {"": 1, "k": 1_000, "m": 1_000_000}
ROUND = re.compile(r"(\d+(?:\.\d*)?(?:e\+?\d+)?)([kKmM]?)")
PARTS: dict[str, Any] = {
    "task": TaskConfig,
    "algorithm": next(iter(ALGORITHMS.values())),
    "model": RecurrentModel,
    "critic": CriticConfig,
    "evaluation": EvaluationConfig,
    "checkpoint": CheckpointConfig,
}
ROOT = {entry.name for entry in fields(TrainConfig)}
TASK = {entry.name for entry in fields(TaskConfig)}
WHOLE = {
    entry.name
    for schema in (TrainConfig, *PARTS.values())
    for entry in fields(schema)
    if str(entry.type).startswith("int")
}


def normalize(word: str) -> str:
    """Return the override that a word of the command line means to Hydra.

    Options of a task that only its simulator knows are settings of it, ``+`` before an option that
    exists changes nothing, whole numbers may be written shortly, and one layer is a list of one.

    Examples:
        >>> normalize("total_frames=1e6"), normalize("total_frames=300k,2M")
        ('total_frames=1000000', 'total_frames=300000,2000000')
        >>> normalize("model.num_cells=128"), normalize("+task=vmas/wheel")
        ('model.num_cells=[128]', 'task=vmas/wheel')
        >>> normalize("task.n_agents=4")
        '++task.settings.n_agents=4'
    """
    key, equals, value = word.partition("=")
    bare = key.lstrip("+")
    first, _, rest = bare.partition(".")
    if not equals or key.startswith("-") or first not in ROOT:
        return word
    if first == "task" and rest and rest.partition(".")[0] not in TASK:
        return f"++task.settings.{rest}={value}"
    if first == "task" and rest.startswith("settings."):
        return f"++{bare}={value}"
    leaf = bare.rpartition(".")[2]
    if leaf in WHOLE:
        value = ",".join(map(_whole, value.split(",")))
    elif leaf == "num_cells" and re.fullmatch(r"[\d,]+", value):
        value = ",".join(f"[{size}]" for size in value.split(","))
    return f"{bare}={value}"


def _whole(value: str) -> str:
    match = ROUND.fullmatch(value)
    if match is None or value.isdigit():
        return value
    number = float(match[1]) * UNITS[match[2].lower()]
    return str(int(number)) if number.is_integer() else value


def asked(override: str) -> str:
    """Return an override as its user would write it."""
    return override.lstrip("+").replace("task.settings.", "task.")


def sentence(error: Exception, known: dict[str, Iterable[str]]) -> str:
    """Say in one sentence what is wrong with a command line that Hydra refused.

    Args:
        error (Exception): Hydra's or OmegaConf's.
        known (dict of str to iterable of str): the choices of each group.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.partition("/")
        return f"There is no {group} {name!r}; {near(name, known.get(group, ()), 'known')}."
    cause = error.__cause__ if isinstance(error, ConfigCompositionException) else error
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and cause.full_key:
        key = str(cause.full_key)
        return no_option(key, _siblings(key, cause))
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        return f"{cause.full_key}: {str(cause).splitlines()[0].rstrip('.')}."
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} is not an override: write KEY=VALUE."
    words = str(error)
    if "Ambiguous value" in words or "--multirun" in words:
        match = re.search(r"'([^']*=[^']*)'", words)
        return (
            f"{match[1] if match else 'A list of values'} asks for several runs: add -m to sweep, "
            "or choose one."
        )
    return words.splitlines()[0].rstrip(".") + "."


def _siblings(key: str, cause: OmegaConfBaseException) -> list[str]:
    """Return the options beside the unknown ``key``; at the root also those one level below."""
    prefix = key.rpartition(".")[0]
    if prefix and is_dataclass(cause.object_type):
        return [f"{prefix}.{entry.name}" for entry in fields(cause.object_type)]
    below = [f"{part}.{entry.name}" for part, node in PARTS.items() for entry in fields(node)]
    return [*ROOT, *(option for option in below if option.rpartition(".")[2] == key)]
