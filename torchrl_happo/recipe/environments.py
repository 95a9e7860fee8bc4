"""A task's environment: built from its configuration, with the team's reward at the root."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Literal, cast

from torchrl.envs import (
    Compose,
    EnvBase,
    RewardSum,
    StepCounter,
    Transform,
    TransformedEnv,
    VmasEnv,
)

from torchrl_happo.envs import TeamReward
from torchrl_happo.recipe.config import ConfigError, TaskConfig, VmasTask


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
            :func:`~torchrl_happo.networks.memory_transforms`. Defaults to ``()``.
    """
    if not isinstance(task, VmasTask):
        raise ConfigError(f"The task {task.name!r} belongs to no simulator known to the recipe.")
    env = TransformedEnv(
        _make_vmas(task, num_envs, device),
        Compose(
            StepCounter(task.max_steps),
            TeamReward(cast(Literal["mean", "sum"] | None, task.team_reward)),
            RewardSum(in_keys=["reward"], out_keys=["episode_reward"]),
            *transforms,
        ),
    )
    env.set_seed(seed)
    return env


def _make_vmas(task: VmasTask, num_envs: int, device: str) -> EnvBase:
    common = {entry.name for entry in fields(VmasTask)}
    scenario = {k: v for k, v in vars(task).items() if k not in common}
    return VmasEnv(
        task.scenario,
        num_envs=num_envs,
        continuous_actions=task.continuous_actions,
        # VMAS would call its own time limit a termination, which must not be bootstrapped.
        max_steps=None,
        device=device,
        **scenario,
    )
