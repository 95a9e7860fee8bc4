"""One iteration of the sequential update gives the reference implementation's numbers."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from newer import tensors
from reference import load, make_actors, make_batch, relative_error

from torchrl_happo import HAPPOLoss, HATRPOLoss, SequentialUpdater
from torchrl_happo.steps import FirstOrderStep
from torchrl_happo.update.correction import RatioFactor

CASES = ["happo_continuous", "happo_continuous_stale", "happo_continuous_mb2", "happo_discrete"]


@pytest.fixture(autouse=True)
def double_precision():
    """The reference was run in float64, its coefficients included."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class RecordedMinibatches:
    """Replays the minibatches that the reference drew."""

    def __init__(self, golden_agent: dict, per_epoch: int) -> None:
        indices = [epoch["indices"] for epoch in golden_agent["epochs"]]
        self.epochs = iter([indices[i : i + per_epoch] for i in range(0, len(indices), per_epoch)])

    def __call__(self, data):
        return (data[index] for index in next(self.epochs))


class RecordedSteps:
    """Loss, gradient norm and parameters of each step of an optimiser."""

    def __init__(self, step: FirstOrderStep) -> None:
        self.losses, self.norms, self.parameters = [], [], []
        self.step = step
        objective = step.objective
        step.objective = lambda data: self.record_loss(objective(data))
        step.optimizer.register_step_post_hook(self.record_step)

    def record_loss(self, loss):
        self.losses.append(loss.detach())
        return loss

    def record_step(self, *_):
        parameters = self.step.parameters()
        self.norms.append(torch.cat([p.grad.flatten() for p in parameters]).norm())
        self.parameters.append(torch.cat([p.detach().flatten() for p in parameters]).clone())


@pytest.mark.parametrize("case", CASES)
def test_happo_matches_the_reference(case, monkeypatch):
    """Losses, gradients, parameters after each epoch, and factors agree to 1e-9, agent by agent.

    In the ``stale`` case the ratio of the loss starts from the stored log-probabilities, the
    factor's from recomputed ones.
    """
    golden = load(case)
    config = golden["config"]
    actors = make_actors(golden)
    loss = HAPPOLoss(
        actors, clip_epsilon=config["clip_param"], entropy_coeff=config["entropy_coef"]
    )
    updater = SequentialUpdater(
        loss,
        optimizer=partial(torch.optim.Adam, lr=config["lr"], eps=config["opti_eps"]),
        num_epochs=config["ppo_epoch"],
        max_grad_norm=config["max_grad_norm"],
        order=golden["agent_order"],
    )
    steps = {}
    for agent, golden_agent in zip(loss.agents, golden["agents"], strict=True):
        step = updater.steps[agent.name]
        step.minibatches = RecordedMinibatches(golden_agent, config["actor_num_mini_batch"])
        steps[agent.name] = RecordedSteps(step)

    factors = {}
    include = RatioFactor.include

    def record(team, agent, log_ratio):
        factors[agent.name] = [team.log_factor.exp()]
        include(team, agent, log_ratio)
        factors[agent.name].append(team.log_factor.exp())

    monkeypatch.setattr(RatioFactor, "include", record)
    metrics = updater(make_batch(golden))

    for i, golden_agent in enumerate(golden["agents"]):
        name = f"agent_{i}"
        factor_in, factor_out = factors[name]
        assert relative_error(factor_in, golden_agent["factor_in"].flatten()) < 1e-9
        assert relative_error(factor_out, golden_agent["factor_out"].flatten()) < 1e-9
        network = actors[name][0].module
        for key, value in network.named_parameters():
            assert relative_error(value, golden_agent["params_final"][key]) < 1e-9, key
        recorded, epochs = steps[name], golden_agent["epochs"]
        per_epoch = config["actor_num_mini_batch"]
        by_epoch = recorded.parameters[per_epoch - 1 :: per_epoch]
        assert relative_error(torch.stack(by_epoch), golden_agent["params_by_epoch"]) < 1e-9
        for norm, loss_value, epoch in zip(recorded.norms, recorded.losses, epochs, strict=True):
            assert relative_error(norm, torch.as_tensor(epoch["grad_norm"])) < 1e-9
            entropy = config["entropy_coef"] * torch.as_tensor(epoch["entropy"])
            objective = torch.as_tensor(epoch["policy_loss"]) - entropy
            assert relative_error(loss_value, objective) < 1e-9
        kl = golden_agent["exact_kl_old_new"].mean()
        assert relative_error(metrics[name, "kl"], kl) < 1e-9


@pytest.mark.parametrize("case", ["hatrpo_continuous", "hatrpo_continuous_fail"])
def test_hatrpo_matches_the_reference(case, monkeypatch):
    """The whole sequential trust-region update gives the reference's parameters and factors.

    In the ``fail`` case every line search is rejected: parameters are bit-identical to before and
    the factor stays 1.
    """
    golden = load(case)
    config = golden["config"]
    actors = make_actors(golden)
    before = {name: copy.deepcopy(tensors(actor)) for name, actor in actors.items()}
    loss = HATRPOLoss(
        actors,
        max_kl=config["kl_threshold"],
        max_backtracks=config["ls_step"],
        accept_ratio=config["accept_ratio"],
        backtrack_factor=config["backtrack_coeff"],
    )
    updater = SequentialUpdater(loss, order=golden["agent_order"])
    factors = {}
    include = RatioFactor.include

    def record(team, agent, log_ratio):
        factors[agent.name] = [team.log_factor.exp()]
        include(team, agent, log_ratio)
        factors[agent.name].append(team.log_factor.exp())

    monkeypatch.setattr(RatioFactor, "include", record)
    metrics = updater(make_batch(golden))

    for i, golden_agent in enumerate(golden["agents"]):
        name, trpo = f"agent_{i}", golden_agent["trpo"]
        factor_in, factor_out = factors[name]
        assert relative_error(factor_in, golden_agent["factor_in"].flatten()) < 1e-9
        assert relative_error(factor_out, golden_agent["factor_out"].flatten()) < 1e-9
        final = golden_agent["params_final"] or golden["inputs"]["actor_init"][i]
        for key, value in actors[name][0].module.named_parameters():
            assert relative_error(value, final[key]) < 1e-9, key
        agent = metrics[name]
        assert bool(agent["line_search_success"]) == bool(trpo["accepted"])
        assert abs(agent["surrogate_before"] - trpo["surrogate"]) < 1e-12  # may be zero
        if not trpo["accepted"]:
            assert agent["step_fraction"] == 0
            assert agent["ratio_max"] == agent["ratio_min"] == 1
            for key, value in tensors(actors[name]).items():
                assert torch.equal(value, before[name][key])
