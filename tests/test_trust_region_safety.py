"""What must never break the trust-region step: it moves nothing, and says so."""

from __future__ import annotations

import math

import pytest
import torch
from problems import assert_unmoved, make_problem, trust_region_step
from torch import distributions as D
from torch.utils._python_dispatch import TorchDispatchMode

from torchrl_happo.steps import TrustRegion
from torchrl_happo.steps.trust_region.natural_gradient import step_length

LINE_SEARCHES = ["sequential", "batched"]


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


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_one_entry_of_a_gradient_that_is_not_finite_is_enough(number):
    """No step along the entries that happen to be finite."""
    params = {name: torch.zeros(3, requires_grad=True) for name in ("loc", "other")}

    def surrogate_fn(dist):
        broken = torch.zeros(3)
        broken[1] = number
        mean = dist.mean * 1.0
        if mean.requires_grad:  # not in the line search
            mean.register_hook(lambda gradient: gradient + broken)
        return mean.sum()

    new, result = trust_region_step(
        lambda values, rows: D.Normal(values["loc"] + values["other"], 1.0), surrogate_fn, params
    )
    assert_unmoved(new, params, result)
    assert not result.gradient_norm.isfinite()


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


@pytest.mark.parametrize("curvature", [0.0, -1.0, math.nan, math.inf])
def test_no_step_without_curvature(curvature):
    """Length 0 and a flag, no NaN."""
    length, usable = step_length(torch.ones(1), torch.tensor([curvature]), 0.01)
    assert length == 0
    assert not usable


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


def test_settings_at_the_edge_of_their_range_are_taken():
    """One iteration, one try, no damping, no tolerance, any improvement, all samples."""
    settings = TrustRegion(
        damping=0.0,
        cg_iterations=1,
        cg_tolerance=0.0,
        max_backtracks=1,
        accept_ratio=0.0,
        fisher_fraction=1.0,
    )
    distribution_fn, surrogate_fn, params = make_problem()
    _, result = trust_region_step(distribution_fn, surrogate_fn, params, settings)
    assert result.curvature > 0


def test_a_loose_tolerance_ends_conjugate_gradient():
    """After the first iteration, whatever the residual."""
    steps = [
        trust_region_step(*make_problem(), TrustRegion(**settings))[0]
        for settings in ({"cg_tolerance": 1e9}, {"cg_iterations": 1}, {})
    ]
    for name, moved in steps[0].items():
        assert torch.equal(moved, steps[1][name])
        assert not torch.equal(moved, steps[2][name])


def test_settings_cannot_be_changed_behind_the_checks():
    """The agents of a team may share them."""
    with pytest.raises(AttributeError):
        TrustRegion().max_kl = -1.0
