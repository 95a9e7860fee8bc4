"""The recipe from Python: :func:`train` starts a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrl_happo.recipe import compose
from torchrl_happo.recipe.compose import GROUPS
from torchrl_happo.recipe.config import TrainConfig
from torchrl_happo.recipe.training import run

PLAIN = re.compile(r"[\w./:+-]+")
"""Strings that Hydra reads as they are."""


def train(
    make_env: Callable[..., Any] | None = None,
    make_actor: Callable[..., Any] | None = None,
    make_critic: Callable[..., Any] | None = None,
    config: TrainConfig | Sequence[str] = (),
    folder: Path | str | None = None,
    **overrides: Any,
) -> Path:
    """Train a team as the command line does, on a task of the recipe or one of your own.

    Args:
        make_env (callable, optional): builds the environments, as
            ``make_env(num_envs=..., device=..., **settings)`` of batch size ``[num_envs]``, or
            without ``num_envs`` one of batch size ``[]``, of which the recipe makes a batch. The
            recipe adds a time limit (``task.max_steps``) and the team's reward
            (``task.team_reward``). Defaults to ``None``: a task of the recipe.
        make_actor (callable, optional): from an environment to an actor, or a dict of the actors of
            all groups. Defaults to ``None``: :func:`torchrl_happo.make_actor`.
        make_critic (callable, optional): from an environment to the critic of HAPPO and HATRPO.
            Defaults to ``None``: :func:`torchrl_happo.make_critic`.
        config (TrainConfig or sequence of str, optional): a whole configuration, or words of the
            command line. Defaults to ``()``.
        folder (Path or str, optional): where the run is written. Defaults to ``None``:
            ``outputs/<task>/<algorithm>/<time>``, or where ``resume`` says.
        **overrides: options by name, such as ``seed=3``; those of a part as a dict, such as
            ``algorithm={"name": "hatrpo", "max_kl": 0.02}``.

    Returns:
        the folder of the run, for :func:`torchrl_happo.recipe.load`.

    Raises:
        ConfigError: in one sentence, if the configuration cannot be run.
        CheckpointError: in one sentence, if ``resume`` cannot be used.
        TypeError: if a whole configuration comes with overrides.

    Example:
        >>> train(task="vmas/het_mass", total_frames=12_000)  # doctest: +SKIP
        PosixPath('outputs/vmas/het_mass/happo/...')
    """
    functions = {
        "task.make_env": make_env,
        "model.make_actor": make_actor,
        "critic.make_critic": make_critic,
    }
    given = {option: function for option, function in functions.items() if function is not None}
    if not isinstance(config, TrainConfig):
        task = overrides.get("task", {})
        is_named = isinstance(task, str) or "name" in task
        own = ["task=custom"] if make_env is not None and not is_named else []
        config = compose.load([*own, *config, *_words(overrides)], given)
    elif overrides or given:
        raise TypeError(
            "train got a whole configuration and overrides; pass one of them, or change the "
            "configuration by dataclasses.replace."
        )
    if folder is None:
        folder = compose.new_folder(config.resume, config.task.name, config.algorithm.name)
    return run(config, Path(folder))


def _words(overrides: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Write overrides as words of the command line."""
    for name, value in overrides.items():
        if isinstance(value, Mapping):
            rest = dict(value)
            if name in ("task", *GROUPS) and not prefix and "name" in rest:
                yield f"{name}={rest.pop('name')}"
            yield from _words(rest, f"{prefix}{name}.")
        elif isinstance(value, (str, Path)):
            text = str(value)
            yield f"{prefix}{name}={text if PLAIN.fullmatch(text) else json.dumps(text)}"
        else:
            yield f"{prefix}{name}={json.dumps(value)}"
