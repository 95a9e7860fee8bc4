"""AgentSplit makes a team of one body, and loses nothing of its action, state and bounds."""

from __future__ import annotations

import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import Compose, EnvBase, GymEnv, MarlGroupMapType, TransformedEnv
from torchrl.envs.utils import check_env_specs

from torchrl_happo.envs import AgentSplit
from torchrl_happo.networks.actors import make_actor

PER_AGENT = MarlGroupMapType.ONE_GROUP_PER_AGENT
ONE_GROUP = MarlGroupMapType.ALL_IN_ONE_GROUP


class Body(EnvBase):
    """Observes three numbers and the action that it was given, whose entries have own bounds."""

    def __init__(self, size=5, batch_size=(2,)):
        super().__init__(batch_size=batch_size)
        self.size = size
        high = torch.arange(1.0, size + 1).expand(*batch_size, size)
        self.observation_spec = Composite(
            observation=Unbounded((*batch_size, 3 + size)), shape=batch_size
        )
        self.action_spec = Bounded(-high, high + 10)
        self.reward_spec = Unbounded((*batch_size, 1))

    def _observe(self, action):
        return {"observation": torch.cat([torch.randn(*self.batch_size, 3), action], -1)}

    def _reset(self, tensordict):
        action = torch.zeros(*self.batch_size, self.size)
        return TensorDict(self._observe(action), self.batch_size)

    def _step(self, tensordict):
        action = tensordict["action"]
        out = TensorDict(self._observe(action), self.batch_size)
        out["reward"] = action.sum(-1, keepdim=True)
        return out.update(self.full_done_spec.zero())

    def _set_seed(self, seed):
        pass


def split(*args, base=None, **kwargs):
    """A body whose joints belong to several agents."""
    return TransformedEnv(Body() if base is None else base, AgentSplit(*args, **kwargs))


@given(st.permutations(range(6)), st.lists(st.integers(1, 5), max_size=5), st.integers(0, 999))
def test_the_agents_actions_are_the_joint_one(order, cuts, seed):
    """Entry k of agent i is entry ``partition[i][k]`` of the joint action, for any partition."""
    edges = [0, *sorted(set(cuts)), 6]
    partition = [order[a:b] for a, b in pairwise(edges)]
    transform = AgentSplit(partition)
    joint = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(seed))
    data = TensorDict(batch_size=[4, 3])
    for group, agents in transform.group_map.items():
        own = [partition[int(agent.removeprefix("agent_"))] for agent in agents]
        data[group, "action"] = torch.stack([joint[..., entries] for entries in own], -2)
    assert torch.equal(transform.inv(data)["action"], joint)
    assert "action" not in data.keys()


@pytest.mark.parametrize(
    "settings",
    [
        {"partition": [[4, 0, 2, 1, 3]]},
        {"partition": [[4], [0], [2], [1], [3]]},
        {"partition": [[4, 0], [2, 1, 3]]},
        {"partition": [[4], [0], [2], [1], [3]], "group_map": PER_AGENT},
        {"partition": [[4, 0], [2, 1, 3]], "observations": [[0, 7], [1]], "identity": False},
        {"partition": [[4, 0], [2, 1, 3]], "state_key": None, "bounded_actions": False},
        {"partition": [[4, 0], [2, 1, 3]], "state_key": "observation", "standardize": True},
        {"partition": [[4, 0], [2, 1, 3]], "state_key": ("critic", "state")},
    ],
)
@pytest.mark.parametrize("batch_size", [(), (2,), (2, 3)])
def test_specs(settings, batch_size):
    """What the specs promise is what the data are, and actors can be built on them."""
    env = split(**settings, base=Body(batch_size=batch_size))
    check_env_specs(env)
    make_actor(env)


def test_observations_of_alike_agents():
    """By default: the whole state, then who one is; the state itself goes to the root."""
    torch.manual_seed(0)
    states = Body(size=4).rollout(1)["observation"]
    torch.manual_seed(0)
    data = split([[0, 1], [2, 3]], base=Body(size=4)).rollout(1)
    assert torch.equal(data["state"], states)
    seen = data["agents", "observation"]
    assert data["agents"].batch_size == (2, 1, 2)
    assert torch.equal(seen[..., :-2], states.unsqueeze(-2).expand(-1, -1, 2, -1))
    assert torch.equal(seen[..., -2:], torch.eye(2).expand(2, 1, 2, 2))
    assert "observation" not in data.keys()
    assert "observation" not in data["next"].keys()


def test_observations_by_entries():
    """Agents see the entries that were listed, in that order; unlike ones are groups apart."""
    env = split([[0, 1], [2, 3, 4]], observations=[[7, 0], [1, 2, 3]], identity=False)
    data = env.rollout(2)
    state = data["state"]
    assert torch.equal(data["agent_0", "observation"], state[..., [7, 0]].unsqueeze(-2))
    assert torch.equal(data["agent_1", "observation"], state[..., [1, 2, 3]].unsqueeze(-2))
    assert data["agent_1", "action"].shape == (2, 2, 1, 3)


@given(st.integers(0, 2**16), st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_standardized_vectors(seed, scale, shift):
    """Each vector, the identity included, is less its mean and over its population deviation."""
    generator = torch.Generator().manual_seed(seed)
    state = scale * torch.randn(7, 9, generator=generator, dtype=torch.float64) + shift
    data = AgentSplit([[0], [1], [2]], standardize=True)(TensorDict({"observation": state}, [7]))
    who = torch.eye(3, dtype=torch.float64).expand(7, 3, 3)
    vectors = torch.cat([state.unsqueeze(-2).expand(7, 3, 9), who], -1)
    for ours, vector in ((data["agents", "observation"], vectors), (data["state"], state)):
        mean, std = vector.mean(-1, keepdim=True), vector.std(-1, correction=0, keepdim=True)
        torch.testing.assert_close(ours, (vector - mean) / std)


def test_equal_entries_stay_finite():
    """A state at rest has no deviation to divide by."""
    data = AgentSplit([[0]], standardize=True)(TensorDict({"observation": torch.ones(2, 4)}, [2]))
    assert not data["state"].any()


@pytest.mark.parametrize("names", [[None, "time"], [None, None]])
def test_a_batch_keeps_what_it_holds(names):
    """Read after the fact, with or without named dimensions: only the observation is replaced.

    The agents' observations are those of an environment that is split while it plays, and what
    else is in the batch, their actions and ``"next"`` among it, is left alone.
    """
    torch.manual_seed(0)
    played = split([[4, 0], [2, 1, 3]]).rollout(3).to("cpu")  # tensordict checks names then only
    batch = played.clone()
    batch["observation"] = batch.pop("state")
    del batch["agent_1"]
    del batch["agent_0", "observation"]
    batch.names = names
    after = AgentSplit([[4, 0], [2, 1, 3]])(batch.clone())
    assert after.names == names
    assert torch.equal(after["state"], played["state"])
    for group in ("agent_0", "agent_1"):
        assert after[group].batch_size == (2, 3, 1)
        assert torch.equal(after[group, "observation"], played[group, "observation"])
    assert (
        after.exclude("state", "agent_1", ("agent_0", "observation"))
        == batch.exclude("observation")
    ).all()


def test_bounds_follow_their_entries():
    """Each agent's bounds are those of the entries that it chooses."""
    spec = split([[4, 0], [2, 1, 3]]).full_action_spec
    assert spec["agent_0", "action"].space.high[0, 0].tolist() == [15, 11]
    assert spec["agent_1", "action"].space.low[0, 0].tolist() == [-3, -2, -4]


def test_actions_without_bounds_are_passed_on_as_they_are():
    """What a Gaussian draws outside the bounds reaches the environment unclipped."""
    env = split([[4, 0, 1], [2, 3]], bounded_actions=False)
    assert isinstance(env.full_action_spec["agent_0", "action"], Unbounded)
    data = env.reset()
    data["agent_0", "action"] = torch.full((2, 1, 3), 100.0)
    data["agent_1", "action"] = torch.full((2, 1, 2), -100.0)
    after = env.step(data)["next"]
    assert after["state"][0, 3:].tolist() == [100, 100, -100, -100, 100]
    assert after["reward"].flatten().tolist() == [100, 100]


@pytest.mark.parametrize(
    "transform",
    [AgentSplit([[1, 0], [2, 3]], standardize=True), AgentSplit([[1], [0, 2, 3]])],
    ids=["one group", "two groups"],
)
def test_copies_work_alike(transform):
    """Clones and pickles do the same, in an environment of their own."""
    data = TensorDict({"observation": torch.randn(2, 5)}, [2])
    for twin in (transform.clone(), pickle.loads(pickle.dumps(transform))):
        assert (twin(data.clone()) == transform(data.clone())).all()
        check_env_specs(split([[0], [1]], base=Body(size=2)).append_transform(Compose()))


def test_gymnasium():
    """TorchRL's GymEnv, whose batch is empty, becomes a team of one."""
    env = split([[0]], base=GymEnv("Pendulum-v1"), standardize=True)
    check_env_specs(env)
    assert env.rollout(3)["agents", "observation"].shape == (3, 1, 4)


def test_torchrls_own_mujoco(tmp_path, monkeypatch):
    """TorchRL's native MuJoCo environments can be split as well."""
    monkeypatch.chdir(tmp_path)  # MuJoCo logs its warnings into the working directory
    pytest.importorskip("mujoco")
    from torchrl.envs.custom.mujoco import HopperEnv

    env = split([[0], [1], [2]], base=HopperEnv(backend="mujoco"))
    check_env_specs(env)
    assert env.rollout(1)["agents", "action"].shape == (1, 1, 3, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"partition": []}, "nothing to choose"),
        ({"partition": [[0], []]}, "nothing to choose"),
        ({"partition": [[0, 1], [1, 2]]}, "exactly one agent"),
        ({"partition": [[0], [2]]}, "entries 0 to 2 .* exactly one agent"),
        ({"partition": [[0], [1]], "observations": [[0]]}, "observations of 1 agents"),
        (
            {"partition": [[0], [1]], "observations": [[0], []]},
            "give each agent at least one entry",
        ),
        ({"partition": [[0], [1]], "observations": [[0], [-1]]}, r"-1\]\].* counted from 0"),
        ({"partition": [[0], [1, 2]], "group_map": ONE_GROUP}, r"\[1, 2\] actions"),
        (
            {"partition": [[0], [1]], "observations": [[0], [0, 1]], "group_map": ONE_GROUP},
            r"\[1, 2\] observations",
        ),
    ],
)
def test_refuses_partitions(settings, message):
    """An action without an agent, or with two, is named at construction."""
    with pytest.raises(ValueError, match=message):
        AgentSplit(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"partition": [0, 1]},
        {"partition": "2x1"},
        {"partition": [[0.0], [1.0]]},
        {"partition": [[0], [1]], "observations": [0, 1]},
    ],
)
def test_refuses_what_is_no_list_of_entries_for_each_agent(settings):
    """One list for all, names and fractions are shown with what is wanted."""
    with pytest.raises(TypeError, match="a list of whole numbers for each agent"):
        AgentSplit(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"partition": [[0], [1]]}, "has 2 entries, but the action 'action' has 5"),
        ({"partition": [[0, 1, 2, 3, 4]], "action_key": "torque"}, r"no action 'torque'.*'action'"),
        ({"partition": [[0, 1, 2, 3, 4]], "observation_key": "pixels"}, "no observation 'pixels'"),
        ({"partition": [[0, 1, 2, 3, 4]], "observations": [[8]]}, "entry 8 .* has 8 entries"),
    ],
)
def test_refuses_environments(settings, message):
    """What does not fit the environment is said when its specs are made."""
    with pytest.raises(ValueError, match=message):
        _ = split(**settings).specs


def test_refuses_actions_and_observations_that_are_no_vectors():
    """A discrete action and an image are not split silently."""
    body = Body(size=1)
    body.action_spec = Categorical(3, shape=(2,))
    with pytest.raises(ValueError, match="a Categorical of shape"):
        _ = split([[0]], base=body).specs
    body = Body(size=1)
    body.observation_spec = Composite(observation=Unbounded((2, 8, 8)), shape=(2,))
    with pytest.raises(ValueError, match="flatten it first"):
        _ = split([[0]], base=body).specs


def test_a_missing_action_is_named():
    """A policy that forgot an agent is told which."""
    env = split([[4, 0], [2, 1, 3]])
    data = env.reset()
    data["agent_0", "action"] = torch.zeros(2, 1, 2)
    with pytest.raises(KeyError, match=r"\('agent_1', 'action'\)"):
        env.step(data)


def test_a_missing_observation_is_named():
    """A batch without the state is refused by name."""
    with pytest.raises(KeyError, match="no observation 'observation'"):
        AgentSplit([[0]])(TensorDict({"state": torch.zeros(2, 3)}, [2]))
