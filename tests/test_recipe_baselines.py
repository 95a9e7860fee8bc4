"""The baselines: TorchRL's own losses, in the loop its users write."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from recipe_helpers import tiny_config
from torch import nn
from torchrl.collectors import Collector
from torchrl.modules import MultiAgentMLP

from torchrl_happo.networks.specs import read_groups
from torchrl_happo.recipe.algorithms import make_learner
from torchrl_happo.recipe.algorithms.simultaneous import (
    SimultaneousUpdater,
    TeamStateCritic,
    make_group_critic,
)
from torchrl_happo.recipe.config import ConfigError
from torchrl_happo.recipe.environments import make_env

BASELINES = [(algorithm, share) for algorithm in ("mappo", "ippo") for share in ("true", "false")]


def learner_and_batch(*overrides):
    """A learner, and a batch that its policy collected."""
    config = tiny_config(*overrides)
    env = make_env(config.task, num_envs=config.num_envs, seed=0)
    learner = make_learner(config, env)
    collector = Collector(
        env,
        learner.policy,
        frames_per_batch=config.frames_per_batch,
        total_frames=-1,
        auto_register_policy_transforms=False,
    )
    return learner, next(iter(collector))


def parameters(module):
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("share_params", [True, False])
def test_the_central_critic_is_torchrls(share_params):
    """With one group it computes what ``MultiAgentMLP(centralized=True)`` does."""
    networks = {"depth": 2, "num_cells": 8, "activation_class": nn.Tanh}
    critic = TeamStateCritic(3 * 5, 3, share_params=share_params, **networks)
    torchrls = MultiAgentMLP(5, 1, 3, centralized=True, share_params=share_params, **networks)
    torchrls.load_state_dict(critic.net.state_dict())
    observations = torch.randn(4, 6, 3, 5)
    torch.testing.assert_close(critic(observations), torchrls(observations))


@pytest.mark.parametrize(("algorithm", "share"), BASELINES)
@pytest.mark.parametrize("task", ["vmas/balance", "vmas/simple_speaker_listener"])
def test_the_policy_that_acts_is_the_one_that_is_trained(task, algorithm, share):
    """Every parameter of every group's actor moves, and the metrics are finite scalars."""
    overrides = (f"task={task}", f"algorithm={algorithm}", f"algorithm.share_params={share}")
    learner, batch = learner_and_batch(*overrides)
    before = parameters(learner.policy)
    metrics = learner.updater(batch)
    after = parameters(learner.policy)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for value in metrics.values(include_nested=True, leaves_only=True):
        assert value.shape == ()
        assert value.isfinite()


def test_one_step_is_the_gradient_step_of_the_loss():
    """A whole-batch epoch equals one hand-written, clipped step on ``MAPPOLoss``."""
    learner, batch = learner_and_batch("algorithm=mappo")
    trained = learner.updater.losses["agents"]
    loss = copy.deepcopy(trained)
    # Plain gradient descent, because a step of Adam hardly depends on the gradient's norm.
    descent = partial(torch.optim.SGD, lr=0.1)
    SimultaneousUpdater(
        {"agents": trained},
        optimizer=descent,
        num_epochs=1,
        minibatch_size=batch.numel(),
        max_grad_norm=0.01,
    )(batch)

    data = batch.copy()
    with torch.no_grad():
        loss.value_estimator(data)
    optimizer = descent(loss.parameters())
    report = loss(data.reshape(-1))
    (report["loss_objective"] + report["loss_critic"]).backward()
    nn.utils.clip_grad_norm_(loss.parameters(), 0.01)
    optimizer.step()
    for own, other in zip(trained.parameters(), loss.parameters(), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("algorithm", ["mappo", "ippo"])
def test_a_last_minibatch_of_one_frame_is_left_out(algorithm):
    """The loss standardises the advantage over a minibatch; a batch has 24 frames."""
    learner, batch = learner_and_batch(f"algorithm={algorithm}", "algorithm.minibatch_size=23")
    sizes = []
    for loss in learner.updater.losses.values():
        loss.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    learner.updater(batch)
    assert set(sizes) == {23}
    assert all(p.isfinite().all() for p in learner.updater.losses["agents"].parameters())


@pytest.mark.parametrize("algorithm", ["mappo", "ippo"])
def test_a_normalised_critic_is_fitted_to_normalised_returns(algorithm):
    """The advantage sees real values; the loss is that of the network and normalised returns."""
    learner, batch = learner_and_batch(f"algorithm={algorithm}", "algorithm.value_norm=running")
    loss = learner.updater.losses["agents"]
    loss.value_norm.update(3 + 5 * torch.randn(100, 1))
    network, norm, data = loss.critic_network.critic, loss.value_norm, batch.copy()
    with torch.no_grad():
        loss.value_estimator(data)
        predicted = network(batch.copy())["agents", "state_value"]
    torch.testing.assert_close(data["agents", "state_value"], norm.denormalize(predicted))
    data["agents", "value_target"] = norm.denormalize(torch.randn_like(predicted))
    norm.update = lambda target: None  # TorchRL's losses take in every minibatch
    target = norm.normalize(data["agents", "value_target"])
    expected = nn.functional.smooth_l1_loss(predicted, target)
    torch.testing.assert_close(loss(data.reshape(-1))["loss_critic"], expected)


@pytest.mark.parametrize(("algorithm", "share"), BASELINES)
def test_state_brings_everything_back(algorithm, share):
    """After loading, the next update is the same, optimiser state included."""
    overrides = (f"algorithm={algorithm}", f"algorithm.share_params={share}")
    learner, batch = learner_and_batch(*overrides)
    learner.updater(batch)
    state = copy.deepcopy(learner.updater.state_dict())
    torch.manual_seed(1)
    learner.updater(batch)

    torch.manual_seed(9)  # other weights than the first learner's
    other, _ = learner_and_batch(*overrides)
    other.updater.load_state_dict(state)
    torch.manual_seed(1)
    other.updater(batch)
    torch.testing.assert_close(
        other.updater.state_dict(), learner.updater.state_dict(), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    "other", ["task=vmas/simple_speaker_listener", "model.num_cells=[9]", "algorithm=ippo"]
)
def test_a_state_of_other_networks_changes_nothing(other):
    """Other groups, sizes or critics are refused as a whole."""
    learner, _ = learner_and_batch("algorithm=mappo")
    state = make_learner(
        tiny_config("algorithm=mappo", other),
        make_env(tiny_config(other).task, num_envs=1, seed=0),
    ).updater.state_dict()
    before = copy.deepcopy(learner.updater.state_dict())
    with pytest.raises(ValueError, match=r"groups|networks"):
        learner.updater.load_state_dict(state)
    torch.testing.assert_close(learner.updater.state_dict(), before, rtol=0, atol=0)


def test_shared_parameters_are_fewer():
    """One network for the team against one for each of three agents."""
    shared, _ = learner_and_batch("algorithm=mappo", "algorithm.share_params=true")
    unshared, _ = learner_and_batch("algorithm=mappo", "algorithm.share_params=false")
    sizes = [
        sum(p.numel() for p in learner.updater.losses["agents"].parameters())
        for learner in (shared, unshared)
    ]
    assert sizes[1] == 3 * sizes[0]


def test_a_group_without_agent_dimension_is_refused():
    """TorchRL's losses need it; HAPPO does not, and the sentence says so."""
    env = make_env(tiny_config().task, num_envs=1, seed=0)
    group = replace(read_groups(env, "observation")[0], n_agents=None)
    with pytest.raises(ConfigError, match="take algorithm=happo"):
        make_group_critic(env, group, centralized=False, share_params=True)
