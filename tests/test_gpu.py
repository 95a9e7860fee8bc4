"""On a CUDA device: equal to the CPU, replayed from graphs, and without waiting for the device."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from team import make_actor, make_batch, make_critic
from tensordict import TensorDict
from torchrl.modules import IndependentNormal, TanhNormal

from torchrl_happo import HAPPOLoss, HATRPOLoss, SequentialUpdater

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LOSSES = [HAPPOLoss, HATRPOLoss]


def make_updater(loss_class, device, distribution=IndependentNormal, **kwargs):
    """An updater on a device and a batch there, the same for every device."""
    torch.manual_seed(0)
    actor, critic = make_actor(distribution=distribution), make_critic()
    batch = make_batch(actor, 4, 7)
    actor, critic = actor.to(device), critic.to(device)
    settings = {"entropy_coeff": 0.0} if loss_class is HAPPOLoss else {"max_kl": 0.02}
    loss = loss_class(actor, critic, **settings)
    # The whole batch at once: permutations are drawn on the device, others on each.
    updater = SequentialUpdater(
        loss,
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        num_epochs=3,
        max_grad_norm=1.0,
        **kwargs,
    )
    return updater, batch.to(device)


def parameters(updater):
    """All that is trained, on the CPU."""
    return {name: p.detach().cpu() for name, p in updater.loss.named_parameters()}


@pytest.mark.parametrize("distribution", [IndependentNormal, TanhNormal])
@pytest.mark.parametrize("loss_class", LOSSES)
def test_equal_to_the_cpu(loss_class, distribution):
    """Two updates end with the parameters of the CPU, up to single precision."""
    ends = []
    for device in ("cpu", "cuda"):
        updater, batch = make_updater(loss_class, device, distribution)
        for _ in range(2):
            updater(batch)
        ends.append(parameters(updater))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=1e-4)


@pytest.fixture
def double():
    """In single precision another order of sums alone moves HATRPO by 3e-5."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("options", [{"cudagraphs": True}, {"cudagraphs": True, "compile": True}])
@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.usefixtures("double")
def test_graphs_are_equal_to_eager(loss_class, options, caplog):
    """Four updates, the second of which captures, leave the parameters of eager ones."""
    ends = []
    for settings in ({}, options):
        updater, batch = make_updater(loss_class, "cuda", **settings)
        for _ in range(4):
            metrics = updater(batch)
        assert all(v.isfinite().all() for v in metrics.values(True, True))
        ends.append(parameters(updater))
    assert "not compiled" not in caplog.text
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-7, atol=1e-9)


def test_graphs_follow_ragged_minibatches_and_schedules():
    """Each size of a minibatch has its graph, and the learning rate of each update is seen."""
    ends = []
    schedule = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    for cudagraphs in (False, True):
        updater, batch = make_updater(
            HAPPOLoss, "cuda", minibatch_size=12, scheduler=schedule, cudagraphs=cudagraphs
        )
        for _ in range(3):
            updater(batch)
        ends.append(parameters(updater))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cudagraphs", [False, True])
@pytest.mark.parametrize("loss_class", LOSSES)
def test_no_synchronisation(loss_class, cudagraphs):
    """After the first ones, which capture, an update waits for the device nowhere."""
    updater, batch = make_updater(loss_class, "cuda", cudagraphs=cudagraphs)
    updater.check_finite = False
    for _ in range(3):
        updater(batch)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = updater(batch)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert isinstance(metrics, TensorDict)


@pytest.mark.parametrize("loss_class", LOSSES)
def test_a_team_goes_to_another_device(loss_class):
    """Between two updates, with its optimisers' momentum; minibatches are drawn where they were."""
    there, batch = make_updater(loss_class, "cpu", minibatch_size=12)
    here = copy.deepcopy(there)
    for updater in (there, here):
        updater(batch)
    here.loss.to("cuda")
    there(batch)
    here(batch.to("cuda"))
    for key, value in parameters(there).items():
        torch.testing.assert_close(parameters(here)[key], value, rtol=1e-3, atol=1e-4)


def test_state_goes_to_another_device():
    """A state that was written on the GPU goes on on the CPU, and the other way round."""
    gpu, gpu_batch = make_updater(HAPPOLoss, "cuda")
    gpu(gpu_batch)
    cpu, batch = make_updater(HAPPOLoss, "cpu")
    cpu.loss.load_state_dict(gpu.loss.state_dict(), strict=False)
    torch.testing.assert_close(parameters(cpu), parameters(gpu))
    state = copy.deepcopy(cpu.loss.state_dict())
    gpu.loss.load_state_dict(state, strict=False)
    gpu(gpu_batch)
    cpu(batch)
    assert all(p.isfinite().all() for p in parameters(gpu).values())
