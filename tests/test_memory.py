"""Recurrent policies: the update sees what the policy saw when it acted, step by step."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from newer import tensors
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Composite, Unbounded
from torchrl.envs import Compose, InitTracker, StepCounter, TensorDictPrimer, TransformedEnv
from torchrl.envs.libs.vmas import VmasEnv
from torchrl.modules import (
    GRUModule,
    LSTMModule,
    ProbabilisticActor,
    TanhNormal,
    set_recurrent_mode,
)

from torchrl_happo import (
    ActorList,
    HAPPOLoss,
    HATRPOLoss,
    SequentialUpdater,
    TeamReward,
    make_critic,
)

pytest.importorskip("vmas")
HIDDEN = 8
CELLS = {"gru": GRUModule, "lstm": LSTMModule}


def make_recurrent_actor(obs_dim, act_dim, cell):
    """A recurrent policy of one agent, which reads and writes its group's keys."""
    states = ["state"] if cell == "gru" else ["state_h", "state_c"]
    memory = CELLS[cell](
        input_size=obs_dim,
        hidden_size=HIDDEN,
        in_keys=[("agents", "observation"), *(("agents", s) for s in states)],
        out_keys=[("agents", "memory"), *(("next", "agents", s) for s in states)],
    )
    head = TensorDictModule(
        nn.Sequential(nn.Linear(HIDDEN, 2 * act_dim), NormalParamExtractor()),
        in_keys=[("agents", "memory")],
        out_keys=[("agents", "loc"), ("agents", "scale")],
    )
    return ProbabilisticActor(
        TensorDictSequential(memory, head),
        in_keys=[("agents", "loc"), ("agents", "scale")],
        out_keys=[("agents", "action")],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )


def make_team(cell, steps_per_episode=4):
    """An environment whose episodes end inside a batch, and a policy with memory."""
    env = VmasEnv("balance", num_envs=3, max_steps=None, continuous_actions=True, seed=0)
    n_agents = len(env.group_map["agents"])
    states = ["state"] if cell == "gru" else ["state_h", "state_c"]
    memory = Composite({s: Unbounded((n_agents, 1, HIDDEN)) for s in states}, shape=(n_agents,))
    env = TransformedEnv(
        env,
        Compose(
            InitTracker(),
            StepCounter(steps_per_episode),
            TeamReward("mean"),
            TensorDictPrimer({"agents": memory}, expand_specs=True),
        ),
    )
    obs_dim = env.observation_spec["agents", "observation"].shape[-1]
    actor = ActorList([make_recurrent_actor(obs_dim, 2, cell) for _ in range(n_agents)])
    return env, actor, make_critic(env)


def collect(env, actor, steps=10):
    """One batch of a collector."""
    frames = steps * env.batch_size[0]
    collector = Collector(env, actor, frames_per_batch=frames, total_frames=frames)
    return next(iter(collector))


@pytest.mark.parametrize("cell", list(CELLS))
@pytest.mark.parametrize("chunk", [None, 5])
def test_sequences_equal_the_step_by_step_policy(cell, chunk):
    """Evaluated over sequences, with resets inside, the log-probabilities are the stored ones."""
    env, actor, critic = make_team(cell)
    batch = collect(env, actor)
    assert batch["is_init"].sum() > 3 * 1  # there are resets inside the sequences
    loss = HAPPOLoss(actor, critic)
    for agent in loss.agents:
        data = agent.view(batch, agent.update_keys)
        data = data.reshape(-1, chunk or batch.shape[-1])
        with torch.no_grad(), set_recurrent_mode(True):
            log_prob = agent.log_prob(agent.policy.parameters(data), data)
        torch.testing.assert_close(log_prob, agent.stored_log_prob(data), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cell", list(CELLS))
@pytest.mark.parametrize("loss_class", [HAPPOLoss, HATRPOLoss])
@pytest.mark.parametrize("chunk", [None, 5])
def test_update(cell, loss_class, chunk):
    """Every agent moves, the first ratio is 1, and everything stays finite."""
    env, actor, critic = make_team(cell)
    batch = collect(env, actor)
    updater = SequentialUpdater(
        loss_class(actor, critic),
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        num_epochs=2,
        minibatch_size=10,
        sequence_length=chunk,
    )
    before = copy.deepcopy(tensors(actor))
    metrics = updater(batch)
    assert all(not torch.equal(v, before[k]) for k, v in tensors(actor).items())
    for name in (agent.name for agent in updater.loss.agents):
        assert all(value.isfinite() for value in metrics[name].values())
        assert metrics[name, "kl"] > 0


def test_minibatches_hold_whole_sequences():
    """A minibatch is made of chunks of consecutive steps, each with its own hidden state."""
    env, actor, critic = make_team("gru")
    batch = collect(env, actor)
    updater = SequentialUpdater(
        HAPPOLoss(actor, critic), num_epochs=1, minibatch_size=12, sequence_length=5
    )
    step = updater.steps["agents_0"]
    objective, shapes = step.objective, []

    def spy(data):
        shapes.append(tuple(data.shape))
        return objective(data)

    step.objective = spy
    updater(batch)
    assert shapes == [(2, 5)] * 3  # 3 environments x 10 steps = 6 chunks of 5


def test_a_chunk_length_must_divide_the_batch():
    """Refused with the length of the batch, and nothing is changed."""
    env, actor, critic = make_team("gru")
    updater = SequentialUpdater(HAPPOLoss(actor, critic), sequence_length=4)
    with pytest.raises(ValueError, match="sequence_length=4 does not divide the 10 steps"):
        updater(collect(env, actor))
