"""A batch is read as it says: ends of trajectories, masks, keys, absent observations."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from newer import tensors
from team import make_actor, make_batch, make_critic
from tensordict.nn import TensorDictModule
from torch import nn

from torchrl_happo import HAPPOLoss, SequentialUpdater

NEXT_OBS = ("next", "agents", "observation")
DONE, TERMINATED = ("next", "done"), ("next", "terminated")


def team_critic():
    return TensorDictModule(
        nn.Sequential(nn.Flatten(-2), nn.Linear(15, 1)),
        in_keys=[("agents", "observation")],
        out_keys=["state_value"],
    )


def team(critic=make_critic, **keys):
    torch.manual_seed(0)
    loss = HAPPOLoss(make_actor(), critic(), entropy_coeff=0.0)
    if keys:
        loss.set_keys(**keys)
    updater = SequentialUpdater(
        loss, optimizer=partial(torch.optim.SGD, lr=0.0), num_epochs=1, order="fixed"
    )
    return updater, make_batch(loss.actor_network)


def critic_loss(updater, batch):
    return updater(batch)["critic", "loss"].item()


def test_trajectories_in_one_row_are_told_apart_by_their_numbers():
    """As in rows of their own, though no done lies between them."""
    updater, batch = team()
    batch["collector", "traj_ids"] = torch.arange(4).unsqueeze(-1).expand(4, 6).clone()
    rows = critic_loss(updater, batch)
    assert critic_loss(updater, batch.reshape(1, -1)) == pytest.approx(rows, abs=1e-5)
    assert critic_loss(updater, batch.reshape(-1)) == pytest.approx(rows, abs=1e-5)
    behind = torch.cat([batch[:2], batch[2:]], 1)
    assert critic_loss(updater, behind) == pytest.approx(rows, abs=1e-5)
    leaked = batch.reshape(1, -1).exclude(("collector", "traj_ids"))
    assert abs(critic_loss(updater, leaked) - rows) > 1e-4


def test_the_mask_of_dead_agents_is_the_one_called_active():
    """TorchRL's (group, "mask") is read as (group, "active"), and what is dead has no influence."""
    updater, batch = team()
    alive = torch.rand(4, 6, 3) > 0.3
    named, masked = batch.clone(), batch.clone()
    named["agents", "active"] = alive
    masked["agents", "mask"] = alive
    one, other = updater(named), updater(masked)
    assert (one == other).all()
    assert (one["agents_0"] != updater(batch)["agents_0"]).any()
    spoilt = masked.clone()
    spoilt["agents", "observation"][~alive] = float("nan")
    assert (updater(spoilt)["agents_0"] == other["agents_0"]).all()


@pytest.mark.parametrize("key", ["alive", ("agents", "alive")], ids=["name", "nested"])
def test_the_active_key_may_be_nested(key):
    """The name of the entry, or the whole key."""
    updater, batch = team()
    alive = torch.rand(4, 6, 3) > 0.3
    wanted = updater(batch.clone().set(("agents", "active"), alive))
    updater, _ = team(active=key)
    assert (updater(batch.clone().set(("agents", "alive"), alive)) == wanted).all()


def test_an_active_key_that_is_not_there_is_refused():
    """A misspelt key does not mean that all are active."""
    updater, batch = team(active=("agents", "alvie"))
    batch["agents", "alive"] = torch.ones(4, 6, 3, dtype=torch.bool)
    with pytest.raises(KeyError, match=r"no entry \('agents', 'alvie'\).*leave active out"):
        updater(batch)
    updater.loss.set_keys(active=("agents", "alive"))  # the cure
    updater(batch)


def test_absent_next_observations():
    """A shifted estimator takes them from the steps that follow; otherwise they are missed."""
    updater, batch = team()
    compact = batch.exclude(NEXT_OBS)
    with pytest.raises(KeyError, match="'observation'"):
        updater(compact)
    torch.manual_seed(0)
    loss = HAPPOLoss(make_actor(), make_critic())
    loss.make_value_estimator(shifted=True)
    shifted = SequentialUpdater(loss, num_epochs=1)
    assert shifted(compact)["critic", "loss"].isfinite()


@pytest.mark.parametrize("critic", [make_critic, team_critic], ids=["of each", "of the team"])
@pytest.mark.parametrize("checks", [True, False])
def test_nan_behind_a_terminated_step(critic, checks):
    """The value behind the end of an episode is 0, whatever is written there."""
    outcomes = []
    for value in (0.0, float("nan"), float("inf")):
        updater, batch = team(critic)
        updater.check_finite = checks
        batch[TERMINATED][0, 3] = batch[DONE][0, 3] = True
        batch[NEXT_OBS][0, 3] = value
        given = batch.clone()
        outcomes.append(updater(batch))
        torch.testing.assert_close(batch[NEXT_OBS], given[NEXT_OBS], equal_nan=True)
    assert (outcomes[0] == outcomes[1]).all()
    assert (outcomes[0] == outcomes[2]).all()


def test_nan_behind_a_truncated_step_is_refused():
    """There the value of the next observation counts."""
    updater, batch = team()
    batch[DONE][0, 3], batch[TERMINATED][0, 3] = True, False
    batch[NEXT_OBS][0, 3] = float("nan")
    with pytest.raises(ValueError, match=r"'observation'.*NaN"):
        updater(batch)


@pytest.mark.parametrize("n_values", [2, 4])
def test_values_of_other_numbers_of_agents_are_refused(n_values):
    """A critic built for another team is named."""
    torch.manual_seed(0)
    critic = TensorDictModule(
        nn.Sequential(nn.Flatten(-2), nn.Linear(15, n_values), nn.Unflatten(-1, (n_values, 1))),
        in_keys=[("agents", "observation")],
        out_keys=[("agents", "state_value")],
    )
    loss = HAPPOLoss(make_actor(), critic)
    updater = SequentialUpdater(loss, num_epochs=1)
    before = copy.deepcopy(tensors(loss))
    with pytest.raises(ValueError, match=r"critic|state_value|advantage"):
        updater(make_batch(loss.actor_network))
    assert all(torch.equal(value, before[name]) for name, value in tensors(loss).items())


@pytest.mark.parametrize("critic", [make_critic, team_critic], ids=["of each", "of the team"])
def test_done_of_each_agent(critic):
    """The team of a team critic is done when all its agents are; alike, it is the team's done."""
    updater, batch = team(critic)
    wanted = updater(batch)
    each = batch.clone()
    for key in (DONE, TERMINATED):
        each[key] = batch[key].unsqueeze(-2).expand(4, 6, 3, 1).clone()
    got = updater(each)
    assert got["critic", "loss"].item() == pytest.approx(wanted["critic", "loss"].item(), abs=1e-5)
    for key in (DONE, TERMINATED):
        each[key][:, 2, 0] = True  # one of them alone
    alone = updater(each)["critic", "loss"].item()
    same = alone == pytest.approx(wanted["critic", "loss"].item(), abs=1e-5)
    assert same == (critic is team_critic)
