"""Every way to collect: workers act with the policy that was trained last."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from recipe_helpers import tiny_config

from torchrl_happo.recipe.algorithms import make_learner
from torchrl_happo.recipe.collection import Batches
from torchrl_happo.recipe.environments import make_env

pytest.importorskip("vmas")
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
every_way = pytest.mark.skipif(
    "EVERY_COLLECTOR" not in os.environ, reason="processes take long to start: EVERY_COLLECTOR=1"
)

WAYS = [
    ("single",),
    pytest.param(("multi",), marks=pytest.mark.slow),
    pytest.param(("multi", "collector.sync=false"), marks=pytest.mark.slow),
    pytest.param(("distributed",), marks=pytest.mark.slow),
    pytest.param(("distributed", "collector.sync=false"), marks=[pytest.mark.slow, every_way]),
    pytest.param(("ray",), marks=[pytest.mark.slow, needs_ray]),
    pytest.param(("ray", "collector.sync=false"), marks=[pytest.mark.slow, needs_ray, every_way]),
]


@pytest.fixture(autouse=True)
def without_tokens(monkeypatch):
    """Lets Ray write nothing into the home folder."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


def acted_with(policy, batch):
    """Whether a batch was collected by the policy as it is now."""
    with torch.no_grad():
        now = policy(batch.select(("agents", "observation")))
    return torch.allclose(now["agents", "loc"], batch["agents", "loc"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_the_policy_reaches_the_workers(way, request):
    """A batch of one shape, whoever collects; the next one is the new policy's.

    Asynchronous workers may have batches of the old policy under way: it reaches them after that.
    ``multi`` starts its workers as a user's run does, by ``spawn``.
    """
    kind, *overrides = way
    if way != ("multi",):
        request.getfixturevalue("quick_workers")
    config = tiny_config(f"collector={kind}", *overrides)
    policy = make_learner(config, make_env(config.task, num_envs=1, seed=0)).policy
    batches = Batches(config, policy)
    waits = 4 if overrides else 0
    shape = (2, 12) if overrides else (4, 6)
    try:
        batches.restart(0)
        first = batches.next()
        assert first.shape == shape
        assert acted_with(policy, first)
        for _ in range(2):
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            batches.policy_changed()
            fresh = [acted_with(policy, batches.next()) for _ in range(waits + 1)]
            assert fresh[-1]
    finally:
        batches.close()
    if kind == "ray":
        import ray

        assert not ray.is_initialized()
    assert not torch.distributed.is_initialized()
