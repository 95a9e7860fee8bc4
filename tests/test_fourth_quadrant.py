r"""Why the agents take turns: the game r = a1 a2, started in the fourth quadrant.

The last part of the theory (see ``test_theory.py``), and the smallest game that shows it. With the
first agent's mean action above zero and the second's below, the first had better come down and
the second climb. If both do, by more than twice their distance from the origin, they meet further
out in the second quadrant and have lost.
"""

from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from effort import effort
from exact import TabularTeam, exact_updater
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule
from torch import nn
from torchrl.modules import IndependentNormal, MultiAgentMLP, ProbabilisticActor

from torchrl_happo import HAPPOLoss, HATRPOLoss
from torchrl_happo.envs import TabularGame
from torchrl_happo.update.correction import RatioFactor


@contextmanager
def without_factor():
    """Takes the factor out of the updater: every agent steps against the others' old policies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RatioFactor, "include", lambda *args: None)
        yield


class GaussianTeam:
    """Two agents on r = a1 a2 with normal policies of scale 1, in expectation.

    J is the product of the means. The batch is a grid of Gauss-Hermite nodes, on which the
    expectations of the updates are exact to rounding.
    """

    def __init__(self, means):
        net = MultiAgentMLP(
            n_agent_inputs=1,
            n_agent_outputs=1,
            n_agents=2,
            centralized=False,
            share_params=False,
            depth=0,
        ).double()
        with torch.no_grad():
            net.params["0", "weight"].zero_()
            net.params["0", "bias"].copy_(torch.tensor(means).reshape(2, 1))
        scale = AddStateIndependentNormalScale((2, 1), scale_mapping="exp").double()
        scale.requires_grad_(False)
        keys = [("agents", "loc"), ("agents", "scale")]
        self.actors = ProbabilisticActor(
            TensorDictModule(
                nn.Sequential(net, scale), in_keys=[("agents", "observation")], out_keys=keys
            ),
            in_keys=keys,
            out_keys=[("agents", "action")],
            distribution_class=IndependentNormal,
            return_log_prob=True,
        )

    @torch.no_grad()
    def means(self):
        data = TensorDict({"agents": {"observation": torch.ones(2, 1).double()}}, [])
        return self.actors.get_dist(data).mean.squeeze(-1)

    @torch.no_grad()
    def batch(self):
        nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(48))
        weights = weights / weights.sum()
        means = self.means()
        action = torch.cartesian_prod(means[0] + nodes, means[1] + nodes)
        weight = torch.cartesian_prod(weights, weights).prod(-1)
        shape = [len(action), 2]
        data = TensorDict({"agents": TensorDict({}, shape)}, shape[:1])
        data["agents", "observation"] = torch.ones(*shape, 1).double()
        data["agents", "action"] = action.unsqueeze(-1)
        dist = self.actors.get_dist(data)
        data["agents", "action_log_prob"] = dist.log_prob(data["agents", "action"])
        advantage = action.prod(-1) - means.prod()
        data["advantage"] = (len(action) * weight * advantage).unsqueeze(-1)
        return data

    def expected_return(self):
        return self.means().prod().item()


class SignTeam(TabularTeam):
    """The same with the actions -1 and 1, and tables of logits. J is the product of the means."""

    def __init__(self, means):
        payoff = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        policies = [torch.tensor([[(1 - m) / 2, (1 + m) / 2]]).double() for m in means]
        super().__init__(TabularGame.one_step(payoff), policies)

    def expected_return(self):
        return self.game.expected_return(self.policies()).item()


@pytest.mark.parametrize("team_class", [GaussianTeam, SignTeam], ids=["normal", "signs"])
@effort(20)
@given(st.floats(-4, -2), st.floats(0.05, 0.45), st.integers(0, 9))
def test_one_after_the_other(team_class, log_kl, share, seed):
    """On r = a1 a2, from (m, -m), this library's HATRPO raises the return, whoever goes first."""
    mean = share * math.sqrt(2 * 10**log_kl)
    team = team_class([mean, -mean])
    updater = exact_updater(HATRPOLoss(team.actors, None, max_kl=10**log_kl), seed=seed)
    metrics = updater(team.batch())
    assert all(metrics[f"agents_{i}", "line_search_success"] for i in range(2))
    assert team.expected_return() > 0 > -(mean**2)


@pytest.mark.parametrize("team_class", [GaussianTeam, SignTeam], ids=["normal", "signs"])
@effort(20)
@given(st.floats(-4, -2), st.floats(0.05, 0.45))
def test_at_the_same_time(team_class, log_kl, share):
    """Without the factor the same update lowers it.

    The first agent goes down, the second climbs, and each is right as long as the other stays.
    Trust regions do not prevent it: however small one is, there are starts nearer to the origin
    than half its radius.
    """
    mean = share * math.sqrt(2 * 10**log_kl)
    team = team_class([mean, -mean])
    updater = exact_updater(HATRPOLoss(team.actors, None, max_kl=10**log_kl))
    with without_factor():
        metrics = updater(team.batch())
    for agent in ("agents_0", "agents_1"):
        assert metrics[agent, "surrogate"] > metrics[agent, "surrogate_before"]
    assert team.expected_return() < -(mean**2)


@pytest.mark.parametrize("team_class", [GaussianTeam, SignTeam], ids=["normal", "signs"])
@pytest.mark.parametrize("seed", range(4))
def test_happo(team_class, seed):
    """HAPPO does the same: with the factor it leaves the quadrant for good, without it it loses."""
    returns = {}
    for with_factor in (True, False):
        team = team_class([0.02, -0.02])
        updater = exact_updater(HAPPOLoss(team.actors, None, entropy_coeff=0.0), seed=seed)
        with nullcontext() if with_factor else without_factor():
            updater(team.batch())
        returns[with_factor] = team.expected_return()
    assert returns[True] > 0
    assert returns[False] < -(0.02**2)
