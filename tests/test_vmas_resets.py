"""Partial resets of VMAS: some environments begin anew, the others never notice."""

from __future__ import annotations

import pytest
import torch
from torchrl.collectors import Collector
from torchrl.envs import Compose, StepCounter, TransformedEnv, VmasEnv
from torchrl.envs.utils import check_env_specs

from torchrl_happo.envs import BatchedResetVmasEnv, TeamReward
from torchrl_happo.versions import simulator

SCENARIOS = [
    "balance",
    "ball_passage",
    "ball_trajectory",
    "buzz_wire",
    "discovery",
    "dispersion",
    "dropout",
    "flocking",
    "give_way",
    "joint_passage",
    "joint_passage_size",
    "multi_give_way",
    "navigation",
    "passage",
    "reverse_transport",
    "sampling",
    "transport",
    "wheel",
    "wind_flocking",
    "simple_adversary",
    "simple_crypto",
    "simple_reference",
    "simple_speaker_listener",
    "simple_spread",
    "simple_tag",
    "simple_world_comm",
    "diff_drive",
    "drone",
    "kinematic_bicycle",
    "waterfall",
]
#: The goal is one of all environments, drawn again with all of them alone.
OF_ALL = {"simple_adversary", "simple_crypto", "simple_reference", "simple_speaker_listener"}
QUICK = {"balance", "navigation", "sampling", "simple_speaker_listener", "wind_flocking"}
NUM_ENVS = 5
MASK = torch.tensor([[False], [True], [False], [True], [True]])


def play(env, data, actions):
    """Steps with given actions; returns what each of them wrote under ``"next"``."""
    out = []
    for action in actions:
        data = data.clone().update(action)
        data = env.step(data)["next"]
        out.append(data)
        data = data.exclude("done", "terminated")
    return out


def draw_actions(env, steps):
    return [env.full_action_spec.rand() for _ in range(steps)]


def same(ones, others, rows):
    for one, other in zip(ones, others, strict=True):
        for key in one.keys(True, True):
            assert torch.equal(one[key][rows], other[key][rows]), key


@pytest.mark.parametrize(
    "scenario",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SCENARIOS],
)
def test_rows_go_on_or_begin_anew(scenario):
    """Where there is no reset all goes on bit for bit; the others are as after a full reset.

    Environments draw the same random numbers in a partial and a full reset from the same seed.
    """
    make = {"num_envs": NUM_ENVS, "max_steps": None}
    env = BatchedResetVmasEnv(scenario, **make)
    fresh, bare = VmasEnv(scenario, **make), VmasEnv(scenario, **make)
    before = draw_actions(env, 4)
    # All of VMAS draws from one generator.
    for each in (bare, fresh, env):
        each.set_seed(2)
        middle = play(each, each.reset(), before)[-1]
    env.set_seed(3)
    now = env.reset(middle.clone().set("_reset", MASK))
    fresh.set_seed(3)
    anew = fresh.reset()
    comparable = scenario not in OF_ALL
    rows, others = MASK.flatten(), ~MASK.flatten()
    for key in now.keys(True, True):
        if key[-1] == "observation":
            assert torch.equal(now[key][others], middle[key][others])
            assert not comparable or torch.equal(now[key][rows], anew[key][rows])
    after = draw_actions(env, 6)
    results = []
    for each, data in ((env, now), (fresh, anew), (bare, middle)):
        each.set_seed(4)
        results.append(play(each, data, after))
    ours, theirs, gone_on = results
    if comparable:
        same(ours, theirs, rows)
    same(ours, gone_on, others)


def test_a_full_reset_is_vmas_own():
    """Without a mask, or with one that names all, the numbers are those of VMAS."""
    envs = [kind("navigation", num_envs=3, seed=0) for kind in (VmasEnv, BatchedResetVmasEnv)]
    for mask in (None, torch.ones(3, 1, dtype=torch.bool)):
        starts = []
        for env in envs:
            env.set_seed(0)
            data = env.reset()
            starts.append(env.reset(data if mask is None else data.set("_reset", mask)))
        assert (starts[0]["agents", "observation"] == starts[1]["agents", "observation"]).all()


@pytest.mark.parametrize(("share", "is_new"), [("all", True), ("some", False)])
def test_state_without_rows_is_drawn_anew_where_all_episodes_end(share, is_new):
    """The masses of het_mass, one for all environments, in every batch of a training anew."""
    env = BatchedResetVmasEnv("het_mass", num_envs=NUM_ENVS, seed=0)
    data = env.reset()
    (heavy, _), masses = simulator(env).agents, []
    for _ in range(3):
        masses.append(heavy.mass)
        env.reset(data.set("_reset", torch.ones_like(MASK) if share == "all" else MASK))
    assert len(set(masses)) == (3 if is_new else 1)


def test_no_environment_is_reset():
    """A mask that names none leaves every environment as it is."""
    env = BatchedResetVmasEnv("balance", num_envs=3, seed=0)
    data = env.reset()
    after = env.reset(data.clone().set("_reset", torch.zeros(3, 1, dtype=torch.bool)))
    assert torch.equal(after["agents", "observation"], data["agents", "observation"])


def test_a_scenario_with_state_of_its_own():
    """Lists, dicts, tuples and objects of the scenario keep their rows as well."""
    env = BatchedResetVmasEnv("balance", num_envs=NUM_ENVS, seed=0)
    scenario = env.scenario
    values = {
        "list": [torch.arange(5.0)],
        "dict": {"a": torch.arange(5)},
        "tuple": (torch.ones(5),),
    }
    scenario.memory = values
    scenario.alias = values["list"][0]
    reset_world_at = scenario.reset_world_at

    def reset(env_index=None):
        reset_world_at(env_index)
        values["list"][0].fill_(-1)
        values["dict"]["a"] = torch.full((5,), -1)
        values["tuple"][0].fill_(-1)

    scenario.reset_world_at = reset
    data = env.reset()
    values["list"][0].copy_(torch.arange(5.0))
    values["dict"]["a"] = torch.arange(5)
    values["tuple"][0].fill_(1)
    env.reset(data.set("_reset", MASK))
    assert scenario.memory["list"][0].tolist() == [0, -1, 2, -1, -1]
    assert scenario.memory["dict"]["a"].tolist() == [0, -1, 2, -1, -1]
    assert scenario.memory["tuple"][0].tolist() == [1, -1, 1, -1, -1]
    assert scenario.alias is scenario.memory["list"][0]


def test_in_a_collector():
    """Episodes of unlike lengths: each begins with step 0 of its own count, and specs hold."""
    env = BatchedResetVmasEnv("balance", num_envs=8, max_steps=None, seed=0)
    check_env_specs(env)
    env = TransformedEnv(env, Compose(StepCounter(60), TeamReward()))
    batch = next(iter(Collector(env, None, frames_per_batch=8 * 150, total_frames=8 * 150)))
    done, count = batch["next", "done"], batch["step_count"]
    assert (done.any(0) & ~done.all(0)).any()
    expected = torch.zeros(8, 1, dtype=count.dtype)
    for step in batch.unbind(1):
        assert torch.equal(step["step_count"], expected)
        expected = torch.where(step["next", "done"], 0, expected + 1)
    # The package is at rest, and near the line, at every begin.
    begins = batch["agents", "observation"][(count == 0).squeeze(-1)]
    assert (begins[..., 2:4] == 0).all()


def test_lists_whose_length_a_reset_changes():
    """They cannot be merged: all is as before, and VMAS resets one environment after the other."""
    env = BatchedResetVmasEnv("balance", num_envs=NUM_ENVS, seed=0)
    data = env.reset()
    scenario, asked = env.scenario, []
    scenario.history = [torch.ones(NUM_ENVS), torch.ones(NUM_ENVS)]
    reset_world_at = scenario.reset_world_at

    def reset(env_index=None):
        reset_world_at(env_index)
        asked.append(env_index)
        if env_index is None:
            scenario.history = []
        else:
            for entry in scenario.history:
                entry[env_index] = 0

    scenario.reset_world_at = reset
    for expected in ([None, 1, 3, 4], [None, 1, 3, 4, 1, 3, 4]):
        now = env.reset(data.clone().set("_reset", MASK))
        assert asked == expected
        assert [entry.tolist() for entry in scenario.history] == [[1, 0, 1, 0, 0]] * 2
        kept = (now["agents", "observation"] == data["agents", "observation"]).flatten(1).all(1)
        assert torch.equal(kept, ~MASK.flatten())
