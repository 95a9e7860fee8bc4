"""Isolation: one agent's turn moves that agent and nothing else, bit for bit."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from newer import PopArtValueNorm
from scenario_groups import Group
from scenarios import Data, Scenario
from wrong_calls import same

from torchrl_happo import HAPPOLoss, HATRPOLoss, SequentialUpdater
from torchrl_happo.steps import FirstOrderStep

ROBOTS = Group("agents", "tanh", 3, obs_dim=2, size=2, block=False, listed=False)
TEAMS = {
    "a stack": [ROBOTS],
    "a list": [Group("agents", "normal", 3, obs_dim=2, size=2, block=False, listed=True)],
    "a stack, a block and one alone": [
        ROBOTS,
        Group("speakers", "categorical", 2, obs_dim=3, size=2, block=True, listed=False),
        Group("listeners", "tanh", None, obs_dim=1, size=1, block=False, listed=False),
    ],
}
DATA = Data(
    shape=(4, 6),
    reward_scale=1.0,
    observation_scale=1.0,
    active=None,
    counted=None,
    advantage="estimated",
    saturated=False,
    dtype=torch.float32,
    chunks=False,
)
CRITIC = {"value_norm": PopArtValueNorm, "popart": True}
UPDATER = {
    "optimizer": partial(torch.optim.Adam, lr=1e-2),
    "scheduler": partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
    "num_epochs": 2,
    "minibatch_size": 7,
    "replay_buffer": None,
}


def belongings(updater):
    """All that an update may change, by whom it belongs to."""
    loss = updater.loss
    owned = {agent.name: [p.detach() for p in agent.parameters()] for agent in loss.agents}
    owned["critic"] = [p.detach() for p in loss.critic_network.parameters()]
    for name, step in updater.steps.items():
        owned[name].append(step.state_dict())
    owned["statistics"] = loss.value_norm.state_dict()
    statistics = {id(buffer) for buffer in loss.value_norm.buffers()}
    owned["nobody"] = [buffer for buffer in loss.buffers() if id(buffer) not in statistics]
    return copy.deepcopy(owned)


@pytest.mark.parametrize("team", TEAMS.values(), ids=TEAMS)
@pytest.mark.parametrize(
    "loss_class", [HAPPOLoss, partial(HATRPOLoss, fisher_fraction=0.5)], ids=["HAPPO", "HATRPO"]
)
def test_a_turn_moves_the_one_whose_turn_it_is(team, loss_class, monkeypatch):
    """Parameters, optimisers, schedules, generators, buffers: all others' are bit-identical.

    During an agent's step those of the other agents and of the critic, during the critic's those of
    the agents. Between the steps nothing moves but the value statistics, and the layer that PopArt
    rescales with them, just before the critic's step; when all is done the schedules go on.
    """
    scenario = Scenario(loss_class, team, DATA, CRITIC, UPDATER, per_agent_critic=False)
    updater = scenario.updater
    updater(scenario.batch())  # gives every optimiser momentum
    last, turns = belongings(updater), []
    move = SequentialUpdater._move

    def moved(since):
        now = belongings(updater)
        return {name for name, owned in now.items() if not same(owned, since[name])}, now

    def checked(self, name, data, transaction, *radius):
        nonlocal last
        between, before = moved(last)
        assert between <= ({"statistics", "critic"} if name == "critic" else set())
        report = move(self, name, data, transaction, *radius)
        during, last = moved(before)
        assert during == {name}
        turns.append(name)
        return report

    monkeypatch.setattr(SequentialUpdater, "_move", checked)
    updater(scenario.batch())
    scheduled = {n for n, step in updater.steps.items() if isinstance(step, FirstOrderStep)}
    assert moved(last)[0] == scheduled
    assert sorted(turns) == sorted([*(agent.name for agent in updater.loss.agents), "critic"])
