"""The exact games: specs, payoffs, closed forms, and values against independent computations."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrl.collectors import Collector
from torchrl.envs import StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs

from torchrl_happo import HAPPOLoss, SequentialUpdater, make_actor, make_critic
from torchrl_happo.envs import (
    DifferentialGame,
    MatrixGame,
    TabularGame,
    TabularGameEnv,
    climbing_payoff,
    penalty_payoff,
    permutation_payoff,
    xor_payoff,
)

ENVIRONMENTS = {
    "xor": lambda **kw: MatrixGame(xor_payoff(4), **kw),
    "permutation": lambda **kw: MatrixGame(permutation_payoff(3), **kw),
    "climbing": lambda **kw: MatrixGame(climbing_payoff(), **kw),
    "penalty": lambda **kw: MatrixGame(penalty_payoff(), **kw),
    "anonymous": lambda **kw: MatrixGame(xor_payoff(), identity=False, **kw),
    "product": lambda **kw: DifferentialGame(**kw),
    "quadratic": lambda **kw: DifferentialGame(
        lambda a: -a.sum(-1).square(), n_agents=3, low=-2.0, high=0.5, identity=False, **kw
    ),
    "tabular": lambda **kw: TabularGameEnv(TabularGame.random(3, [2, 2, 2]), **kw),
}


@pytest.mark.parametrize("num_envs", [1, 5])
@pytest.mark.parametrize("make", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_specs(make, num_envs):
    """Every game is what its specs say, for one game and for several at once."""
    check_env_specs(make(num_envs=num_envs))


@pytest.mark.parametrize("make", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_a_user_can_train_on_it(make):
    """Actor and critic are built from the specs, and an update moves every parameter."""
    env = TransformedEnv(make(num_envs=8), StepCounter(4))
    actor, critic = make_actor(env, num_cells=(8,)), make_critic(env, num_cells=(8,))
    updater = SequentialUpdater(HAPPOLoss(actor, critic), num_epochs=1)
    before = [p.clone() for p in actor.parameters()]
    for batch in Collector(env, actor, frames_per_batch=32, total_frames=32):
        updater(batch)
    assert all(not torch.equal(p, old) for p, old in zip(actor.parameters(), before, strict=True))


def test_identity():
    """Agents that share parameters can tell themselves apart only if the observation lets them."""
    known = MatrixGame(xor_payoff(4), num_envs=2).reset()["agents", "observation"]
    assert torch.equal(known, torch.eye(4).expand(2, 4, 4))
    anonymous = MatrixGame(xor_payoff(4), num_envs=2, identity=False).reset()
    assert torch.equal(anonymous["agents", "observation"], torch.ones(2, 4, 1))


@pytest.mark.parametrize(
    "payoff", [xor_payoff(4), permutation_payoff(3), climbing_payoff(), penalty_payoff(-7.0)]
)
def test_matrix_game_pays_the_selected_entry(payoff):
    """Every joint action is paid its own entry."""
    joint = list(product(range(payoff.shape[0]), repeat=payoff.ndim))
    env = MatrixGame(payoff, num_envs=len(joint))
    data = env.reset().set(("agents", "action"), torch.tensor(joint))
    reward = env.step(data)["next", "reward"].squeeze(-1)
    assert torch.equal(reward, payoff.flatten())


@pytest.mark.parametrize("n_agents", [2, 4, 6, 8])
def test_xor_shared_against_individual(n_agents):
    """The best shared policy reaches 2 / 2^n of the best individual ones (Kuba, proposition 1)."""
    payoff = xor_payoff(n_agents).double()
    p = torch.linspace(0, 1, 1001, dtype=torch.double)
    policy = torch.stack([1 - p, p], -1)
    shared = payoff.expand(len(p), *payoff.shape)
    for _ in range(n_agents):  # all agents draw from the same policy
        shared = (shared * policy.reshape(len(p), *[1] * (shared.ndim - 2), 2)).sum(-1)
    assert shared.max().item() == pytest.approx(2 / 2**n_agents, rel=1e-12)
    assert p[shared.argmax()] == 0.5
    assert payoff.max() == 1.0  # individual policies may play any joint action for certain
    assert payoff.sum() == 2.0


@pytest.mark.parametrize("n_agents", [1, 2, 3, 4])
def test_permutation_shared_against_individual(n_agents):
    """The uniform policy, the best shared one by symmetry, reaches n! / n^n."""
    payoff = permutation_payoff(n_agents)
    assert payoff.mean().item() == pytest.approx(math.factorial(n_agents) / n_agents**n_agents)
    assert payoff.max() == 1.0


@pytest.mark.parametrize("payoff", [climbing_payoff(), penalty_payoff(-30.0)])
def test_the_safe_choice_is_where_independent_learners_end(payoff):
    """Against a uniform partner the safe action is best, and the optimum costs most."""
    against_uniform = payoff.mean(1)
    best, safe = payoff.amax(), against_uniform.argmax()
    assert payoff[safe].amax() < best
    assert against_uniform[(payoff == best).any(1)].amax() < against_uniform[safe]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: xor_payoff(3), "n_agents must be even"),
        (lambda: permutation_payoff(0), "n_agents must be at least 1"),
        (lambda: penalty_payoff(1.0), "penalty must be at most 0"),
        (lambda: MatrixGame(torch.zeros(2, 3)), r"The payoff has shape \[2, 3\]"),
        (lambda: DifferentialGame(n_agents=0), "n_agents must be at least 1"),
        (lambda: DifferentialGame(low=1.0, high=1.0), "low must be less than high"),
        (lambda: TabularGame.random(2, [2], gamma=1.0), "gamma must be at least 0"),
        (lambda: TabularGame(torch.zeros(2, 2, 3), torch.zeros(2, 2)), "one more dimension"),
        (lambda: TabularGameEnv(TabularGame.random(2, [2, 3])), "same number of actions"),
    ],
)
def test_wrong_arguments(call, match):
    """Each wrong argument has its sentence."""
    with pytest.raises(ValueError, match=match):
        call()


games = st.builds(
    lambda seed, n_states, n_actions, gamma: TabularGame.random(
        n_states, n_actions, gamma=gamma, generator=torch.Generator().manual_seed(seed)
    ),
    st.integers(0, 2**32),
    st.integers(1, 4),
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.floats(0, 0.99),
)


@given(games)
def test_values_satisfy_bellmans_equations(game):
    """V is the mean of Q, Q the reward plus the discounted mean of V; visits flow and add up."""
    policies = game.random_policies()
    joint = game.joint_policy(policies)
    actions = tuple(range(1, 1 + game.n_agents))
    torch.testing.assert_close(joint.sum(actions), torch.ones_like(game.initial))
    value, action_value = game.value(policies), game.action_value(policies)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close((joint * action_value).sum(actions), value, **close)
    torch.testing.assert_close(
        game.reward + game.gamma * game.transition @ value, action_value, **close
    )
    occupancy = game.occupancy(policies)
    weight = joint * occupancy.reshape(-1, *[1] * game.n_agents)
    inflow = (weight.unsqueeze(-1) * game.transition).flatten(0, -2).sum(0)
    torch.testing.assert_close(game.initial + game.gamma * inflow, occupancy, **close)
    torch.testing.assert_close(
        (weight * game.reward).sum(), game.expected_return(policies), **close
    )


def test_value_is_the_limit_of_summed_rewards():
    """The linear solve agrees with three hundred steps of the discounted sum."""
    game = TabularGame.random(4, [2, 3], gamma=0.9)
    policies = game.random_policies()
    joint = game.joint_policy(policies)
    state, total = game.initial, 0.0
    for t in range(300):
        flow = state.reshape(-1, 1, 1) * joint
        total += game.gamma**t * (flow * game.reward).sum()
        state = (flow.unsqueeze(-1) * game.transition).sum((0, 1, 2))
    torch.testing.assert_close(game.expected_return(policies), total)


def test_a_batch_of_games_is_solved_game_by_game():
    """Batched quantities are those of the single games."""
    batch = TabularGame.random(3, [2, 3], batch_size=[4])
    policies = batch.random_policies()
    for index in range(4):
        single = TabularGame(
            batch.transition[index], batch.reward[index], initial=batch.initial[index]
        )
        own = [policy[index] for policy in policies]
        for quantity in ("value", "advantage", "occupancy", "expected_return"):
            torch.testing.assert_close(
                getattr(batch, quantity)(policies)[index], getattr(single, quantity)(own)
            )


def test_sampled_game_has_the_exact_frequencies():
    """Rewards, transitions and first states of the environment are those of the tables."""
    game = TabularGame.random(3, [2, 2], generator=torch.Generator().manual_seed(1))
    env = TabularGameEnv(game, num_envs=4000, seed=2)
    data = env.rollout(4)
    first = torch.bincount(data["state"][:, 0, 0], minlength=3) / 4000
    torch.testing.assert_close(first, game.initial.float(), atol=0.03, rtol=0)
    at = (data["state"].squeeze(-1), *data["agents", "action"].unbind(-1))
    assert torch.equal(data["next", "reward"].squeeze(-1), game.reward[at].float())
    joint_index = (at[0] * 2 + at[1]) * 2 + at[2]
    counts = torch.zeros(12, 3).index_put_(
        (joint_index.flatten(), data["next", "state"].flatten()),
        torch.ones(()),
        accumulate=True,
    )
    frequencies = counts / counts.sum(-1, keepdim=True)
    expected = game.transition.flatten(0, 2).float()
    torch.testing.assert_close(frequencies, expected, atol=0.06, rtol=0)


def test_environment_is_seeded():
    """The same seed gives the same play."""
    game = TabularGame.random(3, [2, 2])
    rollouts = []
    for _ in range(2):
        torch.manual_seed(0)
        env = TabularGameEnv(game, num_envs=4, seed=3)
        rollouts.append(env.rollout(10))
    assert (rollouts[0] == rollouts[1]).all()
