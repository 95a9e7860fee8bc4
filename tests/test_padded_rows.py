"""Agents that die where rows are counted on a device: as many rows, the same numbers.

On a CPU their rows are selected. Here an updater pads, as on an accelerator, beside one that does
not.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from team import make_actor, make_batch, make_critic
from tensordict import TensorDict
from torch.distributions import Categorical
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.modules import IndependentNormal, TanhNormal

from torchrl_happo import (
    A2POLoss,
    HAPPOLoss,
    HATRPOLoss,
    SequentialUpdater,
)
from torchrl_happo.steps.minibatches import ReplayBufferMinibatches, ShuffledMinibatches
from torchrl_happo.update.rows import padded_rows, selected_rows


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def pads(updater):
    """Let an updater on the CPU do as on an accelerator."""
    updater._has_graphs = True
    return updater


def twins(loss_class, distribution, *, actor=None, critic=None, loss_kwargs=None, **kwargs):
    torch.manual_seed(0)
    actor = actor or make_actor(distribution=distribution, depth=1)
    critic = critic or make_critic(depth=1)
    updaters = [
        SequentialUpdater(
            loss_class(*copy.deepcopy((actor, critic)), **(loss_kwargs or {})),
            **{"num_epochs": 2, "max_grad_norm": 0.5, **kwargs},
        )
        for _ in range(2)
    ]
    return updaters[0], pads(updaters[1]), make_batch(actor, 4, 6)


def with_deaths(batch, number, poison=math.nan):
    """Return a batch with other deaths for each number; who is dead writes what it likes."""
    generator = torch.Generator().manual_seed(number)
    batch = batch.clone()
    alive = torch.rand(batch["agents", "observation"].shape[:-1], generator=generator) > 0.4
    if number % 3 == 1:
        alive[..., number % 2] = False
    if number % 3 == 2:
        alive[..., 0].fill_(False)[0, 0] = True
    for key in ("observation", "action"):
        value = batch["agents", key]
        if value.is_floating_point():
            value[~alive] = poison
    return batch.set(("agents", "active"), alive)


def assert_equal(ours, theirs, metrics, others):
    one, other = ours.state_dict(), theirs.state_dict()
    for name in ("loss", "steps"):
        torch.testing.assert_close(one[name], other[name], rtol=1e-12, atol=1e-12)
    for key in metrics.keys(True, True):
        error = f"{key}: {metrics[key]} {others[key]}"
        assert torch.isclose(metrics[key].double(), others[key].double(), 1e-9, 1e-11), error


CASES = {
    "happo": (HAPPOLoss, IndependentNormal, {}),
    "discrete": (HAPPOLoss, Categorical, {}),
    "tanh": (HAPPOLoss, TanhNormal, {"loss_kwargs": {"entropy_coeff": 0.0}}),
    "hatrpo": (HATRPOLoss, IndependentNormal, {"loss_kwargs": {"line_search": "batched"}}),
    "a2po": (A2POLoss, Categorical, {}),
    "sequences": (HAPPOLoss, IndependentNormal, {"sequence_length": 3}),
    "block": (HAPPOLoss, IndependentNormal, {"loss_kwargs": {"blocks": ["agents"]}}),
    "one by one": (HATRPOLoss, Categorical, {"loss_kwargs": {"kl_split": "greedy"}}),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_to_selected_rows(case):
    """Batch after batch, whoever is alive in it; an agent that is not there does not move."""
    loss_class, distribution, kwargs = CASES[case]
    *updaters, batch = twins(loss_class, distribution, **kwargs)
    for number in range(7):
        updaters[1].load_state_dict(updaters[0].state_dict())
        results = []
        for updater in updaters:
            torch.manual_seed(number)
            results.append(updater(with_deaths(batch, number)))
        assert_equal(*updaters, *results)
        if case not in ("block", "one by one"):
            missing = [
                n for n in ("agents_0", "agents_1") if "grad_norm" not in results[0][n].keys()
            ]
            assert bool(missing) == (number % 3 == 1)
            assert all(results[1][name]["grad_norm"] == 0 for name in missing)


@pytest.mark.parametrize("shape", [(9,), (9, 2)])
def test_padded_rows_are_the_selected_ones_again(shape):
    """First every living item, once and counted, in order; then the same, which do not count."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        valid = torch.rand(shape, generator=generator) > 0.6
        selected, padded = selected_rows(valid), padded_rows(valid)
        number = 0 if selected is None else len(selected.positions)
        assert padded.valid.shape == valid.shape
        assert not padded.valid[number:].any()
        if selected is not None:
            assert torch.equal(padded.positions[:number], selected.positions)
            assert torch.equal(padded.valid[:number], valid[selected.positions])
            assert set(padded.positions.tolist()) == set(selected.positions.tolist())


@pytest.mark.parametrize("number", [0, 2, 3, 5, 13])
def test_minibatches_have_an_even_share(number):
    """Each item that counts comes once, in parts of one size; none is without one, if any is."""
    valid = torch.arange(13) < number
    data = TensorDict({"x": torch.arange(13), "valid": valid}, [13])
    sampler = ShuffledMinibatches(4, torch.Generator().manual_seed(0))
    orders = []
    for _ in range(2):
        parts = list(sampler(data))
        assert [len(part) for part in parts] == [4, 3, 3, 3]
        counted = [part["x"][part["valid"]].tolist() for part in parts]
        sizes = list(map(len, counted))
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= min(number, 1)
        seen = [x for part in counted for x in part]
        assert set(seen) == set(range(number))
        assert len(seen) == number or len(seen) == len(parts)
        orders.append(seen)
    assert number < 3 or orders[0] != orders[1]


def test_a_replay_buffer_draws_what_counts():
    """Its sampler knows no marks; rows that repeat others are kept from it."""
    valid = torch.arange(8) < 5
    data = TensorDict({"x": torch.arange(8), "valid": valid}, [8])
    sampler = SamplerWithoutReplacement()
    buffer = ReplayBuffer(storage=LazyTensorStorage(8), sampler=sampler, batch_size=2)
    parts = list(ReplayBufferMinibatches(buffer)(data))
    assert len(parts) == 3
    assert {x for part in parts for x in part["x"].tolist()} == set(range(5))


def test_an_optimiser_that_has_no_state_yet_stays_without():
    """An agent that is absent from the first batch on begins when it appears."""
    *updaters, batch = twins(HAPPOLoss, IndependentNormal)
    for number in (1, 4, 1, 0, 1):  # one agent, the other, and both of them at last
        for updater in updaters:
            updater(with_deaths(batch, number))
        assert_equal(*updaters, TensorDict(), TensorDict())
    states = [u.state_dict()["steps"]["agents_1"]["optimizer"]["state"] for u in updaters]
    assert states[0][0]["step"] == states[1][0]["step"]
