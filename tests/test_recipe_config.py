"""The configuration: every file has its schema, every mistake its sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import cycle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import MISSING

import torchrl_happo.conf
from torchrl_happo.recipe.algorithms import ALGORITHMS
from torchrl_happo.recipe.compose import (
    GROUPS,
    TASKS,
    compose_config,
    from_dict,
    resume_config,
    to_dict,
)
from torchrl_happo.recipe.config import ConfigError, TrainConfig
from torchrl_happo.recipe.overrides import normalize

CONF = Path(torchrl_happo.conf.__file__).parent
CONFIG = compose_config()
BUILT_IN = [task for task in TASKS if task != "custom"]


def missing(config, path=""):
    """The fields of a configuration without a value."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            yield from missing(value, f"{path}{entry.name}.")
        elif value == MISSING:
            yield path + entry.name


@pytest.mark.parametrize("group", GROUPS)
def test_each_file_has_a_schema_and_each_schema_a_file(group):
    """Neither a YAML without types nor a dataclass without values is left lying about."""
    files = {
        str(f.relative_to(CONF / group).with_suffix("")) for f in (CONF / group).rglob("*.yaml")
    }
    assert files == set(GROUPS[group])


def check_composed(task, algorithm):
    """Composes a task with an algorithm and compares with their schemas."""
    config = compose_config(f"task={task}", f"algorithm={algorithm}")
    assert not list(missing(config))
    assert (config.task.name, config.algorithm.name) == (task, algorithm)
    assert config.task.simulator in (task.partition("/")[0], task)
    assert type(config.algorithm) is GROUPS["algorithm"][algorithm]


@pytest.mark.parametrize(
    ("task", "algorithm"), list(zip(BUILT_IN, cycle(ALGORITHMS), strict=False))
)
def test_every_task_composes(task, algorithm):
    """All values are there, of the types of their schemas, under the names of their files."""
    check_composed(task, algorithm)


@pytest.mark.slow
@pytest.mark.no_cover  # test_every_task_composes is measured
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_composes_with_every_family(algorithm):
    """Settings that a task adds to its family's compose in ``test_recipe_tuned.py``."""
    for task in {task.partition("/")[0]: task for task in BUILT_IN}.values():
        check_composed(task, algorithm)


@pytest.mark.parametrize("collector", GROUPS["collector"])
def test_collectors_compose(collector):
    """The choice of a collector brings its schema."""
    config = compose_config(f"collector={collector}")
    assert type(config.collector) is GROUPS["collector"][collector]


def test_benchmark_settings_are_the_default():
    """The settings that published numbers refer to do not drift."""
    config = compose_config()
    assert (config.task.name, config.algorithm.name) == ("vmas/het_mass", "happo")
    assert (config.num_envs, config.steps_per_batch, config.task.max_steps) == (60, 100, 100)
    assert (config.task.team_reward, config.evaluation.episodes) == ("mean", 200)
    for algorithm in ("happo", "mappo", "ippo"):
        settings = compose_config(f"algorithm={algorithm}").algorithm
        assert (settings.gamma, settings.lmbda, settings.clip_epsilon) == (0.99, 0.95, 0.2)
        assert (settings.num_epochs, settings.minibatch_size, settings.lr) == (10, 1500, 3e-4)
        assert (settings.max_grad_norm, settings.entropy_coeff) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("task=vmas/navigatoin", "'vmas/navigatoin'; near: vmas/navigation."),
        ("task=navigation", "near: vmas/navigation."),
        ("task=smac/3m", "mujoco/ant_2x4, mujoco/ant_4x2"),
        ("algorithm=hapo", "There is no algorithm 'hapo'; near: happo, hatrpo, a2po."),
        ("collector=rya", "There is no collector 'rya'; known: distributed, multi, ray, single."),
        ("taks=vmas/balance", "There is no option 'taks'; near: task."),
        ("lr=1e-3", "There is no option 'lr'; near: algorithm.lr."),
        (
            "task.mass_nose=4",
            "There is no option 'task.mass_nose'; near: task.mass_noise, task.max_steps.",
        ),
        ("+task.colour=red", "There is no option 'task.colour'"),
        ("seed=abc", "seed: Value 'abc'"),
        ("seed", "'seed' is not an override"),
        ("seed=-1", "seed is -1, but must be at least 0."),
        ("algorithm.lr=0", "algorithm.lr is 0.0, but must be above 0."),
        ("algorithm.clip_epsilon=1", "must be above 0 and below 1."),
        ("algorithm.gamma=1.01", "must be at least 0 and at most 1."),
        ("algorithm.order=best", "one of random, fixed."),
        ("task.team_reward=max", "one of mean, sum."),
        ("model.num_cells=[]", "model.num_cells is empty"),
        ("model.num_cells=[8,0]", "model.num_cells is 0, but must be at least 1."),
        ("num_envs=1", "more than the 100 frames of a batch"),
        ("logger=print", "one of csv, tensorboard, wandb."),
    ],
)
def test_mistakes_get_one_sentence(override, words):
    """Each names what was got and what is wanted, on one line that ends in a full stop."""
    with pytest.raises(ConfigError) as caught:
        compose_config(override)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert message.endswith(".")


def test_environments_must_divide_among_workers():
    """An uneven split is refused before any process starts."""
    with pytest.raises(ConfigError, match="num_envs=61 cannot be split evenly"):
        compose_config("num_envs=61", "collector=multi")


@given(total=st.integers(1, 10**7), envs=st.integers(15, 200), steps=st.integers(100, 500))
def test_the_last_batch_is_whole(total, envs, steps):
    """The iterations cover the frames that were asked for, with less than a batch to spare."""
    config = replace(CONFIG, total_frames=total, num_envs=envs, steps_per_batch=steps)
    spare = config.iterations * config.frames_per_batch - total
    assert 0 <= spare < config.frames_per_batch


def test_a_stored_configuration_is_the_same_when_read_back():
    """What a checkpoint holds brings back values and types."""
    config = compose_config("task=vmas/wheel", "algorithm=ippo", "collector=multi", "seed=7")
    assert from_dict(to_dict(config)) == config


def test_a_stored_configuration_of_another_schema_is_refused():
    """An option that this version does not know is named."""
    values = to_dict(compose_config())
    values["algorithm"]["momentum"] = 0.9
    with pytest.raises(ConfigError, match="momentum"):
        from_dict(values)


class TestResumedConfiguration:
    """What a resumed run takes from its checkpoint and what from the command line."""

    def resume(self, *overrides: str, also: Sequence[str] = ()) -> TrainConfig:
        stored = compose_config("task=vmas/wheel", "algorithm=mappo", "seed=3", *also)
        from hydra import compose, initialize_config_module

        words = [normalize(word) for word in overrides]
        with initialize_config_module("torchrl_happo.conf", version_base="1.3"):
            composed = compose("config", words)
        return resume_config(stored, composed, words)

    def test_the_stored_run_goes_on(self):
        """Defaults of the command line do not replace what was stored."""
        config = self.resume("resume=somewhere")
        assert (config.task.name, config.algorithm.name, config.seed) == ("vmas/wheel", "mappo", 3)

    def test_length_and_bookkeeping_may_change(self):
        """A run can be made longer, and evaluated otherwise."""
        config = self.resume("resume=x", "total_frames=900000", "evaluation.interval=5")
        assert (config.total_frames, config.evaluation.interval) == (900_000, 5)

    def test_the_machine_may_change(self):
        """A run that was trained on a GPU goes on where there is none."""
        config = self.resume("resume=x", "device=cpu", also=["device=cuda"])
        assert config.device == "cpu"

    def test_a_falling_learning_rate_has_an_end(self):
        """Made longer, the run would go on with a learning rate of zero."""
        with pytest.raises(ConfigError, match="A resumed run keeps its total_frames"):
            self.resume("resume=x", "total_frames=900000", also=["algorithm.lr_schedule=linear"])

    def test_the_same_value_again_is_fine(self):
        """The command that started a run can be repeated with ``resume=`` added."""
        config = self.resume("resume=x", "task=vmas/wheel", "algorithm=mappo", "seed=3")
        assert config.task.name == "vmas/wheel"

    @pytest.mark.parametrize("override", ["task=vmas/balance", "seed=4", "task.n_agents=2"])
    def test_another_run_is_refused(self, override):
        """What would make it a different run is named."""
        with pytest.raises(ConfigError, match="A resumed run keeps its"):
            self.resume("resume=x", "task=vmas/wheel", override)
