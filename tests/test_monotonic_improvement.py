r"""Monotonic improvement, on games that are solved exactly, in double precision.

The third part of the theory (see ``test_theory.py``): agents that raise their terms of the joint
advantage one after the other raise the joint return.

Tried by hand (``TORCHRL_HAPPO_EXAMPLES=400``), none of which decreased the return:

- the bound: 25 600 games and pairs of joint policies, least slack 0 (-9e-16 with rounding);
- the exact step: 25 600 games, 128 000 iterations, smallest change 0 (-4e-16 with rounding);
- this library's step: 400 games, 1 200 iterations, smallest change 0;
- this library's HATRPO on one-step games: 400 games, 1 200 updates, smallest change 5e-4.

The exact step without the factor, on 25 600 one-step games: 2 722 decreases, the largest by 3.0.
"""

from __future__ import annotations

import logging
import math

import pytest
import torch
from effort import effort
from exact import TabularTeam, exact_updater, gain_of_turn, games, orders, shuffled
from hypothesis import given
from hypothesis import strategies as st
from problems import trust_region_step
from torch.distributions import Categorical

from torchrl_happo import HATRPOLoss
from torchrl_happo.steps import TrustRegion

logger = logging.getLogger(__name__)

gammas = st.one_of(st.just(0.0), st.floats(0, 0.99))


class Record:
    """How many updates were tried, and the smallest change of the joint return among them."""

    def __init__(self, record_property):
        self.record_property = record_property
        self.updates, self.games, self.smallest, self.decreased = 0, 0, math.inf, 0

    def add(self, change, *, new_games=0):
        self.updates += change.numel()
        self.games += new_games
        self.decreased += int((change < -1e-11).sum())
        self.smallest = min(self.smallest, change.min().item())

    def report(self):
        for name in ("games", "updates", "smallest", "decreased"):
            self.record_property(name, getattr(self, name))
        logger.info(
            "%d games, %d updates, smallest change %.2e, %d decreases",
            self.games,
            self.updates,
            self.smallest,
            self.decreased,
        )


@pytest.fixture
def record(record_property):
    """Shown by ``pytest --log-cli-level=INFO``, and kept in the report of ``--junitxml``."""
    record = Record(record_property)
    yield record
    record.report()


def penalty_coefficient(game, policies):
    r"""The theorem's :math:`C = 4 \gamma \max |A| / (1 - \gamma)^2`, ``[*G]``."""
    largest = game.advantage(policies).flatten(game.batch_dims).abs().amax(-1)
    return 4 * game.gamma * largest / (1 - game.gamma) ** 2


def kl_divergence(old, new):
    """Divergence of the tables in each state."""
    return (old * (old / new).log()).sum(-1)


def kl_ball_optimum(old, gain, radius):
    r"""The policy within a ball, :math:`KL(\pi \| \bar\pi) \le` radius, whose mean gain is largest.

    By Lagrange's multipliers it is :math:`\bar\pi \propto \pi / (\nu - gain)`, and its divergence
    falls from infinity to 0 as :math:`\nu` grows from the largest gain on: bisection in the
    logarithm of the distance.
    """
    short_of_best = gain.amax(-1, keepdim=True) - gain
    spread = short_of_best.amax(-1, keepdim=True).clamp_min(1e-300)

    def policy(log_distance):
        unnormalised = old / (log_distance.exp() * spread + short_of_best)
        return unnormalised / unnormalised.sum(-1, keepdim=True)

    near = torch.full_like((spread * radius), -30.0)
    far = -near
    for _ in range(40):
        middle = (near + far) / 2
        inside = kl_divergence(old, policy(middle)).unsqueeze(-1) <= radius
        near, far = torch.where(inside, near, middle), torch.where(inside, middle, far)
    return policy(far)


RADII = torch.logspace(-10, 1, 24, dtype=torch.double).reshape(-1, 1, 1)


def penalised_step(old, gain, penalty):
    """The step of the theorem: largest gain minus penalty times the largest divergence.

    Args:
        old: the agent's table, ``[*G, S, k]``.
        gain: what each action gains, weighted by the visits, ``[*G, S, k]``.
        penalty: ``[*G]``.

    Returns:
        the best among the optima of balls of several radii and the old policy itself, and its
        penalised gain, which is therefore not negative.
    """
    old, gain = old.unsqueeze(-3), gain.unsqueeze(-3)
    candidates = torch.cat([kl_ball_optimum(old, gain, RADII), old], -3)
    gains = ((candidates - old) * gain).sum((-1, -2))
    objective = gains - penalty.unsqueeze(-1) * kl_divergence(old, candidates).amax(-1)
    best, at = objective.max(-1)
    return torch.take_along_dim(candidates, at[..., None, None, None], -3).squeeze(-3), best


def sequential_sweep(game, old, order, *, step=penalised_step, see_others=True):
    """One iteration: each agent in turn steps, given the new policies of those before.

    Returns the new policies and the sum of the penalised gains.
    """
    penalty = penalty_coefficient(game, old)
    advantage, occupancy = game.advantage(old), game.occupancy(old)
    new, bound = list(old), 0.0
    for turn, agent in enumerate(order):
        others = [i for i in order if i != agent]
        followed = [new[i] if see_others and i in order[:turn] else old[i] for i in range(len(old))]
        gain = game.mean(advantage, followed, others).reshape(old[agent].shape)
        gain = gain * occupancy.unsqueeze(-1)
        new[agent], penalised = step(old[agent], gain, penalty)
        bound = bound + penalised
    return new, bound


BATCH = 64
batches_of_games = games(max_agents=3, gamma=gammas, batch_size=(BATCH,))


def test_the_bound_behind_the_theorem(record):
    r"""The joint return of *any* new policies is bounded from below by the old ones' data.

    In any order of the agents, with their terms :math:`L^{i_m}` of the joint advantage and
    :math:`C = 4 \gamma \max |A| / (1 - \gamma)^2`,

    .. math::
        J(\bar\pi) \ge J(\pi) + \sum_m (L^{i_m} - C \max_s KL(\pi^{i_m} \| \bar\pi^{i_m})).
    """

    @effort(30)
    @given(batches_of_games, orders, st.floats(-6, 0))
    def holds(game_and_policies, source, log_distance):
        game, old = game_and_policies
        order = shuffled(game.n_agents, source)
        other = game.random_policies(generator=torch.Generator().manual_seed(1))
        share = 10**log_distance
        new = [(1 - share) * p + share * q for p, q in zip(old, other, strict=True)]
        gains = [gain_of_turn(game, old, new, order, turn) for turn in range(len(order))]
        divergences = [kl_divergence(p, q).amax(-1) for p, q in zip(old, new, strict=True)]
        bound = sum(gains) - penalty_coefficient(game, old) * sum(divergences)
        slack = game.expected_return(new) - game.expected_return(old) - bound
        record.add(slack, new_games=BATCH)
        assert slack.min() >= -1e-11

    holds()


def test_monotonic_improvement(record):
    """The theorem: under the penalised step the joint return never decreases.

    Each example is a batch of games of one size, each played for five iterations in random orders;
    the return rises by at least the sum of the penalised gains.
    """

    @effort(30)
    @given(batches_of_games, orders)
    def holds(game_and_policies, source):
        game, policies = game_and_policies
        for iteration in range(5):
            new, bound = sequential_sweep(game, policies, shuffled(game.n_agents, source))
            change = game.expected_return(new) - game.expected_return(policies)
            record.add(change, new_games=0 if iteration else BATCH)
            assert change.min() >= -1e-11
            assert (change - bound).min() >= -1e-11
            policies = new

    holds()
    assert record.decreased == 0


def test_without_the_factor_the_return_does_decrease(record):
    """The same step against the others' *old* policies lets some teams lose.

    In one-step games, where there is no penalty: so the test above has something to say.
    """

    @effort(10)
    @given(games(min_agents=2, max_agents=3, gamma=st.just(0.0), batch_size=(BATCH,)), orders)
    def tally(game_and_policies, source):
        game, old = game_and_policies
        new, _ = sequential_sweep(game, old, shuffled(game.n_agents, source), see_others=False)
        record.add(game.expected_return(new) - game.expected_return(old), new_games=BATCH)

    tally()
    assert record.decreased > 0


def library_step(old, gain, penalty):
    """The penalised step by this library's trust region.

    It follows the natural gradient of the gain, shortened until gain minus penalty has risen.
    """

    def policy(params, rows):
        return Categorical(logits=params["logits"] if rows is None else params["logits"][rows])

    def penalised_gain(dist):
        divergence = kl_divergence(old, dist.probs).amax()
        return ((dist.probs - old) * gain).sum() - penalty * divergence

    settings = TrustRegion(
        max_kl=1.0, damping=1e-6, accept_ratio=0.0, backtrack_factor=0.5, max_backtracks=50
    )
    logits = old.log().requires_grad_()
    params, result = trust_region_step(policy, penalised_gain, {"logits": logits}, settings)
    return policy(params, None).probs, torch.where(result.success, result.improvement, 0)


def test_monotonic_improvement_by_the_librarys_step(record):
    """The theorem again, with this library's trust-region step in place of the optimum.

    All that is needed of a step is that the penalised gain is not negative.
    """

    @effort(40)
    @given(games(max_agents=3, max_states=3, gamma=gammas), orders)
    def holds(game_and_policies, source):
        game, policies = game_and_policies
        for iteration in range(3):
            order = shuffled(game.n_agents, source)
            new, bound = sequential_sweep(game, policies, order, step=library_step)
            change = game.expected_return(new) - game.expected_return(policies)
            record.add(change, new_games=not iteration)
            assert change >= bound - 1e-11 >= -1e-11
            policies = new

    holds()
    assert record.decreased == 0


def test_hatrpo_never_decreases_the_return_of_a_one_step_game(record):
    """This library's HATRPO, as it is and with trust regions of any size, on exact expectations.

    Without a future the theorem needs no penalty (C = 0): the terms that the agents raise *are* the
    joint return's change, and the line search accepts no step that lowers one.
    """

    @effort(25)
    @given(
        games(max_agents=3, max_states=3, gamma=st.just(0.0)),
        st.floats(-3, 0.5),
        st.integers(0, 99),
    )
    def holds(game_and_policies, log_kl, seed):
        game, policies = game_and_policies
        team = TabularTeam(game, policies)
        loss = HATRPOLoss(team.actors, None, max_kl=10**log_kl)
        updater = exact_updater(loss, seed=seed)
        before = game.expected_return(policies)
        for iteration in range(3):
            metrics = updater(team.batch())
            after = game.expected_return(team.policies())
            record.add(after - before, new_games=not iteration)
            reports = [metrics[agent.name] for agent in loss.agents]
            gains = [report["surrogate"] - report["surrogate_before"] for report in reports]
            torch.testing.assert_close(sum(gains), after - before, rtol=0, atol=1e-11)
            assert all(gain >= -1e-12 for gain in gains)
            before = after

    holds()
    assert record.decreased == 0
