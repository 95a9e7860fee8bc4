r"""The theory of HAPPO and HATRPO, on games that are solved exactly, in double precision.

It reads in the order of the paper (Kuba et al., 2022, https://arxiv.org/abs/2109.11251):

1. the joint advantage is a sum of advantages of single agents, in any order (lemma 1);
2. the data of the old policies tells an agent its term of the sum, by means of the factor;

3. agents that raise their terms one after the other raise the joint return
   (``test_monotonic_improvement.py``);
4. agents that do so at the same time may lower it (``test_fourth_quadrant.py``).

"This library's" in a test's sentence means that its own losses, updater or trust-region step are
run on batches that hold every state and joint action once, weighted by their probability.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from effort import effort
from exact import TabularTeam, exact_updater, gain_of_turn, games, orders, ratio, shuffled
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torchrl_happo import HAPPOLoss, HATRPOLoss
from torchrl_happo.envs import TabularGame, xor_payoff

close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


# -- 1. The advantage decomposes ---------------------------------------------------------------


@effort(200)
@given(games(), orders, st.data())
def test_multi_agent_advantage_decomposition(game_and_policies, source, data):
    """Lemma 1: what some agents gain is the sum of what each gains given those before, to 1e-12.

    For random games, policies, subsets of the agents and orders. The left side goes through the
    values of the linear solve, the right side through averages of Q.
    """
    game, policies = game_and_policies
    order = shuffled(game.n_agents, source)
    subset = order[: data.draw(st.integers(1, game.n_agents))]
    value = game.value(policies).reshape(-1, *[1] * game.n_agents)
    left = game.multi_agent_action_value(policies, subset) - value
    terms = [
        game.multi_agent_advantage(policies, [agent], given=subset[:m])
        for m, agent in enumerate(subset)
    ]
    close(sum(terms).expand_as(left), left)


@effort(100)
@given(games(), orders, st.data())
def test_an_agents_advantage_is_zero_on_average(game_and_policies, source, data):
    """Whatever the others have chosen, an agent that follows its policy gains nothing."""
    game, policies = game_and_policies
    agent, *others = shuffled(game.n_agents, source)
    chosen = others[: data.draw(st.integers(0, len(others)))]
    advantage = game.multi_agent_advantage(policies, [agent], given=chosen)
    mean = game.mean(advantage, policies, [agent])
    close(mean, torch.zeros_like(mean))


@effort(100)
@given(games(), orders)
def test_agents_that_choose_one_after_the_other_choose_well(game_and_policies, source):
    """The corollary behind the algorithm: best answers, given one after the other, are good.

    If each agent picks its best answer to the choices of those before it, the joint action's
    advantage is not negative, in every state and for every order.
    """
    game, policies = game_and_policies
    order = shuffled(game.n_agents, source)
    new = list(policies)
    for m, agent in enumerate(order):
        # With the agents before at their choices, the best action is the same for all of them.
        advantage = game.mean(
            game.multi_agent_advantage(policies, [agent], given=order[:m]), new, order[:m]
        ).reshape(policies[agent].shape)
        new[agent] = nn.functional.one_hot(advantage.argmax(-1), advantage.shape[-1]).double()
    joint = game.mean(game.advantage(policies), new, order)
    assert joint.min() >= -1e-12
    assert game.expected_return(new) >= game.expected_return(policies) - 1e-12


def test_agents_that_choose_at_the_same_time_may_choose_badly():
    """In the XOR game both agents' best answers to the old policies clash, and they lose."""
    game = TabularGame.one_step(xor_payoff())
    old = [torch.tensor([[0.4, 0.6]], dtype=torch.double)] * 2
    new = []
    for agent in range(2):
        best = game.multi_agent_advantage(old, [agent]).flatten().argmax()
        new.append(nn.functional.one_hot(best, 2).double().unsqueeze(0))
    assert game.expected_return(old).item() == pytest.approx(0.48)
    assert game.expected_return(new) == 0.0


# -- 2. The factor -----------------------------------------------------------------------------


@effort(100)
@given(games(), orders, st.data())
def test_factor_lets_old_data_tell_an_agents_gain(game_and_policies, source, data):
    r"""What the next agent would gain is an average over actions of the old policies.

    If the agents before have moved to :math:`\bar\pi`, then for any new policy of the next one and
    in every state

    .. math::
        E_{a \sim \pi}[(r - 1) f A(s, a)] = E_{\bar\pi}[A^{i_m}(s, a^{i_{1:m-1}}, a^{i_m})], \quad
        r = \bar\pi^{i_m} / \pi^{i_m}, \quad f = \prod_{j < m} \bar\pi^{i_j} / \pi^{i_j}.
    """
    game, old = game_and_policies
    order = shuffled(game.n_agents, source)
    turn = data.draw(st.integers(0, game.n_agents - 1))
    new = game.random_policies(generator=torch.Generator().manual_seed(turn))
    before, agent = order[:turn], order[turn]
    factor = ratio(game, old, new, before)
    weighted = (ratio(game, old, new, [agent]) - 1) * factor * game.advantage(old)
    left = game.mean(weighted, old, range(game.n_agents))
    advantage = game.multi_agent_advantage(old, [agent], given=before)
    right = game.mean(advantage, new, [*before, agent])
    close(left, right)


@pytest.mark.parametrize("stacked", [True, False], ids=["stack", "groups"])
@effort(20)
@given(games(), orders)
def test_the_loss_with_a_factor_is_an_agents_gain(stacked, game_and_policies, source):
    """This library's loss with the factor in the data has the exact gains as its (unreduced) value.

    The factor of an agent is the product of the ratios of those before it.
    """
    game, old = game_and_policies
    order = shuffled(game.n_agents, source)
    batch = TabularTeam(game, old, stacked=stacked).batch()
    new = game.random_policies(generator=torch.Generator().manual_seed(1))
    loss = HATRPOLoss(TabularTeam(game, new, stacked=stacked).actors, None, reduction="none")
    factor = torch.empty(len(batch), game.n_agents, 1, dtype=torch.double)
    for turn, agent in enumerate(order):
        factor[:, agent, 0] = ratio(game, old, new, order[:turn]).flatten()
    batch["factor"] = factor
    objective = loss(batch)["loss_objective"].reshape(len(batch), game.n_agents).mean(0)
    baseline = (factor * batch["advantage"].unsqueeze(-2)).mean(0).squeeze(-1)
    for turn, agent in enumerate(order):
        exact = gain_of_turn(game, old, new, order, turn)
        torch.testing.assert_close(
            -objective[agent] - baseline[agent], exact, rtol=1e-10, atol=1e-10
        )


LOSSES = [
    partial(HAPPOLoss, entropy_coeff=0.0),
    partial(HATRPOLoss, max_kl=0.1),
]


@pytest.mark.parametrize("stacked", [True, False], ids=["stack", "groups"])
@pytest.mark.parametrize("loss_class", LOSSES, ids=["HAPPO", "HATRPO"])
@effort(15)
@given(games(max_agents=3), st.integers(0, 99))
def test_the_updater_reports_exact_gains(stacked, loss_class, game_and_policies, seed):
    """In this library's update each agent gains what it reports.

    That is its term of the sum given the new policies of those before, and the terms add up to the
    old joint advantage under the new joint policy.
    """
    game, policies = game_and_policies
    team = TabularTeam(game, policies, stacked=stacked)
    updater = exact_updater(loss_class(team.actors, None), num_epochs=3, seed=seed)
    for _ in range(2):
        old = team.policies()
        metrics = updater(team.batch())
        new = team.policies()
        reports = [metrics[agent.name] for agent in updater.loss.agents]
        order = sorted(range(game.n_agents), key=lambda i: reports[i]["position"].item())
        gains = [report["surrogate"] - report["surrogate_before"] for report in reports]
        for turn, agent in enumerate(order):
            exact = gain_of_turn(game, old, new, order, turn)
            torch.testing.assert_close(gains[agent], exact, rtol=1e-10, atol=1e-10)
        joint = game.mean(game.advantage(old), new, order).flatten()
        exact = (game.occupancy(old) * joint).sum()
        torch.testing.assert_close(sum(gains), exact, rtol=1e-10, atol=1e-10)
