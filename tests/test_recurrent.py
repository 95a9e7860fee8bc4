"""Recurrent actors from specs: what they read and write, how they start, who keeps their state."""

from __future__ import annotations

import copy

import pytest
import torch
from newer import tensors
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from test_networks import SpecEnv, team
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Binary, Bounded, Composite, OneHot, Unbounded
from torchrl.data import Categorical as CategoricalSpec
from torchrl.envs import Compose, StepCounter, TransformedEnv, VmasEnv
from torchrl.modules import (
    GRUModule,
    IndependentNormal,
    MultiAgentMLP,
    ProbabilisticActor,
    set_recurrent_mode,
)

from torchrl_happo import (
    ActorList,
    HAPPOLoss,
    HATRPOLoss,
    SequentialUpdater,
    TeamReward,
    joint_policy,
    make_actor,
    make_critic,
)
from torchrl_happo.networks.recurrent import CELLS, memory_transforms

HIDDEN = 6


def recurrent_team(env, cell, **kwargs):
    """An environment that keeps the states of recurrent actors, and the actors."""
    actors = make_actor(env, recurrent=cell, hidden_size=HIDDEN, num_cells=(5,), **kwargs)
    transforms = [StepCounter(4), TeamReward("mean"), *memory_transforms(actors)]
    return TransformedEnv(env, Compose(*transforms)), actors


def collect(env, actors, steps=8):
    """One batch of a collector, with resets inside."""
    frames = steps * env.batch_size.numel()
    policy = joint_policy(actors)
    return next(iter(Collector(env, policy, frames_per_batch=frames, total_frames=frames)))


@pytest.mark.parametrize("cell", list(CELLS))
@pytest.mark.parametrize(
    ("scenario", "loss_class"), [("balance", HATRPOLoss), ("simple_speaker_listener", HAPPOLoss)]
)
def test_a_team_with_memory_learns(cell, scenario, loss_class):
    """One group or several: stored log-probs are those over sequences, and every agent moves."""
    env = VmasEnv(scenario, num_envs=3, seed=0)
    critic = make_critic(env, num_cells=(8,))
    env, actors = recurrent_team(env, cell)
    batch = collect(env, actors)
    assert batch["is_init"].sum() == 2 * 3  # a reset inside each sequence
    loss = loss_class(actors, critic)
    for agent in loss.agents:
        data = agent.view(batch, agent.update_keys)
        with torch.no_grad(), set_recurrent_mode(True):
            log_prob = agent.log_prob(agent.policy.parameters(data), data)
        torch.testing.assert_close(log_prob, agent.stored_log_prob(data), rtol=1e-3, atol=1e-3)
    updater = SequentialUpdater(loss, num_epochs=1, sequence_length=4, minibatch_size=12)
    before = [copy.deepcopy(tensors(agent.actor)) for agent in loss.agents]
    updater(batch)
    for agent, state in zip(loss.agents, before, strict=True):
        moved = {key for key, value in tensors(agent.actor).items() if (value != state[key]).any()}
        assert any("weight_hh" in key for key in moved)


@pytest.mark.parametrize("n_agents", [None, 1, 2])
@pytest.mark.parametrize(
    "action",
    [Bounded(-1.0, 1.0, (2,)), Unbounded((2,)), CategoricalSpec(3), OneHot(3)],
    ids=["bounded", "unbounded", "categorical", "one-hot"],
)
def test_every_kind_of_action(n_agents, action):
    """The table of distributions holds with memory, with and without an agent dimension."""
    spec = action if n_agents is None else action.expand(n_agents, *action.shape)
    env = team(spec, n_agents=n_agents, batch_size=(5,))
    kind = type(make_actor(env).get_dist(env.reset()))
    env, actor = recurrent_team(env, "lstm")
    agents = () if n_agents is None else (n_agents,)
    batch = env.rollout(2, actor)
    assert batch["agents", "action_log_prob"].shape == (5, 2, *agents)
    for state in CELLS["lstm"][1]:
        assert batch["agents", state].shape == (5, 2, *agents, 1, HIDDEN)
        assert (batch["agents", state][:, 0] == 0).all()
        assert torch.equal(batch["agents", state][:, 1], batch["next", "agents", state][:, 0])
    single = actor.actors[0] if isinstance(actor, ActorList) else actor
    assert single[-1].distribution_class is kind
    assert isinstance(actor, ActorList) == (n_agents is not None)


def test_agents_at_the_root():
    """An environment that has no groups keeps the state at the root."""
    env = SpecEnv(Composite(observation=Unbounded((4,))), Composite(action=Unbounded((2,))))
    actor = make_actor(env, recurrent="gru", hidden_size=HIDDEN)
    env = TransformedEnv(env, Compose(*memory_transforms(actor)))
    assert env.rollout(2, actor)["recurrent_state"].shape == (2, 1, HIDDEN)


def test_bounds_and_masks_of_each_agent():
    """Each actor has the bounds of its own agent, and reads its own mask."""
    action = torch.stack([Bounded(-1.0, 1.0, (2,)), Bounded(-3.0, 5.0, (2,))])
    actor = make_actor(team(action, n_agents=2), recurrent="gru")
    assert [one[-1].distribution_kwargs["high"].tolist() for one in actor.actors] == [
        [1, 1],
        [5, 5],
    ]
    mask = Binary(4, (2, 4), dtype=torch.bool)
    actor = make_actor(team(CategoricalSpec(4, shape=(2,)), n_agents=2, action_mask=mask))
    recurrent = make_actor(
        team(CategoricalSpec(4, shape=(2,)), n_agents=2, action_mask=mask), recurrent="gru"
    )
    assert {one[-1].distribution_class for one in recurrent.actors} == {
        actor[-1].distribution_class
    }


@pytest.mark.parametrize("cell", list(CELLS))
def test_initialisation(cell):
    """Each gate is orthogonal, biases are zero, the output is small, and agents differ."""
    actor = make_actor(team(Bounded(-1.0, 1.0, (2, 2)), n_agents=2), recurrent=cell, hidden_size=7)
    weights = []
    for single in actor.actors:
        (memory,) = [m for m in single.modules() if isinstance(m, nn.RNNBase)]
        weights.append(memory.weight_hh_l0)
        for gate in memory.weight_hh_l0.split(7):
            torch.testing.assert_close(gate @ gate.T, torch.eye(7), atol=1e-5, rtol=0)
        assert (memory.bias_hh_l0 == 0).all()
        output = [m for m in single.modules() if isinstance(m, nn.Linear)][-1]
        assert output.weight.norm(dim=-1).max() < 0.02
    assert not torch.isclose(*weights).all()


def test_no_layers_before_the_memory():
    """Without hidden layers the memory reads the observation itself."""
    actor = make_actor(team(Unbounded((2, 2)), n_agents=2), recurrent="gru", num_cells=())
    assert actor.actors[0].in_keys[0] == ("agents", "observation")


def test_policies_without_memory_need_nothing():
    """There is nothing to keep for feed-forward actors."""
    env = team(Unbounded((2, 2)), n_agents=2)
    assert memory_transforms(make_actor(env)) == []
    assert memory_transforms(joint_policy({"a": make_actor(env), "b": make_actor(env)})) == []


def test_unlike_memories_are_refused():
    """A group's states are one entry, so they have one size."""

    def single(hidden):
        memory = GRUModule(
            input_size=4,
            hidden_size=hidden,
            in_keys=[("agents", "observation"), ("agents", "state")],
            out_keys=[("agents", "_memory"), ("next", "agents", "state")],
        )
        net = TensorDictModule(
            nn.Linear(hidden, 3), [("agents", "_memory")], [("agents", "logits")]
        )
        return ProbabilisticActor(
            TensorDictSequential(memory, net),
            in_keys=[("agents", "logits")],
            out_keys=[("agents", "action")],
            distribution_class=torch.distributions.Categorical,
        )

    with pytest.raises(ValueError, match="'agents' have memories of unlike"):
        memory_transforms(ActorList([single(3), single(4)]))


def test_one_memory_for_all_agents_is_refused_with_the_cure_for_memories():
    """Not with that for stacks, which is no list of actors; the named cure is a list of them."""
    env = team(Unbounded((2, 2)), n_agents=2)
    memory = GRUModule(
        input_size=2,
        hidden_size=4,
        in_keys=[("agents", "observation"), ("agents", "state")],
        out_keys=[("agents", "_memory"), ("next", "agents", "state")],
    )
    heads = MultiAgentMLP(4, 4, n_agents=2, centralized=False, share_params=False, depth=0)
    net = nn.Sequential(heads, NormalParamExtractor())
    keys = [("agents", "loc"), ("agents", "scale")]
    actor = ProbabilisticActor(
        TensorDictSequential(memory, TensorDictModule(net, [("agents", "_memory")], keys)),
        in_keys=keys,
        out_keys=[("agents", "action")],
        distribution_class=IndependentNormal,
    )
    with pytest.raises(ValueError, match=r"ActorList, such as make_actor\(env, recurrent='gru'\)"):
        HAPPOLoss(actor, None)
    assert len(HAPPOLoss(make_actor(env, recurrent="gru"), None).agents) == 2


def test_refuses_arguments():
    """An unknown memory, and memory with shared parameters."""
    env = team(Unbounded((2, 2)), n_agents=2)
    with pytest.raises(ValueError, match=r"gru, lstm or None, got 'rnn'"):
        make_actor(env, recurrent="rnn")
    with pytest.raises(ValueError, match="share_params=True"):
        make_actor(env, recurrent="gru", share_params=True)
    assert make_actor(env)[-1].distribution_class is IndependentNormal
