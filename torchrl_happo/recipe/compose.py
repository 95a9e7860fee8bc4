"""From YAML files and overrides to a :class:`TrainConfig`, with one sentence for every mistake."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from torchrl_happo.recipe import config as schema
from torchrl_happo.recipe.config import ConfigError, TrainConfig
from torchrl_happo.recipe.places import run_folder
from torchrl_happo.recipe.ranks import launch_time
from torchrl_happo.recipe.tasks import TASKS
from torchrl_happo.recipe.validation import validate

CONFIG_MODULE = "torchrl_happo.conf"

LONGEST_FOLDER = 100

# What a resumed run may set anew without becoming another run.
CHANGEABLE = {
    "checkpoint",
    "device",
    "evaluation",
    "learner_timeout",
    "logger",
    "progress",
    "render",
    "resume",
    "threads",
    "total_frames",
}

# Every group of conf/, and the schema of each of its files.
GROUPS: dict[str, Mapping[str, type]] = {
    "task": TASKS,
    "algorithm": {
        "happo": schema.Happo,
        "hatrpo": schema.Hatrpo,
        "mappo": schema.Mappo,
        "ippo": schema.Ippo,
    },
    "collector": {
        "single": schema.SingleCollector,
        "multi": schema.MultiCollector,
        "ray": schema.RayCollector,
        "distributed": schema.DistributedCollector,
    },
    "model": {
        "mlp": schema.MlpModel,
        "gru": schema.RecurrentModel,
        "lstm": schema.RecurrentModel,
    },
}


@cache  # Hydra keeps them, and half the time of a composition would be theirs
def register() -> None:
    """Makes the schemas and the resolvers of ``conf/config.yaml`` known to Hydra; idempotent."""
    store = ConfigStore.instance()
    store.store(group="schema", name="train", node=TrainConfig)
    for group, schemas in GROUPS.items():
        for path, node in schemas.items():
            folder, _, name = f"schema/{group}/{path}".rpartition("/")
            store.store(group=folder, name=name, node=node)
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
    OmegaConf.register_new_resolver("family", _family, replace=True)
    OmegaConf.register_new_resolver("settings_folder", settings_folder, replace=True)
    OmegaConf.register_new_resolver("launched", _launched, replace=True, use_cache=True)


def compose_config(*overrides: str) -> TrainConfig:
    """Composes a run's configuration as the command line does.

    Args:
        *overrides: what would stand on the command line.

    Returns:
        the typed and validated configuration.

    Raises:
        ConfigError: in one sentence, for anything that does not exist or cannot be run.

    Examples:
        >>> config = compose_config("task=vmas/navigation", "algorithm=mappo", "seed=3")
        >>> config.task.name, config.algorithm.lr, config.seed
        ('vmas/navigation', 0.0003, 3)
        >>> compose_config("task=vmas/navigatoin")
        Traceback (most recent call last):
        ...
        torchrl_happo.recipe.config.ConfigError: There is no task 'vmas/navigatoin'; near: ...
    """
    register()
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        try:
            composed = compose("config", list(overrides))
        except (HydraException, OmegaConfBaseException, MissingConfigException) as error:
            raise ConfigError(sentence(error)) from error
    return to_config(composed)


def to_config(composed: DictConfig) -> TrainConfig:
    """Turns what Hydra composed into the typed configuration, validated."""
    config = OmegaConf.to_object(composed)
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"Expected the configuration of a run, got {type(config).__name__}.")
    for group, schemas in GROUPS.items():
        part = getattr(config, group)
        if schemas.get(part.name) is not type(part):
            raise ConfigError(
                f"{group}.name is {part.name!r}, but the options beside it are another one's: "
                f"choose by {group}={part.name} and leave {group}.name alone."
            )
    validate(config)
    return config


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain values, which a checkpoint and YAML can hold."""
    return asdict(config)


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Reads back what :func:`to_dict` wrote, with the types of today's schema."""
    try:
        parts: dict[str, Any] = {
            group: schemas[values[group]["name"]] for group, schemas in GROUPS.items()
        }
        typed = OmegaConf.structured(TrainConfig(**parts))
        typed.merge_with(values)
        return to_config(typed)
    except (KeyError, TypeError, OmegaConfBaseException) as error:
        raise ConfigError(
            "The stored configuration does not fit this version's schema: "
            f"{str(error).splitlines()[0]}."
        ) from error


def changeable(config: TrainConfig) -> set[str]:
    """What a run that goes on may set anew without becoming another run.

    Its number of frames is part of a learning rate that falls to zero at their end.
    """
    falls = config.algorithm.lr_schedule == "linear"
    return CHANGEABLE - {"total_frames"} if falls else CHANGEABLE


def resume_config(
    stored: TrainConfig, composed: DictConfig, overrides: Iterable[str]
) -> TrainConfig:
    """The configuration of a resumed run: the stored one, but for what may change on the way.

    Args:
        stored (TrainConfig): of the run that wrote the checkpoint.
        composed (DictConfig): what Hydra composed, ``overrides`` included.
        overrides (iterable of str): what the user asked for.

    Raises:
        ConfigError: if an override would make it another run.
    """
    values, free = OmegaConf.create(to_dict(stored)), changeable(stored)
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        option = f"{key}.name" if key in GROUPS else key
        wanted = OmegaConf.select(composed, option)
        if key.partition(".")[0] in free:
            OmegaConf.update(values, key, wanted)
        elif wanted != OmegaConf.select(values, option):
            raise ConfigError(
                f"A resumed run keeps its {option}: leave out {override!r} (what may change: "
                f"{', '.join(sorted(free))})."
            )
    return from_dict(cast(dict[str, Any], OmegaConf.to_container(values)))


def sentence(error: Exception) -> str:
    """Says in one sentence what is wrong with a command line that Hydra refused."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.partition("/")
        known = GROUPS.get(group, {})
        return f"There is no {group} {name!r}; {_near(name, known, 'known')}."
    cause = error.__cause__ if isinstance(error, ConfigCompositionException) else error
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and cause.full_key:
        key = str(cause.full_key)
        return f"There is no option {key!r}; {_near(key, _siblings(key, cause), 'there are')}."
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        return f"{cause.full_key}: {str(cause).splitlines()[0].rstrip('.')}."
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} is not an override: write KEY=VALUE."
    return str(error).splitlines()[0].rstrip(".") + "."


def _near(name: str, known: Iterable[str], otherwise: str) -> str:
    """Names what the user may have meant: the same last part, a longer name or a similar one."""
    known = sorted(known)
    same = [other for other in known if _leaf(other) == _leaf(name)]
    longer = [other for other in known if name in other]
    near = same or longer or get_close_matches(name, known, n=3, cutoff=0.7)
    return f"near: {_some(near)}" if near else f"{otherwise}: {_some(known)}"


def _some(names: list[str], at_most: int = 10) -> str:
    """The names, or the first of them and how many more there are."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


def _leaf(name: str) -> str:
    return re.split("[./]", name)[-1]


def _siblings(key: str, cause: OmegaConfBaseException) -> list[str]:
    """The options beside the unknown ``key``; at the root also those one level below."""
    prefix = key.rpartition(".")[0]
    if prefix and cause.object_type is not None:
        return [f"{prefix}.{entry.name}" for entry in fields(cause.object_type)]
    top = [entry.name for entry in fields(TrainConfig)]
    parts = {
        "algorithm": schema.Happo,
        "model": schema.RecurrentModel,
        "critic": schema.CriticConfig,
        "evaluation": schema.EvaluationConfig,
        "checkpoint": schema.CheckpointConfig,
    }
    below = [f"{part}.{entry.name}" for part, node in parts.items() for entry in fields(node)]
    return [*top, *(option for option in below if _leaf(option) == key)]


def _run_folder(resume: str | None, new: str) -> str:
    """Where a run writes: a folder that is resumed goes on, everything else starts a new one."""
    if not resume or not Path(resume).is_dir():
        return new
    return str(run_folder(Path(resume)))


def _launched(pattern: str) -> str:
    """When the run was launched."""
    return launch_time().strftime(pattern)


def settings_folder(overrides: str) -> str:
    """The name of a folder for what was asked for beyond task, algorithm and seed.

    Examples:
        >>> settings_folder("algorithm.lr=0.001,model=gru")
        'algorithm.lr=0.001,model=gru'
        >>> settings_folder("")
        'default'
    """
    if len(overrides) > LONGEST_FOLDER:
        return f"settings-{hashlib.sha256(overrides.encode()).hexdigest()[:10]}"
    return overrides.replace("/", "_") or "default"


def _family(task: str) -> str:
    """What a task belongs to: the first part of its name."""
    return task.partition("/")[0]
