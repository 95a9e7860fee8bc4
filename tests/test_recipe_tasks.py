"""Every task of the recipe starts, with the layout the rest of it relies on."""

from __future__ import annotations

import warnings

import pytest
import torch
import vmas
from recipe_helpers import tiny_config
from torchrl.collectors import Collector

from torchrl_happo.recipe.algorithms import make_learner
from torchrl_happo.recipe.compose import TASKS, compose_config
from torchrl_happo.recipe.config import ConfigError
from torchrl_happo.recipe.environments import known_settings, make_env
from torchrl_happo.recipe.records import episode_statistics, flatten

LEFT_OUT = {
    "teams of learners compete": {
        "simple_adversary",
        "simple_crypto",
        "simple_push",
        "simple_tag",
        "simple_world_comm",
    },
    "one agent": {"circle_trajectory", "goal", "line_trajectory", "simple"},
    "no reward": {"diff_drive", "drone", "kinematic_bicycle", "pollock"},
}
#: Packages that may not be installed, by task or family.
NEEDS = {
    "lle": "lle",
    "mujoco": "envpool",
    "pettingzoo/multiwalker": "Box2D",
    "smax": "jaxmarl",
}


def known(task):
    """The settings that a task has."""
    return known_settings(compose_config(f"task={task}").task)


def test_every_cooperative_scenario_is_a_task():
    """What VMAS has and the recipe has not, it has not for a reason."""
    scenarios = {*vmas.scenarios, *vmas.mpe_scenarios, *vmas.debug_scenarios}
    tasks = {name.removeprefix("vmas/") for name in TASKS if name.startswith("vmas/")}
    assert scenarios - tasks == set().union(*LEFT_OUT.values())


def test_every_cooperative_particle_environment_is_a_task():
    """Those that mpe2 has and the recipe has not are competitive, or have one agent."""
    mpe2 = pytest.importorskip("mpe2.all_modules").mpe_environments
    environments = {name.removeprefix("mpe/").rpartition("_")[0] for name in mpe2}
    tasks = {name.removeprefix("pettingzoo/") for name in TASKS if name.startswith("pettingzoo/")}
    assert environments - tasks == LEFT_OUT["teams of learners compete"] | {"simple"}


def test_settings_that_follow_others():
    """What VMAS takes from another setting unless it is given, it takes from there here, too."""
    for settings, n_food in ((("task.n_agents=6",), 6), (("task.n_food=3",), 3)):
        task = compose_config("task=vmas/dispersion", *settings).task
        assert len(make_env(task, num_envs=1, seed=0).world.landmarks) == n_food
    task = compose_config("task=vmas/wind_flocking", "task.v_range=0.3").task
    wanted = make_env(task, num_envs=1, seed=0).scenario.desired_vel
    torch.testing.assert_close(wanted, torch.tensor([0.0, 0.3]))


@pytest.mark.parametrize(
    "task", [name for name in TASKS if name.startswith("vmas/") and "n_agents" in known(name)]
)
def test_the_number_of_agents_is_what_was_asked_for(task):
    """Where it can be set it has an effect: one more is one more."""
    n_agents = known(task)["n_agents"] + 1
    config = compose_config(f"task={task}", f"task.n_agents={n_agents}")
    env = make_env(config.task, num_envs=1, seed=0)
    assert sum(map(len, env.group_map.values())) == n_agents


@pytest.mark.parametrize("task", [task for task in TASKS if task != "custom"])
def test_a_task_trains(task):
    """It knows every option of its file, pays one team reward, and two updates are finite."""
    for name in (task, task.partition("/")[0]):
        if name in NEEDS:
            pytest.importorskip(NEEDS[name])
    config = tiny_config(
        f"task={task}",
        "num_envs=3",
        "steps_per_batch=4",
        "algorithm.minibatch_size=6",
        "algorithm.num_epochs=1",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not used by the scenario")
        env = make_env(config.task, num_envs=3, seed=0)
    learner = make_learner(config, env)
    collector = Collector(
        env, learner.policy, frames_per_batch=12, auto_register_policy_transforms=False
    )
    batches = iter(collector)
    for batch in (next(batches), next(batches)):
        assert batch["next", "reward"].shape == (3, 4, 1)
        metrics = flatten(learner.updater(batch))
        assert all(torch.tensor(value).isfinite() for value in metrics.values()), metrics
    collector.shutdown()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("task=vmas/balance task.n_agents=1", r"built: assert self.n_agents > 1 \(.*n_agents=1\)"),
        ("task=vmas/road_traffic task.n_agents=1", "n_nearing_agents_observed must be less than"),
    ],
)
def test_what_no_simulator_builds_is_one_sentence(options, words):
    """Its own words, or the line of a bare assertion, and the settings that it was given."""
    if "pettingzoo" in options:
        pytest.importorskip("mpe2")
    with pytest.raises(ConfigError, match=words):
        make_env(compose_config(*options.split()).task, num_envs=2, seed=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("task.scenario=wheel", "'wheel', but the task is vmas/het_mass: .* by task.name."),
        ("task.scenario=balanc", "task.scenario is 'balanc', but the task is vmas/het_mass"),
        ("task.name=mine task.scenario=balanc", "'balanc', which VMAS has not."),
        (
            "task=pettingzoo/simple_spread task.scenario=simple_tag_v3",
            "'simple_tag_v3', but the task is pettingzoo/simple_spread",
        ),
        (
            "task=pettingzoo/simple_spread task.scenario=simple_spread_v9",
            "'simple_spread_v9', which mpe2 has not.",
        ),
    ],
)
def test_another_scenario_is_another_task(options, words):
    """It is not trained under the name of this one."""
    if "pettingzoo" in options:
        pytest.importorskip("mpe2")
    with pytest.raises(ConfigError, match=words):
        compose_config(*options.split())
    task = compose_config("task.name=mine", "task.scenario=wheel").task
    assert make_env(task, num_envs=1, seed=0).scenario_name == "wheel"


def test_an_error_of_torch_in_a_simulator_is_one_sentence():
    """Past the ranges that are checked, too: nothing raw is raised."""
    task = compose_config("task=vmas/sampling").task
    task.settings["n_gaussians"] = 0
    with pytest.raises(ConfigError, match=r"non-empty TensorList \(.*n_gaussians=0\)"):
        make_env(task, num_envs=2, seed=0)


def test_the_time_limit_truncates():
    """An episode that runs out of time is not called terminated: its value is bootstrapped."""
    env = make_env(tiny_config("task=vmas/wheel").task, num_envs=2, seed=0)
    batch = env.rollout(9, break_when_any_done=False)
    ends = batch["next", "truncated"].squeeze(-1)
    assert ends.nonzero()[:, 1].tolist() == [3, 7, 3, 7]
    assert not batch["next", "terminated"].any()
    statistics = episode_statistics(batch)
    assert statistics["episode_length"] == 4
    assert statistics["episodes"] == 4
    assert statistics["return"] == pytest.approx(batch["next", "reward"][:, :8].sum().item() / 4)


def test_the_team_reward_can_be_summed():
    """``task.team_reward=sum`` pays three agents three times their mean."""
    rewards = []
    for reduction in ("mean", "sum"):
        task = tiny_config(f"task.team_reward={reduction}").task
        rewards.append(make_env(task, num_envs=2, seed=0).rollout(3)["next", "reward"])
    torch.testing.assert_close(3 * rewards[0], rewards[1])


def test_a_batch_without_an_end_has_no_return():
    """NaN says so, where 0 would pass for a result."""
    env = make_env(tiny_config("task.max_steps=50").task, num_envs=2, seed=0)
    statistics = episode_statistics(env.rollout(2))
    assert statistics["return"] != statistics["return"]
    assert statistics["episodes"] == 0
