"""Whether a run can be started as it is configured: ranges, choices, fields that ask for others.

Every refusal is a :class:`~torchrl_happo.recipe.config.ConfigError`, before anything is built.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from torchrl_happo.recipe.config import ConfigError, RecurrentModel, TrainConfig
from torchrl_happo.recipe.environments import BOUNDS, check_scenario, known_settings
from torchrl_happo.versions import needed

INSIDE = {
    "above": lambda value, bound: value > bound,
    "at least": lambda value, bound: value >= bound,
    "below": lambda value, bound: value < bound,
    "at most": lambda value, bound: value <= bound,
}


def validate(config: TrainConfig) -> None:
    """Check every range, every choice and what the fields ask of each other.

    Raises:
        ConfigError: in one sentence that names the field, its value and what is wanted.
    """
    _validate_fields(config)
    _validate_settings(config)
    # The largest that torch takes, and that numpy takes.
    seeds = (("seed", config.seed, 2**63), ("evaluation.seed", config.evaluation.seed, 2**32))
    for name, seed, limit in seeds:
        if seed >= limit:
            raise ConfigError(f"{name} is {seed}, but must be below {limit}.")
    if (config.algorithm.minibatch_size or 0) > config.frames_per_batch:
        raise ConfigError(
            f"algorithm.minibatch_size is {config.algorithm.minibatch_size}, more than the "
            f"{config.frames_per_batch} frames of a batch (num_envs * steps_per_batch): lower it "
            "or collect more."
        )
    _validate_restarts(config)
    workers = getattr(config.collector, "num_workers", 1)
    if config.num_envs % workers:
        raise ConfigError(
            f"num_envs={config.num_envs} cannot be split evenly over "
            f"collector.num_workers={workers}: choose a multiple."
        )
    algorithm, collector = config.algorithm, config.collector
    wanted = {
        f"algorithm={algorithm.name}": algorithm.min_torchrl,
        f"collector={collector.name}": collector.min_torchrl,
        "algorithm.value_norm": "0.11" if algorithm.value_norm is None else "0.14",
    }
    for feature, version in wanted.items():
        if (sentence := needed(feature, version)) is not None:
            raise ConfigError(sentence)
    config.algorithm.check(config)
    _validate_model(config)


def _validate_restarts(config: TrainConfig) -> None:
    restarts, steps = config.collector.restart_interval, config.steps_per_batch
    longest = config.task.max_steps or 0
    if 0 < restarts < config.iterations and restarts * steps < longest:
        raise ConfigError(
            f"collector.restart_interval is {restarts}, but an episode of {longest} steps "
            f"(task.max_steps) lasts longer than that many batches of {steps} (steps_per_batch) "
            f"and would never end: take at least {-(-longest // steps)}, or 0 for no restart."
        )
    interval = config.checkpoint.interval
    if interval > 0 and restarts == 0:
        raise ConfigError(
            f"checkpoint.interval is {interval}, but a run can only go on from where its "
            "environments begin anew, and they never begin anew (collector.restart_interval=0): "
            "take 0, for one checkpoint at the end, or set both."
        )
    if 0 < interval < config.iterations and interval % restarts:
        raise ConfigError(
            f"checkpoint.interval is {interval}, but a run can only go on from where its "
            f"environments begin anew, each {restarts} iterations (collector.restart_interval): "
            f"take a multiple of it or collector.restart_interval={interval}."
        )


def _validate_model(config: TrainConfig) -> None:
    model = config.model
    if model.max_std is not None and (
        model.state_dependent_std or model.initial_std >= model.max_std
    ):
        raise ConfigError(
            f"model.max_std is {model.max_std}: it bounds a deviation that starts below it "
            "(model.initial_std) and does not depend on the observation "
            "(model.state_dependent_std=false)."
        )
    length = model.sequence_length if isinstance(model, RecurrentModel) else None
    if length is not None and config.steps_per_batch % length:
        raise ConfigError(
            f"model.sequence_length is {length}, but must divide steps_per_batch, "
            f"{config.steps_per_batch}."
        )


def _validate_settings(config: TrainConfig) -> None:
    """Check the settings of a simulator against its own arguments, where it can be asked."""
    task = config.task
    check_scenario(task)
    known = known_settings(task)
    for name, value in task.settings.items():
        if known is not None and name not in known:
            options = [f"task.{option}" for option in ("max_steps", "team_reward", *known)]
            raise ConfigError(no_option(f"task.{name}", options))
        default = (known or {}).get(name)
        if isinstance(value, str) and isinstance(default, (bool, int, float)):
            kind = "true or false" if isinstance(default, bool) else "a number"
            raise ConfigError(f"task.{name} is {value!r}, but must be {kind}.")
        if name in BOUNDS and isinstance(value, (int, float)):
            _validate_value(f"task.{name}", value, {"bounds": BOUNDS[name]})


def _validate_fields(config: Any, path: str = "") -> None:
    unknown = vars(config).keys() - {entry.name for entry in fields(config)}
    for name in sorted(unknown):
        raise ConfigError(f"There is no option {path + name!r}; options cannot be added with '+'.")
    for entry in fields(config):
        value, name = getattr(config, entry.name), path + entry.name
        if is_dataclass(value):
            _validate_fields(value, name + ".")
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            if not values:
                raise ConfigError(f"{name} is empty, but at least one value is needed.")
            for item in values:
                _validate_value(name, item, entry.metadata)


def _validate_value(name: str, value: Any, metadata: Any) -> None:
    options, bounds = metadata.get("options"), metadata.get("bounds", {})
    if options and value not in options:
        raise ConfigError(f"{name} is {value!r}, but must be one of {', '.join(options)}.")
    if isinstance(value, float) and math.isinf(value):
        raise ConfigError(f"{name} is {value!r}, but must be finite.")
    if not all(INSIDE[kind](value, bound) for kind, bound in bounds.items()):
        wanted = " and ".join(f"{kind} {bound}" for kind, bound in bounds.items())
        raise ConfigError(f"{name} is {value!r}, but must be {wanted}.")


def no_option(key: str, known: Iterable[str]) -> str:
    """Say that there is no such option, and which ones are near."""
    return f"There is no option {key!r}; {near(key, known, 'there are')}."


def near(name: str, known: Iterable[str], otherwise: str) -> str:
    """Name what the user may have meant: the same last part, a longer name or a similar one.

    Example:
        >>> near("lr", ["seed", "algorithm.lr"], "known")
        'near: algorithm.lr'
    """
    known = sorted(known)
    leaf = _leaf(name)
    same = [other for other in known if _leaf(other) == leaf]
    longer = [other for other in known if name in other]
    found = same or longer or get_close_matches(name, known, n=3, cutoff=0.7)
    names, more = found or known, max(len(found or known) - 10, 0)
    listed = ", ".join(names[:10]) + (f" and {more} more" if more else "")
    return f"{'near' if found else otherwise}: {listed}"


def _leaf(name: str) -> str:
    return name.replace("/", ".").rpartition(".")[2]
