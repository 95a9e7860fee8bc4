"""Divergences, Fisher matrices and entropies, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policies import POLICY_NAMES, batches, policy_named, seeds, sizes
from tensordict import is_tensor_collection
from torch import distributions as D
from torchrl.modules import (
    IndependentNormal,
    MaskedCategorical,
    MaskedOneHotCategorical,
    TanhNormal,
    TruncatedNormal,
)

from torchrl_happo.policy.distributions import entropy, kl_divergence
from torchrl_happo.policy.fisher import distribution_parameters, fisher_product
from torchrl_happo.steps.trust_region.natural_gradient import fisher_vector_product

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
names = st.sampled_from(POLICY_NAMES)


def draw(policy, batch, seed):
    """Raw outputs of an old and of a new network."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(*batch, policy.width, generator=generator, dtype=torch.float64)
    return raw, raw + 0.3 * torch.randn(raw.shape, generator=generator, dtype=torch.float64)


def samples_of(policy, batch):
    """What ``batch_ndim`` has to be for the policy."""
    return len(batch) if policy.batch_ndim == -1 else None


def log_prob_of(dist, action):
    """Log-probability of one batch dimension, summed over action dimensions and components."""
    log_prob = dist.log_prob(action)
    if is_tensor_collection(log_prob):
        parts = list(log_prob.values(include_nested=True, leaves_only=True))
    else:
        parts = [log_prob]
    return torch.stack([part.reshape(len(part), -1).sum(-1) for part in parts]).sum(0)


def assert_mean(values, expected, errors=5):
    """The mean over the first dimension lies within some standard errors of the expected one."""
    deviation = (values - expected).mean(0).abs()
    assert (deviation <= errors * values.std(0) / math.sqrt(len(values)) + 1e-9).all()


# -- divergence --------------------------------------------------------------------------------


@given(name=names, size=sizes, batch=batches, seed=seeds)
def test_divergence_is_one_non_negative_number_per_sample(name, size, batch, seed):
    """Zero from a policy to itself, positive to another, of the batch's shape for all kinds."""
    policy = policy_named(name, size, seed)
    old, new = (policy.build(raw) for raw in draw(policy, batch, seed))
    ndim = samples_of(policy, batch)
    kl = kl_divergence(old, new, batch_ndim=ndim)
    assert kl.shape == batch
    assert kl.dtype == torch.float64
    assert (kl >= 0).all()
    assert (kl_divergence(old, old, batch_ndim=ndim).abs() < 1e-12).all()


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_divergence_is_the_expected_log_ratio(name):
    """Within five standard errors of the average over 100000 samples of the old policy."""
    policy = policy_named(name, seed=5)
    old, new = (policy.build(raw.expand(100_000, -1)) for raw in draw(policy, torch.Size([1]), 5))
    action = old.sample()
    log_ratio = log_prob_of(old, action) - log_prob_of(new, action)
    assert_mean(log_ratio, kl_divergence(old, new, batch_ndim=1))


@given(size=sizes, batch=batches, seed=seeds)
def test_divergence_of_categoricals_is_the_weighted_sum_of_log_ratios(size, batch, seed):
    """The old policy's probabilities weight the log-ratios: the sum over actions is written out."""
    policy = policy_named("Categorical", size, seed)
    old, new = (policy.build(raw) for raw in draw(policy, batch, seed))
    expected = sum(
        old.probs[..., a] * (old.probs[..., a].log() - new.probs[..., a].log())
        for a in range(size + 1)
    )
    torch.testing.assert_close(kl_divergence(old, new), expected, **CLOSE)


def test_divergence_of_a_peaked_categorical():
    """0.0031 nats; unweighted, the log-ratios would add up to a hundred times as much."""
    old = D.Categorical(probs=torch.tensor([0.98, 0.01, 0.01]))
    new = D.Categorical(probs=torch.tensor([0.97, 0.02, 0.01]))
    expected = 0.98 * math.log(0.98 / 0.97) + 0.01 * math.log(0.5)
    torch.testing.assert_close(kl_divergence(old, new), torch.tensor(expected), rtol=1e-4, atol=0)


@given(seed=seeds, one_hot=st.booleans(), neg_inf=st.sampled_from([-math.inf, -1e10]))
def test_masked_actions_do_not_exist(seed, one_hot, neg_inf):
    """Divergence, entropy and their gradients are those of the categorical of allowed actions."""
    generator = torch.Generator().manual_seed(seed)
    old_logits, new_logits = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(6, generator=generator) < 0.5
    mask[seed % 6] = True
    kind = MaskedOneHotCategorical if one_hot else MaskedCategorical
    full = new_logits.clone().requires_grad_()
    kl = kl_divergence(
        kind(logits=old_logits, mask=mask, neg_inf=neg_inf),
        kind(logits=full, mask=mask, neg_inf=neg_inf),
    )
    h = entropy(kind(logits=full, mask=mask, neg_inf=neg_inf))
    part = new_logits[mask].clone().requires_grad_()
    kl_part = kl_divergence(D.Categorical(logits=old_logits[mask]), D.Categorical(logits=part))
    h_part = entropy(D.Categorical(logits=part))
    torch.testing.assert_close(kl, kl_part, **CLOSE)
    torch.testing.assert_close(h, h_part, **CLOSE)
    (grad,) = torch.autograd.grad(kl + h, full)
    (grad_part,) = torch.autograd.grad(kl_part + h_part, part)
    torch.testing.assert_close(grad[mask], grad_part, **CLOSE)
    assert (grad[~mask] == 0).all()


def test_gradient_with_respect_to_the_old_policy_is_finite_under_a_mask():
    """0 * inf appears neither in the value nor in either gradient."""
    mask = torch.tensor([True, True, False])
    old, new = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    kl = kl_divergence(
        MaskedCategorical(logits=old, mask=mask), MaskedCategorical(logits=new, mask=mask)
    )
    for gradient in torch.autograd.grad(kl, [old, new]):
        assert gradient.isfinite().all()


def test_divergence_is_infinite_where_the_new_policy_excludes_an_action():
    """An action that only the old policy takes makes the divergence infinite."""
    old = MaskedCategorical(logits=torch.zeros(2), mask=torch.tensor([True, True]))
    new = MaskedCategorical(logits=torch.zeros(2), mask=torch.tensor([True, False]))
    assert kl_divergence(old, new) == math.inf


@given(size=sizes, batch=batches, seed=seeds)
def test_squashing_cancels(size, batch, seed):
    """A TanhNormal has the divergence and the Fisher matrix of its base, whatever the bounds."""
    squashed = policy_named("TanhNormal(bounds)", size, seed)
    base = policy_named("IndependentNormal", size, seed)
    raws = draw(squashed, batch, seed)
    old, new = (squashed.build(raw) for raw in raws)
    base_old, base_new = (base.build(raw) for raw in raws)
    torch.testing.assert_close(kl_divergence(old, new), kl_divergence(base_old, base_new), **CLOSE)
    tangents = [torch.randn_like(p) for p in distribution_parameters(old)]
    for a, b in zip(fisher_product(old, tangents), fisher_product(base_old, tangents), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_composite_is_the_sum_of_its_components():
    """Divergence and entropy add up, over nested names, dimensions and kinds."""
    policy = policy_named("CompositeDistribution")
    old, new = (policy.build(raw) for raw in draw(policy, torch.Size([2, 3]), 0))
    kl, h = 0.0, 0.0
    for key in old.dists:
        kl = kl + kl_divergence(old.dists[key], new.dists[key], batch_ndim=2)
        h = h + entropy(old.dists[key], batch_ndim=2)
    torch.testing.assert_close(kl_divergence(old, new), kl, **CLOSE)
    torch.testing.assert_close(entropy(old), h, **CLOSE)


def test_batch_ndim_sums_the_action_of_a_bare_normal():
    """As large as the divergence of the IndependentNormal that has the dimensions in its event."""
    loc, scale = torch.randn(4, 3, 2), torch.rand(4, 3, 2) + 0.1
    bare, independent = D.Normal(loc, scale), IndependentNormal(loc, scale)
    other, independent_other = D.Normal(loc + 1, scale), IndependentNormal(loc + 1, scale)
    assert kl_divergence(bare, other).shape == (4, 3, 2)
    torch.testing.assert_close(
        kl_divergence(bare, other, batch_ndim=2), kl_divergence(independent, independent_other)
    )
    torch.testing.assert_close(entropy(bare, batch_ndim=2), entropy(independent))


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        (TruncatedNormal(torch.zeros(1), torch.ones(1)),) * 2 + ("TruncatedNormal",),
        (D.StudentT(torch.ones(1)),) * 2 + ("StudentT",),
        (D.Categorical(torch.ones(2)), D.Bernoulli(torch.ones(2) / 2), "Categorical to Bernoulli"),
        (
            D.TransformedDistribution(D.Normal(0.0, 1.0), D.AffineTransform(0.0, 1.0)),
            D.TransformedDistribution(D.Normal(0.0, 1.0), D.AffineTransform(1.0, 1.0)),
            "TransformedDistribution",
        ),
    ],
    ids=["truncated", "student", "mixed", "unlike transforms"],
)
def test_an_unknown_divergence_is_an_error_that_names_the_distribution(old, new, name):
    """No estimate takes the place of a divergence that is not known."""
    with pytest.raises(NotImplementedError, match=name):
        kl_divergence(old, new)


# -- Fisher matrix -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_fisher_matrix_is_the_covariance_of_the_score(name):
    """J^T M J t against the average of score (score . t), in the network's raw outputs.

    Within five standard errors over 100000 samples.
    """
    policy = policy_named(name, size=2, seed=3)
    raw = draw(policy, torch.Size([1]), 3)[0].repeat(100_000, 1).requires_grad_()
    dist = policy.build(raw)
    tangent = torch.randn(1, policy.width, dtype=torch.float64).expand_as(raw)
    matvec = fisher_vector_product(dist, {"raw": raw}, batch_ndim=1)
    product = len(raw) * matvec(tangent.flatten()).view_as(raw)
    (score,) = torch.autograd.grad(log_prob_of(dist, dist.sample()).sum(), raw)
    assert_mean(score * (score * tangent).sum(-1, keepdim=True), product)


@given(name=names, size=sizes, batch=batches, seed=seeds)
def test_fisher_matrix_is_symmetric_and_positive(name, size, batch, seed):
    """u.Mv equals v.Mu, and v.Mv is not negative, in every sample."""
    policy = policy_named(name, size, seed)
    dist = policy.build(draw(policy, batch, seed)[0])
    parameters = distribution_parameters(dist)
    u, v = ([torch.randn_like(p) for p in parameters] for _ in range(2))
    products = [fisher_product(dist, tangents) for tangents in (u, v)]

    def dot(a, b):
        return sum((x * y).sum() for x, y in zip(a, b, strict=True))

    torch.testing.assert_close(dot(v, products[0]), dot(u, products[1]), rtol=1e-9, atol=1e-9)
    assert dot(u, products[0]) >= -1e-9


def test_masked_actions_have_no_fisher_information():
    """The product is exactly zero at masked actions, even for an infinite tangent there."""
    mask = torch.tensor([True, False, True])
    dist = MaskedCategorical(logits=torch.randn(3), mask=mask)
    (product,) = fisher_product(dist, [torch.tensor([1.0, -math.inf, 2.0])])
    assert product[1] == 0
    assert product.isfinite().all()


def test_fisher_product_counts_its_tangents():
    """Too few tangents are an error, not a shorter product."""
    with pytest.raises(ValueError, match="2 parameters of the Normal, got 1"):
        fisher_product(D.Normal(0.0, 1.0), [torch.tensor(1.0)])


# -- entropy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_entropy_is_the_expected_negative_log_probability(name):
    """Within five standard errors of the average over 100000 samples."""
    policy = policy_named(name, seed=7)
    dist = policy.build(draw(policy, torch.Size([1]), 7)[0].expand(100_000, -1))
    assert_mean(-log_prob_of(dist, dist.sample()), entropy(dist, batch_ndim=1))


@pytest.mark.parametrize(
    ("scale", "tolerance"), [(0.01, 1e-8), (0.5, 1e-8), (1.0, 1e-8), (2.0, 1e-5), (3.0, 5e-4)]
)
def test_entropy_of_a_squashed_normal(scale, tolerance):
    """Value and gradients against a quadrature of 4001 nodes, at means up to +-4."""
    loc = torch.linspace(-4, 4, 33, dtype=torch.float64).unsqueeze(-1).requires_grad_()
    sigma = torch.full_like(loc, scale, requires_grad=True)
    low, high = -2.0, 5.0
    h = entropy(TanhNormal(loc, sigma, low=low, high=high))
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    u = loc + sigma * z
    slope = 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u))
    weights = (-z.square() / 2).exp()
    exact = (
        (sigma * math.sqrt(2 * math.pi * math.e)).log().squeeze(-1)
        + math.log((high - low) / 2)
        + (slope * weights).sum(-1) / weights.sum()
    )
    torch.testing.assert_close(h, exact, rtol=0, atol=tolerance)
    for gradient, expected in zip(
        torch.autograd.grad(h.sum(), [loc, sigma]),
        torch.autograd.grad(exact.sum(), [loc, sigma]),
        strict=True,
    ):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=20 * tolerance)


def test_entropy_of_a_squashed_normal_stays_finite_far_out():
    """Means where the tanh is 1 in floating point lose no precision to log(0)."""
    h = entropy(TanhNormal(torch.tensor([[60.0]]), torch.tensor([[1.0]])))
    expected = 0.5 * math.log(2 * math.pi * math.e) + 2 * math.log(2) - 2 * 60.0
    torch.testing.assert_close(h, torch.tensor([expected]))


def test_an_unknown_entropy_is_an_error_that_names_the_distribution():
    """No estimate takes the place of an entropy that is not known."""
    with pytest.raises(NotImplementedError, match="TransformedDistribution"):
        entropy(D.TransformedDistribution(D.Normal(0.0, 1.0), D.SigmoidTransform()))
