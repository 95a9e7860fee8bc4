"""Distributions of every supported kind, as functions of a network's raw output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import CompositeDistribution
from torch import Tensor
from torch import distributions as D
from torchrl.modules import (
    IndependentNormal,
    MaskedCategorical,
    MaskedOneHotCategorical,
    OneHotCategorical,
    TanhNormal,
)
from torchrl.modules.distributions import Ordinal


@dataclass(frozen=True)
class Policy:
    """A distribution over actions, built from ``width`` raw numbers per sample."""

    name: str
    width: int
    build: Callable[[Tensor], D.Distribution]
    batch_ndim: int | None = None

    def __repr__(self):
        return self.name


def positive(raw):
    """A scale, or another positive parameter."""
    return F.softplus(raw) + 0.1


def halves(build, raw):
    """A distribution of two parameters, the second of them positive."""
    first, second = raw.chunk(2, -1)
    return build(first, positive(second))


def tanh_normal(loc, scale, **kwargs):
    """A squashed normal with the action in its event."""
    return TanhNormal(loc, scale, event_dims=1, **kwargs)


def composite(mask, raw):
    """A squashed, a masked and a plain component, one of them nested."""
    params = TensorDict(
        {
            "move": {"loc": raw[..., 0:2], "scale": positive(raw[..., 2:4])},
            ("talk", "word"): {"logits": raw[..., 4:8], "mask": mask(raw[..., 4:8])},
            "push": {"loc": raw[..., 8:9], "scale": positive(raw[..., 9:10])},
        },
        batch_size=raw.shape[:-1],
    )
    kinds = {"move": TanhNormal, ("talk", "word"): MaskedCategorical, "push": D.Normal}
    return CompositeDistribution(params, kinds)


def as_probs(kind, raw):
    """A categorical built from probabilities."""
    return kind(probs=raw.softmax(-1))


def action_mask(seed, logits):
    """A random mask that leaves at least one action in each sample."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(logits.shape, generator=generator) < 0.6
    one = torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator)
    return mask | F.one_hot(one, logits.shape[-1]).bool()


def masked(kind, mask, raw):
    """A masked categorical."""
    return kind(logits=raw, mask=mask(raw))


def with_indices(mask, raw):
    """The sparse form of a mask: every sample may take the first two actions, in some order."""
    indices = torch.stack([torch.zeros_like(raw[..., 0]), torch.ones_like(raw[..., 0])], -1)
    return MaskedCategorical(logits=raw, indices=indices.long())


def all_policies(size: int, seed: int) -> list[Policy]:
    """Every kind of policy.

    Args:
        size: number of dimensions of a continuous action, or of choices beyond the first.
        seed: of the masks and bounds.
    """
    generator = torch.Generator().manual_seed(seed)
    low = -torch.rand(size, generator=generator, dtype=torch.float64) - 0.1
    high = torch.rand(size, generator=generator, dtype=torch.float64) + 0.1
    mask = partial(action_mask, seed)
    bounded = partial(tanh_normal, low=low, high=high)
    scaled = partial(tanh_normal, tanh_loc=True, upscale=2.0, low=low, high=high)
    continuous = {
        "Normal": (D.Normal, -1),
        "IndependentNormal": (IndependentNormal, None),
        "Independent(Normal)": (lambda loc, scale: D.Independent(D.Normal(loc, scale), 1), None),
        "TanhNormal": (tanh_normal, None),
        "TanhNormal(bounds)": (bounded, None),
        "TanhNormal(tanh_loc)": (scaled, None),
        "LogNormal": (lambda loc, scale: D.Independent(D.LogNormal(loc, scale), 1), None),
        "Laplace": (lambda loc, scale: D.Independent(D.Laplace(loc, scale), 1), None),
        "Beta": (lambda a, b: D.Independent(D.Beta(positive(a), b), 1), None),
        "Gamma": (lambda a, b: D.Independent(D.Gamma(positive(a), b), 1), None),
    }
    choices = size + 1
    discrete = {
        "Categorical": lambda raw: D.Categorical(logits=raw),
        "Categorical(probs)": partial(as_probs, D.Categorical),
        "torch.OneHotCategorical": lambda raw: D.OneHotCategorical(logits=raw),
        "OneHotCategorical": lambda raw: OneHotCategorical(logits=raw),
        "MaskedCategorical": partial(masked, MaskedCategorical, mask),
        "MaskedOneHotCategorical": partial(masked, MaskedOneHotCategorical, mask),
        "MaskedCategorical(indices)": partial(with_indices, mask),
        "Ordinal": lambda raw: Ordinal(scores=raw),
        "Bernoulli": lambda raw: D.Independent(D.Bernoulli(logits=raw), 1),
    }
    return [
        *(
            Policy(name, 2 * size, partial(halves, build), batch_ndim)
            for name, (build, batch_ndim) in continuous.items()
        ),
        *(Policy(name, choices, build) for name, build in discrete.items()),
        Policy(
            "Independent(Categorical)",
            2 * choices,
            lambda raw: D.Independent(D.Categorical(logits=raw.unflatten(-1, (2, choices))), 1),
        ),
        Policy("CompositeDistribution", 10, partial(composite, mask)),
    ]


POLICY_NAMES = [policy.name for policy in all_policies(1, 0)]


def policy_named(name: str, size: int = 3, seed: int = 0) -> Policy:
    """One of :func:`all_policies`."""
    return next(policy for policy in all_policies(size, seed) if policy.name == name)


sizes = st.integers(1, 4)
seeds = st.integers(0, 2**16)
batches = st.lists(st.integers(1, 4), min_size=1, max_size=2).map(torch.Size)
