"""States of random generators: bit for bit on the same kind of device, repeatable between kinds."""

from __future__ import annotations

import copy

import pytest
import torch
from team import make_actor, make_batch, make_critic
from torchrl.modules import IndependentNormal
from wrong_calls import same

from torchrl_happo import HAPPOLoss, HATRPOLoss, SequentialUpdater
from torchrl_happo.transaction import STATE_SIZES, load_generator_state


def cuda_state(seed, offset=0):
    """What a generator of a CUDA device would hand over."""
    numbers = torch.tensor([seed, offset], dtype=torch.int64)
    return numbers.view(torch.uint8)


def draws(state):
    """What a generator on the CPU draws from that state on."""
    generator = torch.Generator()
    load_generator_state(generator, state)
    return torch.rand(3, generator=generator)


def test_sizes_are_those_of_torch():
    """By them the kind of device is told: the CPU's here, CUDA's where there is one."""
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        state = torch.Generator(device).get_state()
        assert (state.numel(), state.dtype) == (STATE_SIZES[device], torch.uint8)


def test_between_kinds_the_state_alone_decides():
    """Seed and offset both count, and where the generator was before does not."""
    assert torch.equal(draws(cuda_state(3)), draws(cuda_state(3)))
    ways = [draws(cuda_state(3)), draws(cuda_state(4)), draws(cuda_state(3, offset=4))]
    assert len({tuple(way.tolist()) for way in ways}) == 3


@pytest.mark.parametrize("size", [0, 15, 17, 5055])
def test_a_damaged_state_is_refused(size):
    """A size that no generator has."""
    generator = torch.Generator()
    before = generator.get_state()
    with pytest.raises((RuntimeError, TypeError)):
        load_generator_state(generator, torch.zeros(size, dtype=torch.uint8))
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("loss_class", "settings"), [(HAPPOLoss, {}), (HATRPOLoss, {"fisher_fraction": 0.5})]
)
def test_a_team_trained_on_a_gpu_goes_on_without_one(loss_class, settings):
    """All that was learned is there, and two that go on draw the same."""
    torch.manual_seed(0)
    actor, critic = make_actor(distribution=IndependentNormal), make_critic()
    batch = make_batch(actor)
    loss = loss_class(actor, critic, **settings)
    trained = SequentialUpdater(loss, num_epochs=2, minibatch_size=7)
    trained(batch)
    state = copy.deepcopy(trained.state_dict())
    state["generators"][1] = cuda_state(5)
    for step in state["steps"].values():
        if "generator" in step:
            step["generator"] = cuda_state(6)
    ends = []
    for _ in range(2):
        resumed = SequentialUpdater(copy.deepcopy(loss), num_epochs=2, minibatch_size=7, seed=9)
        resumed.load_state_dict(state)
        assert same(resumed.state_dict()["loss"], state["loss"])
        resumed(batch)
        ends.append(resumed.state_dict())
    assert same(*ends)
