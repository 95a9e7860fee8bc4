"""``compile=True``: the same numbers, one function for each architecture, no recompilation.

To compile an updater takes the compiler ten seconds of reading Python, whatever the backend. So two
pairs of updaters are compiled once, and most tests go on with them from where they began.
"""

from __future__ import annotations

import copy
import logging
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from compilation import Backend, forget_graphs, num_graphs
from newer import PopArtValueNorm
from team import make_actor, make_batch, make_critic
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torch.optim.lr_scheduler import ExponentialLR
from torchrl.modules import IndependentNormal, TanhNormal

from torchrl_happo import HAPPOLoss, HATRPOLoss, SequentialUpdater
from torchrl_happo.steps.compile.code import Compiler, _may_change
from torchrl_happo.steps.trust_region.step import TrustRegion


@pytest.fixture(autouse=True, scope="module")
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Twins:
    """An updater, its compiled twin on copies of the networks, and a batch."""

    def __init__(self, loss_class=HAPPOLoss, distribution=IndependentNormal, **kwargs):
        torch.manual_seed(0)
        bounds = kwargs.pop("distribution_kwargs", {})
        loss_kwargs = kwargs.pop("loss_kwargs", {})
        actor = make_actor(distribution=distribution, distribution_kwargs=bounds, depth=1)
        critic = make_critic(depth=1)
        self.batch = make_batch(actor, 4, 7)
        self.backend = Backend()
        settings = {"num_epochs": 3, "minibatch_size": 12, **kwargs}
        self.eager, self.compiled = self.both = [
            SequentialUpdater(
                loss_class(*copy.deepcopy((actor, critic)), **copy.deepcopy(loss_kwargs)),
                **settings,
                **options,
            )
            for options in ({}, {"compile": {"backend": self.backend}})
        ]
        self.start = copy.deepcopy(self.eager.state_dict())

    def compile(self, graphs):
        """Two updates: Python runs what comes for the first time. Masks are other data."""
        self.batch = self.masked(torch.Generator().manual_seed(0))
        for _ in range(2):
            self.update(tolerance=1e-7)
        assert self.backend.graphs == graphs
        self.graphs = graphs
        return self

    def reset(self):
        """Go back to the first state, in which optimisers have none."""
        for updater in self.both:
            updater.load_state_dict(copy.deepcopy(self.start))
        return self

    def update(self, batch=None, *, tolerance=1e-10):
        """Update both; they report the same."""
        torch.manual_seed(1)  # entropies may be sampled
        expected = self.eager(self.batch if batch is None else batch)
        torch.manual_seed(1)
        metrics = self.compiled(self.batch if batch is None else batch)
        torch.testing.assert_close(
            metrics.to_dict(), expected.to_dict(), rtol=tolerance, atol=tolerance
        )
        return metrics

    def masked(self, generator):
        """A batch whose agents come and go."""
        batch = self.batch.clone()
        active = torch.rand(*batch.shape, 3, generator=generator) < 0.7
        batch["agents", "active"] = active
        return batch


def assert_equal(one, other, tolerance=1e-12):
    """Networks and optimisers of two updaters agree."""
    ours, theirs = one.state_dict(), other.state_dict()
    torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours["steps"], theirs["steps"], rtol=tolerance, atol=tolerance)


ADAMW = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
AMSGRAD = partial(torch.optim.Adam, lr=1e-3, amsgrad=True, eps=1e-5)
SGD = partial(torch.optim.SGD, lr=1e-2, momentum=0.9)
BOUNDS = {"low": -2 * torch.ones(2), "high": torch.ones(2)}


@pytest.fixture(scope="module")
def happo():
    """Twins with most of what a first-order step knows, compiled by two updates."""
    twins = Twins(
        loss_kwargs={"entropy_coeff": 0.01, "clip_value": 0.2, "loss_critic_type": "l2"},
        optimizer=AMSGRAD,
        scheduler=partial(ExponentialLR, gamma=0.5),
        max_grad_norm=0.5,
    )
    return twins.compile(graphs=4)


@pytest.fixture(scope="module")
def hatrpo():
    """Twins that draw the rows of their Fisher matrix, compiled by two updates."""
    # Each iteration is traced: four of them show what ten would.
    settings = {"max_kl": 0.02, "fisher_fraction": 0.4, "cg_iterations": 4}
    twins = Twins(HATRPOLoss, loss_kwargs=settings)
    return twins.compile(graphs=5)


def test_happo_is_that_of_eager(happo):
    """Three updates leave the same parameters and optimisers, and the same metrics."""
    happo.reset()
    for _ in range(3):
        happo.update()
    assert_equal(happo.eager, happo.compiled)
    # The agents' passes before and after, their step, the critic's.
    assert happo.backend.graphs == happo.graphs
    assert len(happo.compiled.steps["critic"]._compiled.code.compiler.functions) == 4


def test_hatrpo_is_that_of_eager(hatrpo):
    """Three updates leave the same parameters, and report the same; masks and all."""
    hatrpo.reset()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        metrics = hatrpo.update(hatrpo.masked(generator), tolerance=1e-7)
    assert_equal(hatrpo.eager, hatrpo.compiled, tolerance=1e-9)
    assert metrics["agents_0", "step_fraction"] > 0


@pytest.mark.parametrize("name", ["happo", "hatrpo"])
def test_no_recompilation(name, request, caplog):
    """Twenty updates: random order, a ragged last minibatch, agents that come and go.

    Of HATRPO there are: passes before and after, natural gradient, trial; and the critic.
    """
    twins = request.getfixturevalue(name).reset()
    generator = torch.Generator().manual_seed(0)
    for number in range(20):
        batch = twins.masked(generator)
        if number < 10:  # the same numbers again and again would prove no more
            # Rounding adds up to another line search.
            twins.compiled.load_state_dict(twins.eager.state_dict())
            twins.update(batch, tolerance=1e-7)
            assert_equal(*twins.both, tolerance=1e-9)
        else:
            twins.compiled(batch)
    assert twins.backend.graphs == twins.graphs
    assert "not compiled" not in caplog.text


def test_a_schedule_is_seen(happo, caplog):
    """Coefficients of the loss that are set between updates act in compiled code as well."""
    happo.reset()
    for updater in happo.both:
        updater(happo.batch)
        updater.loss.entropy_coeff = 0.5
        updater(happo.batch)
        updater.loss.clip_epsilon = torch.tensor(0.01)
        updater(happo.batch)
    assert_equal(*happo.both)
    assert happo.backend.graphs == happo.graphs
    assert "not compiled" not in caplog.text


@pytest.mark.slow  # code that reads an agent's own bound is compiled for each agent
def test_clipping_ranges_of_each_agent(caplog):
    """One agent's own acts in compiled code, and so does the one that is set later."""
    torch.manual_seed(0)
    actor = make_actor(2, distribution=IndependentNormal, depth=1)
    batch = make_batch(actor, 4, 7, 2)
    batch["advantage"] = torch.randn(4, 7, 1)
    backend = Backend()
    eager, compiled = both = [
        SequentialUpdater(
            HAPPOLoss(
                copy.deepcopy(actor),
                clip_epsilon={"agents_0": 0.2, "agents_1": 1e-6},
                entropy_coeff=0.0,
            ),
            num_epochs=3,
            **options,
        )
        for options in ({}, {"compile": {"backend": backend}})
    ]
    for tight in (1, 1, 0):
        reports = []
        for updater in both:
            updater.loss.clip_epsilon = {"agents": 0.2, f"agents_{tight}": 1e-6}
            reports.append(updater(batch))
        torch.testing.assert_close(*(report.to_dict() for report in reports))
        outside = [reports[1][name, "clip_fraction"] > 0.5 for name in ("agents_0", "agents_1")]
        assert outside == [tight == 0, tight == 1]
    assert_equal(eager, compiled, tolerance=1e-9)
    assert backend.graphs == 6  # of each agent: its step, and the passes before and after
    assert "not compiled" not in caplog.text


def test_a_gradient_that_is_not_finite_is_taken_back(happo, caplog):
    """As without compilation: the agent is as before, and one sentence says so."""
    happo.reset()
    for updater in happo.both:
        before = copy.deepcopy(updater.state_dict()["steps"])
        bad = happo.batch.clone()
        bad["agents", "action_log_prob"][:] = -1e300
        updater(bad)
        assert "was not finite" in caplog.text
        caplog.clear()
        for name, step in before.items():
            if name != "critic":
                after = updater.state_dict()["steps"][name]["optimizer"]["state"]
                torch.testing.assert_close(after, step["optimizer"]["state"], rtol=0, atol=0)


def test_networks_that_were_moved_are_followed(happo, caplog):
    """Other types, loaded states and modes are followed; another setting is compiled anew."""
    happo.reset()
    for updater in happo.both:
        updater(happo.batch)
        updater.loss.to(torch.float32).to(torch.float64)
        updater(happo.batch)
        state = copy.deepcopy(updater.state_dict())
        updater(happo.batch)
        updater.load_state_dict(state)
        updater(happo.batch)
        updater.loss.critic_network.eval()
        updater(happo.batch)
    assert happo.backend.graphs == happo.graphs
    for updater in happo.both:
        updater.loss.critic_network.train()
        updater.loss.loss_critic_type = "l1"
        updater(happo.batch)
        updater.loss.loss_critic_type = "l2"
    happo.graphs += 1
    assert_equal(*happo.both)
    assert happo.backend.graphs == happo.graphs
    assert "not compiled" not in caplog.text


@pytest.mark.parametrize(
    ("distribution", "loss_kwargs", "kwargs"),
    [
        (
            IndependentNormal,
            {"value_norm": PopArtValueNorm(shape=1), "popart": True},
            {"optimizer": ADAMW, "minibatch_size": None},
        ),
        (TanhNormal, {"blocks": ["agents"]}, {"optimizer": SGD, "distribution_kwargs": BOUNDS}),
        (Categorical, {}, {"target_kl": 1e-5}),
    ],
    ids=["popart-adamw-whole", "block-sgd-bounds", "categorical-kl"],
)
def test_happo_with_other_settings(distribution, loss_kwargs, kwargs):
    """Two updates; the entropy of a squashed policy draws the same numbers."""
    twins = Twins(distribution=distribution, loss_kwargs=loss_kwargs, **kwargs)
    for _ in range(2):
        twins.update()
    assert_equal(*twins.both)
    assert twins.backend.graphs == 4


def test_hatrpo_with_other_settings():
    """A discrete policy, whose candidates are tried at once; one agent has its own solver."""

    def step(problem):
        own = {"damping": 0.5} if problem.name == "agents_1" else {}
        region = TrustRegion(max_kl=0.02, line_search="batched", cg_iterations=3, **own)
        return region(problem)

    twins = Twins(HATRPOLoss, Categorical, step=step)
    for _ in range(2):
        twins.update(tolerance=1e-7)
    assert_equal(*twins.both, tolerance=1e-9)
    assert twins.backend.graphs == 7  # natural gradient and trial of two solvers


def test_the_trust_region_of_a_block_says_that_it_is_not_compiled(caplog):
    """Its members are a stack of networks, which dynamo cannot call with other weights."""
    actor = make_actor()
    loss = HATRPOLoss(actor, make_critic(), blocks=["agents"])
    updater = SequentialUpdater(loss, num_epochs=1, compile={"backend": "eager"})
    metrics = updater(make_batch(actor))
    assert metrics["agents", "step_fraction"] > 0
    assert "not compiled" in caplog.text
    assert "a stack of networks" in caplog.text


class Branching(nn.Module):
    """A network whose Python looks at numbers, which no graph can hold."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1)

    def forward(self, observation):
        value = self.net(observation.mean((-2, -1)).unsqueeze(-1))
        return value if self.net.weight.sum() > 0 else 2 * value


class Cautious(nn.Module):
    """A layer whose Python looks at numbers."""

    def forward(self, x):
        return x if x.sum() < torch.inf else -x


def test_what_cannot_be_compiled_runs_as_it_is(caplog):
    """One warning for a team, not one in each of its passes, and the numbers of eager."""
    torch.manual_seed(0)
    actor = make_actor()
    actor[0].module.insert(1, Cautious())
    critic = TensorDictModule(Branching(), [("agents", "observation")], ["state_value"])
    batch = make_batch(actor, 4, 7)
    updaters = []
    for compiled in (False, {"backend": Backend()}):
        loss = HAPPOLoss(*copy.deepcopy((actor, critic)), entropy_coeff=0.0)
        updaters.append(SequentialUpdater(loss, num_epochs=2, compile=compiled))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            for updater in updaters:
                updater(batch)
    assert_equal(*updaters)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not compiled" in caplog.text


def test_unlike_functions_do_not_count_as_one():
    """Torch compiles the same lines for a few functions only, unless they are told apart."""
    compiler = Compiler({"backend": "eager"})

    def make(factor):
        return lambda items: (factor * items[0],)

    for factor in range(12):
        function = compiler.compile(make(float(factor)), None)
        assert function([torch.ones(5)])[0].tolist() == [factor] * 5
        assert function([torch.ones(3)])[0].tolist() == [factor] * 3


def test_the_number_of_items_alone_is_a_symbol():
    """Torch would learn from functions of the same lines that other sizes change as well."""
    symbols = []

    def backend(graph, inputs):
        symbols.append(sum(isinstance(value, torch.SymInt) for value in inputs))
        return graph.forward

    compiler = Compiler({"backend": backend})
    for width in (2, 3, 5):
        function = compiler.compile(lambda items: (items[0].exp().sum(-1),), None)
        for number in (4, 6):
            assert function([torch.zeros(number, width)])[0].tolist() == [width] * number
    assert symbols == [1, 1, 1]


def test_what_may_change_is_asked_for_at_each_call():
    """A setting of a module, and a global of the user's own; a library's names are not."""
    guards = [
        SimpleNamespace(name=name)
        for name in (
            "L['read'].__closure__[0].cell_contents.function.scale",
            "L['weights']['net.weight']",
            "G['__import_user_dot_networks'].COEFFICIENT",
            "G['__import_tensordict_dot_base'].NO_DEFAULT",
            "G['torch'].Tensor",
            "L['layout'].leaves",
        )
    ]
    assert _may_change(guards) == [True, True, True, False, False, False]
    scale = nn.Dropout(0.0)
    scale.factor = 3.0
    function = Compiler({"backend": "eager"}).compile(
        lambda items: (scale.factor * items[0],), None
    )
    assert function([torch.ones(2)])[0].tolist() == [3, 3]
    scale.factor = 4.0
    assert function([torch.ones(2)])[0].tolist() == [4, 4]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a C++ compiler")
def test_default_backend(caplog):
    """The real compiler, in single precision: equal to 1e-6 over an update."""
    torch.manual_seed(0)
    actor, critic = make_actor(distribution=IndependentNormal).float(), make_critic().float()
    batch = make_batch(actor, 8, 25)
    updaters = []
    for compiled in (False, True):
        loss = HAPPOLoss(*copy.deepcopy((actor, critic)))
        updaters.append(SequentialUpdater(loss, num_epochs=2, minibatch_size=90, compile=compiled))
    forget_graphs()
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


def test_rows_of_a_joint_actor_share_no_code():
    """An agent that is evaluated by its joint actor has a row of its own in its code."""
    loss = HAPPOLoss(make_actor(), make_critic())
    updater = SequentialUpdater(loss, compile={"backend": Backend()})
    templates = [updater._passes[agent.name].code.template for agent in loss.agents]
    assert len({template() for template in templates}) == 1
    for agent in loss.agents:
        agent.evaluate_jointly()
    assert len({template() for template in templates}) == 3
