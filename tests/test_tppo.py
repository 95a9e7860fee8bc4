"""T-PPO: the chain of choices is the team's game, its credit is exact, and it can be distilled."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from agent_transformers import game, make_transformer, rollout
from team import same_state, state_of
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.envs import ExplorationType, check_env_specs, set_exploration_type
from torchrl.modules import ProbabilisticActor

from torchrl_happo import MATLoss, SequentialUpdater, TPPOLoss, make_actor
from torchrl_happo.envs import BridgeGame, TabularGame
from torchrl_happo.envs.games.chain import optimal_actions, optimal_prefix_values
from torchrl_happo.objectives.prefix_gae import chain_advantage
from torchrl_happo.policy.distributions import kl_divergence
from torchrl_happo.update.distillation import Distillation


def random_game(**kwargs):
    return TabularGame.random(4, [2, 3, 2], generator=torch.Generator().manual_seed(0), **kwargs)


def test_backward_induction_is_joint_value_iteration():
    """On random games: best values to 1e-10, and the agents' choices in turn are a best one."""
    for tabular in (random_game(batch_size=[5]), random_game()):
        values = optimal_prefix_values(tabular)
        value = torch.zeros_like(values[0])
        for _ in range(400):
            ahead = value.reshape(*value.shape[:-1], 1, 1, 1, 1, 4)
            joint = tabular.reward + tabular.gamma * (tabular.transition * ahead).sum(-1)
            value = joint.flatten(-3).amax(-1)
        torch.testing.assert_close(values[0], value, rtol=0, atol=1e-10)
        torch.testing.assert_close(values[-1], joint, rtol=0, atol=1e-10)
    actions = optimal_actions(values)
    assert torch.equal(joint[(torch.arange(4), *actions)], joint.flatten(1).amax(1))


def test_the_credit_of_a_choice_is_exact():
    """Advantages have mean zero given the choices before, and add up to that of the team."""
    tabular = random_game()
    policies = tabular.random_policies(generator=torch.Generator().manual_seed(1))
    values = [tabular.multi_agent_action_value(policies, range(k)) for k in range(4)]
    total = 0
    for k in range(3):
        advantage = values[k + 1] - values[k]
        mean = tabular.mean(advantage, policies, [k])
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-12)
        assert advantage.abs().max() > 0.1
        total = total + advantage
    torch.testing.assert_close(total, tabular.advantage(policies))


def by_hand(value, next_value, reward, done, terminated, gamma, lmbda):
    """GAE over the chain of sub-steps, one after the other."""
    envs, steps, n, _ = value.shape
    advantage, decay = torch.zeros_like(value), lmbda ** (1 / n)
    for e in range(envs):
        follows = 0.0
        for t in reversed(range(steps)):
            for k in reversed(range(n)):
                if k == n - 1:
                    ahead = 0.0 if terminated[e, t] else next_value[e, t, 0]
                    delta = reward[e, t, 0] + gamma * ahead - value[e, t, k, 0]
                    follows = delta + gamma * decay * (0.0 if done[e, t] else follows)
                else:
                    follows = value[e, t, k + 1, 0] - value[e, t, k, 0] + decay * follows
                advantage[e, t, k, 0] = follows
    return advantage


def numbers(n_agents):
    """Values, rewards and ends of three environments for seven steps."""
    torch.manual_seed(0)
    value = torch.randn(3, 7, n_agents, 1).double()
    next_value, reward = torch.randn(2, 3, 7, 1).double()
    done = torch.rand(3, 7, 1) < 0.3
    return value, next_value, reward, done, done & (torch.rand(3, 7, 1) < 0.5)


@pytest.mark.parametrize("n_agents", [1, 2, 5])
@pytest.mark.parametrize("gamma", [0.9, 0.0])
def test_advantages_of_the_chain(gamma, n_agents):
    """They equal a loop over all sub-steps, with truncations and terminations between."""
    given = numbers(n_agents)
    advantage, target = chain_advantage(*given, gamma=gamma, lmbda=0.8)
    torch.testing.assert_close(advantage, by_hand(*given, gamma, 0.8))
    torch.testing.assert_close(target, advantage + given[0])


def test_credits_of_a_step_add_up_to_its_td_error():
    """The sum of the differences of one step is r + gamma V(s') - V(s), as for one agent."""
    value, next_value, reward, done, terminated = numbers(4)
    delta, _ = chain_advantage(value, next_value, reward, done, terminated, gamma=0.9, lmbda=0.0)
    wanted = reward + 0.9 * next_value * ~terminated - value[..., 0, :]
    torch.testing.assert_close(delta.sum(-2), wanted)


@pytest.mark.parametrize("order", [None, [2, 0, 1]])
def test_the_estimator_reads_prefixes(order):
    """Values of the stored actions before each agent, and of an empty prefix at the next step."""
    env = game()
    actor, critic = make_transformer(env, prefix_values=True, order=order)
    batch = rollout(env, actor, 3)
    # Some steps end nothing, and some are cut: both look ahead.
    batch["next", "terminated"][::2] = False
    batch["next", "done"][::4] = False
    assert batch["next", "terminated"].any()
    loss = TPPOLoss(actor, critic)
    loss.make_value_estimator(gamma=0.9, lmbda=0.7)
    written = batch.copy()
    loss.value_estimator(written)
    value = critic(batch.copy())["agents", "state_value"]
    chain = order or [0, 1, 2]
    for place, agent in enumerate(chain):  # the value of a prefix knows no later action
        other = batch.clone()
        later = chain[place:]
        other["agents", "action"][..., later] = (other["agents", "action"][..., later] + 1) % 3
        same = critic(other)["agents", "state_value"]
        assert torch.equal(same[..., agent, :], value[..., agent, :])
        assert (
            place == 0
            or not torch.equal(same[..., chain[-1], :], value[..., chain[-1], :])
            or (place == 2)
        )
    ahead = batch["next"].clone()
    ahead["agents", "action"] = torch.ones_like(batch["agents", "action"])
    next_value = critic(ahead)["agents", "state_value"][..., chain[0], :]
    ends = (batch["next", name] for name in ("reward", "done", "terminated"))
    wanted = by_hand(value[..., chain, :], next_value, *ends, 0.9, 0.7)
    torch.testing.assert_close(written["advantage"][..., chain, :], wanted.detach())


def test_for_one_agent_it_is_mat():
    """An empty prefix is the observation: the same network, the same update, bit for bit."""
    env = game(1)
    ends = []
    for loss_class in (MATLoss, TPPOLoss):
        actor, critic = make_transformer(env, prefix_values=loss_class is TPPOLoss)
        batch = rollout(env, actor, 2)
        updater = SequentialUpdater(loss_class(actor, critic, critic_coeff=0), num_epochs=2)
        batch["advantage"] = batch["next", "reward"].unsqueeze(-2)
        batch["value_target"] = batch["advantage"]
        updater(batch)
        ends.append(state_of(actor))
    assert same_state(*ends)


def test_it_trains_values_of_prefixes():
    """The block owns its critic, of whose actions the next step has none."""
    env = BridgeGame(num_envs=8)
    actor, critic = make_transformer(env, prefix_values=True)
    loss = TPPOLoss(actor, critic)
    updater = SequentialUpdater(loss, num_epochs=2, minibatch_size=20)
    before = state_of(actor)
    metrics = updater(rollout(env, actor, 6))
    assert list(updater.steps) == ["agents"]
    assert metrics["agents", "kl"] > 0
    assert not same_state(state_of(actor), before)


# -- the bridge --------------------------------------------------------------------------------


def test_the_bridge():
    """Either order of crossing is best; two at once block each other."""
    env = BridgeGame(2, num_envs=3)
    check_env_specs(env)
    data = env.reset()
    first = [[2, 0], [2, 0], [2, 1], [0, 1], [0, 1]]  # the left one goes first
    second = [[0, 1], [0, 1], [2, 1], [2, 0], [2, 0]]
    jam = [[2, 1]] * 5
    total = torch.zeros(3)
    for moves in zip(first, second, jam, strict=True):
        data["agents", "action"] = torch.tensor(moves)
        step = env.step(data)
        total += step["next", "reward"].squeeze(-1)
        data = step["next"].clone()
    assert data["position"].tolist() == [[3, 0], [3, 0], [0, 3]]
    assert data["done"].squeeze(-1).tolist() == [True, True, False]
    assert total[0] == env.best_return


# -- distillation ------------------------------------------------------------------------------


class Correlated(nn.Module):
    """Two agents of which the second does the opposite of the first, who tosses a coin."""

    def forward(self, observation, action):
        logits = torch.zeros(*action.shape, 2)
        logits[..., 1, :] = 40 * (torch.nn.functional.one_hot(1 - action[..., 0], 2) - 0.5)
        return logits


def coin():
    """The coordinated policy of the XOR game that plays both optima alike, and a batch of it."""
    keys = [("agents", "observation"), ("agents", "action")]
    logits = ("agents", "logits")
    teacher = ProbabilisticActor(
        TensorDictModule(Correlated(), in_keys=keys, out_keys=[logits]),
        in_keys=[logits],
        out_keys=[("agents", "action")],
        distribution_class=Categorical,
    )
    agents = TensorDict(
        {"observation": torch.eye(2).expand(8, 2, 2), "action": torch.tensor([[0, 1], [1, 0]] * 4)},
        [8, 2],
    )
    return teacher, TensorDict({"agents": agents}, [8])


def students(n_agents=2, **kwargs):
    torch.manual_seed(0)
    return make_actor(game(n_agents), num_cells=(16,), **kwargs)


ADAM = partial(torch.optim.Adam, lr=0.05)


def test_a_correlated_optimum_is_log_2_away_from_every_product():
    """The best product of the coin in the XOR game: half the time each, divergence log 2."""
    teacher, batch = coin()
    actor = students()
    distil = Distillation(teacher, actor, optimizer=ADAM, num_epochs=60)
    for _ in range(2):
        distil(batch)
    probabilities = actor.get_dist(batch.copy()).probs
    torch.testing.assert_close(probabilities, torch.full((8, 2, 2), 0.5), rtol=0, atol=1e-2)
    old, new = teacher.get_dist(batch.copy()), actor.get_dist(batch.copy())
    divergence = kl_divergence(old, new).sum(-1).mean()
    torch.testing.assert_close(divergence, torch.tensor(math.log(2)), rtol=0, atol=1e-3)


def test_greedy_targets_are_behaviour_cloning():
    """Minus the log-probability of the coordinated policy's most likely joint actions."""
    env = game()
    teacher, _ = make_transformer(env)
    actor = students(3).double()
    batch = rollout(env, teacher, 2)
    distil = Distillation(teacher, actor, target="greedy", num_epochs=1)
    shown = distil._shown(batch)
    losses = [distil._loss(agent, distil._data(agent, batch, shown)) for agent in distil.agents]
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        greedy = teacher(batch.copy())["agents", "action"]
    assert not torch.equal(greedy, batch["agents", "action"])
    log_prob = actor.get_dist(batch.copy()).log_prob(greedy)
    torch.testing.assert_close(torch.stack(losses), -log_prob.flatten(0, 1).mean(0))


@pytest.mark.parametrize("target", ["full", "greedy"])
def test_agents_learn_to_act_alone(target):
    """At every state of the bridge they do what the coordinated policy does, one by one."""
    env = BridgeGame(num_envs=16)
    teacher, _ = make_transformer(env, scale=0.5)
    with torch.no_grad():  # nearly deterministic, so that a product can be the same
        teacher.transformer.policies[0][-1].weight.mul_(20)
    before = state_of(teacher)
    torch.manual_seed(0)
    actor = make_actor(env, num_cells=(32,)).double()
    batch = rollout(env, teacher, 8)
    distil = Distillation(teacher, actor, target=target, optimizer=ADAM, num_epochs=80)
    first = distil(batch)
    last = distil(batch)
    assert all(last[name, "loss"] < first[name, "loss"] for name in last.keys())
    shown = distil._shown(batch) if target == "greedy" else teacher.get_dist(batch.copy())
    wanted = shown["agents", "action"] if target == "greedy" else shown.mode
    agree = actor.get_dist(batch.copy()).mode == wanted
    assert agree.double().mean() > 0.97
    assert same_state(state_of(teacher), before)


def test_dead_agents_teach_nothing():
    """Where an agent is not active, its student does not listen."""
    env = game()
    teacher, _ = make_transformer(env, scale=1.0)
    batch = rollout(env, teacher, 2)
    batch["agents", "active"] = torch.ones(16, 2, 3, dtype=torch.bool)
    batch["agents", "active"][..., 1] = False
    actor = students(3).double()
    distil = Distillation(teacher, actor, num_epochs=1)
    before = [[p.clone() for p in agent.parameters()] for agent in distil.agents]
    distil(batch)
    moved = [
        any(not p.equal(q) for p, q in zip(agent.parameters(), old, strict=True))
        for agent, old in zip(distil.agents, before, strict=True)
    ]
    assert moved == [True, False, True]


def test_a_distillation_goes_on_bit_for_bit():
    """Optimisers, minibatches and students; a state of other students is refused."""
    teacher, batch = coin()
    ends = []
    for split in (False, True):
        actor = students()
        distil = Distillation(teacher, actor, num_epochs=2, minibatch_size=3)
        distil(batch)
        if split:
            state = distil.state_dict()
            actor = students()
            distil = Distillation(teacher, actor, num_epochs=2, minibatch_size=3)
            distil.load_state_dict(state)
        distil(batch)
        ends.append(state_of(actor))
    assert same_state(*ends)
    other = Distillation(teacher, make_actor(game(2), num_cells=(4,)))
    with pytest.raises(ValueError, match="does not have the network of the student 'agents_0'"):
        other.load_state_dict(distil.state_dict())
