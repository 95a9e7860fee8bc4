"""PenaltyCost moves a penalty from the reward to a cost; nothing else of an environment changes."""

from __future__ import annotations

import pytest
import torch
from recipe_helpers import table, tiny_config
from tensordict import TensorDict
from torchrl.envs import TransformedEnv, VmasEnv
from torchrl.envs.utils import check_env_specs

from torchrl_happo.envs import PenaltyCost
from torchrl_happo.recipe import training
from torchrl_happo.recipe.compose import compose_config
from torchrl_happo.recipe.config import ConfigError
from torchrl_happo.recipe.environments import make_env

REWARD, INFO = ("agents", "reward"), ("agents", "info", "agent_collisions")


def crowded():
    """Eight agents in a small world, who touch each other often."""
    sizes = {"n_agents": 8, "world_spawning_x": 0.6, "world_spawning_y": 0.6}
    return VmasEnv("navigation", num_envs=4, max_steps=None, seed=0, **sizes)


def played(env):
    """A rollout from a seed, which the copies of the simulator share."""
    env.set_seed(0)
    torch.manual_seed(0)
    return env.rollout(30)


def test_reward_and_cost_are_the_reward_of_before():
    """The same actions from the same seed: what was paid for contacts is the cost, to the bit."""
    plain, priced = crowded(), TransformedEnv(crowded(), PenaltyCost({REWARD: INFO}))
    check_env_specs(priced, seed=0)
    before, after = (played(env)["next"] for env in (plain, priced))
    assert torch.equal(before["agents", "observation"], after["agents", "observation"])
    assert torch.equal(after["agents", "cost"], -before[INFO])
    assert after["agents", "cost"].max() > 0
    assert torch.equal(before[REWARD] + after["agents", "cost"], after[REWARD])


def test_a_batch_collected_without_it():
    """``forward`` does the same to data, for agents at the root as well."""
    batch = TensorDict({"next": {"reward": torch.tensor([1.0]), "hit": torch.tensor([-3.0])}})
    moved = PenaltyCost({"reward": "hit"})(batch)["next"]
    assert (moved["reward"], moved["cost"]) == (4, 3)


@pytest.mark.parametrize(
    ("penalties", "words"),
    [
        ({}, "got no penalties"),
        ({"reward": INFO}, r"'reward', which is none of the rewards .*'agents', 'reward'"),
        ({REWARD: ("agents", "info", "hits")}, r"none of the reports .*agent_collisions"),
        ({REWARD: ("agents", "observation")}, "of shape .*; name a penalty of the reward's shape"),
    ],
)
def test_refusals(penalties, words):
    """Each names the key, and what there is to choose from."""
    with pytest.raises(ValueError, match=words):
        TransformedEnv(crowded(), PenaltyCost(penalties)).rollout(1)


def test_the_recipe_trains_on_contacts(tmp_path, monkeypatch):
    """The task pays for contacts of all agents; the cost is in training and in evaluation."""
    monkeypatch.setattr(training, "write_report", lambda config, folder: None)
    config = tiny_config("task=vmas/navigation_collisions", "algorithm=macpo")
    folder = training.run(config, tmp_path)
    assert config.algorithm.cost_limit == 1
    assert "within_limit" in table(folder / "evaluation.csv")[0]


def test_a_cost_that_the_scenario_does_not_report():
    """One sentence with what it reports; and none where it reports nothing."""
    for task, words in (("navigation", "agent_collisions, final_rew"), ("wheel", "null")):
        config = compose_config(f"task=vmas/{task}", "task.cost=contact")
        with pytest.raises(ConfigError, match=words):
            make_env(config.task, num_envs=2, seed=0)


def test_a_variant_has_a_name_of_its_own():
    """A task with a cost may be called by its scenario and more; no other may."""
    with pytest.raises(ConfigError, match="give this one a name of its own"):
        compose_config("task=vmas/navigation_collisions", "task.cost=null")
    assert compose_config("task=vmas/navigation_collisions").task.settings["scenario"]
