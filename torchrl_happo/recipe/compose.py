"""From YAML files and overrides to a :class:`TrainConfig`, with one sentence for every mistake."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from torchrl_happo.recipe import config as schema
from torchrl_happo.recipe.algorithms import ALGORITHMS
from torchrl_happo.recipe.config import ConfigError, TrainConfig
from torchrl_happo.recipe.overrides import asked, normalize
from torchrl_happo.recipe.overrides import sentence as _sentence
from torchrl_happo.recipe.ranks import launch_time
from torchrl_happo.recipe.references import name_of
from torchrl_happo.recipe.validation import validate

Functions = Mapping[str, Callable[..., Any]]
#: The options that name functions, or are functions.
FUNCTIONS = ("task.make_env", "model.make_actor", "critic.make_critic")

CONFIG_MODULE = "torchrl_happo.conf"
CONF = Path(__file__).parent.parent / "conf"

LONGEST_FOLDER = 100
CHECKPOINTS, SUFFIX = "checkpoints", ".pt"

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

# The groups of conf/ whose files have schemas of their own.
GROUPS: dict[str, Mapping[str, type]] = {
    "algorithm": ALGORITHMS,
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
#: The tasks that come with the recipe: the files of ``conf/task``.
TASKS = sorted(
    str(f.relative_to(CONF / "task").with_suffix("")) for f in (CONF / "task").rglob("*.yaml")
)


@cache  # Hydra keeps them, and half the time of a composition would be theirs
def register() -> None:
    """Make the schemas and the resolvers of ``conf/config.yaml`` known to Hydra; idempotent."""
    store = ConfigStore.instance()
    store.store(group="schema", name="train", node=TrainConfig)
    for group, schemas in GROUPS.items():
        for name, node in schemas.items():
            store.store(group=f"schema/{group}", name=name, node=node)
    resolvers: dict[str, Callable[..., Any]] = {
        "run_folder": new_folder,
        "family": lambda task: task.partition("/")[0],
        "settings_folder": settings_folder,
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True, use_cache=True)


def compose_config(*overrides: str) -> TrainConfig:
    """Compose a run's configuration as the command line does.

    Args:
        *overrides: what would stand on the command line.

    Returns:
        the typed and validated configuration.

    Raises:
        ConfigError: in one sentence, for anything that does not exist or cannot be run.

    Examples:
        >>> config = compose_config("task=vmas/navigation", "algorithm=haa2c", "seed=3")
        >>> config.task.name, config.algorithm.lr, config.seed
        ('vmas/navigation', 0.0003, 3)
        >>> compose_config("task=vmas/navigatoin")
        Traceback (most recent call last):
        ...
        torchrl_happo.recipe.config.ConfigError: There is no task 'vmas/navigatoin'; near: ...
    """
    return to_config(_compose([normalize(word) for word in overrides]))


def _compose(words: list[str]) -> DictConfig:
    register()
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        try:
            return compose("config", words)
        except (HydraException, OmegaConfBaseException, MissingConfigException) as error:
            raise ConfigError(sentence(error)) from error


def load(words: Iterable[str], functions: Functions | None = None) -> TrainConfig:
    """Compose a run's configuration or, for a resumed run, read it from its checkpoint.

    Args:
        words (iterable of str): what would stand on the command line.
        functions (dict of str to callable, optional): options that are functions, such as
            ``"task.make_env"``. Defaults to ``None``.
    """
    normalized = [normalize(word) for word in words]
    return from_composed(_compose(normalized), normalized, functions)


def from_composed(
    composed: DictConfig, overrides: Iterable[str], functions: Functions | None = None
) -> TrainConfig:
    """Return the configuration that Hydra composed or, for a resumed run, the stored one."""
    if composed.resume is None:
        return to_config(composed, functions)
    from torchrl_happo.recipe import checkpoint  # which reads configurations by this module

    stored = checkpoint.read_config(checkpoint.read(Path(composed.resume)), functions)
    return resume_config(stored, composed, overrides)


def sentence(error: Exception) -> str:
    """Say in one sentence what is wrong with a command line that Hydra refused."""
    return _sentence(error, {"task": TASKS, **GROUPS})


def to_config(composed: DictConfig, functions: Functions | None = None) -> TrainConfig:
    """Turn what Hydra composed into the typed configuration, validated."""
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
    for option, function in (functions or {}).items():
        part, _, name = option.partition(".")
        setattr(getattr(config, part), name, function)
    validate(config)
    return config


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return the configuration as plain values, which a checkpoint and YAML can hold."""
    parts = {option.partition(".")[0]: option for option in FUNCTIONS}
    named = {
        part: replace(
            getattr(config, part),
            **{option.partition(".")[2]: name_of(_function(config, option))},
        )
        for part, option in parts.items()
    }
    return asdict(replace(config, **named))


def from_dict(values: Mapping[str, Any], functions: Functions | None = None) -> TrainConfig:
    """Read back what :func:`to_dict` wrote, with the types of today's schema."""
    try:
        parts: dict[str, Any] = {
            group: schemas[values[group]["name"]] for group, schemas in GROUPS.items()
        }
        typed = OmegaConf.structured(TrainConfig(**parts))
        typed.merge_with(values)
        return to_config(typed, functions)
    except (KeyError, TypeError, OmegaConfBaseException) as error:
        raise ConfigError(
            "The stored configuration does not fit this version's schema: "
            f"{str(error).splitlines()[0]}."
        ) from error


def changeable(config: TrainConfig) -> set[str]:
    """Return what a run that goes on may set anew without becoming another run.

    Its number of frames is part of a learning rate that falls to zero at their end.
    """
    falls = config.algorithm.lr_schedule == "linear"
    return CHANGEABLE - {"total_frames"} if falls else CHANGEABLE


def resume_config(
    stored: TrainConfig, composed: DictConfig, overrides: Iterable[str]
) -> TrainConfig:
    """Return the configuration of a resumed run: the stored one, but for what may change.

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
        option = f"{key}.name" if key in {"task", *GROUPS} else key
        wanted = OmegaConf.select(composed, option)
        if key.partition(".")[0] in free:
            OmegaConf.update(values, key, wanted)
        elif wanted != OmegaConf.select(values, option):
            raise ConfigError(
                f"A resumed run keeps its {asked(option)}: leave out {asked(override)!r} (what may "
                f"change: {', '.join(sorted(free))})."
            )
    functions = {option: _function(stored, option) for option in FUNCTIONS}
    given = {option: function for option, function in functions.items() if function is not None}
    return from_dict(cast(dict[str, Any], OmegaConf.to_container(values)), given)


def _function(config: TrainConfig, option: str) -> Any:
    part, _, name = option.partition(".")
    return getattr(getattr(config, part), name)


def run_folder(place: Path) -> Path:
    """Return the folder of a run, from itself, its folder of checkpoints or one of these.

    Examples:
        >>> run_folder(Path("outputs/a/checkpoints/00000004.pt")).name
        'a'
    """
    folder = place.parent if place.suffix == SUFFIX else place
    return folder.parent if folder.name == CHECKPOINTS else folder


def new_folder(resume: str | None, task: str, algorithm: str) -> str:
    """Return where a run writes: a folder that is resumed goes on, else there is a new one."""
    if resume and Path(resume).is_dir():
        return str(run_folder(Path(resume)))
    return f"outputs/{task}/{algorithm}/{launch_time():%Y-%m-%d_%H-%M-%S-%f}"


def settings_folder(overrides: str) -> str:
    """Return the name of a folder for what was asked for beyond task, algorithm and seed.

    Examples:
        >>> settings_folder("algorithm.lr=0.001,model=gru")
        'algorithm.lr=0.001,model=gru'
        >>> settings_folder("++task.settings.n_agents=4"), settings_folder("")
        ('task.n_agents=4', 'default')
    """
    overrides = ",".join(map(asked, overrides.split(",")))
    if len(overrides) > LONGEST_FOLDER:
        return f"settings-{hashlib.sha256(overrides.encode()).hexdigest()[:10]}"
    return overrides.replace("/", "_") or "default"
