"""A task's environment: built from its configuration, with the team's reward at the root."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any, Literal, cast

import torch
from torchrl.envs import (
    Compose,
    EnvBase,
    RewardSum,
    SerialEnv,
    StepCounter,
    Transform,
    TransformedEnv,
    VmasEnv,
)

from torchrl_happo.arguments import first_line
from torchrl_happo.envs import (
    BatchedPettingZooEnv,
    Rounds,
    SeededForagingEnv,
    TeamReward,
    make_mujoco,
)
from torchrl_happo.recipe.config import (
    ConfigError,
    ForagingTask,
    MujocoTask,
    PettingZooTask,
    TaskConfig,
    VmasTask,
)


def make_env(
    task: TaskConfig,
    *,
    num_envs: int,
    seed: int,
    device: str = "cpu",
    transforms: Sequence[Transform] = (),
) -> EnvBase:
    """Builds ``num_envs`` copies of a task, stepped together.

    The root of each step holds ``reward`` (the team's), ``episode_reward`` (its sum since the
    start of the episode), ``step_count``, and ``done``, ``terminated`` and ``truncated``, all of
    shape ``[num_envs, 1]``. An episode that reaches ``task.max_steps`` is truncated.

    Args:
        task (TaskConfig): the task; its type says which simulator it belongs to.

    Keyword Args:
        num_envs (int): how many copies.
        seed (int): of the initial states and whatever else the simulator draws.
        device (str, optional): where the simulation runs. Defaults to ``"cpu"``.
        transforms (sequence of Transform): what a policy needs besides, see
            :func:`~torchrl_happo.networks.actors.memory_transforms`. Defaults to ``()``.
    """
    check_device(device)
    env = TransformedEnv(
        _make_simulator(task, num_envs, device),
        Compose(
            StepCounter(task.max_steps),
            TeamReward(cast(Literal["mean", "sum"] | None, task.team_reward)),
            RewardSum(in_keys=["reward"], out_keys=["episode_reward"]),
            *transforms,
        ),
        auto_unwrap=True,  # one list of transforms, whatever the simulator brings with it
    )
    env.set_seed(seed)
    return env


def check_device(device: str) -> None:
    """Refuses a device that torch does not know or this machine does not have.

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


def _make_simulator(task: TaskConfig, num_envs: int, device: str) -> EnvBase:
    for schema, make in _SIMULATORS.items():
        if isinstance(task, schema):
            return make(task, num_envs, device)
    raise ConfigError(f"The task {task.name!r} belongs to no simulator known to the recipe.")


def _make_vmas(task: VmasTask, num_envs: int, device: str) -> EnvBase:
    settings = _own_fields(task, VmasTask)
    with _building(task, settings):
        env = VmasEnv(
            task.scenario,
            num_envs=num_envs,
            continuous_actions=task.continuous_actions,
            # VMAS would call its own time limit a termination, which must not be bootstrapped.
            max_steps=None,
            device=device,
            **settings,
        )
    # VmasEnv asks its simulator for these at every step, through a search of all its attributes.
    for name in ("n_agents", "continuous_actions"):
        setattr(env, name, getattr(env, name))
    return env


def _make_pettingzoo(task: PettingZooTask, num_envs: int, device: str) -> EnvBase:
    try:
        module = importlib.import_module(f"mpe2.{task.scenario}")
    except ImportError as error:
        if (error.name or "").startswith("mpe2."):
            raise ConfigError(f"task.scenario is {task.scenario!r}, which mpe2 has not.") from error
        raise ConfigError(
            f"The task {task.name!r} needs mpe2: pip install torchrl_happo[pettingzoo]."
        ) from error
    settings = _own_fields(task, PettingZooTask)
    with _building(task, settings):
        return BatchedPettingZooEnv(
            lambda **kwargs: Rounds(module.raw_env(**kwargs)),
            num_envs=num_envs,
            device=device,
            continuous_actions=task.continuous_actions,
            max_cycles=task.max_steps,
            **settings,
        )


def _make_foraging(task: ForagingTask, num_envs: int, device: str) -> EnvBase:
    if importlib.util.find_spec("lbforaging") is None:
        raise ConfigError(
            f"The task {task.name!r} needs lbforaging: pip install torchrl_happo[lbforaging]."
        )
    if task.environment not in SeededForagingEnv.available_envs:
        raise ConfigError(f"task.environment is {task.environment!r}, which lbforaging has not.")
    make = partial(SeededForagingEnv, task.environment, max_steps=task.max_steps)
    return SerialEnv(num_envs, make, device=device)


def _make_mujoco(task: MujocoTask, num_envs: int, device: str) -> EnvBase:
    settings = _own_fields(task, TaskConfig)
    try:
        return make_mujoco(**settings, num_envs=num_envs, max_steps=task.max_steps, device=device)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"The task {task.name!r} cannot be built: {error}") from error


@contextmanager
def _building(task: VmasTask | PettingZooTask, settings: dict[str, Any]) -> Iterator[None]:
    """Turns whatever a simulator raises into one sentence that names the settings it was given."""
    try:
        yield
    except Exception as error:
        # A bare assertion has no other words than its line.
        line = "" if str(error) else traceback.extract_tb(error.__traceback__)[-1].line
        given = ", ".join(f"{name}={value}" for name, value in settings.items())
        raise ConfigError(
            f"The task {task.name!r} cannot be built: {line or first_line(error)} "
            f"(scenario {task.scenario!r}, {given or 'no settings'})."
        ) from error


def _own_fields(task: TaskConfig, family: type[TaskConfig]) -> dict[str, Any]:
    """The settings of a task that the schema of its family does not know."""
    common = {entry.name for entry in fields(family)}
    return {name: value for name, value in vars(task).items() if name not in common}


_SIMULATORS: dict[type[TaskConfig], Callable[[Any, int, str], EnvBase]] = {
    ForagingTask: _make_foraging,
    MujocoTask: _make_mujoco,
    PettingZooTask: _make_pettingzoo,
    VmasTask: _make_vmas,
}
