"""The trust-region step: the reference's numbers, known answers, networks of all kinds."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policies import seeds
from problems import (
    assert_unmoved,
    leaves_of,
    make_problem,
    random_system,
    step_within_trust_region,
    trust_region_step,
)
from reference import Network, load, relative_error
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import distributions as D
from torch import nn
from torch.func import functional_call
from torchrl.modules import (
    GRUModule,
    IndependentNormal,
    ProbabilisticActor,
    TanhNormal,
    set_recurrent_mode,
)

from torchrl_happo.policy.distributions import kl_divergence
from torchrl_happo.steps import TrustRegion
from torchrl_happo.steps.trust_region.local_model import LocalModel
from torchrl_happo.steps.trust_region.natural_gradient import (
    conjugate_gradient,
    fisher_vector_product,
    flatten,
    gradient,
    step_length,
)

LINE_SEARCHES = ["sequential", "batched"]


@pytest.mark.parametrize("line_search", LINE_SEARCHES)
@pytest.mark.parametrize("case", ["hatrpo_continuous", "hatrpo_continuous_fail"])
def test_step_matches_the_reference(case, line_search):
    """Surrogate, gradient, products, solution, step length, line search, parameters and factor.

    To 1e-9 relative for each agent; in the failing case no parameter moves and the factor stays.
    """
    golden = load(case)
    config, inputs = golden["config"], golden["inputs"]
    for i, agent in enumerate(golden["agents"]):
        net = Network(
            golden["obs_dims"][i], config["hidden_sizes"], golden["act_dims"][i], "cont"
        ).double()
        net.load_state_dict(inputs["actor_init"][i])
        params = dict(net.named_parameters())
        assert list(params) == golden["param_order"][i]
        observation = inputs["obs"][i].flatten(0, 1)
        action = inputs["actions"][i].flatten(0, 1)
        stored_log_prob = inputs["old_log_probs"][i].flatten(0, 1).sum(-1)
        factored_advantage = (agent["factor_in"] * agent["adv_norm"]).flatten()

        def distribution_fn(params, rows, net=net, x=observation):
            return IndependentNormal(*functional_call(net, dict(params), (x,)))

        def surrogate_fn(dist, action=action, old=stored_log_prob, m=factored_advantage):
            return ((dist.log_prob(action) - old).exp() * m).mean()

        recorded = agent["trpo"]
        dist = distribution_fn(params, None)
        surrogate = surrogate_fn(dist)
        g = flatten(gradient([surrogate], params.values()))
        fisher = fisher_vector_product(dist, params)
        x, residual = conjugate_gradient(lambda v, fisher=fisher: fisher(v) + 0.1 * v, g)
        length, _ = step_length(x, g - residual, config["kl_threshold"])
        assert abs(surrogate.detach() - recorded["surrogate"]) < 1e-12
        assert relative_error(g, recorded["grad"]) < 1e-9
        assert relative_error(fisher(agent["hvp"]["v"]), agent["hvp"]["Hv"]) < 1e-9
        assert relative_error(x, recorded["cg_solution"]) < 1e-9
        assert relative_error(x.dot(g - residual) / 2, recorded["half_xHx"]) < 1e-9
        assert relative_error(length, recorded["step_size"]) < 1e-9

        settings = TrustRegion(
            max_kl=config["kl_threshold"],
            backtrack_factor=config["backtrack_coeff"],
            max_backtracks=config["ls_step"],
            accept_ratio=config["accept_ratio"],
            line_search=line_search,
        )
        new, result = trust_region_step(distribution_fn, surrogate_fn, params, settings)
        last = recorded["line_search"][-1]
        assert bool(result.success) == recorded["accepted"]
        assert result.kl.item() == pytest.approx(last["kl"], rel=1e-9)
        assert result.improvement.item() == pytest.approx(last["loss_improve"], rel=1e-9)
        assert result.expected_improvement.item() == pytest.approx(
            last["expected_improve"], rel=1e-9
        )
        if recorded["accepted"]:
            assert result.step_fraction.item() == pytest.approx(last["fraction"])
            for name, value in agent["params_final"].items():
                assert relative_error(new[name], value) < 1e-9
        else:
            assert_unmoved(new, params, result)
        log_ratio = distribution_fn(new, None).log_prob(action) - dist.log_prob(action)
        factor = agent["factor_in"].flatten() * log_ratio.exp()
        assert relative_error(factor, agent["factor_out"].flatten()) < 1e-9


@given(
    kind=st.sampled_from(["normal", "tanh", "categorical", "masked"]),
    seed=seeds,
    max_kl=st.sampled_from([1e-4, 0.01, 0.3, 3.0]),
)
def test_line_searches_give_the_same_step(kind, seed, max_kl):
    """On networks: the same fraction, the same numbers; inside the ball and better than before."""
    problem = make_problem(kind, seed=seed)
    (new, result), (new_batched, batched) = (
        trust_region_step(*problem, TrustRegion(max_kl=max_kl, line_search=line_search))
        for line_search in LINE_SEARCHES
    )
    for ours, other in zip(result, batched, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-8, atol=1e-10)
    for name, value in new.items():
        assert torch.equal(value, new_batched[name])
    distribution_fn, surrogate_fn, params = problem
    with torch.no_grad():
        old, moved = distribution_fn(params, None), distribution_fn(new, None)
        if result.success:
            kl = kl_divergence(old, moved).mean()
            assert kl < max_kl
            torch.testing.assert_close(kl, result.kl)
            assert surrogate_fn(moved) > surrogate_fn(old)
        else:
            assert_unmoved(new, params, result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "tanh", "categorical", "masked"])
def test_a_small_step_is_as_long_as_asked_for(kind, dtype):
    """In a small ball the full step is accepted and keeps what second and first order promise.

    The divergence is max_kl less the share that damping takes, damping / 2 |step|^2.
    """
    problem = make_problem(kind, dtype=dtype, samples=512)
    new, result = trust_region_step(*problem, TrustRegion(max_kl=1e-5))
    assert result.success
    assert result.step_fraction == 1
    step = flatten(new.values()) - flatten(problem[-1].values())
    expected = 1e-5 - 0.1 / 2 * step.square().sum().item()
    assert result.kl.item() == pytest.approx(expected, rel=0.03)
    assert result.improvement.item() == pytest.approx(result.expected_improvement.item(), rel=0.1)
    assert all(value.dtype == dtype for value in new.values())


@given(size=st.integers(1, 12), seed=seeds, max_kl=st.floats(1e-4, 1.0))
def test_step_has_the_quadratic_divergence_asked_for(size, seed, max_kl):
    """Half of s^T A s is max_kl."""
    a, x = random_system(size, seed)
    length, usable = step_length(x, a @ x, max_kl)
    step = length * x
    assert usable
    torch.testing.assert_close((step @ a @ step / 2).item(), max_kl, rtol=1e-10, atol=0)


def test_step_needs_no_surrounding_gradient_mode():
    """Taken under ``torch.no_grad()``, as by a caller that only moves numbers, it is the same."""
    problem = make_problem()
    expected, _ = trust_region_step(*problem)
    with torch.no_grad():
        new, result = trust_region_step(*problem)
    assert result.success
    assert all(torch.equal(new[name], expected[name]) for name in new)


def test_dimensions_of_the_action_are_no_samples():
    """A normal distribution for each dimension, with ``batch_ndim``, is one for all of them."""
    distribution_fn, surrogate_fn, params = make_problem()

    def bare(values, rows):
        return distribution_fn(values, rows).base_dist

    new, result = trust_region_step(distribution_fn, surrogate_fn, params)
    other, expected = trust_region_step(
        bare, lambda dist: surrogate_fn(D.Independent(dist, 1)), params, batch_ndim=1
    )
    assert result.success
    for name in new:
        torch.testing.assert_close(other[name], new[name], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.stack(expected[2:]), torch.stack(result[2:]))


def test_reported_residual():
    """The residual of conjugate gradient after one iteration, relative to the gradient's norm."""
    distribution_fn, surrogate_fn, params = make_problem()
    settings = TrustRegion(cg_iterations=1, damping=0.3)
    _, result = trust_region_step(distribution_fn, surrogate_fn, params, settings)
    dist = distribution_fn(params, None)
    g = flatten(gradient([surrogate_fn(dist)], params.values())).detach()
    fisher = fisher_vector_product(dist, params)
    x, _ = conjugate_gradient(lambda v: fisher(v) + 0.3 * v, g, num_iterations=1)
    residual = g - (fisher(x) + 0.3 * x)
    torch.testing.assert_close(result.cg_residual, residual.norm() / g.norm())
    torch.testing.assert_close(result.gradient_norm, g.norm())
    torch.testing.assert_close(result.curvature, x.dot(fisher(x) + 0.3 * x))


def test_only_valid_samples_shape_the_step():
    """The step equals that on the valid samples alone."""
    torch.manual_seed(0)
    x, m = torch.randn(40, 5, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    net = nn.Linear(5, 3).double()
    params = leaves_of(net)
    action = torch.randint(3, (40,))
    valid = torch.arange(40) % 3 > 0

    def policy(x, params, rows):
        return D.Categorical(logits=functional_call(net, dict(params), (x,)))

    def masked(dist):
        return torch.where(valid, dist.log_prob(action) * m, 0).sum() / valid.sum()

    def selected(dist):
        return (dist.log_prob(action[valid]) * m[valid]).mean()

    new, result = trust_region_step(partial(policy, x), masked, params, valid=valid)
    other, expected = trust_region_step(partial(policy, x[valid]), selected, params)
    assert result.success
    for name in new:
        torch.testing.assert_close(new[name], other[name], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.stack(result[2:]), torch.stack(expected[2:]))


def test_fisher_matrix_on_a_share_of_the_rows():
    """Rows are drawn by the generator, valid ones first; all of them give the full matrix."""
    distribution_fn, surrogate_fn, params = make_problem(samples=100)
    valid = torch.arange(100) < 30
    drawn = []

    def recording(params, rows):
        drawn.append(rows)
        return distribution_fn(params, rows)

    def of_fisher_matrix():
        return next(rows for rows in drawn if rows is not None)

    def step(fraction, seed, valid=None):
        drawn.clear()
        return trust_region_step(
            recording,
            surrogate_fn,
            params,
            TrustRegion(fisher_fraction=fraction),
            valid=valid,
            generator=torch.Generator().manual_seed(seed),
        )

    new, result = step(0.2, 0)
    rows = of_fisher_matrix()
    assert result.success
    assert len(rows.unique()) == 20
    again, _ = step(0.2, 0)
    other, _ = step(0.2, 1)
    assert torch.equal(new["2.weight"], again["2.weight"])
    assert not torch.equal(new["2.weight"], other["2.weight"])
    step(0.2, 0, valid)
    assert valid[of_fisher_matrix()].all()
    step(0.5, 0, valid)
    assert set(of_fisher_matrix().tolist()) > set(range(30))


def test_a_share_of_the_rows_counts_valid_samples_only():
    """What the policy does at samples that are not valid makes no difference."""
    distribution_fn, _, params = make_problem("categorical")
    valid = torch.arange(64) % 4 > 0

    def step(sharpness):
        def sharpened(params, rows):
            logits = distribution_fn(params, rows).logits
            counted = valid if rows is None else valid[rows]
            return D.Categorical(
                logits=torch.where(counted.unsqueeze(-1), logits, sharpness * logits)
            )

        return trust_region_step(
            sharpened,
            lambda dist: torch.where(valid, dist.log_prob(torch.zeros(64)), 0).mean(),
            params,
            TrustRegion(fisher_fraction=0.9),
            valid=valid,
            generator=torch.Generator().manual_seed(0),
        )

    (new, result), (other, expected) = step(1.0), step(3.0)
    assert result.success
    torch.testing.assert_close(torch.stack(result[2:]), torch.stack(expected[2:]))
    for name in new:
        torch.testing.assert_close(new[name], other[name])


class PolicyOf(nn.Module):
    """The distribution of an actor as the output of a module, for functional_call.

    TensorDict.to_module would not put the parameters back when called inside torch.vmap.
    """

    def __init__(self, actor):
        super().__init__()
        self.actor = actor

    def forward(self, data):
        return self.actor.get_dist(data)


@pytest.mark.parametrize("line_search", LINE_SEARCHES)
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_recurrent_policy(line_search, fraction):
    """Whole sequences, with resets, through a GRU that cannot be vectorised over candidates."""
    torch.manual_seed(0)
    gru = GRUModule(
        input_size=3,
        hidden_size=8,
        in_keys=["observation", "hidden"],
        out_keys=["features", ("next", "hidden")],
    )
    head = TensorDictModule(nn.Linear(8, 4), in_keys=["features"], out_keys=["logits"])
    policy = PolicyOf(
        ProbabilisticActor(
            TensorDictSequential(gru, head), in_keys=["logits"], distribution_class=D.Categorical
        )
    )
    inputs = TensorDict(
        {
            "observation": torch.randn(6, 10, 3),
            "is_init": torch.rand(6, 10, 1) < 0.2,
            "hidden": torch.zeros(6, 10, 1, 8),
        },
        batch_size=[6, 10],
    )
    m, action, valid = torch.randn(6, 10), torch.randint(4, (6, 10)), torch.rand(6, 10) < 0.8

    def distribution_fn(params, rows):
        data = inputs.copy() if rows is None else inputs[rows]
        return functional_call(policy, dict(params), (data,))

    def surrogate_fn(dist):
        return torch.where(valid, dist.log_prob(action) * m, 0).sum() / valid.sum()

    params = dict(policy.named_parameters())
    settings = TrustRegion(line_search=line_search, fisher_fraction=fraction)
    with set_recurrent_mode(True):
        _, result = trust_region_step(distribution_fn, surrogate_fn, params, settings, valid=valid)
    assert result.success
    assert 0.001 < result.kl < 0.01


@pytest.mark.parametrize("line_search", LINE_SEARCHES)
def test_step_of_a_tensordict_actor(line_search):
    """The policy of a TorchRL actor at parameters of our choice; the actor itself is not moved."""
    actor = ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4), NormalParamExtractor()),
            in_keys=["observation"],
            out_keys=["loc", "scale"],
        ),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    data = TensorDict({"observation": torch.randn(32, 3), "advantage": torch.randn(32)}, [32])
    with torch.no_grad():
        data = actor(data)

    policy = PolicyOf(actor)

    def distribution_fn(params, rows):
        inputs = data.select("observation")
        inputs = inputs if rows is None else inputs[rows]
        return functional_call(policy, dict(params), (inputs,))

    def surrogate_fn(dist):
        ratio = (dist.log_prob(data["action"]) - data["action_log_prob"]).exp()
        return (ratio * data["advantage"]).mean()

    params = dict(policy.named_parameters())
    before = {name: p.detach().clone() for name, p in params.items()}
    settings = TrustRegion(line_search=line_search)
    new, result = trust_region_step(distribution_fn, surrogate_fn, params, settings)
    assert result.success
    for name, p in policy.named_parameters():
        assert p is params[name]
        assert torch.equal(p, before[name])
        assert not torch.equal(new[name], p)


def test_a_model_of_several_learners_is_their_average():
    """Surrogate, gradient and products, each by the samples that it is a mean over."""
    gradient = torch.tensor([1.0, 2.0])
    model = LocalModel(torch.tensor(3.0), gradient, lambda v: 5 * v, 7.0, 11.0)
    common = model.common(lambda values, weight: [2 * value + weight for value in values])
    assert common.surrogate == 2 * 3 + 7
    assert torch.equal(common.gradient, 2 * gradient + 7)
    assert torch.equal(common.fisher_product(gradient), 2 * 5 * gradient + 11)


@pytest.mark.parametrize("line_search", LINE_SEARCHES)
@pytest.mark.parametrize("masked", [False, True])
def test_learners_count_the_samples_that_are_valid(line_search, masked):
    """Of the whole batch for surrogate, gradient and trials; of the rows drawn for products."""
    valid = torch.arange(64) % 4 != 0 if masked else None
    weights = []

    def average(values, weight):
        weights.append(int(weight))
        return values

    fraction = 0.9 if masked else 0.5  # of which the valid ones come first
    settings = TrustRegion(fisher_fraction=fraction, cg_iterations=3, line_search=line_search)
    generator = torch.Generator().manual_seed(0)
    trust_region_step(
        *make_problem(samples=64), settings, valid=valid, generator=generator, average=average
    )
    everything = 48 if masked else 64
    model, *products = weights[:4]
    assert model == everything
    assert products == [48 if masked else 32] * 3
    assert set(weights[4:]) == {everything}


@pytest.mark.parametrize("line_search", ["sequential", "batched"])
@pytest.mark.parametrize(("tries", "fraction"), [(2, 0.0), (3, 0.25)])
def test_the_settings_of_the_line_search_are_its_own(line_search, tries, fraction):
    """The divergence allows a third of the step, and three tenths of what was promised come true.

    So the third of the tries 1, 0.5 and 0.25 is taken.
    """
    settings = TrustRegion(
        max_kl=0.02,
        damping=0.0,
        backtrack_factor=0.5,
        accept_ratio=0.2,
        max_backtracks=tries,
        line_search=line_search,
    )
    theta = torch.zeros(2)
    _, result = step_within_trust_region(
        theta,
        LocalModel(theta.sum(), torch.ones(2), lambda v: v),
        lambda theta: (0.3 * theta.sum(), 4 * theta.square().sum()),
        settings,
    )
    assert result.step_fraction == fraction
    assert bool(result.success) == (fraction > 0)
