"""Who builds a task's environments: the simulators that the recipe knows, by name."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torchrl.envs import EnvBase, SerialEnv, TransformedEnv

from torchrl_happo.envs import (
    BatchedPettingZooEnv,
    BatchedResetVmasEnv,
    LLEEnv,
    PenaltyCost,
    Rounds,
    SMAXEnv,
    make_mujoco,
)
from torchrl_happo.envs.simulators.smax import smax_scenarios, smax_settings
from torchrl_happo.recipe.config import ConfigError, TaskConfig
from torchrl_happo.recipe.references import accepted, resolve
from torchrl_happo.team.entries import path_of

#: Where PettingZoo has what mpe2 has not: cooperative environments that need Box2D.
SISL = {"multiwalker_v9": "pettingzoo.sisl.multiwalker.multiwalker"}

#: Settings that a scenario of VMAS reads and then sets itself.
WITHOUT_EFFECT = {"multi_give_way": {"n_agents"}}


@dataclass(frozen=True)
class Simulator:
    """Who builds a task's environments."""

    build: Callable[[TaskConfig, int, str], EnvBase]
    settings: Callable[[TaskConfig], dict[str, Any] | None]
    package: str | None = None
    """The package that it needs, and the extra of ours that installs it."""
    extra: str | None = None
    draws: bool = False


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
    module = _pettingzoo_module(task)
    del settings["scenario"]
    # Walkers would call their own time limit a termination, which must not be bootstrapped.
    is_sisl = task.settings["scenario"] in SISL
    return BatchedPettingZooEnv(
        lambda **kwargs: Rounds(module.raw_env(**kwargs)),
        num_envs=num_envs,
        device=device,
        max_cycles=2**31 - 1 if is_sisl else task.max_steps,
        **settings,
    )


def _pettingzoo_module(task: TaskConfig) -> Any:
    scenario = task.settings["scenario"]
    if scenario in SISL and find_spec("Box2D") is None:
        raise ConfigError(f"The task {task.name!r} needs Box2D: pip install 'torchrl_happo[sisl]'.")
    try:
        return importlib.import_module(SISL.get(scenario, f"mpe2.{scenario}"))
    except ImportError as error:
        raise ConfigError(f"task.scenario is {scenario!r}, which mpe2 has not.") from error


def _pettingzoo_settings(task: TaskConfig) -> dict[str, Any] | None:
    if task.settings["scenario"] in SISL and find_spec("Box2D") is None:
        return None
    make = _pettingzoo_module(task).raw_env
    if task.settings["scenario"] in SISL:  # its raw_env passes on any word, to this one
        make = importlib.import_module(
            "pettingzoo.sisl.multiwalker.multiwalker_base"
        ).MultiWalkerEnv
    return {"scenario": None, **_arguments(make.__init__, "max_cycles", "render_mode")}


def _make_foraging(task: TaskConfig, num_envs: int, device: str) -> EnvBase:
    from torchrl_happo.envs import SeededForagingEnv  # which asks for lbforaging

    environment = task.settings["environment"]
    if environment not in SeededForagingEnv.available_envs:
        raise ConfigError(f"task.environment is {environment!r}, which lbforaging has not.")
    make = partial(SeededForagingEnv, environment, max_steps=task.max_steps)
    return SerialEnv(num_envs, make, device=device)


def _make_smax(task: TaskConfig, num_envs: int, device: str) -> EnvBase:
    settings = {"scenario": _leaf(task), **task.settings}
    return SMAXEnv(**settings, num_envs=num_envs, device=device)


def _smax_settings(task: TaskConfig) -> dict[str, Any]:
    scenario = task.settings.get("scenario", _leaf(task))
    if scenario not in smax_scenarios():
        raise ConfigError(f"task.scenario is {scenario!r}, which SMAX has not.")
    return {"scenario": None, **smax_settings()}


def _make_lle(task: TaskConfig, num_envs: int, device: str) -> EnvBase:
    settings = {"scenario": _leaf(task), **task.settings}
    scenario = str(settings.pop("scenario"))
    number = scenario.removeprefix("level_")
    if not number.isdigit():
        raise ConfigError(f"task.scenario is {scenario!r}, but must be level_1 to level_6.")
    return LLEEnv(int(number), **settings, num_envs=num_envs, device=device)


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
    "smax": Simulator(_make_smax, _smax_settings, "jaxmarl", "smax"),
    "lle": Simulator(
        _make_lle,
        lambda task: {
            "scenario": None,
            **_arguments(LLEEnv.__init__, "level", "num_envs", "seed", "device"),
        },
        "lle",
        "lle",
    ),
    "custom": Simulator(_make_custom, _custom_settings),
}
