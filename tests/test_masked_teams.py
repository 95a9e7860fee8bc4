"""Games whose agents are masked, in batches: LLE and SMAX keep one contract.

Both need packages that the ``test`` extra has not, for these are large: JaxMARL, and what the Laser
Learning Environment brings with it. Their tests run by hand, after
``pip install -c constraints.txt -e '.[test,smax,lle]'``, and are skipped without them.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections import deque
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from recipe_helpers import table, tiny_config
from tensordict.nn import TensorDictModule
from torchrl.envs import check_env_specs
from torchrl.envs.utils import step_mdp

from torchrl_happo import HAPPOLoss, SequentialUpdater, make_actor, make_critic
from torchrl_happo.envs import LLEEnv, SMAXEnv
from torchrl_happo.networks.actors import joint_policy
from torchrl_happo.recipe import training
from torchrl_happo.recipe.compose import compose_config
from torchrl_happo.recipe.config import ConfigError
from torchrl_happo.recipe.environments import make_env
from torchrl_happo.recipe.evaluation import Evaluation
from torchrl_happo.recipe.records import episode_statistics

PACKAGES = {"lle": "lle", "smax": "jaxmarl"}
TASKS = {"lle": "lle/level_6", "smax": "smax/2s3z"}


@pytest.fixture(params=PACKAGES)
def family(request):
    """A simulator that is installed."""
    pytest.importorskip(PACKAGES[request.param])
    return request.param


def build(family, num_envs=4, seed=0):
    """Copies of a game, by default as many as elsewhere here: other numbers compile anew."""
    if family == "lle":
        return LLEEnv(6, num_envs=num_envs, seed=seed)
    return SMAXEnv("2s3z", num_envs=num_envs, seed=seed)


def play(env, steps, seed=0, **kwargs):
    """Random allowed actions, the same ones each time."""
    torch.manual_seed(seed)
    return env.rollout(steps, break_when_any_done=False, **kwargs)


def at_random():
    """A policy that draws allowed actions."""

    def draw(mask):
        return torch.multinomial(mask.flatten(0, 1).float(), 1).reshape(mask.shape[:-1])

    return TensorDictModule(draw, [("agents", "action_mask")], [("agents", "action")])


def same_rows(one, other):
    """Which copies show the same."""
    return (
        (one == other)
        .flatten_keys()
        .apply(lambda entry: entry.flatten(1).all(1), batch_size=one.batch_size[:1])
    )


def copies_alike(one, other):
    """Which copies show the same in all entries, ``[num_envs]``."""
    return torch.stack(list(same_rows(one, other).values())).all(0).tolist()


def test_specs(family):
    """Data are what the specs promise."""
    check_env_specs(build(family))


def test_seeds(family):
    """Equal seeds give equal data, ``set_seed`` starts anew; battles differ by copy and seed."""
    env = build(family)
    first = play(env, 30)
    assert (play(build(family), 30) == first).all()
    env.set_seed(0)
    assert (play(env, 30) == first).all()
    if family == "smax":  # LLE's levels always begin alike
        assert len(first["state"][:, 0].unique(dim=0)) == 4
        assert not (play(build(family, seed=1), 30) == first)["state"].all()


def test_global_generators_are_left_alone(family):
    """A seed is the copies' own: what else draws in the process is not touched."""
    before = random.getstate(), np.random.get_state()[1].tolist()
    env = build(family)
    env.set_seed(5)
    env.reset()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    torch.manual_seed(3)
    one, other = (build(family, seed=None).reset() for _ in range(2))
    assert copies_alike(one, other) == [family == "lle"] * 4


def test_partial_resets(family):
    """The copies that are asked to begin anew; the others go on as in a twin."""
    env, twin = build(family), build(family)
    now, others = (play(which, 4)[:, -1]["next"].exclude("reward") for which in (env, twin))
    now["_reset"] = torch.tensor([[False], [True], [False], [False]])
    now = env.reset(now)
    assert copies_alike(now, others) == [True, False, True, True]
    fresh = build(family).reset()
    assert (now["agents", "observation"][1] == fresh["agents", "observation"][1]).all() == (
        family == "lle"
    )
    stay = 4  # which either game always allows
    act = torch.full(now["agents"].batch_size, stay)
    after = []
    for which, data in ((env, now), (twin, others)):
        data["agents", "action"] = act
        after.append(which.step(data)["next"])
    assert copies_alike(*after) == [True, False, True, True]


def test_a_copy_that_is_over_waits_for_its_reset(family):
    """It stays as its last step left it, unpaid, while the others go on."""
    env = build(family)
    torch.manual_seed(0)
    data, steps = env.reset(), []
    while not data["done"].all():
        # Not rollout(), which would not step the copies that are over.
        steps.append(env.step(env.rand_action(data)))
        data = step_mdp(steps[-1])
    after = torch.stack(steps, 1)["next"]
    done = after["done"].squeeze(-1)
    first = done.int().argmax(1)
    assert len(first.unique()) > 1
    for copy, end in enumerate(first):
        assert done[copy, end:].all()
        assert not after["reward"][copy, end + 1 :].any()
        for key in ("state", "won", ("agents", "observation"), ("agents", "action_mask")):
            rest = after[key][copy, end:]
            assert (rest == rest[:1]).all()
    assert torch.equal(after["terminated"], after["done"])


def test_forbidden_actions_are_refused(family):
    """By copy, agent and what is allowed; no copy has moved, not even the others."""
    env, twin = build(family), build(family)
    now, others = (play(which, 3)[:, -1]["next"].exclude("reward") for which in (env, twin))
    mask = now["agents", "action_mask"]
    copy, agent, action = (~mask).nonzero()[-1].tolist()
    allowed = torch.full(mask.shape[:-1], 4)
    wrong = allowed.clone()
    wrong[copy, agent] = action
    agents = env.group_map["agents"]
    words = rf"action {action} of agent '{agents[agent]}' in copy {copy} is forbidden.*allows \["
    with pytest.raises(ValueError, match=words):
        env.step(now.clone().set(("agents", "action"), wrong))
    for number in (-1, mask.shape[-1]):
        wrong[copy, agent] = number
        with pytest.raises(ValueError, match=rf"action {number} of agent"):
            env.step(now.clone().set(("agents", "action"), wrong))
    one = env.step(now.set(("agents", "action"), allowed))["next"]
    other = twin.step(others.set(("agents", "action"), allowed))["next"]
    assert (one == other).all()


def test_the_time_limit_truncates_and_the_end_terminates(family):
    """Only what the game itself ends is not bootstrapped; the last observation is the true one."""
    task = compose_config(f"task={TASKS[family]}", "task.max_steps=7").task
    batch = play(make_env(task, num_envs=4, seed=0), 60)["next"]
    truncated, terminated = batch["truncated"], batch["terminated"]
    assert torch.equal(truncated, batch["step_count"] == 7)
    assert torch.equal(batch["done"], truncated | terminated)
    task = compose_config(f"task={TASKS[family]}").task
    batch = play(make_env(task, num_envs=4, seed=0), 60)["next"]
    assert (batch["terminated"] & ~batch["truncated"]).any()
    sums = batch["reward"].squeeze(-1).cumsum(1)
    ends = batch["done"].squeeze(-1)
    for copy in range(4):
        totals = sums[copy][ends[copy]].diff(prepend=torch.zeros(1))
        paid = batch["episode_reward"][copy][ends[copy]].squeeze(-1)
        torch.testing.assert_close(paid, totals, atol=1e-5, rtol=0)


def test_no_copies(family):
    """One sentence."""
    with pytest.raises(ValueError, match="num_envs must be at least 1, got 0"):
        build(family, num_envs=0)


def test_no_episode_has_begun(family):
    """One sentence, where nothing is known of the masks."""
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        build(family).rand_action()


def test_a_run_goes_on_bit_for_bit(family, tmp_path, monkeypatch):
    """It trains, logs and evaluates the share of episodes won, and resumes as if never stopped."""
    monkeypatch.setattr(training, "write_report", lambda config, folder: None)
    words = (f"task={TASKS[family]}", "collector.restart_interval=1", "evaluation.episodes=4")
    whole = training.run(tiny_config(*words), tmp_path / "whole")
    half = training.run(tiny_config(*words, "total_frames=24"), tmp_path / "half")
    rest = training.run(tiny_config(*words, f"resume={half}"), half)
    for name in ("metrics.csv", "evaluation.csv"):
        assert table(rest / name)[-1] == table(whole / name)[-1]
        assert "win_rate" in table(whole / name)[-1]


def test_happo_learns_from_it(family):
    """HAPPO with a critic of the state: two updates are finite, agents are as many as units."""
    env = make_env(compose_config(f"task={TASKS[family]}").task, num_envs=4, seed=0)
    actor = make_actor(env, num_cells=[16])
    critic = make_critic(env, num_cells=[16], state_key="state")
    updater = SequentialUpdater(
        HAPPOLoss(actor, critic, entropy_coeff=0.01),
        optimizer=partial(torch.optim.Adam, lr=5e-4),
        num_epochs=2,
    )
    for _ in range(2):
        with torch.no_grad():
            batch = env.rollout(40, joint_policy(actor), break_when_any_done=False)
        metrics = updater(batch)
        assert all(value.isfinite().all() for value in metrics.values(True, True))


def shortest_way(raw):
    """Joint actions that win a level of one agent or two, found by breadth."""
    world = raw.world
    raw.reset()
    seen, queue = {str(world.get_state())}, deque([((), world.get_state())])
    while queue:
        path, state = queue.popleft()
        raw.set_state(state)
        masks = raw.available_actions()
        for actions in itertools.product(*(mask.nonzero()[0].tolist() for mask in masks)):
            raw.set_state(state)
            step = raw.step(actions)
            if step.info["exit_rate"] == 1:
                return [*path, actions]
            now = world.get_state()
            if not step.done and str(now) not in seen:
                seen.add(str(now))
                queue.append(((*path, actions), now))
    raise AssertionError


class TestLLE:
    """Rules of LLE alone."""

    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("lle")

    @pytest.mark.parametrize("observation", ["flattened", "partial7x7", "normalized-state"])
    def test_each_copy_is_the_level_itself(self, observation):
        """The same actions give LLE's numbers, over the ends of episodes; who one is comes last."""
        from lle import LLE

        env = LLEEnv(6, num_envs=2, observation=observation, seed=0)
        batch = play(env, 60)
        n = env.full_action_spec["agents", "action"].shape[-1]
        builder = LLE.level(6).obs_type(observation).state_type("normalized-state")
        for copy in range(2):
            raw = builder.build()
            seen, state = raw.reset()
            for now in batch[copy].unbind(0):
                self.compare(now, seen, state, n)
                step = raw.step(now["agents", "action"].tolist())
                after = now["next"]
                self.compare(after, step.obs, step.state, n)
                assert after["reward"].item() == step.reward.sum()
                assert after["terminated"].item() == step.done
                assert after["won"].item() == (step.info["exit_rate"] == 1)
                seen, state = step.obs, step.state
                if step.done:
                    seen, state = raw.reset()

    @staticmethod
    def compare(data, seen, state, n):
        """Each entry is what LLE says."""
        shown = data["agents", "observation"]
        np.testing.assert_array_equal(shown[:, :-n], seen.data.reshape(n, -1))
        assert torch.equal(shown[:, -n:], torch.eye(n))
        np.testing.assert_array_equal(data["agents", "action_mask"], seen.available_actions)
        np.testing.assert_array_equal(data["state"], np.float32(state.data))

    def test_won_is_all_at_their_exits(self):
        """The way out of a level is known: the last step wins, pays twice and terminates."""
        from lle import LLE

        env = LLEEnv(1, seed=0)
        plan = shortest_way(LLE.level(1).build())
        data = env.reset()
        for actions in plan:
            assert not data["won"].any()
            data["agents", "action"] = torch.tensor([actions])
            data = step_mdp(env.step(data), exclude_reward=False)
        assert data["won"].all()
        assert data["terminated"].all()
        assert data["reward"].item() == 2 * len(env.group_map["agents"]) - (
            len(env.group_map["agents"]) - 1
        )

    def test_unknown_words(self):
        """Levels, observations and scenarios that LLE has not are refused."""
        with pytest.raises(ValueError, match="no level 7; it has 1 to 6"):
            LLEEnv(7)
        with pytest.raises(ValueError, match="observation is 'rgb', but must be one of flattened"):
            LLEEnv(1, observation="rgb")
        with pytest.raises(ConfigError, match="'level_5', but the task is lle/level_6"):
            compose_config("task=lle/level_6", "task.scenario=level_5")
        task = compose_config("task=lle/level_6", "task.name=mine", "task.scenario=last").task
        with pytest.raises(ConfigError, match="'last', but must be level_1 to level_6"):
            make_env(task, num_envs=1, seed=0)


class TestSMAX:
    """Rules of SMAX alone."""

    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("jaxmarl")

    def raw(self, **settings):
        from jaxmarl.environments.smax import HeuristicEnemySMAX, map_name_to_scenario

        return HeuristicEnemySMAX(scenario=map_name_to_scenario("2s3z"), **settings)

    def test_each_copy_is_a_raw_battle(self):
        """The same keys and actions give SMAX's numbers, over the ends of battles."""
        import jax

        env, raw = build("smax"), self.raw()
        keys = np.array(env._keys)
        batch = play(env, 90)
        reset, advance = jax.jit(raw.reset), jax.jit(raw.step_env)
        n_ends = 0
        for copy in range(2):
            key, own = jax.random.split(keys[copy])
            seen, state = reset(own)
            for now in batch[copy].unbind(0):
                self.compare(now, raw, seen, state)
                actions = dict(zip(raw.agents, now["agents", "action"].numpy(), strict=True))
                key, own = jax.random.split(key)
                seen, state, rewards, dones, _ = advance(own, state, actions)
                after = now["next"]
                self.compare(after, raw, seen, state)
                # All are paid the same: the reward is the team's.
                assert len({float(rewards[agent]) for agent in raw.agents}) == 1
                paid = pytest.approx(float(rewards[raw.agents[0]]), abs=1e-6)
                assert after["reward"].item() == paid
                assert after["terminated"].item() == bool(dones["__all__"])
                # As JaxMARL's own log has it: a victory is what pays its bonus.
                assert after["won"].item() == (float(rewards[raw.agents[0]]) >= 1)
                alive = [not bool(dones[agent]) for agent in raw.agents]
                assert after["agents", "active"].tolist() == alive
                if dones["__all__"]:
                    n_ends += 1
                    key, own = jax.random.split(key)
                    seen, state = reset(own)
        assert n_ends > 1
        assert not batch["agents", "active"].all()

    @staticmethod
    def compare(data, raw, seen, state):
        """Each entry is what SMAX says."""
        masks = raw.get_avail_actions(state)
        near = {"atol": 1e-5, "rtol": 1e-5}
        for index, agent in enumerate(raw.agents):
            np.testing.assert_allclose(data["agents", "observation"][index], seen[agent], **near)
            np.testing.assert_array_equal(data["agents", "action_mask"][index], masks[agent])
        np.testing.assert_allclose(data["state"], seen["world_state"], **near)

    def test_what_the_dead_do_is_not_counted(self):
        """Whatever stands in their entries, an update ends with the same numbers, bit for bit."""
        env = make_env(compose_config("task=smax/2s3z").task, num_envs=4, seed=0)
        torch.manual_seed(0)
        actor = make_actor(env, num_cells=[16])
        critic = make_critic(env, num_cells=[16], state_key="state")
        with torch.no_grad():
            batch = env.rollout(60, joint_policy(actor), break_when_any_done=False)
        dead = ~batch["agents", "active"]
        assert 0.05 < dead.float().mean() < 0.95
        # The simulator leaves them one action, to stop, and shows them nothing.
        assert (batch["agents", "action_mask"][dead].nonzero()[:, 1] == 4).all()
        other = batch.clone()
        other["agents", "observation"][dead] = torch.nan
        other["agents", "action"][dead] = 3
        after = []
        for data in (batch, other):
            loss = HAPPOLoss(deepcopy(actor), deepcopy(critic), entropy_coeff=0.01)
            torch.manual_seed(0)
            metrics = SequentialUpdater(loss, num_epochs=2)(data)
            after.append([*loss.parameters(), *metrics.values(True, True)])
        assert all(map(torch.equal, *after))

    def test_battles_that_are_won(self):
        """Where nothing kills the team it wins: training and evaluation say so."""
        words = ("task=smax/2s3z", "task.enemy_shoots=false", "task.walls_cause_death=false")
        words += ("task.max_steps=2000", "collector.restart_interval=0", "checkpoint.interval=0")
        config = compose_config(*words, "evaluation.episodes=4")
        env = make_env(config.task, num_envs=4, seed=0)
        row = episode_statistics(play(env, 300))
        assert row["episodes"] > 0
        assert row["win_rate"] == 1
        assert row["return"] == pytest.approx(2, abs=1e-4)  # all damage, and the bonus
        played = Evaluation(config, deterministic=False)(at_random())
        assert played["win_rate"] == 1

    def test_configuration_is_left_alone(self):
        """Nothing of JAX's settings, which all of a process shares, is changed."""
        import jax

        before = dict(jax.config.values)
        play(build("smax"), 2)
        assert dict(jax.config.values) == before

    def test_another_environment_compiles_nothing(self):
        """A run builds its environments again and again, with the code of the first."""
        env, other = build("smax"), build("smax", seed=1)
        play(env, 2)
        compiled = env._battle.play._cache_size()
        play(other, 2)
        assert other._battle.play._cache_size() == compiled

    def test_unknown_words(self):
        """Scenarios and settings that SMAX has not are refused."""
        with pytest.raises(ValueError, match="no scenario '2s4z'; it has 3m, 2s3z"):
            SMAXEnv("2s4z")
        with pytest.raises(ValueError, match=r"no settings \['action_type', 'speed'\]"):
            SMAXEnv("2s3z", speed=1, action_type="continuous")
        with pytest.raises(ConfigError, match="'3m', but the task is smax/2s3z"):
            compose_config("task=smax/2s3z", "task.scenario=3m")
        with pytest.raises(ConfigError, match="'2s4z', which SMAX has not"):
            compose_config("task=smax/2s3z", "task.name=mine", "task.scenario=2s4z")
        with pytest.raises(
            ConfigError, match=r"no option 'task.enemy_shots'; near: .*enemy_shoots"
        ):
            compose_config("task=smax/2s3z", "task.enemy_shots=false")


def test_without_their_packages(monkeypatch):
    """A sentence says what to install; the modules themselves import nothing of them."""
    for package, make, extra in (
        ("lle", lambda: LLEEnv(1), "lle"),
        ("jaxmarl", lambda: SMAXEnv("2s3z", see_enemy_actions=False), "smax"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf"torchrl_happo\[{extra}\]"):
            make()
