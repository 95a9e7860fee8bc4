"""What a critic sees and for whom it gives a value; advantages per agent."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from newer import PopArtValueNorm, tensors
from team import team_batch
from tensordict.nn import TensorDictModule
from test_networks import SpecEnv, team
from torch import nn
from torchrl.data import Composite, Unbounded
from torchrl.envs import TransformedEnv, VmasEnv

from torchrl_happo import HAPPOLoss, HATRPOLoss, SequentialUpdater, TeamReward, make_actor
from torchrl_happo.networks.critics import CRITIC_INPUTS, make_critic


def with_state(n_agents=3):
    """A group of agents whose environment also has a global state, of two dimensions."""
    return SpecEnv(
        Composite(
            state=Unbounded((2, 3)),
            agents=Composite(observation=Unbounded((n_agents, 4)), shape=(n_agents,)),
        ),
        Composite(agents=Composite(action=Unbounded((n_agents, 2)), shape=(n_agents,))),
        (5,),
    )


def moved_by(critic, data, key, row=None):
    """Which values change when an entry (of one agent) does: a boolean for each."""
    before = critic(data.clone())["state_value"]
    other = data.clone()
    target = other[key] if row is None else other[key][..., row, :]
    target += 1.0
    return (critic(other)["state_value"] != before).flatten(1).any(0).tolist()


def test_what_each_input_sees():
    """One value from all observations or the state; one each from the own observation, and both."""
    env = with_state()
    data = env.reset()
    observation, state = ("agents", "observation"), "state"
    critics = {name: make_critic(env, input=name, num_cells=(8,)) for name in CRITIC_INPUTS}
    rows = {name: moved_by(critic, data, observation, 1) for name, critic in critics.items()}
    states = {name: moved_by(critic, data, state) for name, critic in critics.items()}
    assert rows == {
        "observations": [True],
        "state": [False],
        "agent_specific": [False, True, False],
        "own": [False, True, False],
    }
    assert states == {
        "observations": [False],
        "state": [True],
        "agent_specific": [True] * 3,
        "own": [False] * 3,
    }


def test_without_a_state_the_observations_stand_for_it():
    """Every agent's value then depends on the observation of every other, in all groups."""
    env = VmasEnv("simple_tag", num_envs=3, seed=0)
    critic = make_critic(env, input="agent_specific", num_cells=(8,))
    data = env.reset()
    assert moved_by(critic, data, ("agent", "observation")) == [True] * 4
    assert moved_by(critic, data, ("adversary", "observation"), 2) == [True] * 4
    own = make_critic(env, input="own", num_cells=(8,))
    assert moved_by(own, data, ("agent", "observation")) == [False, False, False, True]


@pytest.mark.parametrize("share_params", [False, True])
@pytest.mark.parametrize("input", ["agent_specific", "own"])
def test_agents_have_networks_of_their_own_or_share_one(input, share_params):
    """The gradient of one agent's value touches its own network alone, unless it is shared."""
    env = with_state()
    critic = make_critic(env, input=input, share_params=share_params, num_cells=(8, 6))
    critic(env.reset())["state_value"][:, 1].sum().backward()
    for parameter in critic.parameters():
        assert parameter.grad.abs().sum() > 0
        if not share_params:
            assert (parameter.grad[[0, 2]] == 0).all()


@pytest.mark.parametrize("n_agents", [None, 1, 2])
@pytest.mark.parametrize("batch_size", [(), (5,)])
def test_groups_with_and_without_an_agent_dimension(n_agents, batch_size):
    """A value for each agent, also of a lone one."""
    action = Unbounded((2,) if n_agents is None else (n_agents, 2))
    env = team(action, n_agents=n_agents, batch_size=batch_size)
    for name in ("agent_specific", "own"):
        critic = make_critic(env, input=name, num_cells=(8,))
        assert critic(env.reset())["state_value"].shape == (*batch_size, n_agents or 1, 1)


def test_copies_act_alike():
    """A critic can be copied and pickled."""
    env = with_state()
    critic, data = make_critic(env, input="agent_specific"), env.reset()
    value = critic(data.clone())["state_value"]
    for twin in (copy.deepcopy(critic), pickle.loads(pickle.dumps(critic))):
        assert torch.equal(twin(data.clone())["state_value"], value)


def batch_of(scenario, **kwargs):
    """A team, its critic, and one rollout."""
    env = TransformedEnv(VmasEnv(scenario, num_envs=4, seed=0), TeamReward("mean"))
    actors = make_actor(env, num_cells=(8,))
    critic = make_critic(env, num_cells=(8,), **kwargs)
    loss = HAPPOLoss(actors, critic)
    policy = loss.actor_network
    with torch.no_grad():
        return loss, env.rollout(6, policy)


@pytest.mark.parametrize("scenario", ["navigation", "simple_tag"])
def test_an_advantage_for_each_agent_is_standardised_jointly(scenario):
    """Each agent gets its own row, in the order of the groups, of one standardised advantage."""
    loss, batch = batch_of(scenario, input="agent_specific")
    made = team_batch(loss, batch)
    advantage = made.batch["advantage"]
    assert advantage.shape == (4, 6, loss.num_agents, 1)
    joint = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-5)
    for position, agent in enumerate(loss.agents):
        torch.testing.assert_close(made.advantage(agent), joint[..., position, 0])


def test_equal_values_give_the_joint_advantage():
    """A critic that says the same for every agent gives each the advantage of a joint one."""
    loss, batch = batch_of("simple_tag")
    joint = team_batch(loss, batch)
    single = loss.critic_network

    class Repeat(nn.Module):
        def forward(self, *inputs):
            return single.module(*inputs).unsqueeze(-2).expand(*inputs[0].shape[:2], 4, 1)

    critic = TensorDictModule(Repeat(), in_keys=single.in_keys, out_keys=["state_value"])
    actors = {"adversary": loss.actor_network[0], "agent": loss.actor_network[1]}
    repeated = team_batch(HAPPOLoss(actors, critic), batch)
    for one, other in zip(loss.agents, repeated.team.agents, strict=True):
        torch.testing.assert_close(joint.advantage(one), repeated.advantage(other))


@pytest.mark.parametrize("loss_class", [HAPPOLoss, HATRPOLoss])
@pytest.mark.parametrize("input", ["agent_specific", "own"])
def test_updates_with_values_of_each_agent(loss_class, input):
    """Through the whole update, with PopArt: everything is finite and the critic moves."""
    _, batch = batch_of("simple_tag")
    env = VmasEnv("simple_tag", num_envs=4, seed=0)
    critic = make_critic(env, input=input, num_cells=(8,))
    loss = loss_class(
        make_actor(env, num_cells=(8,)), critic, value_norm=PopArtValueNorm(shape=1), popart=True
    )
    before = copy.deepcopy(tensors(critic))
    metrics = SequentialUpdater(loss, num_epochs=2)(batch)
    assert all(value.isfinite() for value in metrics.values(True, True))
    assert all((value != before[key]).any() for key, value in tensors(critic).items())


def test_popart_keeps_the_values_of_agents_in_all_groups():
    """The last layer of every agent is rescaled, whatever its group."""
    env = VmasEnv("simple_tag", num_envs=4, seed=0)
    critic = make_critic(env, input="own", num_cells=(8,)).double()
    actors = make_actor(env, num_cells=(8,))
    loss = HAPPOLoss(actors, critic, value_norm=PopArtValueNorm(shape=1), popart=True)
    loss.value_norm.double()
    loss.make_value_estimator()
    data = env.reset().select(*critic.in_keys).double()
    values = loss.value_estimator.value_network
    loss.critics["critic"].update_norm(torch.randn(50, 1).double() * 4 + 10)
    before = values(data.clone())["state_value"]
    loss.critics["critic"].update_norm(torch.randn(50, 1).double() * 400 - 1000)
    torch.testing.assert_close(values(data.clone())["state_value"], before, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"input": "everything"}, "one of observations, state, agent_specific, own"),
        ({"input": "state", "groups": ["agents"]}, "both groups and input='state'"),
        ({"input": "own", "state_key": "state"}, "does not see"),
        ({"input": "own", "num_cells": ()}, "at least one hidden layer"),
    ],
)
def test_refuses_arguments(kwargs, message):
    """Contradictions are refused with what to do."""
    with pytest.raises(ValueError, match=message):
        make_critic(with_state(), **kwargs)


def test_an_environment_without_a_state():
    """Asked for a state that is not there, the critic names what there is."""
    with pytest.raises(KeyError, match=r"no observation 'state'.*'agents', 'observation'"):
        make_critic(team(Unbounded((3, 2))), input="state")
