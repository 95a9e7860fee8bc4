"""State that the whole process, or a factory, shares: an update neither reads nor changes it.

Buffers with prefetch or on disk, learning rates that are tensors and autocast's cache have their
tests in ``test_steps.py``.
"""

from __future__ import annotations

import copy
import threading
from functools import partial

import pytest
import torch
from newer import tensors
from team import make_actor, make_batch, make_critic
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer
from torchrl.envs.utils import ExplorationType, exploration_type, set_exploration_type
from torchrl.modules import IndependentNormal

from torchrl_happo import HAPPOLoss, HATRPOLoss, SequentialUpdater

BOTH = pytest.mark.parametrize("loss_class", [HAPPOLoss, HATRPOLoss])


def team(loss_class=HAPPOLoss, **kwargs):
    torch.manual_seed(0)
    loss = loss_class(make_actor(distribution=IndependentNormal), make_critic())
    settings = {"num_epochs": 2, "optimizer": partial(torch.optim.SGD, lr=0.05), **kwargs}
    return SequentialUpdater(loss, **settings), make_batch(loss.actor_network)


def moved(updater, batch):
    """The loss's tensors after an update."""
    updater(batch)
    return copy.deepcopy(tensors(updater.loss))


def assert_same(one, other):
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("inside", [False, True], ids=["batch outside", "batch inside"])
@BOTH
def test_an_update_under_another_mode_is_the_same(mode, inside, loss_class):
    """Bit for bit; a batch that was made under inference_mode can be trained with as well."""
    updater, batch = team(loss_class)
    wanted = moved(updater, batch)
    updater, batch = team(loss_class)
    with mode():
        batch = batch.clone() if inside else batch
        got = moved(updater, batch)
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert torch.is_grad_enabled()
    assert_same(wanted, got)
    updater(batch)  # and once more, outside


def test_networks_made_under_inference_mode_are_refused():
    """No gradient can reach them; the sentence says what to do."""
    with torch.inference_mode():
        loss = HAPPOLoss(make_actor(), make_critic())
    with pytest.raises(ValueError, match=r"inference_mode.*build them outside"):
        SequentialUpdater(loss)


@pytest.mark.parametrize("kind", [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC])
@BOTH
def test_the_exploration_type_is_left_alone(kind, loss_class):
    """It is read as it was before, during and after an update, and has no influence."""
    updater, batch = team(loss_class)
    wanted = moved(updater, batch)
    updater, batch = team(loss_class)
    seen = []
    agent_terms = updater.loss.agent_terms

    def watched(*args):
        seen.append(exploration_type())
        return agent_terms(*args)

    updater.loss.agent_terms = watched
    with set_exploration_type(kind):
        got = moved(updater, batch)
        assert exploration_type() == kind
    assert set(seen) <= {kind}
    assert seen or loss_class is HATRPOLoss
    assert_same(wanted, got)


@BOTH
def test_a_thread_samples_while_an_update_runs(loss_class):
    """Each of its actions is drawn at random, none is a mode."""
    updater, batch = team(loss_class)
    actor = make_actor(distribution=IndependentNormal)
    view = batch.select(("agents", "observation"))
    modes, stop = [], threading.Event()

    def sample():
        while not stop.is_set():
            with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
                drawn = actor(view.copy())
            modes.append((drawn["agents", "action"] == drawn["agents", "loc"]).float().mean())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        for _ in range(3):
            updater(batch)
    finally:
        stop.set()
        thread.join()
    assert modes
    assert max(modes) == 0


BUFFERS = {
    "prefetch": lambda folder: ReplayBuffer(
        storage=LazyTensorStorage(24), batch_size=8, prefetch=2
    ),
    "on disk": lambda folder: ReplayBuffer(
        storage=LazyMemmapStorage(24, scratch_dir=folder), batch_size=8
    ),
}


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("kind", BUFFERS)
def test_a_buffer_of_the_users_keeps_what_it_holds(kind, used, tmp_path):
    """Every loss of an epoch is that of the present batch: at a rate of 0, as without a buffer."""
    buffer = BUFFERS[kind](tmp_path)
    if used:
        buffer.extend(TensorDict({"x": torch.arange(10)}, [10]))
    updater, batch = team(replay_buffer=buffer, optimizer=partial(torch.optim.SGD, lr=0.0))
    for _ in range(2):
        metrics = updater(batch)
        assert metrics["agents_1", "ratio_mean"].item() == pytest.approx(1, abs=1e-5)
        batch = make_batch(updater.loss.actor_network)
    assert len(buffer) == (10 if used else 0)


def test_one_tensor_as_the_rate_of_all():
    """Each optimiser has a copy: a schedule multiplies each once for a batch."""
    rate = torch.tensor(0.05)
    updater, batch = team(
        optimizer=partial(torch.optim.SGD, lr=rate),
        scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
    )
    updater(batch)
    rates = [step.optimizer.param_groups[0]["lr"].item() for step in updater.steps.values()]
    assert rates == pytest.approx([0.025] * 4)
    assert rate.item() == pytest.approx(0.05)


def test_optimisers_of_several_parameter_groups():
    """A factory may split an agent's parameters into groups with settings of their own."""

    def halves(parameters):
        parameters = list(parameters)
        groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.0}]
        return torch.optim.SGD(groups, lr=0.05)

    updater, batch = team(optimizer=halves)
    agent = updater.loss.agents[0]
    before = [p.detach().clone() for p in agent.parameters()]
    updater(batch)
    same = [torch.equal(a, b) for a, b in zip(before, agent.parameters(), strict=True)]
    assert same == [False] * 2 + [True] * (len(same) - 2)


@pytest.mark.parametrize("masked", [False, True])
@BOTH
def test_under_autocast_the_factor_is_that_of_the_moved_policy(masked, loss_class):
    """The cache of casts, if it were used, would give kl 0 and factor 1."""
    updater, batch = team(loss_class)
    if masked:
        batch["agents", "active"] = torch.rand(*batch.shape, 3) < 0.8
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metrics = updater(batch)
        assert torch.is_autocast_cache_enabled()
    last = min(metrics.keys(), key=lambda name: -metrics[name].get("position", torch.tensor(-1.0)))
    assert metrics[last, "factor_ess"] < 1
