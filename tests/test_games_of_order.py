"""Games in which agents that know the choices before theirs do what products of policies cannot."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import pytest
import torch
from torchrl.envs import ExplorationType, set_exploration_type

from torchrl_happo import (
    HAPPOLoss,
    MATLoss,
    SequentialUpdater,
    TPPOLoss,
    make_actor,
    make_critic,
    make_transformer,
)
from torchrl_happo.envs import MatrixGame, climbing_payoff, permutation_payoff
from torchrl_happo.update.distillation import Distillation

ADAM = partial(torch.optim.Adam, lr=3e-3)


def batch_of(env, policy, kind=ExplorationType.RANDOM):
    with torch.no_grad(), set_exploration_type(kind):
        return env.rollout(1, policy)


def joint_entropy(env, actor):
    """The entropy of a policy's joint action, over all joint actions."""
    shape = env.payoff.shape
    joint = torch.tensor(list(product(*(range(size) for size in shape))))
    data = env.reset()[:1].expand(len(joint)).clone().set(("agents", "action"), joint)
    with torch.no_grad():
        log_prob = actor.get_dist(data).log_prob(joint).sum(-1)
    torch.testing.assert_close(log_prob.exp().sum(), torch.ones(()))
    return -(log_prob.exp() * log_prob).sum().item()


def trained(kind, env, *, entropy, cooling, updates, seed=0):
    """A team after updates, the weight of its entropy bonus falling to a share of its start."""
    torch.manual_seed(seed)
    if kind is HAPPOLoss:
        actor, critic = make_actor(env, num_cells=(16,)), make_critic(env, num_cells=(16,))
    else:
        actor, critic = make_transformer(env, size=16, prefix_values=kind is TPPOLoss)
    loss = kind(actor, critic, entropy_coeff=entropy)
    updater = SequentialUpdater(loss, optimizer=ADAM, num_epochs=8, max_grad_norm=10.0)
    for index in range(updates):
        loss.entropy_coeff = torch.tensor(entropy * max(cooling, 1 - 1.25 * index / updates))
        updater(batch_of(env, actor))
    return actor


def payoff_of(env, actor):
    """Return the payoff of the most likely joint action."""
    return batch_of(env, actor, ExplorationType.DETERMINISTIC)["next", "reward"].mean().item()


@pytest.mark.learning
def test_the_climbing_game():
    """MAT and T-PPO climb to 11 and can be taught to agents alone; a product ends at 7 at most."""
    env = MatrixGame(climbing_payoff(), num_envs=128)
    settings = {"entropy": 2.0, "cooling": 0.0, "updates": 50}
    paid = {kind: trained(kind, env, **settings) for kind in (MATLoss, TPPOLoss, HAPPOLoss)}
    assert payoff_of(env, paid[MATLoss]) == 11
    assert payoff_of(env, paid[TPPOLoss]) == 11
    assert payoff_of(env, paid[HAPPOLoss]) <= 7
    alone = make_actor(env, num_cells=(16,))
    distil = Distillation(paid[TPPOLoss], alone, optimizer=ADAM, num_epochs=100)
    distil(batch_of(env, paid[TPPOLoss]))
    assert payoff_of(env, alone) == 11


@pytest.mark.learning
def test_the_permutation_game_has_many_modes():
    """The autoregressive policy plays many permutations; a product that pays, just one."""
    env = MatrixGame(permutation_payoff(3), num_envs=128)
    actor = trained(MATLoss, env, entropy=0.5, cooling=1.0, updates=50)
    assert batch_of(env, actor)["next", "reward"].mean() > 0.9
    assert 0.8 * math.log(6) < joint_entropy(env, actor) < math.log(6) + 0.3
    product_of = trained(HAPPOLoss, env, entropy=0.01, cooling=0.0, updates=50)
    assert batch_of(env, product_of)["next", "reward"].mean() > 0.9
    assert joint_entropy(env, product_of) < 0.8
