"""``compile=True``: the same numbers, one graph for each architecture, no recompilation."""

from __future__ import annotations

import copy
import logging
import shutil
from functools import partial

import pytest
import torch
from compilation import Backend, forget_graphs, num_graphs
from team import make_actor, make_batch, make_critic
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torch.optim.lr_scheduler import ExponentialLR
from torchrl.modules import IndependentNormal, PopArtValueNorm, TanhNormal

from torchrl_happo import HAPPOLoss, HATRPOLoss, SequentialUpdater


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    forget_graphs()
    yield
    torch.set_default_dtype(before)


def twins(
    loss_class=HAPPOLoss,
    distribution=IndependentNormal,
    loss_kwargs=None,
    distribution_kwargs=None,
    **kwargs,
):
    """An updater, its compiled twin on copies of the networks, the backend, and a batch."""
    torch.manual_seed(0)
    networks = {"distribution": distribution, "distribution_kwargs": distribution_kwargs or {}}
    actor, critic = make_actor(**networks, depth=1), make_critic(depth=1)
    batch = make_batch(actor, 4, 7)
    backend = Backend()
    settings = {"num_epochs": 3, "minibatch_size": 12, "max_grad_norm": 0.5, **kwargs}
    if loss_class is HATRPOLoss:
        settings.pop("max_grad_norm")
    updaters = []
    for compiled in ({}, {"compile": {"backend": backend}}):
        networks = copy.deepcopy((actor, critic))
        loss = loss_class(*networks, **copy.deepcopy(loss_kwargs or {}))
        updaters.append(SequentialUpdater(loss, **settings, **compiled))
    return *updaters, backend, batch


def assert_equal(one, other, tolerance=1e-12):
    """Networks and optimisers of two updaters agree."""
    ours, theirs = one.state_dict(), other.state_dict()
    torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours["steps"], theirs["steps"], rtol=tolerance, atol=tolerance)


ADAMW = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
AMSGRAD = partial(torch.optim.Adam, lr=1e-3, amsgrad=True, eps=1e-5)
SGD = partial(torch.optim.SGD, lr=1e-2, momentum=0.9)


@pytest.mark.parametrize(
    ("loss_kwargs", "kwargs"),
    [
        ({"entropy_coeff": 0.01}, {}),
        ({"entropy_coeff": 0.0}, {"max_grad_norm": None, "minibatch_size": None}),
        ({"clip_value": 0.2, "loss_critic_type": "l2"}, {}),
        ({"value_norm": PopArtValueNorm(shape=1), "popart": True}, {}),
        ({"blocks": ["agents"]}, {}),
        ({}, {"optimizer": ADAMW}),
        ({}, {"optimizer": AMSGRAD, "scheduler": partial(ExponentialLR, gamma=0.5)}),
        ({}, {"optimizer": SGD}),
        ({}, {"target_kl": 1e-5}),
    ],
    ids=[
        "entropy",
        "whole-batch",
        "clip-value",
        "popart",
        "block",
        "adamw",
        "amsgrad",
        "sgd",
        "kl",
    ],
)
def test_happo_is_that_of_eager(loss_kwargs, kwargs):
    """Three updates leave the same parameters and optimisers, and the same metrics."""
    eager, compiled, backend, batch = twins(loss_kwargs=loss_kwargs, **kwargs)
    for _ in range(3):
        expected, metrics = eager(batch), compiled(batch)
        torch.testing.assert_close(metrics.to_dict(), expected.to_dict(), rtol=1e-10, atol=1e-10)
    assert_equal(eager, compiled)
    assert backend.graphs == 4  # the agents' passes before and after, their step, the critic's


BOUNDS = {"low": -2 * torch.ones(2), "high": torch.ones(2)}


@pytest.mark.parametrize(
    ("distribution", "distribution_kwargs"),
    [(TanhNormal, {}), (TanhNormal, BOUNDS), (Categorical, {})],
    ids=["tanh", "bounds", "categorical"],
)
def test_happo_with_other_actions(distribution, distribution_kwargs):
    """Squashed and discrete policies; the squashed one's entropy draws the same numbers."""
    eager, compiled, backend, batch = twins(
        distribution=distribution, distribution_kwargs=distribution_kwargs
    )
    for updater in (eager, compiled):
        torch.manual_seed(1)
        for _ in range(2):
            updater(batch)
    assert_equal(eager, compiled)
    assert backend.graphs == 4


@pytest.mark.parametrize(
    ("loss_kwargs", "kwargs"),
    [
        ({}, {}),
        ({"fisher_fraction": 0.4}, {}),
        ({"line_search": "batched"}, {}),
        ({"blocks": ["agents"]}, {}),
        ({"distribution": TanhNormal}, {}),
        ({"distribution": Categorical}, {}),
    ],
    ids=["normal", "fraction", "batched", "block", "tanh", "categorical"],
)
def test_hatrpo_is_that_of_eager(loss_kwargs, kwargs):
    """Three updates leave the same parameters, and report the same; masks and all."""
    loss_kwargs = {"max_kl": 0.02, **loss_kwargs}
    distribution = loss_kwargs.pop("distribution", IndependentNormal)
    eager, compiled, backend, batch = twins(
        HATRPOLoss, distribution, loss_kwargs=loss_kwargs, **kwargs
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        batch["agents", "active"] = torch.rand(*batch.shape, 3, generator=generator) < 0.7
        expected, metrics = eager(batch), compiled(batch)
        torch.testing.assert_close(metrics.to_dict(), expected.to_dict(), rtol=1e-7, atol=1e-9)
    assert_equal(eager, compiled, tolerance=1e-9)
    # Of the agents: passes before and after, what their step computes once, the Fisher-vector
    # product, an iteration of conjugate gradient, a trial. And the critic.
    assert backend.graphs == 7
    assert metrics["agents_0" if "agents_0" in metrics.keys() else "agents", "step_fraction"] > 0


@pytest.mark.parametrize(("loss_class", "graphs"), [(HAPPOLoss, 4), (HATRPOLoss, 7)])
def test_no_recompilation(loss_class, graphs):
    """A hundred updates: random order, a ragged last minibatch, agents that come and go."""
    eager, compiled, backend, batch = twins(loss_class, num_epochs=1)
    generator = torch.Generator().manual_seed(0)
    for number in range(100):
        active = torch.rand(*batch.shape, 3, generator=generator) < 0.7
        batch["agents", "active"] = active
        if number < 30:  # the same numbers again and again would prove no more
            compiled.load_state_dict(eager.state_dict())  # rounding adds up to another line search
            eager(batch)
        compiled(batch)
        if number < 30:
            assert_equal(eager, compiled, tolerance=1e-9)
    assert backend.graphs == graphs
    compiler = compiled.steps["critic"]._compiled.code.compiler
    assert compiler.num_graphs == graphs
    assert len(compiler._made) == 4  # nothing was traced twice, either


def test_a_schedule_is_seen(caplog):
    """Coefficients of the loss that are set between updates act in compiled code as well."""
    eager, compiled, backend, batch = twins(loss_kwargs={"entropy_coeff": 0.01})
    for updater in (eager, compiled):
        updater(batch)
        updater.loss.entropy_coeff = 0.5
        updater(batch)
        updater.loss.clip_epsilon = torch.tensor(0.01)
        updater(batch)
    assert_equal(eager, compiled)
    assert backend.graphs == 4
    assert "not compiled" not in caplog.text


def test_networks_that_were_moved_are_followed(caplog):
    """Copies, other types and loaded states are followed as they are without compilation."""
    eager, compiled, backend, batch = twins()
    for updater in (eager, compiled):
        updater(batch)
        updater.loss.to(torch.float32).to(torch.float64)
        updater.loss.agents[0].actor.eval()
        updater(batch)
        state = copy.deepcopy(updater.state_dict())
        updater(batch)
        updater.load_state_dict(state)
        updater(batch)
    assert_equal(eager, compiled)
    assert backend.graphs == 4
    assert "not compiled" not in caplog.text


def test_a_gradient_that_is_not_finite_is_taken_back(caplog):
    """As without compilation: the agent is as before, and one sentence says so."""
    eager, compiled, _, batch = twins()
    compiled(batch)
    eager(batch)
    for updater in (eager, compiled):
        before = copy.deepcopy(updater.state_dict()["steps"])
        updater.check_finite = True
        bad = batch.clone()
        bad["agents", "action_log_prob"][0, 0] = -1e300
        updater(bad)
        assert "was not finite" in caplog.text
        for name, step in before.items():
            if name != "critic":
                after = updater.state_dict()["steps"][name]
                torch.testing.assert_close(after, step, rtol=0, atol=0)


class Branching(nn.Module):
    """A network whose Python looks at numbers, which no graph can hold."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1)

    def forward(self, observation):
        value = self.net(observation.mean((-2, -1)).unsqueeze(-1))
        return value if self.net.weight.sum() > 0 else 2 * value


def test_what_cannot_be_traced_runs_as_it_is(caplog):
    """One warning, and the numbers of eager."""
    torch.manual_seed(0)
    actor = make_actor()
    critic = TensorDictModule(Branching(), [("agents", "observation")], ["state_value"])
    batch = make_batch(actor, 4, 7)
    updaters = []
    for compiled in (False, {"backend": Backend()}):
        loss = HAPPOLoss(*copy.deepcopy((actor, critic)), entropy_coeff=0.0)
        updaters.append(SequentialUpdater(loss, num_epochs=2, compile=compiled))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for updater in updaters:
                updater(batch)
    assert_equal(*updaters)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not compiled" in caplog.text


class Cautious(nn.Module):
    """A layer whose Python looks at numbers."""

    def forward(self, x):
        return x if x.sum() < torch.inf else -x


def test_one_warning_for_a_team(caplog):
    """Three agents whose networks branch on numbers complain once, not in each of their passes."""
    torch.manual_seed(0)
    actor = make_actor()
    actor[0].module.insert(1, Cautious())
    batch = make_batch(actor, 4, 7)
    loss = HAPPOLoss(actor, make_critic(), entropy_coeff=0.0)
    updater = SequentialUpdater(loss, num_epochs=2, compile={"backend": Backend()})
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            updater(batch)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not compiled" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a C++ compiler")
def test_default_backend(caplog):
    """The real compiler, in single precision: equal to 1e-6 over an update."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    actor, critic = make_actor(distribution=IndependentNormal), make_critic()
    batch = make_batch(actor, 8, 25)
    updaters = []
    for compiled in (False, True):
        loss = HAPPOLoss(*copy.deepcopy((actor, critic)))
        updaters.append(SequentialUpdater(loss, num_epochs=2, minibatch_size=90, compile=compiled))
    for updater in updaters:
        assert num_graphs() == 0
        updater(batch)
    assert_equal(*updaters, tolerance=1e-6)
    assert num_graphs() == 2
    assert "not compiled" not in caplog.text


def test_cudagraphs_without_a_device(caplog):
    """One warning, and the update runs as it would without."""
    torch.manual_seed(0)
    actor, critic = make_actor(), make_critic()
    batch = make_batch(actor)
    updaters = []
    for options in ({}, {"cudagraphs": True}):
        loss = HAPPOLoss(*copy.deepcopy((actor, critic)), entropy_coeff=0.0)
        updaters.append(SequentialUpdater(loss, num_epochs=2, **options))
        updaters[-1](batch)
    assert_equal(*updaters, tolerance=0)
    assert [record.message.split()[0] for record in caplog.records] == ["cudagraphs=True"]
