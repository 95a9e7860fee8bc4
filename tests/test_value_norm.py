"""Value normalisation: the critic sees normalised returns, the advantage real values."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from newer import PercentileValueNorm, PopArtValueNorm, RunningValueNorm, tensors
from reference import DATA, Trunk, relative_error
from team import N_AGENTS, make_actor, make_batch, make_critic, same_state, state_of
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from torchrl_happo import HAPPOLoss, HATRPOLoss, SequentialUpdater


def make_updater(value_norm=None, *, loss_class=HAPPOLoss, popart=False, clip_value=None, **kwargs):
    """An updater whose critic predicts normalised values."""
    if value_norm is None:
        value_norm = PopArtValueNorm(shape=1)
    settings = {"value_norm": value_norm, "popart": popart, "clip_value": clip_value}
    loss = loss_class(make_actor(), make_critic(), **settings)
    return SequentialUpdater(loss, **{"num_epochs": 2, **kwargs})


def test_advantage_is_estimated_from_real_values():
    """The values that enter GAE are the critic's outputs, denormalised."""
    updater = make_updater(RunningValueNorm(shape=1))
    loss = updater.loss
    loss.value_norm.update(5.0 + 3.0 * torch.randn(100, 1))
    batch = make_batch(loss.actor_network)
    with torch.no_grad():
        loss.value_estimator(batch)
        predicted = loss.critic_network(batch.copy())["agents", "state_value"]
    assert torch.equal(batch["agents", "state_value"], loss.value_norm.denormalize(predicted))
    real = loss.value_estimator.value_network
    assert (real.in_keys, real.out_keys) == (
        loss.critic_network.in_keys,
        loss.critic_network.out_keys,
    )


@pytest.mark.parametrize("loss_class", [HAPPOLoss, HATRPOLoss])
def test_statistics_are_updated_once_per_batch(loss_class):
    """However many epochs and minibatches, the returns of a batch are taken in once."""
    updater = make_updater(
        RunningValueNorm(shape=1), loss_class=loss_class, num_epochs=3, minibatch_size=5
    )
    batch = make_batch(updater.loss.actor_network)
    updater(batch)
    assert updater.loss.value_norm.count == batch.numel() * N_AGENTS


@pytest.mark.parametrize("loss_class", [HAPPOLoss, HATRPOLoss])
def test_a_batch_in_which_nobody_acts_changes_nothing(loss_class):
    """No return counts: statistics and policies stay as they are, and all metrics are finite."""
    updater = make_updater(loss_class=loss_class, popart=True)
    batch = make_batch(updater.loss.actor_network)
    updater(batch)
    unchanged = [updater.loss.value_norm, updater.loss.actor_network]
    before = [state_of(module) for module in unchanged]
    batch["agents", "active"] = torch.zeros(*batch.shape, N_AGENTS, dtype=torch.bool)
    metrics = updater(batch)
    assert all(map(same_state, map(state_of, unchanged), before))
    assert all(value.isfinite() for value in metrics.values(True, True))


def test_statistics_are_part_of_the_state():
    """They are saved and loaded, and moved with the loss."""
    updater = make_updater()
    updater(make_batch(updater.loss.actor_network))
    other = make_updater()
    other.load_state_dict(updater.state_dict())
    assert same_state(updater.loss.value_norm.state_dict(), other.loss.value_norm.state_dict())
    assert updater.loss.to("meta").value_norm.running_mean.device.type == "meta"


@pytest.mark.parametrize("num_returns", [0, 1])
def test_statistics_of_few_returns(num_returns):
    """None changes nothing, a single one counts; either way there is something to take back."""
    updater = make_updater()
    before = state_of(updater.loss.value_norm)
    restore = updater.loss.critics["critic"].update_norm(torch.full((num_returns, 1), 5.0))
    assert same_state(before, state_of(updater.loss.value_norm)) == (num_returns == 0)
    restore()
    assert same_state(before, state_of(updater.loss.value_norm))


def test_without_statistics_there_is_nothing_to_update():
    """A loss without value normalisation takes returns in, and back, all the same."""
    loss = HAPPOLoss(make_actor(), make_critic())
    before = state_of(loss)
    loss.critics["critic"].update_norm(torch.ones(5, 1))()
    assert same_state(before, state_of(loss))


def test_popart_keeps_the_values():
    """When the statistics move, the critic's real values stay where they are."""
    updater = make_updater(popart=True)
    loss = updater.loss.double()
    batch = make_batch(loss.actor_network)
    loss.critics["critic"].update_norm(torch.randn(50, 1).double() * 4 + 10)
    values = loss.value_estimator.value_network
    with torch.no_grad():
        before = values(batch.copy())["agents", "state_value"]
        loss.critics["critic"].update_norm(torch.randn(50, 1).double() * 400 - 1000)
        after = values(batch.copy())["agents", "state_value"]
    torch.testing.assert_close(after, before, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("popart", [False, True])
@pytest.mark.parametrize("norm", [PopArtValueNorm, RunningValueNorm, PercentileValueNorm])
def test_clipping_starts_from_the_old_predictions(norm, popart):
    """Whatever the statistics do: before its first step the critic predicts what it is clipped to.

    The reference clips the change of predictions, not of the values that these stand for.
    """
    updater = make_updater(norm(shape=1), popart=popart, clip_value=0.05)
    loss = updater.loss
    objective, differences = updater.steps["critic"].objective, []

    def record(data):
        prediction = loss.critic_network(data.copy())["agents", "state_value"]
        old = loss.value_norm.normalize(data["agents", "state_value"])
        differences.append((prediction - old).abs().max().item())
        return objective(data)

    updater.steps["critic"].objective = record
    batch = make_batch(loss.actor_network)
    for offset in (-100, 300, 0):
        batch["next", "reward"] = batch["next", "reward"] * 10 + offset
        updater(batch.copy())
    assert max(differences[::2]) < 1e-5  # of two epochs in three batches
    assert min(differences[1::2]) > 1e-3


@pytest.mark.parametrize("norm", [PopArtValueNorm, RunningValueNorm, PercentileValueNorm])
def test_the_first_statistics_leave_the_critic_alone(norm):
    """There are no values to keep yet, and at their scale of nearly zero no gradient would pass."""
    updater = make_updater(norm(shape=1), popart=True)
    before = copy.deepcopy(tensors(updater.loss.critic_network))
    restore = updater.loss.critics["critic"].update_norm(torch.randn(50, 1) * 40 - 60)
    assert same_state(before, tensors(updater.loss.critic_network))
    restore()
    assert same_state(before, tensors(updater.loss.critic_network))
    for _ in range(2):
        restore = updater.loss.critics["critic"].update_norm(torch.randn(50, 1) * 40 - 60)
    assert not same_state(before, tensors(updater.loss.critic_network))
    restore()
    assert same_state(before, tensors(updater.loss.critic_network))


@pytest.mark.parametrize("bias", [False, True])
def test_popart_wants_a_linear_last_layer(bias):
    """A critic that ends in something else is refused with its updater, and nothing is changed."""
    critic = TensorDictModule(
        nn.Sequential(nn.Linear(5, 1), nn.LayerNorm(1, bias=bias)),
        in_keys=[("agents", "observation")],
        out_keys=[("agents", "state_value")],
    )
    loss = HAPPOLoss(make_actor(), critic, value_norm=PopArtValueNorm(shape=1), popart=True)
    before = copy.deepcopy(tensors(loss))
    with pytest.raises(ValueError, match="must be linear with a bias"):
        SequentialUpdater(loss)
    assert same_state(before, {k: v for k, v in tensors(loss).items() if k in before})


def test_an_error_in_the_critics_fit_takes_the_statistics_back():
    """The update is all or nothing, statistics and rescaled layer included."""
    updater = make_updater(popart=True)
    batch = make_batch(updater.loss.actor_network)
    updater(batch)
    before = copy.deepcopy(updater.state_dict())

    def fails(data):
        raise RuntimeError("in the middle")

    updater.steps["critic"].objective = fails
    with pytest.raises(RuntimeError):
        updater(batch)
    assert same_state(before["loss"], updater.state_dict()["loss"])


def test_critic_steps_match_the_reference():
    """Loss, gradient norm, statistics and parameters of the reference's critic steps, to 1e-9.

    The reference takes the same returns into its statistics before each step; so does this test.
    Its Huber loss is quadratic below 10: half of TorchRL's ``"l2"``.
    """
    golden = torch.load(DATA / "critic.pt", weights_only=True)
    torch.set_default_dtype(torch.float64)
    try:
        net = nn.Sequential()
        net.add_module("base", Trunk(18, golden["hidden_sizes"]))
        net.add_module("v_out", nn.Linear(golden["hidden_sizes"][-1], 1))
        net.load_state_dict(golden["critic_init"])
        critic = TensorDictModule(net, in_keys=["state"], out_keys=["state_value"])
        actor = make_actor().double()
        value_norm = PopArtValueNorm(shape=1)
        loss = HAPPOLoss(
            actor,
            critic,
            critic_coeff=0.5,
            loss_critic_type="l2",
            clip_value=golden["clip_param"],
            value_norm=value_norm,
        )
        for name, value in golden["valuenorm_init"].items():
            getattr(value_norm, name).copy_(value.reshape(getattr(value_norm, name).shape))
        updater = SequentialUpdater(
            loss,
            optimizer=partial(torch.optim.Adam, lr=golden["lr"], eps=golden["eps"]),
            max_grad_norm=golden["max_grad_norm"],
        )
    finally:
        torch.set_default_dtype(torch.float32)
    data = TensorDict(
        {
            "state": golden["state"],
            "value_target": golden["returns"],
            # The reference stores predictions; here the old value is what these stand for.
            "state_value": value_norm.denormalize(golden["value_preds"]),
        },
        golden["state"].shape[:1],
    )
    for epoch in golden["epochs"]:
        loss.critics["critic"].update_norm(golden["returns"], data)
        value, norm = updater.steps["critic"].step(data)
        assert relative_error(value, torch.as_tensor(epoch["value_loss"])) < 1e-9
        assert relative_error(norm, torch.as_tensor(epoch["grad_norm"])) < 1e-9
        for key, parameter in net.named_parameters():
            assert relative_error(parameter, epoch["params"][key]) < 1e-9, key
        for key, statistic in epoch["valuenorm"].items():
            own = getattr(value_norm, key)
            assert relative_error(own.reshape(statistic.shape), statistic) < 1e-9, key


def test_returns_of_inactive_agents_are_left_out():
    """With a value for each agent, the statistics see only the returns of agents that acted."""
    updater = make_updater(RunningValueNorm(shape=1))
    batch = make_batch(updater.loss.actor_network)
    active = torch.rand(*batch.shape, N_AGENTS) > 0.4
    batch["agents", "active"] = active
    batch["advantage"] = torch.randn(*batch.shape, 1)
    batch["value_target"] = torch.where(active, 1.0, 100.0).unsqueeze(-1)
    updater(batch)
    assert updater.loss.value_norm.count == active.sum()
    assert updater.loss.value_norm.mean == 1.0
