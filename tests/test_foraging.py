"""Level-based foraging through TorchRL's wrapper: reproducible, sparse, cooperative."""

from __future__ import annotations

import pytest
import torch
from newer import needs
from torchrl.envs import check_env_specs

from torchrl_happo.envs import SeededForagingEnv
from torchrl_happo.recipe.compose import compose_config
from torchrl_happo.recipe.config import ConfigError
from torchrl_happo.recipe.environments import make_env

pytest.importorskip("lbforaging")
pytestmark = needs("LBForagingEnv", "0.14")

TASK = "Foraging-8x8-2p-2f-coop-v3"


def play(env, steps=60):
    """Random actions, the same ones each time, over the ends of episodes."""
    torch.manual_seed(0)
    return env.rollout(steps, break_when_any_done=False)


def test_specs():
    """What they promise is what the data are."""
    check_env_specs(SeededForagingEnv(TASK))


def test_an_episode_after_a_seed_forgets_the_ones_before():
    """Seeded again, an environment plays as a new one does, whatever it has played."""
    fresh = SeededForagingEnv(TASK)
    fresh.set_seed(3)
    expected = play(fresh)
    for _ in range(3):
        fresh.set_seed(3)
        assert (play(fresh) == expected).all()


def test_a_batch_has_different_episodes():
    """Each copy has a seed of its own, and the whole batch is reproducible."""
    task = compose_config("task=lbforaging/8x8_2p_2f_coop").task
    batches = [play(make_env(task, num_envs=4, seed=seed)) for seed in (0, 0, 1)]
    assert (batches[0] == batches[1]).all()
    starts = torch.cat([batch["agents", "observation"][:, 0] for batch in batches[1:]])
    assert len(starts.unique(dim=0)) == 8


def test_the_time_limit_truncates_and_the_last_food_terminates():
    """The team is paid once for each food, 1 in all; the episode ends with the last of them."""
    task = compose_config("task=lbforaging/8x8_2p_2f_coop").task
    env = make_env(task, num_envs=1, seed=0)
    batch = play(env, 51)
    assert batch["next", "truncated"].flatten().nonzero().tolist() == [[49]]
    assert not batch["next", "terminated"].any()
    foraging = env.base_env._envs[0]._env.unwrapped
    data = env.reset()
    for player, position in zip(foraging.players, ((2, 1), (2, 3)), strict=True):
        player.position = position
    foraging.field[:] = 0
    foraging.field[2, 2] = sum(player.level for player in foraging.players)
    foraging._food_spawned = foraging.field.sum()
    foraging._gen_valid_moves()
    data["agents", "action"] = torch.full((1, 2), 5)  # load
    after = env.step(data)["next"]
    assert after["reward"].item() == pytest.approx(1.0)
    assert after["terminated"].item()
    assert not after["truncated"].item()


@pytest.mark.parametrize("max_steps", [20, 80])
def test_the_time_limit_may_be_another(max_steps):
    """``task.max_steps`` takes the place of lbforaging's own limit, below it and above."""
    task = compose_config("task=lbforaging/8x8_2p_2f_coop", f"task.max_steps={max_steps}").task
    batch = play(make_env(task, num_envs=1, seed=0), 81)["next"]
    ends = batch["truncated"].flatten().nonzero().flatten().tolist()
    assert ends == list(range(max_steps - 1, 81, max_steps))
    assert torch.equal(batch["done"], batch["truncated"])
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        SeededForagingEnv(TASK, max_steps=0)


def test_an_unknown_task_is_refused():
    """In one sentence."""
    task = compose_config("task=lbforaging/8x8_2p_3f", "task.environment=Foraging-8x8").task
    with pytest.raises(ConfigError, match="'Foraging-8x8', which lbforaging has not"):
        make_env(task, num_envs=1, seed=0)
