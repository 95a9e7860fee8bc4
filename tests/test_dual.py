"""The dual of the constrained trust region: worked cases, and the best step found by search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_happo.steps.trust_region.dual import Case, solve_dual

G = torch.tensor([1.0, 0.0], dtype=torch.float64)


def step_of(g, b, excess, max_kl):
    """The combination, and the step that it makes with the unit matrix."""
    b, excess = torch.as_tensor(b).double(), torch.as_tensor(excess).double()
    found = solve_dual(g @ g, -(g @ b), b @ b, excess, max_kl)
    return found, found.gain * g - found.retreat * b


@pytest.mark.parametrize(
    ("b", "excess", "case", "multiplier", "price", "step"),
    [
        ((0.0, 1.0), -0.5, Case.BOTH, 1.0, 0.0, (1.0, 0.0)),
        ((1.0, 1.0), -0.5, Case.BOTH, 0.755929, 0.311018, (0.911438, -0.411438)),
        ((1.0, 1.0), 0.5, Case.RESTORING, 0.755929, 0.688982, (0.411438, -0.911438)),
        ((0.0, 1.0), 1.5, Case.RECOVERY, float("inf"), 1.0, (0.0, -1.0)),
        ((0.2, 0.1), -0.5, Case.INSIDE, 1.0, 0.0, (1.0, 0.0)),
        ((0.0, 0.0), -0.5, Case.FLAT, 1.0, 0.0, (1.0, 0.0)),
    ],
)
def test_worked_cases(b, excess, case, multiplier, price, step):
    """A radius of 1 and the unit matrix, computed by hand."""
    found, moved = step_of(G, b, excess, max_kl=0.5)
    assert found.case == case
    assert found.multiplier.item() == pytest.approx(multiplier, abs=1e-6)
    assert found.price.item() == pytest.approx(price, abs=1e-6)
    torch.testing.assert_close(moved, torch.tensor(step).double(), atol=1e-6, rtol=0)


#: Steps to the edge of the unit disc and within it.
ANGLES = torch.linspace(0, 2 * torch.pi, 721, dtype=torch.float64)
DISC = torch.cat(
    [r * torch.stack([ANGLES.cos(), ANGLES.sin()], -1) for r in torch.linspace(0, 1, 41)]
)
numbers = st.floats(-2, 2, width=32)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(numbers, numbers, numbers, numbers, numbers)
def test_no_allowed_step_gains_more(g0, g1, b0, b1, excess):
    """Of the steps in the disc that keep the bound none gains more; in recovery none costs less."""
    g, b = torch.tensor([g0, g1]).double(), torch.tensor([b0, b1]).double()
    found, moved = step_of(g, b, excess, max_kl=0.5)
    assert moved.norm() <= 1 + 1e-6
    if found.case == Case.RECOVERY:
        assert b @ moved <= (DISC @ b).min() + 1e-6
        return
    if b.square().sum() > 1e-8:
        assert b @ moved + excess <= 1e-6
        allowed = DISC[DISC @ b + excess <= 0]
        if len(allowed):
            assert g @ moved >= (allowed @ g).max() - 1e-6
    elif excess < 0:
        assert g @ moved >= (DISC @ g).max() - 1e-6
