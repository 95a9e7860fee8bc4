"""TeamReward reduces the agents' rewards to one, and leaves everything else as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import Categorical, Composite, LazyTensorStorage, ReplayBuffer, Unbounded
from torchrl.envs import (
    Compose,
    EnvBase,
    MarlGroupMapType,
    RewardSum,
    SerialEnv,
    StepCounter,
    TransformedEnv,
    VmasEnv,
)
from torchrl.envs.utils import check_env_specs, make_composite_from_td

from torchrl_happo.envs import TeamReward

ONE_GROUP = MarlGroupMapType.ALL_IN_ONE_GROUP
PER_AGENT = MarlGroupMapType.ONE_GROUP_PER_AGENT


def vmas(scenario="navigation", *transforms, num_envs=3, **kwargs):
    """A seeded VMAS environment behind transforms."""
    env = VmasEnv(scenario, num_envs=num_envs, max_steps=None, seed=0, **kwargs)
    return TransformedEnv(env, Compose(*transforms))


class SplitRewards(EnvBase):
    """Pays the given rewards at every step, whatever their groups."""

    def __init__(self, rewards, batch_size=(2,)):
        super().__init__(batch_size=batch_size)
        self.observation_spec = Composite(obs=Unbounded((*batch_size, 1)), shape=batch_size)
        self.action_spec = Categorical(2, shape=batch_size)
        rewards = TensorDict(rewards, batch_size)
        for reward in rewards.values():
            if isinstance(reward, TensorDict):
                reward.batch_size = reward["reward"].shape[:-1]
        self.rewards = rewards
        self.reward_spec = make_composite_from_td(rewards)

    def _reset(self, tensordict):
        return self.observation_spec.zero()

    def _step(self, tensordict):
        out = TensorDict(self.full_done_spec.zero(), self.batch_size)
        out.update(self.observation_spec.zero())
        return out.update(self.rewards)

    def _set_seed(self, seed):
        pass


def split_rewards():
    """Two agents without an agent dimension, and a group of three with one."""
    return {
        ("scout", "reward"): torch.randn(2, 1),
        ("tank", "reward"): torch.randn(2, 1),
        ("drones", "reward"): torch.randn(2, 3, 1),
    }


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("scenario", "groups"),
    [
        ("balance", {}),
        ("navigation", {}),
        ("simple_tag", {}),
        ("simple_tag", {"group_map": ONE_GROUP}),  # unlike observations: a lazy stack
        ("navigation", {"group_map": PER_AGENT}),
        ("simple_speaker_listener", {}),
    ],
)
def test_reduces_over_all_agents_of_all_groups(scenario, groups, reduction):
    """Each agent weighs the same whatever its group; specs agree with the data."""
    env = vmas(scenario, TeamReward(reduction), **groups)
    check_env_specs(env)
    step = env.rollout(5)["next"]
    agents = torch.cat([step[group, "reward"] for group in env.group_map], dim=-2)
    assert agents.shape[-2] == env.n_agents
    torch.testing.assert_close(step["reward"], getattr(agents, reduction)(-2))
    assert env.full_reward_spec["reward"].shape == (3, 1)


def test_groups_with_and_without_an_agent_dimension_mix():
    """A single agent without an agent dimension weighs as much as each agent of a group."""
    rewards = split_rewards()
    env = TransformedEnv(SplitRewards(rewards), TeamReward("mean"))
    check_env_specs(env)
    agents = torch.cat([rewards["drones", "reward"].squeeze(-1), rewards["scout", "reward"]], -1)
    agents = torch.cat([agents, rewards["tank", "reward"]], dim=-1)
    step = env.rollout(2)["next"]
    torch.testing.assert_close(step["reward"][:, 0], agents.mean(-1, keepdim=True))


def test_leaves_the_rest_of_the_step_alone():
    """Per agent rewards, observations and done flags are those of the bare environment."""
    torch.manual_seed(0)
    bare = vmas("navigation").rollout(4)
    torch.manual_seed(0)
    batch = vmas("navigation", TeamReward("sum")).rollout(4)
    assert (batch.exclude(("next", "reward")) == bare).all()
    assert "reward" not in batch.keys()


@given(st.integers(1, 5), st.integers(0, 2**16))
def test_agrees_with_a_team_of_one_reward(n_agents, seed):
    """For shared rewards ``None`` and ``"mean"`` are that reward, and ``"sum"`` is n times it."""
    shared = torch.randn(4, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    group = TensorDict({"reward": shared.unsqueeze(-2).expand(4, n_agents, 1)}, [4, n_agents])
    batch = TensorDict({"next": {"agents": group}}, [4])
    none, mean, total = (
        TeamReward(reduction, in_keys=[("agents", "reward")])(batch.clone())["next", "reward"]
        for reduction in (None, "mean", "sum")
    )
    assert torch.equal(none, shared)
    torch.testing.assert_close(mean, shared)
    torch.testing.assert_close(total, n_agents * shared)


def test_none_refuses_rewards_that_differ():
    """A step at which agents are paid differently is never silently averaged."""
    env = TransformedEnv(SplitRewards(split_rewards()), TeamReward(None))
    with pytest.raises(ValueError, match=r"\('drones', 'reward'\).*reduction='mean'"):
        env.rollout(1)


def test_none_takes_not_a_number_for_shared():
    """NaN in a shared reward is another error's business, not a difference between agents."""
    rewards = {("agents", "reward"): torch.full((2, 3, 1), torch.nan)}
    env = TransformedEnv(SplitRewards(rewards), TeamReward(None))
    assert env.rollout(1)["next", "reward"].isnan().all()


@pytest.mark.gpu
def test_none_verifies_on_a_device_without_waiting_at_every_step():
    """On CUDA the first step is compared, and no later one reads back to the host."""
    transform = TeamReward(None, in_keys=[("agents", "reward")])
    reward = torch.ones(2, 3, 1, device="cuda")
    batch = TensorDict({"agents": TensorDict({"reward": reward}, [2, 3])}, [2])
    transform(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        transform(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    reward[0, 0] = 2
    with pytest.raises(ValueError, match="differ between agents"):
        TeamReward(None, in_keys=[("agents", "reward")])(batch)


def test_two_teams_have_a_reward_each():
    """Predators and prey are reduced apart, under keys of their own."""
    predators = TeamReward(
        "sum", in_keys=[("adversary", "reward")], out_key=("predators", "reward")
    )
    prey = TeamReward("sum", in_keys=[("agent", "reward")], out_key=("prey", "reward"))
    env = vmas("simple_tag", predators, prey, RewardSum())
    check_env_specs(env)
    step = env.rollout(3)["next"]
    assert torch.equal(step["predators", "reward"], step["adversary", "reward"].sum(-2))
    assert torch.equal(step["prey", "reward"], step["agent", "reward"].sum(-2))
    assert step["prey", "episode_reward"].shape == (3, 3, 1)


@pytest.mark.parametrize("nested", [False, True])
def test_what_another_one_writes_is_no_agents_reward(nested):
    """Mean and sum of the same agents side by side, whether in one environment or one around it."""
    mean, total = TeamReward("mean"), TeamReward("sum", out_key="total")
    if nested:
        env = TransformedEnv(vmas("navigation", mean), total, auto_unwrap=False)
    else:
        env = vmas("navigation", mean, StepCounter(), total)
    check_env_specs(env)
    step = env.rollout(3)["next"]
    assert torch.equal(step["total"], step["agents", "reward"].sum(-2))
    assert torch.equal(step["reward"], step["agents", "reward"].mean(-2))
    assert list(total.in_keys) == [("agents", "reward")]


@pytest.mark.parametrize("reduction", ["mean", "sum", None])
def test_passes_through_a_reward_that_is_the_teams(reduction):
    """An environment with one root reward has a team reward already."""
    reward = torch.randn(2, 1)
    env = TransformedEnv(SplitRewards({"reward": reward}), TeamReward(reduction))
    check_env_specs(env)
    assert torch.equal(env.rollout(1)["next", "reward"].squeeze(1), reward)
    env = env.append_transform(TeamReward(out_key="total"))
    assert torch.equal(env.rollout(1)["next", "total"].squeeze(1), reward)


@pytest.mark.parametrize(
    "reward_sum",
    [RewardSum, lambda: RewardSum(in_keys=["reward"], out_keys=["episode_reward"])],
    ids=["default", "named"],
)
def test_reward_sum_over_collected_episodes(reward_sum):
    """Root ``episode_reward`` is the running sum of the team's rewards, and starts anew on reset.

    Episodes of unlike lengths make partial resets, which reach some environments only.
    """
    env = vmas("balance", StepCounter(60), TeamReward("mean"), reward_sum(), num_envs=8)
    collector = Collector(env, None, frames_per_batch=8 * 50, total_frames=8 * 100)
    running, partial = torch.zeros(8, 1), False
    for batch in collector:
        for step in batch.unbind(1):
            torch.testing.assert_close(step["episode_reward"], running)
            running = running + step["next", "reward"]
            torch.testing.assert_close(step["next", "episode_reward"], running)
            done = step["next", "done"]
            partial |= bool(done.any() and not done.all())
            running = torch.where(done, 0.0, running)
    collector.shutdown()
    assert partial


def test_in_a_batched_environment_and_a_replay_buffer():
    """It may sit in the workers of a batched environment, or read a stored batch."""
    env = SerialEnv(2, lambda: vmas("navigation", TeamReward("mean")))
    assert env.rollout(2)["next", "reward"].shape == (2, 3, 2, 1)
    batch = vmas().rollout(4).reshape(-1)
    team = TeamReward("mean", in_keys=[("agents", "reward")])
    buffer = ReplayBuffer(storage=LazyTensorStorage(12), transform=team, batch_size=6)
    buffer.extend(batch)
    sample = buffer.sample()
    assert torch.equal(sample["next", "reward"], sample["next", "agents", "reward"].mean(-2))


def test_survives_copies_and_another_environment():
    """Pickles, deep copies and clones find the rewards of the environment that they are put in."""
    team = TeamReward("sum")
    vmas("navigation", team).rollout(1)
    for twin in (
        team.clone(),
        copy.deepcopy(team.clone()),
        pickle.loads(pickle.dumps(team.clone())),
    ):
        assert "reward" in vmas("simple_tag", twin).rollout(1)["next"].keys()
        assert list(twin.in_keys) == [("adversary", "reward"), ("agent", "reward")]


def test_pettingzoo():
    """Rewards per group, batch size [] and done flags at two levels work as well."""
    mpe2 = pytest.importorskip("mpe2.simple_spread_v3")
    from torchrl.envs import PettingZooWrapper

    env = PettingZooWrapper(mpe2.parallel_env(max_cycles=5), seed=0)
    env = TransformedEnv(env, Compose(TeamReward("mean"), RewardSum()))
    check_env_specs(env)
    step = env.rollout(3)["next"]
    torch.testing.assert_close(step["reward"], step["agent", "reward"].mean(-2))
    torch.testing.assert_close(step["episode_reward"], step["reward"].cumsum(0))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"reduction": "max"}, "'max'.*'mean', 'sum' and None"),
        ({"in_keys": []}, "empty in_keys"),
    ],
)
def test_refuses_arguments(kwargs, message):
    """What it cannot do is said at construction."""
    with pytest.raises(ValueError, match=message):
        TeamReward(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"in_keys": [("agent", "reward")]}, r"\('agent', 'reward'\).*choose among"),
        ({"in_keys": ["agents"]}, "'agents'.*choose among"),
        ({"out_key": ("agents", "team")}, "'agents' is a group"),
        ({"out_key": "agents"}, "'agents' is a group"),
        ({"out_key": ("agents", "reward")}, "write over the reward"),
    ],
)
def test_refuses_keys_of_the_environment(kwargs, message):
    """Keys that are missing or taken are named when the environment's specs are made."""
    with pytest.raises(ValueError, match=message):
        vmas("navigation", TeamReward(**kwargs)).rollout(1)


def test_refuses_rewards_it_cannot_read():
    """A batch without the reward, or with one of another shape, is refused by name."""
    batch = TensorDict({"next": {"reward": torch.zeros(4, 3)}}, [4])
    with pytest.raises(KeyError, match="finds no reward"):
        TeamReward(in_keys=[("agents", "reward")])(batch)
    with pytest.raises(ValueError, match=r"\(4, 3\).*reshape it"):
        TeamReward(in_keys=["reward"], out_key="team")(batch)
    with pytest.raises(ValueError, match="pass in_keys"):
        TeamReward()(batch)


def test_a_batch_is_reduced_anew():
    """What stands under the team's key gives way to the agents' rewards of now."""
    batch = TensorDict(
        {"agents": {"reward": torch.ones(4, 3, 1)}, "reward": torch.zeros(4, 1)}, [4]
    )
    reward = TeamReward("sum", in_keys=[("agents", "reward")])(batch)["reward"]
    assert torch.equal(reward, torch.full((4, 1), 3.0))


def test_rewards_of_agents_under_the_teams_own_key():
    """They are reduced; the team's own reward is kept as it is."""
    transform = TeamReward("sum", in_keys=["reward"])
    batch = TensorDict({"reward": torch.ones(4, 3, 1)}, [4])
    for _ in range(2):
        assert torch.equal(transform(batch)["reward"], torch.full((4, 1), 3.0))
