"""PettingZoo's walkers, by configuration alone: the batch that particles run in carries them."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from torchrl_happo.envs import BatchedPettingZooEnv, Rounds
from torchrl_happo.recipe import simulators
from torchrl_happo.recipe.compose import compose_config
from torchrl_happo.recipe.config import ConfigError
from torchrl_happo.recipe.environments import make_env

pytest.importorskip("Box2D")
from pettingzoo.sisl.multiwalker.multiwalker import parallel_env, raw_env

TASK = "task=pettingzoo/multiwalker"


def play(env, steps=90):
    """Random actions, the same ones each time, over the ends of episodes."""
    torch.manual_seed(0)
    return env.rollout(steps, break_when_any_done=False)


def test_rounds_are_pettingzoos_conversion():
    """Without the checks on the way: the same data to the last digit; a fall ends it for all."""
    batches = [
        play(BatchedPettingZooEnv(make, num_envs=2, seed=5))
        for make in (parallel_env, lambda **kwargs: Rounds(raw_env(**kwargs)))
    ]
    assert batches[0]["next", "terminated"].any()
    assert (batches[0] == batches[1]).all()


def test_the_time_limit_truncates():
    """PettingZoo's own would terminate, and so cut off the value of what comes after."""
    env = make_env(compose_config(TASK, "task.max_steps=20").task, num_envs=2, seed=0)
    after = play(env, 30)["next"]
    at_limit = after["step_count"] == 20
    assert at_limit.any()
    assert torch.equal(after["truncated"], at_limit)
    assert not (after["terminated"] & at_limit).any()
    # The walkers share one reward unless they are told otherwise.
    paid = after["walker", "reward"].squeeze(-1)
    torch.testing.assert_close(after["reward"].expand_as(paid), paid)


def test_settings_are_its_own():
    """Its arguments can be set; a slip, another version and too few walkers are refused."""
    env = make_env(compose_config(TASK, "task.n_walkers=4").task, num_envs=1, seed=0)
    assert len(env.group_map["walker"]) == 4
    for words, sentence in (
        ("task.n_walker=4", "no option 'task.n_walker'; near: .*n_walkers"),
        ("task.n_walkers=0", "task.n_walkers is 0, but must be at least 1"),
        ("task.scenario=multiwalker_v8", "'multiwalker_v8', which mpe2 has not"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            compose_config(TASK, words)


def test_without_box2d(monkeypatch):
    """The task composes, and one sentence says what building it takes."""
    monkeypatch.setattr(
        simulators,
        "find_spec",
        lambda name: None if name == "Box2D" else importlib.util.find_spec(name),
    )
    with pytest.raises(ConfigError, match=r"needs Box2D: pip install 'torchrl_happo\[sisl\]'"):
        make_env(compose_config(TASK).task, num_envs=1, seed=0)
