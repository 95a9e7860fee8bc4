"""A task's environment: built from its configuration, with the team's reward at the root."""

from __future__ import annotations

import ast
import importlib
import inspect
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
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
)

from torchrl_happo.arguments import first_line
from torchrl_happo.envs import (
    BatchedPettingZooEnv,
    BatchedResetVmasEnv,
    PenaltyCost,
    Rounds,
    TeamCost,
    TeamReward,
    make_mujoco,
)
from torchrl_happo.recipe.config import ConfigError, TaskConfig
from torchrl_happo.recipe.references import accepted, resolve
from torchrl_happo.team.entries import path_of

#: Settings of simulators that would fail late, or in other words, out of their range.
COUNTS = (
    *("N", "n_agents", "n_blue_agents", "n_food", "n_gaussians", "n_packages", "n_passages"),
    *("n_targets", "num_collectors", "num_deposits", "num_threads", "num_treasures"),
)
BOUNDS: dict[str, dict[str, float]] = {
    **{name: {"at least": 1} for name in COUNTS},
    "local_ratio": {"at least": 0, "at most": 1},
    "nearest": {"at least": 0},
}

#: Settings that a scenario of VMAS reads and then sets itself.
WITHOUT_EFFECT = {"multi_give_way": {"n_agents"}}


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
    simulator pays costs, there are ``cost``, the sum of the agents', and ``episode_cost`` too.

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


@dataclass(frozen=True)
class Simulator:
    """Who builds a task's environments."""

    build: Callable[[TaskConfig, int, str], EnvBase]
    settings: Callable[[TaskConfig], dict[str, Any] | None]
    package: str | None = None
    """The package that it needs, and the extra of ours that installs it."""
    extra: str | None = None
    draws: bool = False


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


def _arguments(function: Any, *without: str) -> dict[str, Any]:
    """Return the names and defaults of the arguments of a function."""
    parameters = inspect.signature(function).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in ("self", *without)
    }


def _make_vmas(task: TaskConfig, num_envs: int, device: str) -> EnvBase:
    # VMAS would call its own time limit a termination, which must not be bootstrapped.
    limits: dict[str, Any] = {"num_envs": num_envs, "max_steps": None, "device": device}
    settings = {"scenario": _leaf(task), **task.settings}
    penalty = settings.pop("cost", None)
    env = BatchedResetVmasEnv(**settings, **limits)
    if penalty is None:
        return env
    own = {key: (*path_of(key)[:-1], "info", penalty) for key in env.reward_keys}
    reported = env.full_observation_spec.keys(True, True)
    if not own.keys() or any(place not in reported for place in own.values()):
        known = sorted({path_of(key)[-1] for key in reported if "info" in path_of(key)})
        raise ConfigError(
            f"task.cost is {penalty!r}, which {settings['scenario']} does not report of its "
            f"agents: take one of {', '.join(known) or 'its reports, which are none'}, or null."
        )
    return TransformedEnv(env, PenaltyCost(own))


def _vmas_settings(task: TaskConfig) -> dict[str, Any]:
    found = _read_scenario(str(task.settings.get("scenario", _leaf(task))))
    return {"scenario": None, "continuous_actions": True, "cost": None, **found}


@cache
def _read_scenario(scenario: str) -> dict[str, Any]:
    """Read the settings of a scenario of VMAS from its source, which pops them from ``kwargs``."""
    spec = find_spec("vmas")
    assert spec is not None
    folders = spec.submodule_search_locations or []
    sources = [path for f in folders for path in Path(f, "scenarios").rglob(f"{scenario}.py")]
    if not sources:
        raise ConfigError(f"task.scenario is {scenario!r}, which VMAS has not.")
    without = WITHOUT_EFFECT.get(scenario, set())
    found: dict[str, Any] = {}
    for node in (n for path in sources for n in ast.walk(ast.parse(path.read_text()))):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="kwargs"), attr="pop" | "get"),
                args=[ast.Constant(value=str(name)), *default],
            ):
                is_literal = default and isinstance(default[0], ast.Constant)
                found[name] = ast.literal_eval(default[0]) if is_literal else None
    return {key: value for key, value in found.items() if key not in without}


def _make_pettingzoo(task: TaskConfig, num_envs: int, device: str) -> EnvBase:
    settings = dict(task.settings)
    module = _mpe2_module(task)
    del settings["scenario"]
    return BatchedPettingZooEnv(
        lambda **kwargs: Rounds(module.raw_env(**kwargs)),
        num_envs=num_envs,
        device=device,
        max_cycles=task.max_steps,
        **settings,
    )


def _mpe2_module(task: TaskConfig) -> Any:
    scenario = task.settings["scenario"]
    try:
        return importlib.import_module(f"mpe2.{scenario}")
    except ImportError as error:
        raise ConfigError(f"task.scenario is {scenario!r}, which mpe2 has not.") from error


def _pettingzoo_settings(task: TaskConfig) -> dict[str, Any]:
    make = _mpe2_module(task).raw_env
    return {"scenario": None, **_arguments(make.__init__, "max_cycles", "render_mode")}


def _make_foraging(task: TaskConfig, num_envs: int, device: str) -> EnvBase:
    from torchrl_happo.envs import SeededForagingEnv  # which asks for lbforaging

    environment = task.settings["environment"]
    if environment not in SeededForagingEnv.available_envs:
        raise ConfigError(f"task.environment is {environment!r}, which lbforaging has not.")
    make = partial(SeededForagingEnv, environment, max_steps=task.max_steps)
    return SerialEnv(num_envs, make, device=device)


def _make_mujoco(task: TaskConfig, num_envs: int, device: str) -> EnvBase:
    limits: dict[str, Any] = {"num_envs": num_envs, "max_steps": task.max_steps, "device": device}
    return make_mujoco(**task.settings, **limits)


def _make_custom(task: TaskConfig, num_envs: int, device: str) -> EnvBase:
    make = resolve(task.make_env, "task.make_env")
    batched = accepted(make, num_envs=num_envs, device=device)
    if "num_envs" in batched:
        env = make(**batched, **task.settings)
    else:
        env = SerialEnv(num_envs, partial(make, **batched, **task.settings), device=device)
    if not isinstance(env, EnvBase) or tuple(env.batch_size) != (num_envs,):
        got = f"batch size {[*env.batch_size]}" if isinstance(env, EnvBase) else repr(env)
        raise ConfigError(
            f"task.make_env returned {got}; write it as make_env(num_envs, device), which returns "
            f"an environment of batch size [num_envs], here {num_envs}, or as make_env(), which "
            "returns one of batch size []."
        )
    return env


def _custom_settings(task: TaskConfig) -> dict[str, Any] | None:
    if task.make_env is None:
        raise ConfigError(
            f"task={task.name} needs task.make_env=package.module:function, which builds it."
        )
    make = resolve(task.make_env, "task.make_env")
    takes_all = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(make).parameters.values())
    return None if takes_all else _arguments(make, "num_envs", "device")


def _leaf(task: TaskConfig) -> str:
    return task.name.partition("/")[2]


SIMULATORS = {
    "vmas": Simulator(_make_vmas, _vmas_settings, "vmas", "vmas", draws=True),
    "pettingzoo": Simulator(_make_pettingzoo, _pettingzoo_settings, "mpe2", "pettingzoo"),
    "lbforaging": Simulator(
        _make_foraging, lambda task: {"environment": None}, "lbforaging", "lbforaging"
    ),
    "mujoco": Simulator(
        _make_mujoco,
        lambda task: _arguments(make_mujoco, "num_envs", "max_steps", "seed", "device"),
    ),
    "custom": Simulator(_make_custom, _custom_settings),
}
