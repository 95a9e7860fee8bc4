"""Whether a run can be started as it is configured: ranges, choices, fields that ask for others.

Every refusal is a :class:`~torchrl_happo.recipe.config.ConfigError`, before anything is built.
"""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any

from torchrl_happo.recipe.config import (
    ConfigError,
    RecurrentModel,
    SequentialConfig,
    TrainConfig,
)


def validate(config: TrainConfig) -> None:
    """Checks every range, every choice and what the fields ask of each other.

    Raises:
        ConfigError: in one sentence that names the field, its value and what is wanted.
    """
    _validate_fields(config)
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
    interval, steps = config.checkpoint.interval, config.steps_per_batch
    if 0 < interval < config.iterations and interval * steps < config.task.max_steps:
        raise ConfigError(
            f"checkpoint.interval is {interval}, but at a checkpoint the environments begin anew, "
            f"and an episode of {config.task.max_steps} steps (task.max_steps) lasts longer than "
            f"that many batches of {steps} (steps_per_batch): take at least "
            f"{-(-config.task.max_steps // steps)}, or 0 for one at the end."
        )
    workers = getattr(config.collector, "num_workers", 1)
    if config.num_envs % workers:
        raise ConfigError(
            f"num_envs={config.num_envs} cannot be split evenly over "
            f"collector.num_workers={workers}: choose a multiple."
        )
    _validate_networks(config)


def _validate_networks(config: TrainConfig) -> None:
    """What algorithm, model and critic ask of each other."""
    algorithm, model = config.algorithm, config.model
    if isinstance(algorithm, SequentialConfig):
        if algorithm.popart and algorithm.value_norm is None:
            raise ConfigError(
                "algorithm.popart needs statistics of the values: set algorithm.value_norm."
            )
    elif algorithm.minibatch_size == 1:
        raise ConfigError(
            f"algorithm.minibatch_size is 1, but {algorithm.name} standardises the advantage over "
            "a minibatch: take at least 2."
        )
    elif isinstance(model, RecurrentModel):
        raise ConfigError(
            f"model={model.name} is for happo and hatrpo: take model=mlp with {algorithm.name}."
        )
    elif config.critic.input != "auto" or config.critic.model != "mlp":
        name = "input" if config.critic.input != "auto" else "model"
        raise ConfigError(
            f"critic.{name} is for happo and hatrpo: leave it out with {algorithm.name}."
        )
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
    options = metadata.get("options")
    if options and value not in options:
        raise ConfigError(f"{name} is {value!r}, but must be one of {', '.join(options)}.")
    inside = {
        "above": lambda bound: value > bound,
        "at least": lambda bound: value >= bound,
        "below": lambda bound: value < bound,
        "at most": lambda bound: value <= bound,
    }
    if isinstance(value, float) and math.isinf(value):
        raise ConfigError(f"{name} is {value!r}, but must be finite.")
    bounds = {k: b for k, b in metadata.get("bounds", {}).items() if b is not None}
    if not all(inside[kind](bound) for kind, bound in bounds.items()):
        wanted = " and ".join(f"{kind} {bound}" for kind, bound in bounds.items())
        raise ConfigError(f"{name} is {value!r}, but must be {wanted}.")
