"""The trust-region step: known answers, the reference's numbers, and what must never break it."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policies import POLICY_NAMES, batches, policy_named, seeds, sizes
from reference import Network, load, relative_error
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import distributions as D
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.modules import IndependentNormal, MaskedCategorical, ProbabilisticActor, TanhNormal

from torchrl_happo.distributions import kl_divergence
from torchrl_happo.optim.natural_gradient import flatten, gradient, twice_differentiable, unflatten
from torchrl_happo.optim.trust_region import (
    TrustRegion,
    batched_line_search,
    conjugate_gradient,
    fisher_vector_product,
    sequential_line_search,
    step_length,
    trust_region_step,
)

LINE_SEARCHES = ["sequential", "batched"]


def leaves_of(module):
    """Copies of a module's parameters that require a gradient."""
    return {k: p.detach().clone().requires_grad_() for k, p in module.named_parameters()}


def hessian_product(kl, parameters, vector):
    """Hessian of a scalar times a vector, by differentiating twice."""
    first = flatten(gradient([kl], parameters.values(), create_graph=True))
    return flatten(gradient([first], parameters.values(), [vector]))


def make_problem(kind="normal", *, dtype=torch.float64, seed=0, samples=64, width=16):
    """A policy network with data: distribution_fn, surrogate_fn, parameters."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    split = NormalParamExtractor()
    x = torch.randn(samples, 5, generator=generator, dtype=dtype)
    net = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 4)).to(dtype)
    build = {
        "normal": lambda y: IndependentNormal(*split(y)),
        "tanh": lambda y: TanhNormal(*split(y), low=-2.0, high=1.0),
        "categorical": lambda y: D.Categorical(logits=y),
        "masked": lambda y: MaskedCategorical(logits=y, mask=torch.arange(4) < 3),
    }[kind]

    def distribution_fn(params, rows):
        return build(functional_call(net, dict(params), (x if rows is None else x[rows],)))

    params = leaves_of(net)
    with torch.no_grad():
        dist = distribution_fn(params, None)
        action = dist.sample()
        old_log_prob = dist.log_prob(action)
    advantage = torch.randn(samples, generator=generator, dtype=dtype)

    def surrogate_fn(dist):
        return ((dist.log_prob(action) - old_log_prob).exp() * advantage).mean()

    return distribution_fn, surrogate_fn, params


def assert_unmoved(new, params, result):
    """Bit for bit the parameters of before, and a result that says so."""
    assert not result.success
    assert result.step_fraction == 0
    assert new.keys() == params.keys()
    for name, parameter in params.items():
        assert torch.equal(new[name], parameter)
        assert torch.equal(new[name].signbit(), parameter.signbit())  # -0.0 equals 0.0
        assert new[name].dtype == parameter.dtype


# -- Fisher-vector product ---------------------------------------------------------------------


@given(
    # The kink of the Laplace divergence has no second derivative; its matrix is tested elsewhere.
    name=st.sampled_from([n for n in POLICY_NAMES if n != "Laplace"]),
    size=sizes,
    batch=batches,
    seed=seeds,
    share=st.sampled_from([None, 0.0, 0.5, 1.0]),
)
def test_fisher_product_is_the_hessian_of_the_mean_divergence(name, size, batch, seed, share):
    """To 1e-10 for every distribution, over shapes, action masks, bounds and validity masks."""
    policy = policy_named(name, size, seed)
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.LayerNorm(3), nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, policy.width)
    ).double()
    params = leaves_of(net)
    x = torch.randn(*batch, 3, dtype=torch.float64)
    dist = policy.build(functional_call(net, params, (x,)))
    old = policy.build(net(x).detach())
    valid = None if share is None else torch.rand(batch) < share
    vector = torch.randn(sum(p.numel() for p in params.values()), dtype=torch.float64)

    kl = kl_divergence(old, dist, batch_ndim=len(batch))
    kl = kl.mean() if valid is None else kl[valid].sum() / valid.sum().clamp_min(1)
    expected = hessian_product(kl, params, vector)
    product = fisher_vector_product(dist, params, valid=valid, batch_ndim=len(batch))(vector)
    torch.testing.assert_close(product, expected, rtol=1e-10, atol=1e-10)


def gru():
    return nn.GRU(3, 4, batch_first=True), lambda out: out[0]


def attention():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(3, 4), layer), lambda out: out


def normalised():
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU()), lambda out: out


@pytest.mark.parametrize("make", [gru, attention, normalised])
def test_fisher_product_of_networks_with_fused_kernels(make):
    """Whole sequences through a GRU, attention and LayerNorm, against the autograd Hessian."""
    torch.manual_seed(0)
    net, read = make()
    net = net.double()
    params = leaves_of(net)
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    with twice_differentiable():
        dist = D.Categorical(logits=read(functional_call(net, params, (x,))))
    old = D.Categorical(logits=dist.logits.detach())
    vector = torch.randn(sum(p.numel() for p in params.values()), dtype=torch.float64)
    expected = hessian_product(kl_divergence(old, dist).mean(), params, vector)
    product = fisher_vector_product(dist, params)(vector)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(product, expected, rtol=1e-9, atol=1e-12)


def test_fisher_product_of_parameters_that_do_nothing_is_zero():
    """Unused parameters, and a distribution that depends on no parameter at all."""
    used, unused = (torch.ones(2, requires_grad=True) for _ in range(2))
    dist = D.Normal(used.expand(3, 2), torch.ones(3, 2))
    matvec = fisher_vector_product(dist, {"unused": unused, "used": used}, batch_ndim=1)
    assert matvec(torch.ones(4)).tolist() == [0, 0, 1, 1]
    constant = D.Normal(torch.zeros(3, 2), torch.ones(3, 2))
    assert fisher_vector_product(constant, {"unused": unused})(torch.ones(2)).tolist() == [0, 0]


def test_fisher_product_ignores_what_is_not_valid():
    """Samples that do not count may even hold NaN."""
    loc = torch.zeros(2, requires_grad=True)
    spread = torch.tensor([1.0, math.nan])
    matvec = fisher_vector_product(
        D.Normal(loc, spread), {"loc": loc}, valid=torch.tensor([True, False])
    )
    assert matvec(torch.ones(2)).tolist() == [1, 0]


# -- conjugate gradient and step length --------------------------------------------------------


def textbook_conjugate_gradient(a, b, num_iterations, tolerance):
    """The loop with an early exit, as the reference runs it."""
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    for _ in range(num_iterations):
        alpha = (r @ r) / (p @ a @ p)
        x, r_next = x + alpha * p, r - alpha * (a @ p)
        p, r = r_next + (r_next @ r_next) / (r @ r) * p, r_next
        if r @ r < tolerance:
            break
    return x


def random_system(size, seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = root @ root.T / size + torch.eye(size, dtype=torch.float64)
    return matrix, torch.randn(size, generator=generator, dtype=torch.float64)


@given(size=st.integers(1, 12), seed=seeds)
def test_conjugate_gradient_solves(size, seed):
    """As many iterations as unknowns give the solution of a direct solver."""
    a, b = random_system(size, seed)
    x, _ = conjugate_gradient(a.mv, b, num_iterations=2 * size, residual_tolerance=1e-26)
    torch.testing.assert_close(x, torch.linalg.solve(a, b), rtol=1e-9, atol=1e-9)


@given(
    size=st.integers(1, 12),
    seed=seeds,
    iterations=st.integers(1, 15),
    tolerance=st.sampled_from([0.0, 1e-10, 1e-2, 1e2]),
)
def test_conjugate_gradient_stops_where_the_textbook_does(size, seed, iterations, tolerance):
    """A fixed number of products gives the numbers of the loop that breaks, and b - A x."""
    a, b = random_system(size, seed)
    x, residual = conjugate_gradient(
        a.mv, b, num_iterations=iterations, residual_tolerance=tolerance
    )
    if tolerance > 0 or iterations < size:
        expected = textbook_conjugate_gradient(a, b, iterations, tolerance)
        torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(residual, b - a @ x, rtol=1e-9, atol=1e-9)


def test_conjugate_gradient_of_zero_is_zero():
    """0 / 0 appears nowhere."""
    x, residual = conjugate_gradient(lambda v: 2 * v, torch.zeros(3))
    assert x.tolist() == residual.tolist() == [0, 0, 0]


@pytest.mark.parametrize("curvature", [0.0, -1.0, math.nan])
def test_conjugate_gradient_keeps_off_directions_without_curvature(curvature):
    """The solution stays finite, and is that of the directions before."""
    a = torch.diag(torch.tensor([2.0, curvature]))
    x, residual = conjugate_gradient(a.mv, torch.tensor([0.0, 1.0]))
    assert x.tolist() == [0, 0]
    assert residual.tolist() == [0, 1]
    x, _ = conjugate_gradient(a.mv, torch.tensor([1.0, 0.5]))
    assert x.isfinite().all()


@given(size=st.integers(1, 12), seed=seeds, max_kl=st.floats(1e-4, 1.0))
def test_step_has_the_quadratic_divergence_asked_for(size, seed, max_kl):
    """Half of s^T A s is max_kl."""
    a, x = random_system(size, seed)
    length, usable = step_length(x, a @ x, max_kl)
    step = length * x
    assert usable
    torch.testing.assert_close((step @ a @ step / 2).item(), max_kl, rtol=1e-10, atol=0)


@pytest.mark.parametrize("curvature", [0.0, -1.0, math.nan, math.inf])
def test_no_step_without_curvature(curvature):
    """Length 0 and a flag, no NaN."""
    length, usable = step_length(torch.ones(1), torch.tensor([curvature]), 0.01)
    assert length == 0
    assert not usable


# -- line search -------------------------------------------------------------------------------


@given(
    seed=seeds,
    max_kl=st.floats(0.01, 2.0),
    backtrack_factor=st.floats(0.2, 0.9),
    max_backtracks=st.integers(1, 8),
    accept_ratio=st.floats(0.0, 0.9),
    trouble=st.sampled_from(["none", "nan surrogate", "inf surrogate", "nan kl"]),
)
def test_line_searches_agree_with_the_definition(
    seed, max_kl, backtrack_factor, max_backtracks, accept_ratio, trouble
):
    """Both accept the first fraction that satisfies the three conditions, or none."""
    generator = torch.Generator().manual_seed(seed)
    g, curve, theta, step = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    far = 0.5 * step.norm()

    def evaluate(x):
        moved = x - theta
        surrogate = g.dot(moved) - (curve * moved).square().sum()
        kl = moved.square().sum() / 2
        troubled = moved.norm() > far
        if trouble == "nan surrogate":
            surrogate = torch.where(troubled, math.nan, surrogate)
        if trouble == "inf surrogate":
            surrogate = torch.where(troubled, math.inf, surrogate)
        if trouble == "nan kl":
            kl = torch.where(troubled, math.nan, kl)
        return surrogate, kl

    settings = {
        "max_kl": max_kl,
        "backtrack_factor": backtrack_factor,
        "max_backtracks": max_backtracks,
        "accept_ratio": accept_ratio,
    }
    before, expected = torch.tensor(0.0, dtype=torch.float64), g.dot(step)
    outcomes = [
        search(evaluate, theta, step, before, expected, **settings)
        for search in (sequential_line_search, batched_line_search)
    ]
    for k in range(max_backtracks):
        fraction = backtrack_factor**k
        surrogate, kl = evaluate(theta + fraction * step)
        enough = surrogate > 0 and surrogate > accept_ratio * fraction * expected and expected > 0
        accepted = bool(kl < max_kl and enough and surrogate.isfinite())
        if accepted:
            break
    for outcome in outcomes:
        assert outcome.success.item() == accepted
        assert outcome.fraction.item() == pytest.approx(fraction if accepted else 0.0, rel=1e-12)
        torch.testing.assert_close(outcome.kl, kl, equal_nan=True)
        torch.testing.assert_close(outcome.surrogate, surrogate, equal_nan=True)
        torch.testing.assert_close(outcome.expected, fraction * expected)


@pytest.mark.parametrize("search", [sequential_line_search, batched_line_search])
@pytest.mark.parametrize("expected", [0.0, -1.0])
def test_rounding_does_not_pass_for_an_improvement(search, expected):
    """A step that the gradient promises nothing for is not accepted."""
    outcome = search(
        lambda x: (x.sum() + 1e-7, x.sum()),
        torch.zeros(2),
        torch.zeros(2),
        torch.tensor(0.0),
        torch.tensor(expected),
        max_kl=0.01,
    )
    assert not outcome.success
    assert outcome.fraction == 0


# -- the whole step ----------------------------------------------------------------------------


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


@pytest.mark.parametrize("line_search", LINE_SEARCHES)
def test_parameters_passed_in_are_not_touched(line_search):
    """New tensors come back; values, gradients and versions of the old ones stay."""
    distribution_fn, surrogate_fn, params = make_problem()
    before = {k: p.detach().clone() for k, p in params.items()}
    versions = {k: p._version for k, p in params.items()}
    settings = TrustRegion(line_search=line_search)
    new, result = trust_region_step(distribution_fn, surrogate_fn, params, settings)
    assert result.success
    for name, p in params.items():
        assert torch.equal(p, before[name])
        assert p._version == versions[name]
        assert p.grad is None
        assert not new[name].requires_grad


@pytest.mark.parametrize("line_search", LINE_SEARCHES)
@pytest.mark.parametrize("scale", [0.0, math.nan, math.inf])
def test_a_gradient_that_is_zero_or_not_finite_moves_nothing(line_search, scale):
    """Nothing is NaN but what reports the gradient itself."""
    distribution_fn, surrogate_fn, params = make_problem()
    params["0.bias"] = torch.full_like(params["0.bias"], -0.0, requires_grad=True)
    settings = TrustRegion(line_search=line_search)
    new, result = trust_region_step(
        distribution_fn, lambda dist: scale * surrogate_fn(dist), params, settings
    )
    assert_unmoved(new, params, result)
    assert result.curvature == result.cg_residual == result.expected_improvement == 0
    assert abs(result.kl) < 1e-12
    assert result.gradient_norm == 0 or not result.gradient_norm.isfinite()


@pytest.mark.parametrize("line_search", LINE_SEARCHES)
def test_a_surrogate_without_a_graph_moves_nothing(line_search):
    """As a loss of zero valid samples may be."""
    distribution_fn, _, params = make_problem()
    settings = TrustRegion(line_search=line_search)
    new, result = trust_region_step(distribution_fn, lambda d: torch.zeros(()), params, settings)
    assert_unmoved(new, params, result)


@pytest.mark.parametrize("line_search", LINE_SEARCHES)
@pytest.mark.parametrize("scale", [1e-30, 1.8e19, 1e25])
def test_a_matrix_that_is_not_finite_or_vanishes_moves_nothing(line_search, scale):
    """1 / scale^2 overflows or underflows in float32; there is no damping to help."""
    loc = torch.zeros(2, requires_grad=True)
    new, result = trust_region_step(
        lambda params, rows: D.Normal(params["loc"], torch.full((2,), scale)),
        lambda dist: dist.loc.sum(),
        {"loc": loc},
        TrustRegion(damping=0.0, line_search=line_search),
    )
    assert_unmoved(new, {"loc": loc}, result)
    assert result.kl == result.improvement == result.expected_improvement == 0


@pytest.mark.parametrize("line_search", LINE_SEARCHES)
def test_a_batch_without_valid_samples_moves_nothing(line_search):
    """The mean over nothing is zero."""
    distribution_fn, _, params = make_problem()
    valid = torch.zeros(64, dtype=torch.bool)

    def surrogate_fn(dist):
        return torch.where(valid, dist.log_prob(torch.ones(64, 2, dtype=torch.float64)), 0).sum()

    settings = TrustRegion(line_search=line_search)
    new, result = trust_region_step(distribution_fn, surrogate_fn, params, settings, valid=valid)
    assert_unmoved(new, params, result)


@pytest.mark.parametrize("line_search", LINE_SEARCHES)
@pytest.mark.parametrize("wrong", ["surrogate", "kl"])
def test_candidates_that_are_not_finite_are_rejected(line_search, wrong):
    """A policy that breaks down away from the old parameters is not moved to."""
    theta = torch.zeros(3, requires_grad=True)

    def distribution_fn(params, rows):
        loc = params["theta"]
        broken = math.nan if wrong == "kl" else 0.0
        return D.Normal(torch.where(loc.abs().sum() > 1e-9, loc + broken, loc), 1.0)

    def surrogate_fn(dist):
        broken = math.inf if wrong == "surrogate" else 0.0
        return dist.loc.sum() + torch.where(dist.loc.abs().sum() > 1e-9, broken, 0.0)

    settings = TrustRegion(line_search=line_search)
    new, result = trust_region_step(distribution_fn, surrogate_fn, {"theta": theta}, settings)
    assert_unmoved(new, {"theta": theta}, result)


@pytest.mark.parametrize("line_search", LINE_SEARCHES)
def test_only_what_requires_a_gradient_is_moved(line_search):
    """Frozen parameters stay, unused ones too; without any trainable one nothing happens."""
    distribution_fn, surrogate_fn, params = make_problem()
    settings = TrustRegion(line_search=line_search)
    net_keys = dict(params)
    params = {"unused": torch.ones(3, requires_grad=True), **params}
    params["0.weight"] = params["0.weight"].detach()

    def of_the_net(params, rows):
        return distribution_fn({k: params[k] for k in net_keys}, rows)

    new, result = trust_region_step(of_the_net, surrogate_fn, params, settings)
    assert result.success
    assert torch.equal(new["unused"], params["unused"])
    assert new["0.weight"] is params["0.weight"]
    assert not torch.equal(new["2.weight"], params["2.weight"])
    frozen = {k: p.detach() for k, p in params.items()}
    new, result = trust_region_step(of_the_net, surrogate_fn, frozen, settings)
    assert_unmoved(new, frozen, result)


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
    rows = drawn[1]
    assert result.success
    assert len(rows.unique()) == 20
    again, _ = step(0.2, 0)
    other, _ = step(0.2, 1)
    assert torch.equal(new["2.weight"], again["2.weight"])
    assert not torch.equal(new["2.weight"], other["2.weight"])
    step(0.2, 0, valid)
    assert valid[drawn[1]].all()
    step(0.5, 0, valid)
    assert set(drawn[1].tolist()) > set(range(30))


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


@pytest.mark.parametrize("line_search", LINE_SEARCHES)
def test_recurrent_policy(line_search):
    """Whole sequences through a GRU, which cannot be vectorised over candidates."""
    torch.manual_seed(0)
    net, head = nn.GRU(3, 8, batch_first=True), nn.Linear(8, 4)
    module = nn.ModuleDict({"net": net, "head": head})
    x, m = torch.randn(6, 10, 3), torch.randn(6, 10)
    valid = torch.rand(6, 10) < 0.8
    action = torch.randint(4, (6, 10))

    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = module

        def forward(self, x):
            return self.layers["head"](self.layers["net"](x)[0])

    policy = Policy()

    def distribution_fn(params, rows):
        inputs = x if rows is None else x[rows]
        return D.Categorical(logits=functional_call(policy, dict(params), (inputs,)))

    def surrogate_fn(dist):
        return torch.where(valid, dist.log_prob(action) * m, 0).sum() / valid.sum()

    for fraction in (1.0, 0.5):
        _, result = trust_region_step(
            distribution_fn,
            surrogate_fn,
            dict(policy.named_parameters()),
            TrustRegion(line_search=line_search, fisher_fraction=fraction),
            valid=valid,
        )
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

    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.actor = actor

        def forward(self, data):
            return self.actor.get_dist(data)

    policy = Policy()

    def distribution_fn(params, rows):
        # TensorDict.to_module does not put back the parameters when called inside torch.vmap.
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


class NothingRead(TorchDispatchMode):
    """Refuses every operation that needs a value on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.is_nonzero.default,
        ):
            raise AssertionError(f"{func} reads a value back from the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["normal", "categorical"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_batched_step_reads_nothing_back(kind, fraction):
    """No tensor becomes a Python number, from the first forward pass to the new parameters."""
    distribution_fn, surrogate_fn, params = make_problem(kind)
    settings = TrustRegion(line_search="batched", fisher_fraction=fraction)
    with NothingRead():
        new, result = trust_region_step(
            distribution_fn, surrogate_fn, params, settings, valid=torch.arange(64) < 60
        )
    assert result.success
    assert new.keys() == params.keys()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_kl", 0.0),
        ("max_kl", math.nan),
        ("max_kl", math.inf),
        ("damping", -0.1),
        ("cg_iterations", 0),
        ("cg_tolerance", -1e-10),
        ("backtrack_factor", 1.0),
        ("backtrack_factor", 0.0),
        ("max_backtracks", 0),
        ("accept_ratio", 1.0),
        ("accept_ratio", -0.1),
        ("fisher_fraction", 0.0),
        ("fisher_fraction", 1.5),
        ("line_search", "golden"),
    ],
)
def test_settings_out_of_range_are_refused(setting, value):
    """The error names the setting and what it got."""
    with pytest.raises(ValueError, match=f"^{setting} must be .*got {value!r}"):
        TrustRegion(**{setting: value})


def test_flatten_and_unflatten_are_inverse():
    """Names, shapes (scalars too) and order survive."""
    tensors = {"b": torch.randn(2, 3), "a": torch.randn(()), "c": torch.randn(1)}
    vector = flatten(tensors.values())
    assert vector.shape == (8,)
    restored = unflatten(vector, tensors)
    assert list(restored) == list(tensors)
    assert all(torch.equal(restored[name], tensors[name]) for name in tensors)
