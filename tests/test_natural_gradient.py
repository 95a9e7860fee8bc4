"""Fisher-vector products against autograd Hessians, conjugate gradient against direct solvers."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import POLICY_NAMES, batches, policy_named, seeds, sizes
from problems import leaves_of, random_system
from torch import distributions as D
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchrl_happo.policy.distributions import kl_divergence
from torchrl_happo.steps.trust_region.linearize import linearizable
from torchrl_happo.steps.trust_region.natural_gradient import (
    conjugate_gradient,
    fisher_vector_product,
    flatten,
    gradient,
    unflatten,
)


def hessian_product(kl, parameters, vector):
    """Hessian of a scalar times a vector, by differentiating twice."""
    first = flatten(gradient([kl], parameters.values(), create_graph=True))
    return flatten(gradient([first], parameters.values(), [vector]))


# The kink of the Laplace divergence has no second derivative; its matrix is tested elsewhere.
@pytest.mark.parametrize("name", [n for n in POLICY_NAMES if n != "Laplace"])
@settings(max_examples=20)
@given(size=sizes, batch=batches, seed=seeds, share=st.sampled_from([None, 0.0, 0.5, 1.0]))
def test_fisher_product_is_the_hessian_of_the_mean_divergence(name, size, batch, seed, share):
    """To 1e-10 for every distribution, over shapes, action masks, bounds and validity masks."""
    policy = policy_named(name, size, seed)
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.LayerNorm(3), nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, policy.width)
    ).double()
    params = leaves_of(net)
    x = torch.randn(*batch, 3, dtype=torch.float64)
    new, old = policy.build(functional_call(net, params, (x,))), policy.build(net(x).detach())
    valid = None if share is None else torch.rand(batch) < share
    vector = torch.randn(sum(p.numel() for p in params.values()), dtype=torch.float64)
    kl = kl_divergence(old, new, batch_ndim=len(batch))
    kl = kl.mean() if valid is None else kl[valid].sum() / valid.sum().clamp_min(1)
    expected = hessian_product(kl, params, vector)
    with linearizable():
        dist = policy.build(functional_call(net, params, (x,)))
    product = fisher_vector_product(dist, params, valid=valid, batch_ndim=len(batch))(vector)
    torch.testing.assert_close(product, expected, rtol=1e-10, atol=1e-10)


def gru():
    return nn.GRU(3, 4, batch_first=True), lambda out: out[0]


class Packed(nn.Module):
    """Packs six sequences of unlike lengths, as TorchRL does where episodes end within a row."""

    lengths = torch.tensor([1, 5, 3, 5, 4, 1])

    def __init__(self, memory, state_of):
        super().__init__()
        self.memory, self.state_of = memory, state_of
        self.first = nn.Parameter(torch.randn(2, 6, 4))

    def forward(self, x):
        pack = nn.utils.rnn.pack_padded_sequence
        packed = pack(x, self.lengths, batch_first=True, enforce_sorted=False)
        out, last = self.memory(packed, self.state_of(self.first))
        out, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
        lasts = last if isinstance(last, tuple) else (last,)
        return torch.cat([out, *(last.transpose(0, 1) for last in lasts)], 1)


def packed_gru():
    return Packed(nn.GRU(3, 4, num_layers=2, batch_first=True), lambda s: s), lambda out: out


def packed_lstm():
    memory = nn.LSTM(3, 4, num_layers=2, batch_first=True)
    return Packed(memory, lambda s: (s, 2 * s)), lambda out: out


def attention():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(3, 4), layer), lambda out: out


def normalised(**kwargs):
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4, **kwargs), nn.ReLU()), lambda out: out


def normalised_over_two_dimensions():
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm([5, 4])), lambda out: out


@pytest.mark.parametrize(
    "make",
    [
        gru,
        packed_gru,
        packed_lstm,
        attention,
        normalised,
        partial(normalised, bias=False),
        partial(normalised, elementwise_affine=False),
        normalised_over_two_dimensions,
    ],
)
def test_fisher_product_of_networks_with_fused_kernels(make):
    """Whole and packed sequences through memories, attention, layer norms: the autograd Hessian.

    The outputs and the first gradient in the same context are torch's own.
    """
    torch.manual_seed(0)
    net, read = make()
    net = net.double()
    params = leaves_of(net)
    x = torch.randn(6, 5, 3, dtype=torch.float64)

    def policy():
        return D.Categorical(logits=read(functional_call(net, params, (x,))))

    with sdpa_kernel(SDPBackend.MATH):
        plain = policy()
    with linearizable():
        dist = policy()
    old = D.Categorical(logits=plain.logits.detach())
    vector = torch.randn(sum(p.numel() for p in params.values()), dtype=torch.float64)
    expected = hessian_product(kl_divergence(old, plain).mean(), params, vector)
    product = fisher_vector_product(dist, params)(vector)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(dist.logits, plain.logits, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(product, expected, rtol=1e-9, atol=1e-12)
    for ours, torchs in zip(
        gradient([dist.logits[..., 0].sum()], params.values()),
        gradient([plain.logits[..., 0].sum()], params.values()),
        strict=True,
    ):
        torch.testing.assert_close(ours, torchs, rtol=1e-9, atol=1e-12)


def test_fisher_product_of_parameters_that_do_nothing_is_zero():
    """Unused parameters, and a distribution that depends on no parameter at all."""
    used, unused = (torch.ones(2, requires_grad=True) for _ in range(2))
    dist = D.Normal(used.expand(3, 2), torch.ones(3, 2))
    matvec = fisher_vector_product(dist, {"unused": unused, "used": used}, batch_ndim=1)
    assert matvec(torch.ones(4)).tolist() == [0, 0, 1, 1]
    constant = D.Normal(torch.zeros(3, 2), torch.ones(3, 2))
    assert fisher_vector_product(constant, {"unused": unused})(torch.ones(2)).tolist() == [0, 0]


def test_fisher_product_needs_no_surrounding_gradient_mode():
    """Made and used under ``torch.no_grad()``, it is the same."""
    logits = torch.randn(5, 3, requires_grad=True)
    dist, v = torch.distributions.Categorical(logits=logits), torch.randn(15)
    expected = fisher_vector_product(dist, {"logits": logits})(v)
    with torch.no_grad():
        got = fisher_vector_product(dist, {"logits": logits})(v)
    assert expected.any()
    assert torch.equal(got, expected)


def test_fisher_product_ignores_what_is_not_valid():
    """Samples that do not count may even hold NaN."""
    loc = torch.zeros(2, requires_grad=True)
    spread = torch.tensor([1.0, math.nan])
    matvec = fisher_vector_product(
        D.Normal(loc, spread), {"loc": loc}, valid=torch.tensor([True, False])
    )
    assert matvec(torch.ones(2)).tolist() == [1, 0]


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


@given(size=st.integers(1, 12), seed=seeds, damping=st.sampled_from([0.0, 0.1, 10.0]))
def test_damping_is_added_to_the_diagonal(size, seed, damping):
    """The same as a matrix that has it already."""
    a, b = random_system(size, seed)
    expected = conjugate_gradient((a + damping * torch.eye(size).to(a)).mv, b)
    for mine, theirs in zip(conjugate_gradient(a.mv, b, damping=damping), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


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


def test_of_nothing_there_is_no_gradient():
    """No parameters: no gradient, and a vector without entries."""
    x = torch.ones(2, requires_grad=True)
    assert gradient([x.sum()], []) == []
    assert flatten([]).shape == (0,)


def test_flatten_and_unflatten_are_inverse():
    """Names, shapes (scalars too) and order survive."""
    tensors = {"b": torch.randn(2, 3), "a": torch.randn(()), "c": torch.randn(1)}
    vector = flatten(tensors.values())
    assert vector.shape == (8,)
    restored = unflatten(vector, tensors)
    assert list(restored) == list(tensors)
    assert all(torch.equal(restored[name], tensors[name]) for name in tensors)
