"""A task's environment: built from its configuration, with the team's reward at the root."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
from torchrl.envs import Compose, EnvBase, RewardSum, StepCounter, Transform, TransformedEnv

from torchrl_happo.arguments import first_line
from torchrl_happo.envs import TeamCost, TeamReward
from torchrl_happo.recipe.config import ConfigError, TaskConfig
from torchrl_happo.recipe.simulators import SIMULATORS
from torchrl_happo.team.entries import path_of

#: Settings of simulators that would fail late, or in other words, out of their range.
COUNTS = (
    *("N", "n_agents", "n_blue_agents", "n_food", "n_gaussians", "n_packages", "n_passages"),
    *("n_targets", "n_walkers", "num_collectors", "num_deposits", "num_threads", "num_treasures"),
)
BOUNDS: dict[str, dict[str, float]] = {
    **{name: {"at least": 1} for name in COUNTS},
    "local_ratio": {"at least": 0, "at most": 1},
    "nearest": {"at least": 0},
}


def make_env(
    task: TaskConfig,
    *,
    num_envs: int,
    seed: int,
    device: str = "cpu",
    transforms: Sequence[Transform] = (),
) -> EnvBase:
    """Build ``num_envs`` copies of a task, stepped together.

    The root of each step holds ``reward`` (the team's), ``episode_reward`` (its sum since the
    start of the episode), ``step_count``, and ``done``, ``terminated`` and ``truncated``, all of
    shape ``[num_envs, 1]``. An episode that reaches ``task.max_steps`` is truncated. Where the
    simulator pays costs, there are ``cost``, the sum of the agents', and ``episode_cost`` too;
    where it says whether the team has won, ``won``.

    Args:
        task (TaskConfig): the task, with the name of its simulator.

    Keyword Args:
        num_envs (int): how many copies.
        seed (int): of the initial states and whatever else the simulator draws.
        device (str, optional): where the simulation runs. Defaults to ``"cpu"``.
        transforms (sequence of Transform): what a policy needs besides, see
            :func:`~torchrl_happo.networks.actors.memory_transforms`. Defaults to ``()``.

    Raises:
        ConfigError: in one sentence, if the simulator cannot build it.
    """
    check_device(device)
    base = _build(task, num_envs, device)
    has_costs = any(path_of(key)[-1] == "cost" for key in base.reward_keys)
    paid = ["reward", "cost"] if has_costs else ["reward"]
    env = TransformedEnv(
        base,
        Compose(
            StepCounter(task.max_steps),
            TeamReward(cast(Literal["mean", "sum"] | None, task.team_reward)),
            *([TeamCost("sum")] if has_costs else []),
            RewardSum(in_keys=paid, out_keys=[f"episode_{name}" for name in paid]),
            *transforms,
        ),
        auto_unwrap=True,  # one list of transforms, whatever the simulator brings with it
    )
    env.set_seed(seed)
    return env


def check_device(device: str) -> None:
    """Refuse a device that torch does not know or this machine does not have.

    Raises:
        ConfigError: in one sentence, which says what to take.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    numbered_cpu = wanted is not None and wanted.type == "cpu" and wanted.index is not None
    if wanted is None or wanted.type not in ("cpu", "cuda") or numbered_cpu:
        raise ConfigError(f"device is {device!r}, but must be cpu or cuda, such as cuda:0.")
    available = torch.cuda.device_count()
    if wanted.type == "cuda" and (wanted.index or 0) >= available:
        raise ConfigError(
            f"device is {device!r}, but torch sees {available} CUDA devices: take device=cpu."
        )


def known_settings(task: TaskConfig) -> dict[str, Any] | None:
    """Return the settings that a task's simulator has, with the defaults that are literals.

    Returns:
        ``None`` if the simulator is not installed, does not know the scenario, or takes anything.

    Raises:
        ConfigError: if there is no such simulator.
    """
    if task.simulator not in SIMULATORS:
        raise ConfigError(
            f"task.simulator is {task.simulator!r}, but must be one of {', '.join(SIMULATORS)}."
        )
    simulator = SIMULATORS[task.simulator]
    is_there = simulator.package is None or find_spec(simulator.package) is not None
    return simulator.settings(task) if is_there else None


def check_scenario(task: TaskConfig) -> None:
    """Refuse another scenario under the name of a task, which would pass for that task."""
    family, _, leaf = task.name.partition("/")
    scenario, with_cost = task.settings.get("scenario"), task.settings.get("cost") is not None
    # A variant has the name of its scenario and more.
    is_variant = with_cost and leaf.startswith(f"{scenario}_")
    fits = is_variant or str(scenario).startswith(leaf)
    if scenario and family == task.simulator and not fits:
        raise ConfigError(
            f"task.scenario is {scenario!r}, but the task is {task.name}: choose another task, or "
            "give this one a name of its own by task.name."
        )


def _build(task: TaskConfig, num_envs: int, device: str) -> EnvBase:
    simulator = SIMULATORS[task.simulator]
    if simulator.package is not None and find_spec(simulator.package) is None:
        raise ConfigError(
            f"The task {task.name!r} needs {simulator.package}: "
            f"pip install 'torchrl_happo[{simulator.extra}]'."
        )
    try:
        return simulator.build(task, num_envs, device)
    except ConfigError:
        raise
    except Exception as error:
        # A bare assertion has no other words than its line.
        line = "" if str(error) else traceback.extract_tb(error.__traceback__)[-1].line
        given = ", ".join(f"{name}={value}" for name, value in task.settings.items())
        raise ConfigError(
            f"The task {task.name!r} cannot be built: {line or first_line(error)} "
            f"({given or 'no settings'})."
        ) from error
