"""The mathematics of the objectives, against its definitions in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrl_happo.masked import count, effective_sample_size, masked_mean, moments, standardize

numbers = st.lists(st.floats(-100, 100), min_size=1, max_size=12)
masks = st.lists(st.booleans(), min_size=12, max_size=12)


def doubled(values, weight):
    """Stands for an average over several learners, of whom each knows its own part alone."""
    return [2 * value + weight for value in values]


@given(numbers, masks)
def test_averages_are_over_the_valid_entries(entries, mask):
    """Number, mean and population variance; what is not valid may be NaN; none at all gives 0."""
    mask = mask[: len(entries)]
    kept = [x for x, valid in zip(entries, mask, strict=True) if valid]
    valid = torch.tensor(mask)
    value = torch.tensor(entries, dtype=torch.double).masked_fill(~valid, math.nan)
    mean = sum(kept) / len(kept) if kept else 0.0
    variance = sum((x - mean) ** 2 for x in kept) / len(kept) if kept else 0.0
    assert count(value, valid) == len(kept)
    assert masked_mean(value, valid).item() == pytest.approx(mean)
    assert [m.item() for m in moments(value, valid)] == pytest.approx([mean, variance])
    everything = torch.tensor(kept, dtype=torch.double)
    if kept:
        assert count(everything) == len(kept)
        assert masked_mean(everything).item() == pytest.approx(mean)
    scaled = standardize(value, valid)[valid]
    torch.testing.assert_close(scaled, (everything - mean) / (math.sqrt(variance) + 1e-5))


@given(numbers)
def test_effective_sample_size(logs):
    """The squared sum of the weights over the sum of their squares, as a share; scale is free."""
    logs = [x / 10 for x in logs]
    weights = [math.exp(x - max(logs)) for x in logs]
    expected = sum(weights) ** 2 / (len(weights) * sum(w**2 for w in weights))
    for shift in (0.0, 500.0):
        log_weight = torch.tensor(logs, dtype=torch.double) + shift
        assert effective_sample_size(log_weight).item() == pytest.approx(expected)


def test_an_average_of_several_learners_is_used_throughout():
    """Mean, variance around that mean, and both means of the effective sample size."""
    value = torch.tensor([1.0, 3.0])
    mean = 2 * 2.0 + 2
    variance = 2 * ((1 - mean) ** 2 + (3 - mean) ** 2) / 2 + 2
    assert moments(value, average=doubled) == (mean, variance)
    expected = (value - mean) / (math.sqrt(variance) + 1e-5)
    torch.testing.assert_close(standardize(value, average=doubled), expected)
    own = [math.exp(-2), 1.0]
    first, second = (2 * sum(w**k for w in own) / 2 + 2 for k in (1, 2))
    got = effective_sample_size(value, peak=torch.tensor(3.0), average=doubled)
    assert got.item() == pytest.approx(first**2 / second)
    own = [math.exp(-3), math.exp(-1)]  # the largest is another learner's
    first, second = (2 * sum(w**k for w in own) / 2 + 2 for k in (1, 2))
    got = effective_sample_size(value, peak=torch.tensor(4.0), average=doubled)
    assert got.item() == pytest.approx(first**2 / second)
