"""Backtracking: one after the other, all at once, and by definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policies import seeds

from torchrl_happo.steps.trust_region.line_search import batched_line_search, sequential_line_search


@given(
    seed=seeds,
    max_kl=st.floats(0.01, 2.0),
    backtrack_factor=st.floats(0.2, 0.9),
    max_backtracks=st.integers(1, 8),
    accept_ratio=st.floats(0.0, 0.9),
    trouble=st.sampled_from(["none", "nan surrogate", "inf surrogate", "nan kl"]),
    others=st.sampled_from([0.0, 0.5]),
)
def test_line_searches_agree_with_the_definition(
    seed, max_kl, backtrack_factor, max_backtracks, accept_ratio, trouble, others
):
    """Both accept the first fraction that satisfies the three conditions, or none.

    ``others`` is what other learners add to the surrogate and to the divergence.
    """
    generator = torch.Generator().manual_seed(seed)
    g, curve, theta, step = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    before = torch.randn((), generator=generator, dtype=torch.float64)
    far = 0.5 * step.norm()

    def evaluate(x):
        moved = x - theta
        surrogate = before + g.dot(moved) - (curve * moved).square().sum()
        kl = moved.square().sum() / 2
        troubled = moved.norm() > far
        if trouble == "nan surrogate":
            surrogate = torch.where(troubled, math.nan, surrogate)
        if trouble == "inf surrogate":
            surrogate = torch.where(troubled, math.inf, surrogate)
        if trouble == "nan kl":
            kl = torch.where(troubled, math.nan, kl)
        return surrogate, kl

    def common(values):
        return [value + others for value in values]

    settings = {
        "common": common,
        "max_kl": max_kl,
        "backtrack_factor": backtrack_factor,
        "max_backtracks": max_backtracks,
        "accept_ratio": accept_ratio,
    }
    expected = g.dot(step)
    outcomes = [
        search(evaluate, theta, step, before, expected, **settings)
        for search in (sequential_line_search, batched_line_search)
    ]
    for k in range(max_backtracks):
        fraction = backtrack_factor**k
        surrogate, kl = common(evaluate(theta + fraction * step))
        gain = surrogate - before
        enough = gain > 0 and gain > accept_ratio * fraction * expected and expected > 0
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
