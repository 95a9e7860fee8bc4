"""A batch of PettingZoo environments is that many single ones, by TorchRL's protocol."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torchrl.collectors import Collector
from torchrl.data import Categorical
from torchrl.envs import MarlGroupMapType, PettingZooWrapper
from torchrl.envs.utils import check_env_specs

from torchrl_happo import HAPPOLoss, SequentialUpdater, TeamReward, make_actor, make_critic
from torchrl_happo.envs import BatchedPettingZooEnv, Rounds
from torchrl_happo.networks.actors import joint_policy

pytest.importorskip("mpe2")
from mpe2 import (
    collect_treasure_v1,
    simple_formation_v1,
    simple_line_v1,
    simple_reference_v3,
    simple_speaker_listener_v4,
    simple_spread_v3,
)

TASKS = [
    simple_spread_v3,
    simple_reference_v3,
    simple_speaker_listener_v4,
    simple_formation_v1,
    simple_line_v1,
    collect_treasure_v1,
]
PER_AGENT = MarlGroupMapType.ONE_GROUP_PER_AGENT


def build(module=simple_spread_v3, num_envs=3, seed=0, **kwargs):
    """Copies of a task of mpe2."""
    return BatchedPettingZooEnv(module.parallel_env, num_envs=num_envs, seed=seed, **kwargs)


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("module", TASKS, ids=lambda module: module.__name__)
def test_specs(module, continuous):
    """The specs of TorchRL's wrapper with a batch in front; data are what they promise."""
    env = build(module, continuous_actions=continuous)
    check_env_specs(env)
    single = PettingZooWrapper(
        module.parallel_env(continuous_actions=continuous), categorical_actions=True
    )
    for (group, agents), (name, same) in zip(
        env.group_map.items(), single.group_map.items(), strict=True
    ):
        assert (group, agents) == ("collectors" if name == "collector" else name, same)
        for ours, theirs, leaf in (
            (env.full_action_spec, single.full_action_spec, "action"),
            (env.full_observation_spec, single.full_observation_spec, "observation"),
            (env.full_reward_spec, single.full_reward_spec, "reward"),
        ):
            assert ours[group, leaf].shape == (3, *theirs[name, leaf].shape)
            assert ours[group, leaf].dtype == theirs[name, leaf].dtype
        spec = env.full_action_spec[group, "action"]
        assert isinstance(spec, Categorical) is not continuous


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("module", TASKS, ids=lambda module: module.__name__)
def test_rounds_are_pettingzoos_conversion(module, continuous):
    """Without the checks on the way: the same data to the last digit, over the ends of episodes."""
    settings = {"num_envs": 3, "seed": 5, "continuous_actions": continuous, "max_cycles": 4}
    batches = []
    for make in (module.parallel_env, lambda **kwargs: Rounds(module.raw_env(**kwargs))):
        torch.manual_seed(0)
        env = BatchedPettingZooEnv(make, **settings)
        batches.append(env.rollout(10, break_when_any_done=False))
    assert batches[0]["next", "truncated"].any()
    assert (batches[0] == batches[1]).all()


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("module", TASKS, ids=lambda module: module.__name__)
def test_each_copy_is_a_single_environment(module, continuous):
    """The same seeds and actions give the numbers of the bare environment, over resets too."""
    env = build(module, continuous_actions=continuous, max_cycles=4)
    seeds = list(env._seeds)
    batch = env.rollout(10, break_when_any_done=False)
    for copy, seed in enumerate(seeds):
        single = module.parallel_env(continuous_actions=continuous, max_cycles=4)
        seen, _ = single.reset(seed=seed)
        for now in batch[copy].unbind(0):
            compare(now, seen, env.group_map, "observation")
            actions = {
                agent: now[group, "action"][member].numpy()
                for group, agents in env.group_map.items()
                for member, agent in enumerate(agents)
            }
            seen, rewards, _, truncations, _ = single.step(actions)
            compare(now["next"], seen, env.group_map, "observation")
            paid = {agent: np.float32([reward]) for agent, reward in rewards.items()}
            compare(now["next"], paid, env.group_map, "reward")
            if any(truncations.values()):
                seen, _ = single.reset()


def compare(data, expected, group_map, leaf):
    """Entries of all agents equal those of PettingZoo's dict."""
    for group, agents in group_map.items():
        for member, agent in enumerate(agents):
            np.testing.assert_array_equal(data[group, leaf][member].numpy(), expected[agent])


def test_the_time_limit_truncates():
    """Every fourth step ends an episode without terminating it; its observation is the last one."""
    batch = build(max_cycles=4).rollout(10, break_when_any_done=False)
    ends = batch["next", "truncated"].squeeze(-1)
    assert ends[0].nonzero().flatten().tolist() == [3, 7]
    assert torch.equal(ends, batch["next", "done"].squeeze(-1))
    assert not batch["next", "terminated"].any()
    before = batch["next", "agent", "observation"][:, :-1]
    after = batch["agent", "observation"][:, 1:]
    same = (before == after).flatten(2).all(-1)
    assert torch.equal(same, ~ends[:, :-1])


@pytest.mark.parametrize("rounds", [True, False])
def test_a_copy_that_has_ended_waits_for_its_reset(rounds):
    """It stays as its last step left it, unpaid, and the others go on as in a twin."""
    module = simple_spread_v3
    make = (lambda **kwargs: Rounds(module.raw_env(**kwargs))) if rounds else module.parallel_env
    env, twin = (BatchedPettingZooEnv(make, num_envs=2, seed=0, max_cycles=5) for _ in range(2))
    starts = []
    for which in (env, twin):
        torch.manual_seed(0)
        data = which.rollout(2)[:, -1]["next"].exclude("reward", ("agent", "reward"))
        starts.append(which.reset(data.set("_reset", torch.tensor([[True], [False]]))))
    batches = []
    for which, steps in ((env, 20), (twin, 3)):
        torch.manual_seed(1)
        settings = {"auto_reset": False, "tensordict": starts.pop(0)}
        settings |= {"break_when_any_done": False, "break_when_all_done": True}
        batches.append(which.rollout(steps, **settings)["next"])
    batch, expected = batches
    assert batch["done"].squeeze(-1).tolist() == [4 * [False] + [True], 2 * [False] + 3 * [True]]
    assert torch.equal(batch["truncated"], batch["done"])
    assert (batch[:, :3] == expected).all()
    last = batch[:, -1]
    after = env.step(env.full_action_spec.rand())["next"]
    assert last["agent", "reward"].all()
    assert not after["agent", "reward"].any()
    assert (after.exclude(("agent", "reward")) == last.exclude(("agent", "reward"))).all()
    again = env.rollout(20, break_when_any_done=False, break_when_all_done=True)
    assert again.shape == (2, 5)


def test_partial_resets():
    """Only the copies that are asked to start anew; the others go on as in a twin."""
    env, twin = build(), build()
    batches = []
    for which in (env, twin):
        torch.manual_seed(0)
        batches.append(which.rollout(3)[:, -1]["next"].exclude("reward"))
    data, others = batches
    data["_reset"] = torch.tensor([[False], [True], [False]])
    data = env.reset(data)
    same = (data["agent", "observation"] == others["agent", "observation"]).flatten(1).all(-1)
    assert same.tolist() == [True, False, True]
    action = env.full_action_spec.rand()
    data, others = (which.step(now.update(action)) for which, now in ((env, data), (twin, others)))
    after = (data["next"] == others["next"])["agent", "observation"].flatten(1).all(-1)
    assert after.tolist() == [True, False, True]


def test_seeds():
    """Equal seeds give equal data, ``set_seed`` starts anew, and copies differ."""

    def play(env):
        torch.manual_seed(0)
        return env.rollout(6, break_when_any_done=False)

    env = build(max_cycles=4)
    first = play(env)
    assert (play(build(max_cycles=4)) == first).all()
    env.set_seed(0)
    assert (play(env) == first).all()
    assert not (play(build(max_cycles=4, seed=1)) == first).all()
    assert len(first["agent", "observation"][:, 0].unique(dim=0)) == 3
    torch.manual_seed(3)
    one, other = (build(seed=None).reset()["agent", "observation"] for _ in range(2))
    assert not torch.equal(one, other)


def test_group_maps():
    """Agents can be grouped as in TorchRL's wrapper, if the agents of a group are alike."""
    assert list(build(group_map=PER_AGENT).group_map) == ["agent_0", "agent_1", "agent_2"]
    groups = {"pair": ["agent_2", "agent_0"], "one": ["agent_1"]}
    data = build(group_map=groups).rollout(2)
    assert data["pair", "observation"].shape == (3, 2, 2, 18)
    collector = {"collector": groups["pair"], "one": groups["one"]}
    with pytest.raises(ValueError, match="'collector', under which TorchRL's collectors"):
        build(group_map=collector)
    with pytest.raises(ValueError, match="hold each of"):
        build(group_map={"pair": ["agent_0", "agent_1"]})
    with pytest.raises(ValueError, match="a group without agents"):
        build(group_map={"all": ["agent_0", "agent_1", "agent_2"], "none": []})
    with pytest.raises(ValueError, match=r"unlike spaces.*ONE_GROUP_PER_AGENT"):
        build(simple_speaker_listener_v4, group_map=MarlGroupMapType.ALL_IN_ONE_GROUP)


class Quitter:
    """An environment that one of two agents leaves early, or whose spaces are not vectors."""

    possible_agents = ("a_0", "a_1")

    def __init__(self, observation=(2,), action=None):
        from gymnasium.spaces import Box, Discrete

        self._observation = Box(-1, 1, observation)
        self._action = Discrete(2) if action is None else Box(-1, 1, action)

    def observation_space(self, agent):
        return self._observation

    def action_space(self, agent):
        return self._action

    def reset(self, seed=None):
        return {agent: np.zeros(2) for agent in self.possible_agents}, {}

    def step(self, actions):
        def each(*values):
            return dict(zip(self.possible_agents, values, strict=True))

        return self.reset()[0], each(0, 0), each(True, False), each(False, False), {}


def test_refuses_what_it_cannot_batch():
    """Agents that leave early, images and matrices are named; nothing is padded silently."""
    with pytest.raises(ValueError, match="num_envs must be at least 1, got 0"):
        build(num_envs=0)
    with pytest.raises(RuntimeError, match=r"ended for some agents only.*PettingZooWrapper"):
        BatchedPettingZooEnv(Quitter, seed=0).rollout(1)
    with pytest.raises(ValueError, match=r"'a' observe .* takes vectors"):
        BatchedPettingZooEnv(Quitter, observation=(2, 2))
    with pytest.raises(ValueError, match="'a' act in"):
        BatchedPettingZooEnv(Quitter, action=(2, 2))


@pytest.mark.parametrize("continuous", [True, False])
def test_happo_learns_from_it(continuous):
    """Two updates of unlike agents over the ends of episodes are finite."""
    env = build(simple_speaker_listener_v4, 4, continuous_actions=continuous, max_cycles=8)
    env = env.append_transform(TeamReward("sum"))
    actors = make_actor(env, num_cells=[16])
    updater = SequentialUpdater(
        HAPPOLoss(actors, make_critic(env, num_cells=[16]), entropy_coeff=0.01),
        optimizer=partial(torch.optim.Adam, lr=5e-4),
        num_epochs=2,
    )
    collector = Collector(env, joint_policy(actors), frames_per_batch=80, total_frames=160)
    for batch in collector:
        metrics = updater(batch)
        assert all(value.isfinite().all() for value in metrics.values(True, True))
    collector.shutdown()
