"""Settings that a task brings with it: found by the names of task and algorithm, last but one."""

from __future__ import annotations

from pathlib import Path

import pytest

import torchrl_happo.conf
from torchrl_happo.recipe.algorithms import ALGORITHMS
from torchrl_happo.recipe.compose import TASKS, compose_config

TUNED = Path(torchrl_happo.conf.__file__).parent / "tuned"


def names(group):
    """Each file's folder and name."""
    files = (TUNED / group).rglob("*.yaml")
    return {(str(f.parent.relative_to(TUNED / group)), f.stem) for f in files}


def test_each_file_belongs_to_a_task_and_an_algorithm():
    """A file with a slip in its name would never be read, and nobody would notice."""
    assert {task for task, _ in names("task")} <= set(TASKS)
    assert {algorithm for _, algorithm in names("task")} <= set(ALGORITHMS)
    families = {task.partition("/")[0] for task in TASKS}
    assert {family for _, family in names("base")} <= families
    assert {family for family, _ in names("family")} <= families
    assert {algorithm for _, algorithm in names("family")} <= set(ALGORITHMS)


@pytest.mark.parametrize(("task", "algorithm"), sorted(names("task")))
def test_each_file_composes(task, algorithm):
    """It sets nothing that the algorithm does not have."""
    config = compose_config(f"task={task}", f"algorithm={algorithm}")
    assert (config.task.name, config.algorithm.name) == (task, algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("task", ["mujoco/swimmer_2x1", "pettingzoo/simple_spread"])
def test_a_family_has_settings_for_every_algorithm(task, algorithm):
    """A task without a file of its own trains with those of its family."""
    config = compose_config(f"task={task}", f"algorithm={algorithm}")
    assert (config.num_envs, config.steps_per_batch, config.algorithm.lr) == (20, 200, 5e-4)
    assert (config.model.activation, config.model.layer_norm) == ("relu", True)


def test_an_algorithm_is_above_the_base_of_its_family():
    """On particles HAPPO, its followers and MAT take whole batches, the others minibatches."""
    sizes = {
        algorithm: compose_config(
            "task=pettingzoo/simple_spread", f"algorithm={algorithm}"
        ).algorithm.minibatch_size
        for algorithm in ALGORITHMS
    }
    whole = dict.fromkeys(
        ("happo", "haa2c", "a2po", "coppo", "happo_lagrangian", "mat", "mat_dec", "tppo")
    )
    assert sizes == whole | {"hatrpo": 400, "macpo": 400, "mappo": 400, "ippo": 400}


def test_the_task_is_above_its_family_and_the_command_line_above_both():
    """HalfCheetah 2x3 clips at 0.05 for 15 epochs, unless it is told otherwise."""
    command = ["task=mujoco/halfcheetah_2x3", "algorithm.num_epochs=3", "num_envs=8"]
    config = compose_config(*command)
    assert (config.algorithm.clip_epsilon, config.algorithm.entropy_coeff) == (0.05, 0.01)
    assert (config.algorithm.num_epochs, config.num_envs) == (3, 8)
    assert config.model.num_cells == [128, 128, 128]


def test_they_can_be_left_out():
    """Without them the recipe's own settings hold, as for a family that has none."""
    task = "task=mujoco/halfcheetah_2x3"
    config, default = (
        compose_config(task, "~tuned/base", "~tuned/family", "~tuned/task"),
        compose_config(),
    )
    assert config.algorithm == default.algorithm
    assert (config.model, config.num_envs) == (default.model, default.num_envs)
