"""Small policy-improvement problems for the trust region."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor
from torch import distributions as D
from torch import nn
from torch.func import functional_call
from torchrl.modules import IndependentNormal, MaskedCategorical, TanhNormal

from torchrl_happo.distributed import own_mean
from torchrl_happo.steps import Problem, TrustRegion
from torchrl_happo.steps.trust_region.natural_gradient import unflatten
from torchrl_happo.steps.trust_region.solve import find_direction, take_step


def leaves_of(module):
    """Copies of a module's parameters that require a gradient."""
    return {k: p.detach().clone().requires_grad_() for k, p in module.named_parameters()}


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


def random_system(size, seed):
    """A positive definite matrix and a vector."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = root @ root.T / size + torch.eye(size, dtype=torch.float64)
    return matrix, torch.randn(size, generator=generator, dtype=torch.float64)


def trust_region_step(
    distribution_fn,
    surrogate_fn,
    params,
    settings=None,
    *,
    valid=None,
    batch_ndim=None,
    generator=None,
    average=own_mean,
):
    """The trust-region step of a policy at rows of a batch: new parameters, and what happened.

    ``params`` are named tensors, of which those that require a gradient are moved.
    """
    shape = distribution_fn(params, None).batch_shape[:batch_ndim]
    data = TensorDict({"row": torch.arange(shape[0])}, shape[:1])
    if valid is not None:
        data["valid"] = valid
    problem = Problem(
        "agent",
        loss=lambda data: -surrogate_fn(distribution_fn(params, None)),
        named_parameters=params.items,
        distribution=lambda values, part: distribution_fn(
            values, None if part is data else part["row"]
        ),
        surrogate=lambda dist, data: surrogate_fn(dist),
        sample_shape=lambda part: torch.Size([len(part), *shape[1:]]),
        learners=SimpleNamespace(mean=average),
        generator=generator,
    )
    step = (settings or TrustRegion())(problem)
    moved, result = step.propose(data).take()
    return {**params, **unflatten(moved, step.trained())}, result


def step_within_trust_region(theta, model, evaluate, settings, *, average=own_mean):
    """The same for a policy that is known by its local model."""
    settings = dataclasses.asdict(settings)
    direction = {name: settings.pop(name) for name in ("damping", "cg_iterations", "cg_tolerance")}
    del settings["fisher_fraction"]
    settings["line_search"] = settings["line_search"] or "sequential"
    model = model.common(average)
    found = find_direction(model, **direction)
    return take_step(theta, model, found, evaluate, average=average, **settings)
