"""Saturation: which stored actions cannot be scored as they were sampled."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from policies import all_policies
from team import make_actor, make_batch, perturb
from tensordict import TensorDict
from tensordict.nn import CompositeDistribution, TensorDictModule
from torch import distributions as D
from torch import nn
from torchrl.modules import ProbabilisticActor, TanhNormal
from wrong_calls import stack

from torchrl_happo import HAPPOLoss
from torchrl_happo.policy.distributions import is_saturated


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_actions_are_those_near_a_bound_of_their_dimension(dtype):
    """Per dimension: either bound, beyond it, and both sides of the threshold sqrt(eps)."""
    low = torch.tensor([-1.0, 0.0, -1e-5], dtype=dtype)
    high = torch.tensor([1.0, 10.0, 1e-5], dtype=dtype)
    middle, half = (high + low) / 2, (high - low) / 2
    dist = TanhNormal(
        torch.zeros(1, 3, dtype=dtype), torch.ones(1, 3, dtype=dtype), low=low, high=high
    )
    threshold = math.sqrt(torch.finfo(dtype).eps)
    for distance, expected in (
        (0.0, True),
        (-0.1, True),
        (threshold / 2, True),
        (2 * threshold, False),
    ):
        for side in (-1, 1):
            for dim in range(3):
                y = torch.zeros(1, 3, dtype=dtype)
                y[0, dim] = side * (1 - distance)
                assert is_saturated(dist, middle + half * y).tolist() == [expected]
    assert is_saturated(dist, middle.unsqueeze(0)).tolist() == [False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_actions_that_are_not_saturated_are_scored_as_they_were_sampled(dtype):
    """The log-probability that TorchRL gives a fresh action is found again from the stored one.

    Of the saturated actions some are scored differently by more than a nat.
    """
    loc = torch.linspace(-8, 8, 20_001, dtype=dtype).unsqueeze(-1)
    if dtype == torch.float64:
        loc = loc * 3
    dist = TanhNormal(loc, torch.full_like(loc, 0.3), low=-3.0, high=1.0)
    action, fresh = dist.sample_and_log_prob()
    error = (dist.log_prob(action) - fresh).abs()
    saturated = is_saturated(dist, action)
    assert saturated.any()
    assert error[~saturated].max() < 30 * math.sqrt(torch.finfo(dtype).eps)
    assert error[saturated].max() > 1


def test_other_distributions_are_never_saturated():
    """False of the batch's shape, whatever the type of the action."""
    for policy in all_policies(2, 0):
        if "Tanh" in policy.name or policy.name == "CompositeDistribution":
            continue
        dist = policy.build(torch.randn(4, policy.width))
        flags = is_saturated(dist, dist.sample(), batch_ndim=1)
        assert flags.dtype == torch.bool
        assert flags.tolist() == [False] * 4


def test_a_composite_is_saturated_where_a_component_is():
    """Nested names and event_dims=0 are followed."""
    params = TensorDict(
        {
            "move": {"loc": torch.zeros(2, 3), "scale": torch.ones(2, 3)},
            ("talk", "word"): {"logits": torch.zeros(2, 4)},
        },
        batch_size=[2],
    )
    dist = CompositeDistribution(
        params,
        {"move": TanhNormal, ("talk", "word"): D.Categorical},
        extra_kwargs={"move": {"event_dims": 0}},
    )
    move = torch.zeros(2, 3)
    move[1, 2] = 1.0
    action = TensorDict({"move": move, ("talk", "word"): torch.zeros(2, dtype=torch.long)}, [2])
    assert is_saturated(dist, action).tolist() == [False, True]


def composite_actor():
    """Agents that move within bounds and say a word."""
    kinds = {("agents", "action", "move"): TanhNormal, ("agents", "action", "word"): D.Categorical}
    leaves = [("move", "loc"), ("move", "scale"), ("word", "logits")]

    def heads(net):
        loc, scale, logits = net.split([2, 2, 3], -1)
        return loc, scale.exp(), logits

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = stack(n_agent_outputs=7)

        def forward(self, observation):
            return heads(self.net(observation))

    return ProbabilisticActor(
        TensorDictModule(
            Heads(),
            in_keys=[("agents", "observation")],
            out_keys=[("agents", "params", "agents", "action", *leaf) for leaf in leaves],
        ),
        in_keys=[("agents", "params")],
        out_keys=list(kinds),
        distribution_class=CompositeDistribution,
        distribution_kwargs={"distribution_map": kinds},
        return_log_prob=True,
    )


@pytest.mark.parametrize(
    "build",
    [
        make_actor,
        partial(make_actor, distribution_kwargs={"tanh_loc": True}),
        partial(make_actor, distribution_kwargs={"event_dims": 0}),
        composite_actor,
    ],
    ids=["default", "tanh_loc", "event_dims=0", "composite"],
)
def test_a_policy_compared_with_itself_has_ratio_one(build):
    """Whatever form of squashed normal it is, and however often it draws actions at its bounds.

    Against the log-probabilities that were stored it would be far from that.
    """
    actor = build()
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.mul_(6)
    batch = make_batch(actor, num_envs=40, time=10)
    loss = HAPPOLoss(actor, None, entropy_coeff=0.0)
    worst = 0.0
    for agent in loss.agents:
        data = agent.view(batch, agent.update_keys)
        with torch.no_grad():
            parameters = agent.policy.parameters(data)
            agent.policy.prepare(data)
            new = agent.log_prob(parameters, data)
            old = agent.behaviour_log_prob(data, new)
        torch.testing.assert_close(new, old, rtol=0, atol=0.05)
        worst = max(worst, (agent.stored_log_prob(data) - new).abs().max().item())
    assert worst > 0.5


@pytest.mark.parametrize("parameters", [True, False])
def test_who_scores_saturated_actions(parameters):
    """The policy that acted, if the data has its parameters; else the present one, if it is given.

    What is not saturated keeps the log-probability that the collector has stored.
    """
    actor = make_actor(distribution=TanhNormal).double()
    batch = make_batch(actor)
    batch["agents", "action"][0] = 1.0
    agent = HAPPOLoss(actor, None).agents[1]
    with torch.no_grad():
        acted = actor.get_dist(batch.copy()).log_prob(batch["agents", "action"])[..., 1]
        perturb(actor)
        current = actor.get_dist(batch.copy()).log_prob(batch["agents", "action"])[..., 1]
    if not parameters:
        batch = batch.exclude(("agents", "loc"), ("agents", "scale"))
    keys = [("agents", name) for name in ("observation", "action", "action_log_prob")]
    data = agent.view(batch, [*keys, *agent.policy.parameter_keys])
    stored = batch["agents", "action_log_prob"][..., 1]
    for given in (None, current):
        got = agent.behaviour_log_prob(data, given)
        assert torch.equal(got[1:], stored[1:])
        if parameters:
            torch.testing.assert_close(got[0], acted[0])
        else:
            assert torch.equal(got[0], (stored if given is None else current)[0])
