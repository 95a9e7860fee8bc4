"""Multi-agent MuJoCo: gymnasium-robotics' teams, Gymnasium's physics, TorchRL's protocol."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import Unbounded
from torchrl.envs import RewardSum
from torchrl.envs.utils import check_env_specs

from torchrl_happo import HAPPOLoss, SequentialUpdater, TeamReward, make_actor, make_critic
from torchrl_happo.envs import EnvPoolEnv, TeamCost, make_mujoco
from torchrl_happo.envs.simulators.robots import ROBOTS
from torchrl_happo.networks.actors import joint_policy

envpool = pytest.importorskip("envpool")
gymnasium = pytest.importorskip("gymnasium")

TEAMS = [(robot, name) for robot, body in ROBOTS.items() for name in body.partitions]
OUR_OWN = {("Ant", "8x1"), ("Humanoid", "17x1"), ("HumanoidStandup", "17x1"), ("Walker2d", "6x1")}
FINGERTIP_HEIGHT = (
    5  # entry of the second agent's observation; it is always 0, and not in the state
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """MuJoCo logs its warnings into the working directory."""
    monkeypatch.chdir(tmp_path)


def step(env, data, action):
    """One step with a joint action, cut into the agents' ones."""
    transform = env.transform
    for group, agents in env.group_map.items():
        own = [transform.partition[int(agent.removeprefix("agent_"))] for agent in agents]
        data[group, "action"] = torch.stack([action[:, entries] for entries in own], 1)
    return env.step(data)["next"]


@pytest.mark.parametrize(("robot", "name"), [team for team in TEAMS if team not in OUR_OWN])
def test_gymnasium_robotics_agrees(robot, name):
    """The same actuators move, and the same values are observed, number by number.

    Two differences are known. gymnasium-robotics swaps the names of two joints of the humanoid,
    so that its agent observes the same values in another order; and it does not clip Walker2d's
    velocities to 10, as the task's state has them.
    """
    mamujoco = pytest.importorskip("gymnasium_robotics").mamujoco_v1
    body = ROBOTS[robot]
    team = body.partitions[name]
    for distance in (0, 1, 3):
        theirs = mamujoco.parallel_env(robot, name, agent_obsk=distance)
        seen, _ = theirs.reset(seed=0)
        joints = [[node.act_ids for node in part] for part in theirs.agent_action_partitions]
        assert body.actuators(team) == joints
        for agent in theirs.possible_agents:
            theirs.action_space(agent).seed(0)
        for _ in range(5):
            actions = {agent: theirs.action_space(agent).sample() for agent in theirs.agents}
            seen = theirs.step(actions)[0]
        state = theirs.state()
        for agent, entries in zip(seen, body.observations(team, distance), strict=True):
            expected, ours = seen[agent], state[entries]
            if robot == "Walker2d":
                expected = expected.clip(-10, 10)
            if robot == "Reacher" and agent == "agent_1":
                expected = np.delete(expected, FINGERTIP_HEIGHT)
            if robot.startswith("Humanoid"):
                expected, ours = np.sort(expected), np.sort(ours)
            np.testing.assert_array_equal(ours, expected)
        theirs.close()


@pytest.mark.parametrize("name", ["2x4", "8x1"])
def test_the_nearest_joints_are_what_agents_observe(name):
    """``nearest`` reaches the agents: each sees these entries of the state, and nothing else."""
    env = make_mujoco("Ant", name, num_envs=2, nearest=1, identity=False, standardize=False, seed=0)
    data = env.rollout(2)
    body = ROBOTS["Ant"]
    entries = iter(body.observations(body.partitions[name], 1))
    for group in env.group_map:
        for seen in data[group, "observation"].unbind(2):
            assert torch.equal(seen, data["state"][..., next(entries)])


@pytest.mark.parametrize("robot", ["Ant", "HalfCheetah", "Hopper", "Swimmer", "Walker2d"])
def test_gymnasium_agrees(robot):
    """From the same state the same joint action leads to Gymnasium's state and reward.

    The action lies outside the motors' range: MuJoCo clamps it, the control cost does not.
    """
    name = next(iter(ROBOTS[robot].partitions))
    env = make_mujoco(robot, name, standardize=False, seed=3)
    data = env.reset()
    state = data["state"][0].double().numpy()
    theirs = gymnasium.make(f"{robot}-v5").unwrapped
    theirs.reset(seed=0)
    hidden = theirs.observation_structure["skipped_qpos"]
    positions = theirs.model.nq - hidden
    theirs.set_state(
        np.concatenate([np.zeros(hidden), state[:positions]]),
        state[positions : positions + theirs.model.nv],
    )
    action = torch.linspace(-2, 1.5, theirs.model.nu).unsqueeze(0)
    observed, reward, *_ = theirs.step(action[0].double().numpy())
    after = step(env, data, action)
    np.testing.assert_allclose(after["state"][0], observed, rtol=1e-3, atol=1e-3)
    assert after["reward"].item() == pytest.approx(reward, abs=1e-3)


@pytest.mark.parametrize(
    ("robot", "name", "bound"),
    [
        ("Ant", "2x4", 2.522),
        ("Ant", "4x2", 2.418),
        ("HalfCheetah", "6x1", 2.932),
        ("HalfCheetah", "2x3", 3.227),
        ("Hopper", "3x1", 0.9613),
        ("Humanoid", "9|8", 0.58),
        ("Swimmer", "2x1", 0.04891),
        ("Walker2d", "2x3", 1.641),
    ],
)
def test_the_cost_of_velocity(robot, name, bound):
    """Step by step, the cost says whether gymnasium-robotics' robot is faster than the bound.

    Each step starts from the same state and takes the same joint action.
    """
    mamujoco = pytest.importorskip("gymnasium_robotics").mamujoco_v1
    build = partial(make_mujoco, robot, name, standardize=False, seed=3, cost="velocity")
    theirs = mamujoco.parallel_env(robot, name)
    theirs.reset(seed=0)
    single = theirs.single_agent_env.unwrapped
    hidden = single.observation_structure["skipped_qpos"]
    positions, seen = single.model.nq - hidden, set()
    for limit, env in ((bound, build()), (0.1, build(max_velocity=0.1))):
        data = env.reset()
        assert "cost" not in data.keys()  # nothing is paid for a reset
        near = np.array([limit - 1e-6, limit + 1e-6])
        info = {"x_velocity": near, "y_velocity": np.zeros(2)}
        if ROBOTS[robot].velocity is np.abs:
            del info["y_velocity"]
        assert env.base_env.cost(info).tolist() == [False, True]
        for _ in range(20):
            state = data["state"][0].double().numpy()
            single.set_state(
                np.concatenate([np.zeros(hidden), state[:positions]]),
                state[positions : positions + single.model.nv],
            )
            action = 2 * torch.rand(1, single.model.nu) - 1
            *_, infos = theirs.step(
                {
                    agent: action[0, [node.act_ids for node in part]].numpy()
                    for agent, part in zip(
                        theirs.possible_agents, theirs.agent_action_partitions, strict=True
                    )
                }
            )
            info = infos[theirs.possible_agents[0]]
            velocity = [info[key] for key in ("x_velocity", "y_velocity") if key in info]
            speed = velocity[0] if robot == "Swimmer" else np.linalg.norm(velocity)
            data = step(env, data, action)
            assert data["cost"].shape == (1, 1)
            if abs(speed - limit) > 0.01:  # float32 states do not decide closer calls
                assert data["cost"].item() == float(speed > limit)
                seen.add(data["cost"].item())
            data = env.reset() if data["done"].item() else data
    assert seen == {0.0, 1.0} or robot == "Swimmer"


def test_the_cost_of_the_team_is_the_robots():
    """It concerns the whole team, specs hold, and an episode adds it up."""
    env = make_mujoco("HalfCheetah", "2x3", num_envs=3, seed=0, cost="velocity", max_velocity=0.01)
    env = env.append_transform(TeamCost())
    env = env.append_transform(RewardSum(in_keys=["cost"], out_keys=["episode_cost"]))
    check_env_specs(env)
    data = env.rollout(5)
    assert data["next", "cost"].max() == 1
    sums = data["next", "cost"].cumsum(1)
    assert torch.equal(data["next", "episode_cost"], sums)
    assert "cost" not in make_mujoco("Ant", "4x2").rollout(1)["next"].keys()


@pytest.mark.parametrize(
    ("arguments", "message", "mended"),
    [
        (("Ant", "4x2", {"cost": "speed"}), "cost must be one of 'velocity'", {"cost": "velocity"}),
        (("Ant", "8x1", {"cost": "velocity"}), "no bound.*Ant '8x1'.*max_velocity",
         {"cost": "velocity", "max_velocity": 1.0}),
        (("Reacher", "2x1", {"cost": "velocity"}), "Reacher has no velocity", {}),
        (("Ant", "4x2", {"max_velocity": 1.0}), "there is none; pass cost='velocity'",
         {"cost": "velocity", "max_velocity": 1.0}),
    ],
)  # fmt: skip
def test_refuses_costs(arguments, message, mended):
    """Unknown costs, bounds and robots without them, each with a cure that works."""
    robot, name, settings = arguments
    with pytest.raises(ValueError, match=message):
        make_mujoco(robot, name, **settings)
    make_mujoco(robot, name, **mended)


def test_actions_are_clamped_where_they_act_and_paid_for_as_they_are():
    """Twice as far outside the range: the same motion, at a higher cost."""
    after = []
    for scale in (1.0, 3.0):
        env = make_mujoco("HalfCheetah", "2x3", num_envs=2, seed=0)
        after.append(step(env, env.reset(), torch.full((2, 6), scale)))
    assert torch.equal(after[0]["state"], after[1]["state"])
    cost = torch.full((2, 1), 0.1 * 6 * (3**2 - 1))
    torch.testing.assert_close(after[0]["reward"] - after[1]["reward"], cost)


@pytest.mark.parametrize(
    ("robot", "name", "settings"),
    [
        *((robot, name, {}) for robot, name in TEAMS),
        *((robot, name, {"nearest": 1, "bounded_actions": True}) for robot, name in TEAMS),
        ("Walker2d", [[0, 1], [2, 3, 4], [5]], {"version": "v4"}),
    ],
)
def test_specs(robot, name, settings):
    """Of every team: float32 throughout, and what the specs promise is what the data are."""
    env = make_mujoco(robot, name, num_envs=3, seed=0, **settings)
    check_env_specs(env)
    data = env.rollout(2)
    floats = {leaf.dtype for leaf in data.values(True, True) if leaf.is_floating_point()}
    assert floats == {torch.float32}
    assert data["next", "reward"].shape == (3, 2, 1)
    for action in env.full_action_spec.values(True, True):
        assert isinstance(action, Unbounded) is not settings.get("bounded_actions", False)


def test_an_observation_is_the_standardised_state_and_identity():
    """The reference's setting, on the simulator's own numbers."""
    raw, ours = (
        make_mujoco("HalfCheetah", "2x3", num_envs=2, standardize=scaled, seed=0).reset()
        for scaled in (False, True)
    )
    for agent in range(2):
        who = torch.eye(2)[agent].expand(2, 2)
        vector = torch.cat([raw["state"], who], -1).double()
        mean, std = vector.mean(-1, keepdim=True), vector.std(-1, correction=0, keepdim=True)
        torch.testing.assert_close(
            ours["agents", "observation"][:, agent].double(), (vector - mean) / std
        )
    mean = raw["state"].mean(-1, keepdim=True)
    std = raw["state"].std(-1, correction=0, keepdim=True)
    torch.testing.assert_close(ours["state"], (raw["state"] - mean) / std)


def hoppers(max_steps=1000, seed=0, num_envs=6, **kwargs):
    """Legs that fall after some tens of steps, with the simulator's own numbers."""
    return EnvPoolEnv("Hopper-v5", num_envs=num_envs, max_steps=max_steps, seed=seed, **kwargs)


def play(env, steps, seed=0):
    """Random actions, the same ones for each seed, over all ends of episodes."""
    torch.manual_seed(seed)
    return env.rollout(steps, break_when_any_done=False)


def test_ends_are_told_apart():
    """A fall terminates, the time limit truncates, and a fall in the last step is both."""
    free = play(hoppers(num_envs=1), 60)["next"]
    fall = int(free["terminated"].flatten().nonzero()[0])
    assert not free["truncated"].any()
    for max_steps, terminated, truncated in (
        (fall, False, True),
        (fall + 1, True, True),
        (fall + 2, True, False),
    ):
        ends = play(hoppers(max_steps, num_envs=1), 60)["next"]
        first = int(ends["done"].flatten().nonzero()[0])
        assert first == min(fall, max_steps - 1)
        assert ends["terminated"][0, first].item() is terminated
        assert ends["truncated"][0, first].item() is truncated
    assert torch.equal(free["done"], free["terminated"])


def test_the_last_observation_is_the_true_one():
    """EnvPool, driven by hand, shows the same rewards and observations up to each end."""
    batch = play(hoppers(max_steps=30), 80)
    env = hoppers()
    env.reset()
    pool, alive = env._pool, np.ones(6, bool)
    for now in batch.unbind(1):
        observation, reward, *_ = pool.step(now["action"].numpy())
        np.testing.assert_array_equal(
            now["next", "observation"][alive], observation.astype(np.float32)[alive]
        )
        np.testing.assert_array_equal(now["next", "reward"][alive, 0], reward[alive])
        alive &= ~now["next", "done"].numpy()[:, 0]
    assert not alive.any()


def test_a_reset_of_nobody():
    """An empty choice of copies returns, where EnvPool would wait for ever, and all go on."""
    env, twin = hoppers(), hoppers()
    for which in (env, twin):
        play(which, 3)
    env.reset(TensorDict({"_reset": torch.zeros(6, 1, dtype=torch.bool)}, [6]))
    action = TensorDict({"action": torch.ones(6, 3)}, [6])
    assert (env.step(action.clone())["next"] == twin.step(action)["next"]).all()


def test_partial_resets():
    """Where an episode ends a new one begins, near the initial state; all others go on."""
    batch = play(hoppers(max_steps=30), 80)
    done = batch["next", "done"][:, :-1, 0]
    assert (done.any(0) & ~done.all(0)).any()
    before, after = batch["next", "observation"][:, :-1], batch["observation"][:, 1:]
    assert torch.equal(before[~done], after[~done])
    initial = torch.tensor([1.25] + 10 * [0.0])
    assert ((after[done] - initial).abs() <= 0.005 + 1e-6).all()
    assert not torch.isclose(before[done], initial, atol=0.005).all(-1).any()
    assert not batch["done"].any()


@pytest.mark.parametrize("other", [{"seed": 1}, {"num_threads": 2}, {"seed": 0}])
def test_seeds(other):
    """Equal seeds give equal data on any number of threads; neighbouring ones share no episode."""
    ours, theirs = play(hoppers(), 20), play(hoppers(**other), 20)
    assert bool((ours == theirs).all()) == (other != {"seed": 1})
    if other == {"seed": 1}:
        starts = torch.cat([ours["observation"][:, 0], theirs["observation"][:, 0]])
        assert len(starts.unique(dim=0)) == len(starts) == 12


@pytest.mark.parametrize("everyone", [None, torch.ones(6, 1, dtype=torch.bool)])
def test_a_seed_waits_for_the_next_reset_of_all(everyone):
    """Until then all copies go on, through partial resets too; then nothing of before is left."""
    env, twin = hoppers(), hoppers()
    first = play(env, 20)
    play(twin, 20)
    env.set_seed(0)
    some = TensorDict({"_reset": torch.tensor([[True]] + 5 * [[False]])}, [6])
    action = TensorDict({"action": torch.ones(6, 3)}, [6])
    for which in (env, twin):
        which.step(action.clone())
        which.reset(some.clone())
    assert (env.step(action.clone())["next"] == twin.step(action)["next"]).all()
    old = env._pool
    start = env.reset(None if everyone is None else TensorDict({"_reset": everyone}, [6]))
    assert env._pool is not old
    assert torch.equal(start["observation"], first["observation"][:, 0])
    pool = env._pool
    env.reset()
    assert env._pool is pool


def test_a_seeded_environment_plays_as_a_new_one():
    """``set_seed`` makes it forget what it did before."""
    env = hoppers()
    first = play(env, 20)
    play(env, 15, seed=1)
    env.set_seed(0)
    assert (play(env, 20) == first).all()


def test_a_collector_may_be_seeded_before_its_first_batch():
    """It holds a reset by then, from which the old episodes go on."""
    collector = Collector(hoppers(), frames_per_batch=12, total_frames=12)
    collector.set_seed(0)
    assert next(iter(collector)).shape == (6, 2)
    collector.shutdown()


def test_a_step_comes_after_a_reset():
    """Without one there is nothing to step."""
    with pytest.raises(RuntimeError, match="reset it before it steps"):
        hoppers().step(TensorDict({"action": torch.ones(6, 3)}, [6]))


def test_without_a_seed_torchs_generator_decides():
    """Runs differ unless torch is seeded, like everything in TorchRL."""
    torch.manual_seed(5)
    starts = [hoppers(seed=None).reset()["observation"] for _ in range(2)]
    torch.manual_seed(5)
    assert torch.equal(starts[0], hoppers(seed=None).reset()["observation"])
    assert not torch.equal(*starts)


@pytest.mark.parametrize(("robot", "name"), [("HalfCheetah", "2x3"), ("Humanoid", "9|8")])
def test_happo_learns_from_it(robot, name):
    """Two updates of alike agents and of unlike ones, over the ends of episodes, are finite."""
    env = make_mujoco(robot, name, num_envs=4, max_steps=8, seed=0).append_transform(TeamReward())
    actors = make_actor(env, num_cells=[16], state_dependent_std=False)
    critic = make_critic(env, state_key="state", num_cells=[16])
    updater = SequentialUpdater(
        HAPPOLoss(actors, critic, entropy_coeff=0.01),
        optimizer=partial(torch.optim.Adam, lr=5e-4),
        num_epochs=2,
    )
    collector = Collector(env, joint_policy(actors), frames_per_batch=80, total_frames=160)
    for batch in collector:
        metrics: TensorDict = updater(batch)
        assert all(value.isfinite().all() for value in metrics.values(True, True))
    assert batch["next", "truncated"].any()
    collector.shutdown()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("HalfCheeta", "2x3"), "no robot 'HalfCheeta'.*'HalfCheetah'"),
        (("HalfCheetah", "3x2"), "no partition of HalfCheetah '3x2'.*'2x3'"),
        (("HalfCheetah", [[0, 1], [1, 2]]), "exactly one agent"),
        (("HalfCheetah", [[0, 1, 2], [3, 4, 7]]), "0 to 7 .* exactly one agent"),
        (
            ("HalfCheetah", [[0, 1, 2], [3, 4]]),
            "has 5 entries, but the action of HalfCheetah has 6",
        ),
        (("Hopper", [[0, 1], [2, 3]]), "has 4 entries, but the action of Hopper has 3"),
    ],
)
def test_refuses_teams(arguments, message):
    """A team that does not exist is named, with those near it, whatever its agents observe."""
    for nearest in (None, 1):
        with pytest.raises(ValueError, match=message):
            make_mujoco(*arguments, nearest=nearest)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"partition": [0, 1, 2]}, TypeError, r"partition=\[0, 1, 2\].* for each agent"),
        ({"nearest": -2}, ValueError, "nearest must be at least 0, got -2"),
        ({"nearest": 1.5}, TypeError, "nearest must be a whole number of at least 0, got 1.5"),
        ({"num_envs": 0}, ValueError, "num_envs must be at least 1, got 0"),
        ({"num_threads": -1}, ValueError, "num_threads must be at least 1, got -1"),
        ({"batch_size": 2}, ValueError, r"does not take .* {'batch_size': 2}; .* given is thread"),
        ({"max_steps": 0}, ValueError, "max_steps must be at least 1, got 0"),
        (
            {"prize": 1},
            ValueError,
            r"'HalfCheetah-v5' does not .* {'prize': 1}; .*ctrl_cost_weight",
        ),
        ({"ctrl_cost_weight": "a"}, ValueError, r"does not take .* {'ctrl_cost_weight': 'a'}"),
    ],
)
def test_refuses_arguments(settings, error, message):
    """What cannot be meant is named before anything is built."""
    with pytest.raises(error, match=message):
        make_mujoco("HalfCheetah", **{"partition": "2x3", **settings})


def test_the_nearest_joints_are_those_of_the_state_that_is_described():
    """Arguments of the task that shift the entries of its state do not go with them."""
    shifted = {"exclude_current_positions_from_observation": False}
    with pytest.raises(ValueError, match=r"nearest=0 needs .* with its 17 entries, .* one of 18"):
        make_mujoco("HalfCheetah", "2x3", nearest=0, **shifted)
    with pytest.raises(ValueError, match=r"105 entries, .* one of 27"):
        make_mujoco("Ant", "4x2", nearest=0, use_contact_force=False)
    assert make_mujoco("HalfCheetah", "2x3", **shifted).observation_spec["state"].shape == (1, 18)
    make_mujoco("HalfCheetah", "2x3", nearest=0, ctrl_cost_weight=0.0)


def test_refuses_tasks():
    """Other versions have another state, and tasks without vectors are not taken."""
    with pytest.raises(ValueError, match="nearest=1 needs the state of version='v5', got 'v4'"):
        make_mujoco("Ant", "4x2", nearest=1, version="v4")
    with pytest.raises(ValueError, match="no task 'Hopper-v9'"):
        EnvPoolEnv("Hopper-v9")
    with pytest.raises(ValueError, match="action of 'CartPole-v1'"):
        EnvPoolEnv("CartPole-v1")


def test_closing_ends_the_pool():
    """A closed environment holds no threads."""
    env = hoppers()
    env.reset()
    env.close()
    assert env._pool is None
