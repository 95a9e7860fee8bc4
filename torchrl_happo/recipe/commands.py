"""``torchrl-happo evaluate|render|export run=FOLDER``: what is done with a trained team."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchrl_happo.recipe.compose import run_folder
from torchrl_happo.recipe.config import ConfigError
from torchrl_happo.recipe.export import FORMATS, export_agent
from torchrl_happo.recipe.report import ROLLOUT, short
from torchrl_happo.recipe.trained import load
from torchrl_happo.recipe.validation import near, no_option
from torchrl_happo.recipe.zoo import is_name


def evaluate(run: Path, episodes: int = 200, deterministic: bool = True, seed: int = -1) -> None:
    """Play episodes of a trained team and say how they went.

    Args:
        run (Path): the folder of a run, a checkpoint, or zoo:NAME.
        episodes (int): how many.
        deterministic (bool): whether agents take their most likely actions.
        seed (int): of initial states and draws; -1: that of the run's own evaluations.
    """
    result = load(run).evaluate(
        episodes, deterministic=deterministic, seed=None if seed < 0 else seed
    )
    won = f", {result['win_rate']:.1%} won" if "win_rate" in result else ""
    sys.stdout.write(
        f"Return {short(result['return'], 4)} +- {short(result['return_stderr'], 2)}{won} "
        f"({episodes} episodes of {short(result['episode_length'], 4)} steps on average)\n"
    )


def render(run: Path, output: Path | None = None, deterministic: bool = True) -> None:
    """Play one episode of a trained team and write it as a GIF.

    Args:
        run (Path): the folder of a run, a checkpoint, or zoo:NAME.
        output (Path): the GIF; in the run's folder unless it is given, here for zoo:NAME.
        deterministic (bool): whether agents take their most likely actions.
    """
    target = load(run).render(output or _folder(run) / ROLLOUT, deterministic=deterministic)
    sys.stdout.write(f"{target}\n")


def export(run: Path, agent: str = "", format: str = "onnx", output: Path | None = None) -> None:
    """Write the policy of each agent, or of one, as a file of its own.

    Args:
        run (Path): the folder of a run, a checkpoint, or zoo:NAME.
        agent (str): its name; without one, all agents are written.
        format (str): onnx, pt2 (torch.export) or weights.
        output (Path): a folder; ``export`` in the run's folder unless it is given, here for
            zoo:NAME.
    """
    if format not in FORMATS:
        raise ConfigError(f"format is {format!r}, but must be one of {', '.join(FORMATS)}.")
    agents = load(run).agents
    if agent and agent not in agents:
        raise ConfigError(f"There is no agent {agent!r}; {near(agent, agents, 'there are')}.")
    folder = output or _folder(run) / "export"
    for name in [agent] if agent else agents:
        target = export_agent(agents[name], folder / f"{name}{FORMATS[format]}")
        sys.stdout.write(f"{target}\n")


def _folder(run: Path) -> Path:
    """Return where the files of a team go, which is not the library's own folder."""
    return Path() if is_name(run) else run_folder(run)


COMMANDS: dict[str, Callable[..., None]] = {
    "evaluate": evaluate,
    "render": render,
    "export": export,
}

KINDS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "bool": lambda word: {"true": True, "false": False}[word.lower()],
    "str": str,
    "Path": Path,
    "Path | None": Path,
}


def command(name: str, words: list[str]) -> None:
    """Run a command with its options.

    Args:
        name (str): one of :data:`COMMANDS`.
        words (list of str): ``option=value`` each.

    Raises:
        ConfigError: in one sentence, for options that do not exist or cannot be read.
    """
    function = COMMANDS[name]
    kinds = {key: kind for key, kind in function.__annotations__.items() if key != "return"}
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r} is not an option of {name}: write KEY=VALUE.")
        if key not in kinds:
            raise ConfigError(no_option(key, kinds))
        try:
            options[key] = KINDS[kinds[key]](value)
        except (KeyError, ValueError) as error:
            raise ConfigError(f"{key} is {value!r}, but must be of type {kinds[key]}.") from error
    if "run" not in options:
        raise ConfigError(f"Say whose agents: torchrl-happo {name} run=FOLDER.")
    function(**options)
