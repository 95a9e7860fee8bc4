"""MACPO: its limits, its conditions, an independent CPO, and exact games with a bound."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from compilation import Backend
from recipe_helpers import table, tiny_config
from team import N_AGENTS, make_actor, make_batch, make_critic, same_state
from tensordict import TensorDict
from test_lagrangian import costly, of_actor
from torch import nn

from torchrl_happo import HATRPOLoss, MACPOLoss, SequentialUpdater
from torchrl_happo.distributed import Learners
from torchrl_happo.recipe import training
from torchrl_happo.steps.trust_region.constrained import (
    ConstrainedProblem,
    ConstrainedTrustRegion,
)
from torchrl_happo.steps.trust_region.dual import Case


def make_updater(kind=MACPOLoss, dtype=torch.float64, compile=False, **kwargs):
    """A small team; with a cost, whose bound is 1, if the loss has one."""
    torch.manual_seed(0)
    networks = [make_actor(), make_critic()]
    costs = {} if kind is HATRPOLoss else {"cost_critic": make_critic(), "cost_limit": 1.0}
    costs.update(kwargs)
    networks = [network.to(dtype) for network in networks]
    costs = {k: v.to(dtype) if isinstance(v, nn.Module) else v for k, v in costs.items()}
    return SequentialUpdater(kind(*networks, max_kl=0.01, **costs), num_epochs=1, compile=compile)


def batch_of(updater, **kwargs):
    batch = make_batch(updater.loss.actor_network)
    batch = costly(batch, **kwargs)
    return batch.apply(lambda x: x.double() if x.is_floating_point() else x)


def test_without_a_bound_it_is_hatrpo():
    """An infinite bound: the parameters of all agents, to 1e-12."""
    safe, plain = make_updater(cost_limit=float("inf")), make_updater(HATRPOLoss)
    batch = batch_of(plain)
    one, two = safe(batch), plain(batch)
    for (name, moved), (_, wanted) in zip(
        of_actor(safe).items(), of_actor(plain).items(), strict=True
    ):
        torch.testing.assert_close(moved, wanted, rtol=0, atol=1e-12, msg=name)
    for agent in plain.loss.agents:
        assert one[agent.name, "case"] == Case.INSIDE
        assert two[agent.name, "line_search_success"] == 1


@pytest.mark.parametrize(
    ("limit", "cases"),
    [(-1e6, {Case.RECOVERY}), (1.0, {Case.RECOVERY, Case.RESTORING}), (1e6, {Case.INSIDE})],
)
@pytest.mark.parametrize("line_search", ["sequential", "batched"])
def test_every_accepted_step_keeps_to_the_conditions(limit, cases, line_search):
    """Divergence below the radius; above the bound the cost falls; below it the gain grows."""
    updater = make_updater(cost_limit=limit, line_search=line_search)
    metrics = updater(batch_of(updater))
    for agent in updater.loss.agents:
        got = metrics[agent.name]
        assert got["case"].item() in cases
        assert got["line_search_success"] == 1
        assert got["step_kl"] < 0.01
        if got["excess"] >= 0:
            assert got["cost_change"] <= 0
        else:
            assert got["improvement"] > 0
        torch.testing.assert_close(got["kl"], got["step_kl"])


def test_line_searches_give_the_same_step():
    """One by one, or all at once."""
    one, two = (make_updater(line_search=kind) for kind in ("sequential", "batched"))
    batch = batch_of(one)
    one(batch), two(batch)
    moved, wanted = of_actor(one), of_actor(two)
    for name in wanted:
        torch.testing.assert_close(moved[name], wanted[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("limit", [-10.0, 1.0, 10.0])
def test_what_an_agent_adds_is_not_left_for_the_next(limit):
    """The excess at each turn is that at the turn before and the change that was made."""
    updater = make_updater(cost_limit=limit)
    metrics = updater(batch_of(updater))
    order = sorted((a.name for a in updater.loss.agents), key=lambda n: metrics[n, "position"])
    for before, after in pairwise(order):
        added = metrics[before, "cost_change"]
        assert added != 0
        torch.testing.assert_close(metrics[after, "excess"], metrics[before, "excess"] + added)


@pytest.fixture
def a_learner(tmp_path, monkeypatch):
    """This process as one of a group, which averages each product with the Fisher matrix."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    monkeypatch.setattr(Learners, "alone", False)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("line_search", "functions"),
    [("sequential", ["product", "slope", "trial"]), ("batched", ["solve", "trial"])],
    ids=["of several learners", "alone"],
)
def test_compiled_it_is_that_of_eager(line_search, functions, caplog, request):
    """Natural gradients of gain and cost are one function for all agents; bounds are data."""
    if "product" in functions:
        request.getfixturevalue("a_learner")
    backend = Backend()
    eager, compiled = (
        make_updater(line_search=line_search, **options)
        for options in ({}, {"compile": {"backend": backend}})
    )
    batch = batch_of(eager)
    for limit in (1.0, 1e6, -1e6):
        for updater in (eager, compiled):
            updater.loss.cost_limits = {"cost": limit}
        wanted, got = eager(batch), compiled(batch)
        torch.testing.assert_close(got.to_dict(), wanted.to_dict(), rtol=1e-7, atol=1e-7)
    for name, wanted in of_actor(eager).items():
        torch.testing.assert_close(of_actor(compiled)[name], wanted, rtol=0, atol=1e-9, msg=name)
    made = compiled.steps["agents_0"]._compiled.code.compiler.functions
    assert sorted(key[-1][0] for key in made if key[-1][0] in functions) == functions
    assert "not compiled" not in caplog.text


def test_a_step_that_is_rejected_restores_bit_for_bit():
    """No fraction of it is below a divergence of nothing."""
    updater = make_updater(backtrack_factor=0.999, max_backtracks=1)
    before = of_actor(updater)
    updater.loss.max_kl = 1e3  # far beyond where the quadratic model holds
    metrics = updater(batch_of(updater))
    rejected = [a for a in updater.loss.agents if not metrics[a.name, "line_search_success"]]
    assert rejected
    for agent in rejected:
        for name, value in of_actor(updater).items():
            assert torch.equal(value[agent.index], before[name][agent.index]), name
        assert metrics[agent.name, "kl"] == 0


def test_what_is_not_known_counts_as_reached():
    """Before the first episode has ended the cost may not grow; later the last one counts."""
    updater = make_updater()
    metrics = updater(batch_of(updater, ends=False))
    assert metrics["agents_0", "episode_cost"].isnan()
    assert metrics["agents_0", "excess"] == 0
    assert metrics["agents_0", "cost_change"] <= 0
    known = updater(batch_of(updater))["agents_0", "episode_cost"]
    again = updater(batch_of(updater, ends=False))["agents_0", "episode_cost"]
    assert known == again > 0


class Softmax(nn.Module):
    """A policy of one state: its logits are its parameters."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)


def cpo(logits, gain, cost, excess, max_kl, damping):
    """The step of CPO (Achiam et al., 2017) for a softmax, by dense matrices and bisection.

    The best step of the linear gain in the intersection of an ellipsoid with a half-space: on the
    ellipsoid's edge, at the price nu >= 0 at which the half-space is kept.
    """
    p = logits.softmax(0)
    fisher = torch.diag(p) - torch.outer(p, p) + damping * torch.eye(len(p)).double()
    g, b = p * (gain - p @ gain), p * (cost - p @ cost)

    def at(price):
        direction = torch.linalg.solve(fisher, g - price * b)
        return direction * (2 * max_kl / (direction @ fisher @ direction)).sqrt()

    if b @ at(0.0) + excess <= 0:
        return at(0.0)
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if b @ at(middle) + excess > 0 else (low, middle)
    return at(high)


def alone(policy, surrogate, cost, excess):
    """The problem of one agent with a softmax policy."""
    return ConstrainedProblem(
        "alone",
        loss=len,
        named_parameters=policy.named_parameters,
        distribution=lambda parameters, data: torch.distributions.Categorical(
            logits=parameters["logits"].expand(len(data), -1)
        ),
        surrogate=surrogate,
        cost=cost,
        excess=lambda data: torch.tensor(excess).double(),
    )


def first(dist, data):
    """The probability of the first action."""
    return dist.probs[..., 0].mean()


def falling(dist, data):
    """A gain with a slope, from which every step of some length falls."""
    return first(dist, data) - 1e6 * (dist.logits.exp() - 0.25).square().sum()


@pytest.mark.parametrize(
    ("surrogate", "cost", "excess"),
    [
        (falling, lambda dist, data: 0 * first(dist, data), -1.0),  # no step gains
        (lambda dist, data: 0 * first(dist, data), lambda dist, data: 0 * first(dist, data), 1.0),
    ],
    ids=["no gain", "no slope at all"],
)
def test_no_step_at_all(surrogate, cost, excess):
    """Where the bound is kept a step must gain; a step of nothing is none."""
    policy = Softmax(torch.zeros(4).double())
    settings = ConstrainedTrustRegion(max_kl=1e-2, max_backtracks=3)
    data = TensorDict({"x": torch.zeros(1)}, [1])
    report = settings(alone(policy, surrogate, cost, excess)).propose(data).apply()
    assert report["line_search_success"] == 0
    assert torch.equal(policy.logits, torch.zeros(4).double())


@pytest.mark.parametrize("seed", range(8))
def test_alone_it_is_cpo(seed):
    """The full step of one agent equals an independent CPO, written from the paper."""
    generator = torch.Generator().manual_seed(seed)
    logits, gain, cost = torch.randn(3, 4, generator=generator).double()
    excess = -0.02 if seed % 2 else 0.01
    policy = Softmax(logits.clone())
    data = TensorDict({"x": torch.zeros(1)}, [1])

    def expected(values):
        return lambda dist, data: (dist.probs * values).sum(-1).mean()

    problem = alone(policy, expected(gain), expected(cost), excess)
    settings = ConstrainedTrustRegion(max_kl=1e-3, damping=0.1, cg_iterations=30, cg_tolerance=0.0)
    proposal = settings(problem).propose(data)
    step, made = proposal._full_step(1e-3)
    if made.case != Case.RECOVERY:
        wanted = cpo(logits, gain, cost, excess, 1e-3, 0.1)
        torch.testing.assert_close(step, wanted, rtol=1e-6, atol=1e-9)
    else:
        assert (logits.softmax(0) * (cost - logits.softmax(0) @ cost)) @ step < 0


@pytest.mark.parametrize("seed", range(6))
def test_a_bound_that_is_kept_stays_kept(seed):
    """Exact one-step games of two agents: the true cost exceeds by the second order at most.

    The linearised bound is kept by every accepted step; the true cost of the joint policy may
    exceed it by what the surrogate of the second agent, taken at the new policy of the first, sees
    exactly: nothing. So the sum of both agents' allowances bounds the true cost.
    """
    generator = torch.Generator().manual_seed(seed)
    payoff, cost = torch.randn(2, 3, 3, generator=generator).double()
    policies = [Softmax(torch.zeros(3).double()) for _ in range(2)]
    data = TensorDict({"x": torch.zeros(1)}, [1])
    settings = ConstrainedTrustRegion(max_kl=0.01, damping=1e-3, accept_ratio=0.0)

    def value(matrix, first=None):
        p, q = (policy.logits.detach().softmax(0) for policy in policies)
        return p @ matrix @ q

    bound = value(cost).item() + 0.05
    start = value(payoff)
    for _ in range(20):
        for index, policy in enumerate(policies):
            other = policies[1 - index].logits.detach().softmax(0)
            gains, costs = (m @ other if index == 0 else other @ m for m in (payoff, cost))
            excess = value(cost) - bound
            problem = ConstrainedProblem(
                "agent",
                loss=len,
                named_parameters=policy.named_parameters,
                distribution=lambda parameters, data: torch.distributions.Categorical(
                    logits=parameters["logits"].expand(len(data), -1)
                ),
                surrogate=lambda dist, data, g=gains: (dist.probs * g).sum(-1).mean(),
                cost=lambda dist, data, c=costs: (dist.probs * c).sum(-1).mean(),
                excess=lambda data, e=excess: e,
            )
            settings(problem).propose(data).apply()
            assert value(cost) <= bound + 1e-9
    assert value(payoff) > start


class TestBadInput:
    def test_arguments(self):
        """Several costs, and a budget of gains, are refused with a cure."""
        with pytest.raises(ValueError, match="add them up to one"):
            make_updater(
                cost_critic={"heat": make_critic(), "noise": make_critic()},
                cost_limit={"heat": 1.0, "noise": 1.0},
            )
        with pytest.raises(ValueError, match="may have to give gain up"):
            make_updater(kl_split="greedy")

    def test_a_step_without_costs(self):
        """A constrained step for a loss that has none is refused where it is built."""
        loss = HATRPOLoss(make_actor(), make_critic())
        with pytest.raises(ValueError, match=r"needs a cost, .* take a TrustRegion step"):
            SequentialUpdater(loss, step=ConstrainedTrustRegion())


def test_it_goes_on_from_its_state():
    """Parameters and the cost that was last known, bit for bit."""
    one, two = make_updater(), make_updater()
    batch = batch_of(one)
    one(batch)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.loss.last_costs, two.loss.last_costs)
    one(batch), two(batch)
    assert same_state(of_actor(one), of_actor(two))


def test_the_recipe_trains_it(tmp_path, monkeypatch):
    """``algorithm=macpo`` on a task with costs."""
    pytest.importorskip("envpool")
    monkeypatch.setattr(training, "write_report", lambda config, folder: None)
    words = ("task=mujoco/halfcheetah_2x3_velocity", "algorithm=macpo")
    folder = training.run(tiny_config(*words, "algorithm.minibatch_size=null"), tmp_path)
    row = table(folder / "metrics.csv")[-1]
    assert {"agents_1/case", "agents_1/excess", "cost"} <= row.keys()
    assert N_AGENTS == 3
