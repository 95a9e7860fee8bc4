"""Critics with memory: values are those of the critic asked step by step, and so is its fit."""

from __future__ import annotations

import copy

import pytest
import torch
from newer import PopArtValueNorm, RunningValueNorm, tensors
from team import team_batch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import Compose, InitTracker, StepCounter, TransformedEnv, VmasEnv
from torchrl.modules import set_recurrent_mode
from torchrl.objectives.value.functional import generalized_advantage_estimate

from torchrl_happo import (
    HAPPOLoss,
    HATRPOLoss,
    SequentialUpdater,
    TeamReward,
    joint_policy,
    make_actor,
    make_critic,
    memory_transforms,
)
from torchrl_happo.policy.memory import state_specs

CELLS = ["gru", "lstm"]
INPUTS = ["observations", "agent_specific", "own"]


class Team:
    """Predators and prey as one team with a critic that has memory; episodes of four steps."""

    def __init__(self, cell="gru", *, input="observations", rolled_out=False, memory=None):
        env = VmasEnv("simple_tag", num_envs=3, seed=0, max_steps=None)
        self.actors = make_actor(env, num_cells=(8,), recurrent=memory, hidden_size=4)
        self.critic = make_critic(
            env, input=input, num_cells=(7,), recurrent=cell, hidden_size=5, output_gain=1.0
        )
        self.policy = joint_policy(self.actors, self.critic if rolled_out else None)
        transforms = memory_transforms(self.policy) or [InitTracker()]
        self.env = TransformedEnv(env, Compose(StepCounter(4), TeamReward("mean"), *transforms))

    def batches(self, steps=10, number=1):
        """What a collector yields."""
        frames = 3 * steps
        total = number * frames
        return list(Collector(self.env, self.policy, frames_per_batch=frames, total_frames=total))


def asked_step_by_step(critic, batch, state=None):
    """Values and next values of one environment, ``[T]``, by a loop that carries the memory."""
    keys = list(state_specs(critic))
    observations = [key for key in critic.in_keys if key not in (*keys, "is_init")]
    zero = TensorDict({key: spec.zero() for key, spec in state_specs(critic).items()})
    state = zero if state is None else state
    values, next_values = [], []
    with torch.no_grad(), set_recurrent_mode(False):
        for step in batch.unbind(0):
            if step["is_init"]:
                state = zero

            def ask(data, state):
                data = data.select(*observations).update(state)
                return critic(data.set("is_init", torch.zeros(1, dtype=torch.bool)))

            asked = ask(step, state)
            state = asked["next"].select(*keys)
            values.append(asked["state_value"])
            next_values.append(ask(step["next"], state)["state_value"])
    return torch.stack(values), torch.stack(next_values)


@pytest.mark.parametrize("rolled_out", [False, True])
@pytest.mark.parametrize("input", INPUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_values_are_those_of_the_critic_asked_step_by_step(cell, input, rolled_out):
    """The value at each step, and that of the true next observation, also where an episode ends.

    The advantage is the generalised one of these very values.
    """
    team = Team(cell, input=input, rolled_out=rolled_out)
    (batch,) = team.batches()
    assert batch["is_init"].sum() == 3 * 3  # resets inside the rows
    loss = HAPPOLoss(team.actors, team.critic)
    data = team_batch(loss, batch).critic_batches["critic"]
    for row, own in zip(data.unbind(0), batch.unbind(0), strict=True):
        value, next_value = asked_step_by_step(team.critic, own)
        torch.testing.assert_close(row["state_value"], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(row["next", "state_value"], next_value, rtol=1e-4, atol=1e-5)
    reward, done, terminated = (
        batch["next", name].reshape(3, 10, *(1,) * (data["state_value"].ndim - 2))
        for name in ("reward", "done", "terminated")
    )
    advantage, target = generalized_advantage_estimate(
        0.99,
        0.95,
        *(data[key] for key in ("state_value", ("next", "state_value"))),
        *(x.expand_as(data["state_value"]) for x in (reward, done, terminated)),
        time_dim=1,
    )
    torch.testing.assert_close(data["advantage"], advantage, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(data["value_target"], target, rtol=1e-4, atol=1e-5)


def test_memory_reaches_the_end_of_its_episode_and_no_further():
    """The first observation of an episode moves all its values, the last next one included."""
    team = Team()
    (batch,) = team.batches()
    loss = HAPPOLoss(team.actors, team.critic)
    before = team_batch(loss, batch).critic_batches["critic"]
    other = batch.clone()
    other["adversary", "observation"][0, 4] += 1.0  # the second episode is steps 4 to 7
    after = team_batch(loss, other).critic_batches["critic"]
    for key, moved in (("state_value", range(4, 8)), (("next", "state_value"), range(4, 8))):
        differs = (before[key] != after[key]).squeeze(-1)
        assert differs[0].nonzero().flatten().tolist() == list(moved)
        assert not differs[1:].any()


@pytest.mark.parametrize("sequence_length", [None, 5, 1])
@pytest.mark.parametrize("input", INPUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_the_fit_begins_with_the_values_of_the_advantage(cell, input, sequence_length):
    """Over whole sequences or chunks, each from its own state, the critic says the same."""
    team = Team(cell, input=input)
    (batch,) = team.batches()
    data = team_batch(HAPPOLoss(team.actors, team.critic), batch, sequence_length=sequence_length)
    view = data.critic_data("critic")
    assert view.shape == (30 // (sequence_length or 10), sequence_length or 10)
    with torch.no_grad(), set_recurrent_mode(True):
        value = team.critic(view.copy())["state_value"]
    torch.testing.assert_close(value, view["state_value"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_a_rolled_out_critic_remembers_the_batch_before(cell):
    """An episode that a batch cuts in two has the values of the whole; alone, it begins anew."""
    team = Team(cell, rolled_out=True)
    batches = team.batches(number=2)
    loss = HAPPOLoss(team.actors, team.critic)
    assert not batches[1]["is_init"][:, 0].any()
    whole = team_batch(loss, torch.cat(batches, 1)).batch["state_value"][:, 10:]
    second = team_batch(loss, batches[1]).batch["state_value"]
    torch.testing.assert_close(second, whole, rtol=1e-4, atol=1e-5)
    forgetful = team_batch(loss, batches[1].exclude(*state_specs(team.critic))).batch
    differs = (forgetful["state_value"] - whole).abs().amax((0, 2)) > 1e-4
    assert differs.tolist() == [True, True] + [False] * 8


@pytest.mark.parametrize("cell", CELLS)
def test_in_a_loop_of_ones_own(cell):
    """With the states of a rolled-out critic in the data, the loss needs no updater.

    Its estimator then gives the values and advantages that the updater would.
    """
    team = Team(cell, rolled_out=True)
    (batch,) = team.batches()
    loss = HAPPOLoss(team.actors, team.critic)
    expected = team_batch(loss, batch).critic_batches["critic"]
    with torch.no_grad():
        loss.value_estimator(batch)
    for key in ("state_value", ("next", "state_value"), "advantage", "value_target"):
        torch.testing.assert_close(batch[key], expected[key], rtol=1e-4, atol=1e-5)
    with set_recurrent_mode(True):
        losses = loss(batch)
    losses["loss_critic"].backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in team.critic.parameters())


@pytest.mark.parametrize(("memory", "rolled_out"), [(None, False), ("gru", True)])
@pytest.mark.parametrize("loss_class", [HAPPOLoss, HATRPOLoss])
@pytest.mark.parametrize("cell", CELLS)
def test_update(cell, loss_class, memory, rolled_out):
    """Everything moves, recurrent weights included, with PopArt, and a batch stays as it was."""
    team = Team(cell, input="agent_specific", memory=memory, rolled_out=rolled_out)
    loss = loss_class(team.actors, team.critic, value_norm=PopArtValueNorm(shape=1), popart=True)
    updater = SequentialUpdater(loss, num_epochs=2, minibatch_size=10, sequence_length=5)
    before = copy.deepcopy(tensors(loss))
    for batch in team.batches(number=2):
        kept = batch.clone()
        metrics = updater(batch)
        assert (batch == kept).all()
    assert all(value.isfinite() for value in metrics.values(True, True))
    for key, value in tensors(team.critic).items():
        assert (value != before[f"critic_network.{key}"]).any(), key


def test_normalised_values():
    """With memory, too, the advantage sees real values and the critic predicts normalised ones."""
    team = Team()
    (batch,) = team.batches()
    plain = team_batch(HAPPOLoss(team.actors, team.critic), batch).critic_batches["critic"][
        "next", "state_value"
    ]
    norm = RunningValueNorm(shape=1)
    norm.update(5.0 + 3.0 * torch.randn(100, 1))
    loss = HAPPOLoss(team.actors, team.critic, value_norm=norm)
    real = team_batch(loss, batch).critic_batches["critic"]["next", "state_value"]
    torch.testing.assert_close(real, norm.denormalize(plain))


def test_chunks_are_the_critics_alone():
    """Beside a critic with memory, actors without still learn from single steps."""
    team = Team()
    data = team_batch(HAPPOLoss(team.actors, team.critic), *team.batches())
    assert data.critic_data("critic").shape == (3, 10)
    assert data.agent_data(data.team.agents[0], {}).shape == (30,)
    team = Team(None, memory="gru")
    data = team_batch(HAPPOLoss(team.actors, team.critic), *team.batches())
    assert data.critic_data("critic").shape == (30,)
    assert data.agent_data(data.team.agents[0], {}).shape == (3, 10)


def test_minibatches_hold_whole_sequences():
    """The critic's minibatches are made of chunks of consecutive steps."""
    team = Team()
    (batch,) = team.batches()
    updater = SequentialUpdater(
        HAPPOLoss(team.actors, team.critic), num_epochs=1, minibatch_size=12, sequence_length=5
    )
    objective, shapes = updater.steps["critic"].objective, []

    def spy(data):
        shapes.append(tuple(data.shape))
        return objective(data)

    updater.steps["critic"].objective = spy
    updater(batch)
    assert shapes == [(2, 5)] * 3


def test_one_row_is_a_batch():
    """An environment without a batch dimension yields a row of steps."""
    team = Team()
    row = team.batches()[0][0]
    value = team_batch(HAPPOLoss(team.actors, team.critic), row).batch["state_value"]
    torch.testing.assert_close(value, asked_step_by_step(team.critic, row)[0])


def test_a_critic_needs_to_know_where_episodes_begin():
    """Without ``"is_init"`` the batch is refused with what to do, and nothing changes."""
    team = Team()
    (batch,) = team.batches()
    updater = SequentialUpdater(HAPPOLoss(team.actors, team.critic))
    before = copy.deepcopy(updater.state_dict())
    with pytest.raises(KeyError, match=r"'is_init'.* append InitTracker\(\) to the transforms"):
        updater(batch.exclude("is_init"))
    torch.testing.assert_close(updater.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"recurrent": "rnn"}, r"gru, lstm or None, got 'rnn'"),
        ({"recurrent": "gru", "share_params": True}, "leave share_params out"),
        ({"recurrent": "gru", "num_cells": ()}, "at least one hidden layer"),
        ({"recurrent": "gru", "hidden_size": 0}, "hidden_size"),
    ],
)
def test_refuses_arguments(kwargs, message):
    """Contradictions are refused with what to do."""
    with pytest.raises(ValueError, match=message):
        make_critic(VmasEnv("simple_tag", num_envs=1), **kwargs)


def test_refuses_a_critic_that_is_none():
    """A joint policy rolls out tensordict modules only."""
    team = Team()
    with pytest.raises(TypeError, match="as the critic; pass what make_critic returns"):
        joint_policy(team.actors, critic=torch.nn.Linear(1, 1))
