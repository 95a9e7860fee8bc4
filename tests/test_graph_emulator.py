"""``cudagraphs=True`` on an emulated device: equal to eager, in place, at static addresses.

Blind to all that is the device's own: streams and their order, the memory pool, kernels that no
graph can hold, the compiler under capture, what another thread does meanwhile.
"""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from graph_emulator import Recorder, emulate
from team import make_actor, make_batch, make_critic
from torch import nn
from torch.distributions import Categorical
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torchrl.modules import IndependentNormal, TanhNormal

from torchrl_happo import HAPPOLoss, HATRPOLoss, SequentialUpdater
from torchrl_happo.steps.compile import cuda_graphs
from torchrl_happo.steps.compile.cuda_graphs import GraphPool, GraphReplays
from torchrl_happo.steps.trust_region import line_search


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def device(monkeypatch):
    return emulate(monkeypatch)


def twins(loss_class=HAPPOLoss, distribution=IndependentNormal, *, actor=None, **kwargs):
    """An updater, its twin with graphs on copies of the networks, and a batch."""
    torch.manual_seed(0)
    loss_kwargs = kwargs.pop("loss_kwargs", {})
    actor = actor or make_actor(distribution=distribution, depth=1)
    critic = make_critic(depth=1)
    batch = make_batch(actor, 4, 7)
    settings = {"num_epochs": 3, "max_grad_norm": 0.5, "check_finite": False, **kwargs}
    updaters = [
        SequentialUpdater(
            loss_class(*copy.deepcopy((actor, critic)), **loss_kwargs), **settings, **options
        )
        for options in ({}, {"cudagraphs": True})
    ]
    return *updaters, batch


def assert_equal(one, other, tolerance=1e-12):
    ours, theirs = one.state_dict(), other.state_dict()
    torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours["steps"], theirs["steps"], rtol=tolerance, atol=tolerance)


def update(updaters, batch):
    """Update each; entropies that are sampled draw the same numbers."""
    for updater in updaters:
        torch.manual_seed(1)
        updater(batch)
    return torch.rand(())


HAPPO = HAPPOLoss, {"entropy_coeff": 0.01, "clip_value": 0.2}, {"minibatch_size": 12}
HATRPO = HATRPOLoss, {"max_kl": 0.02, "line_search": "sequential"}, {}
BATCHED = HATRPOLoss, {"max_kl": 0.02, "line_search": "batched"}, {}


@pytest.mark.parametrize(
    ("distribution", "algorithm"),
    [
        (IndependentNormal, HAPPO),
        (TanhNormal, HAPPO),
        (Categorical, HAPPO),
        (IndependentNormal, HATRPO),
        (TanhNormal, BATCHED),
        (Categorical, BATCHED),
    ],
    ids=["happo-normal", "happo-tanh", "happo-discrete", "normal", "tanh-batched", "batched"],
)
def test_equal_to_eager(device, distribution, algorithm, caplog):
    """Four updates: whole and ragged minibatches, a schedule, addresses that stay.

    The last update captures nothing, and the generator is where eager has left it.
    """
    loss_class, loss_kwargs, kwargs = algorithm
    *updaters, batch = twins(loss_class, distribution, loss_kwargs=loss_kwargs, **kwargs)
    for _ in range(4):
        for updater in updaters:
            updater.steps["critic"].optimizer.param_groups[0]["lr"] *= 0.9
        captures = device.captures
        # In place. Conjugate gradient would multiply the rounding of one update in the next.
        updaters[1].loss.load_state_dict(updaters[0].loss.state_dict())
        drawn = [update([updater], batch) for updater in updaters]
        assert torch.equal(*drawn)
        assert_equal(*updaters)
    assert captures == device.captures > 8
    assert "not compiled" not in caplog.text
    # One pool and one stream of warm-ups for all; other threads may use the device meanwhile.
    assert (len(device.pools), device.streams, device.modes) == (1, 1, {"thread_local"})


def test_candidates_are_replayed_one_by_one(device, monkeypatch):
    """A batched line search does not try to vectorise a replay, which would spoil its inputs."""

    class Torch:
        def __getattr__(self, name):
            assert name != "vmap"
            return getattr(torch, name)

    *_, updater, batch = twins(HATRPOLoss, loss_kwargs=BATCHED[1])
    monkeypatch.setattr(line_search, "torch", Torch())
    for _ in range(3):
        updater(batch)
    assert device.captures


def test_a_capture_that_fails_changes_nothing(device, caplog):
    """Parameters that warm-ups moved are put back; the update goes on without graphs."""
    device.breaks = True
    *updaters, batch = twins()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            update(updaters, batch)
    assert device.captures
    assert_equal(*updaters, tolerance=1e-15)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def dying(batch, number):
    """Let other agents die in each batch: the first one is never there in every fourth."""
    generator = torch.Generator().manual_seed(number)
    alive = torch.rand(4, 7, 3, generator=generator) > 0.9 - number % 4 * 0.3
    alive[..., 0] &= number % 4 != 2
    batch["agents", "active"] = alive
    return batch


@pytest.mark.parametrize(
    ("loss_class", "kwargs"),
    [
        (HAPPOLoss, {}),
        (HAPPOLoss, {"minibatch_size": 12}),
        (HATRPOLoss, {"loss_kwargs": HATRPO[1]}),
    ],
    ids=["happo", "minibatches", "hatrpo"],
)
def test_agents_that_die_make_no_new_graphs(device, caplog, loss_class, kwargs):
    """Batches have one size, whoever is alive; numbers are those of the rows where agents are.

    Twelve batches with other deaths in each, in one of four of which an agent is never there.
    """
    *updaters, batch = twins(loss_class, Categorical, **kwargs)
    # Minibatches of selected rows are fewer: there the twin has the same rows, without graphs.
    updaters[0]._has_graphs = "minibatch_size" in kwargs
    captures = []
    for number in range(12):
        updaters[1].loss.load_state_dict(updaters[0].loss.state_dict())
        update(updaters, dying(batch, number))
        assert_equal(*updaters)
        captures.append(device.captures)
    assert captures[4] == captures[-1]
    assert "not compiled" not in caplog.text


def test_a_parameter_without_a_gradient(device, caplog):
    """It has none in a graph either, and stays where it is."""
    torch.manual_seed(0)
    critic = make_critic(depth=1)
    critic.module.idle = nn.Parameter(torch.ones(2))
    actor = make_actor(distribution=IndependentNormal, depth=1)
    batch = make_batch(actor, 4, 7)
    sgd = torch.optim.SGD
    updaters = [
        SequentialUpdater(
            HAPPOLoss(*copy.deepcopy((actor, critic))),
            critic_optimizer=lambda parameters: sgd(parameters, lr=0.1),
            num_epochs=3,
            **options,
        )
        for options in ({}, {"cudagraphs": True})
    ]
    for _ in range(3):
        update(updaters, batch)
    assert_equal(*updaters)
    assert "not compiled" not in caplog.text


def test_the_batch_of_a_trust_region_is_copied_once(device, monkeypatch):
    """Not again for each product with the Fisher matrix, and each trial."""
    *_, updater, batch = twins(HATRPOLoss, loss_kwargs={"max_kl": 0.02})
    for _ in range(3):
        updater(batch)
    copies = []
    real = torch._foreach_copy_
    monkeypatch.setattr(
        cuda_graphs.torch,
        "_foreach_copy_",
        lambda to, of: copies.append(real(to, of)),
        raising=False,
    )
    updater(batch)
    # Three agents: before, the step, after; and the critic's three epochs.
    assert len(copies) == 3 * 3 + 3


def test_restored_optimisers_are_followed(device):
    """New moments have new graphs; the moments of before are not written any more."""
    *updaters, batch = twins()
    for _ in range(3):
        update(updaters, batch)
    for updater in updaters:
        state = copy.deepcopy(updater.state_dict())
        updater(batch)
        updater.load_state_dict(state)
        for _ in range(3):
            updater(batch)
    assert_equal(*updaters)


def test_nothing_is_compiled_while_a_graph_is_captured(device):
    """A function has run once by itself, and three times beside, when its call is captured.

    What compiles it at its first calls, or at its first ones on another stream, has done so.
    """
    replays, captured, total = GraphReplays(GraphPool()), [], torch.zeros(3)

    def function(total, items):
        captured.append(isinstance(_get_current_dispatch_mode(), Recorder))
        total += items[0].sum(0)
        return (items[0] * 2,)

    call = replays.bind(function, [total])
    for number in range(4):
        call([torch.ones(4, 3)])
        assert total.tolist() == [4 * (number + 1)] * 3  # what warm-ups have added is gone
        assert captured == ([False] if number == 0 else [False] * 4 + [True])


def test_a_replay_is_of_one_type_and_layout(device):
    """Tensors of the same shapes, but of another type or with other strides, have their own."""
    replays = GraphReplays(GraphPool())
    total = torch.zeros(3)

    def function(total, items):
        total += items[0].double().sum(0)
        return items[0] * 2, None

    call = replays.bind(function, [total])
    wanted = torch.zeros(3)
    for _ in range(4):
        for items in (torch.rand(4, 3), torch.rand(4, 3).float(), torch.rand(3, 4).T):
            result, nothing = call([items])
            wanted += items.double().sum(0)
            assert nothing is None
            assert result.dtype == items.dtype
            torch.testing.assert_close(result, items * 2, rtol=0, atol=0)
            torch.testing.assert_close(total, wanted)
    assert device.captures == 3
