"""The multi-agent transformer: it scores as it acts, and is causal bit for bit."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from agent_transformers import TEAMS, UNLIKE, double, game, make_transformer, rollout
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from torchrl_happo.envs import DifferentialGame
from torchrl_happo.policy.distributions import kl_divergence


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("kind", TEAMS)
def test_it_scores_as_it_acts(kind, cached):
    """Parallel parameters and log-probabilities are those of acting, to 1e-12."""
    env, kwargs = TEAMS[kind]
    actor, critic = make_transformer(env, num_blocks=2, **kwargs)
    actor.use_cache = cached
    if is_image := any("image" in str(key) for key in actor.in_keys) or "image" in kind:
        actor, critic = actor.float(), critic.float()  # which encoders read in single precision
    close = {"rtol": 0, "atol": 1e-5 if is_image else 1e-12}
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        data = actor(env.reset() if is_image else double(env.reset()))
        scored = actor[0](data.copy())
        for key in actor[0].out_keys:
            torch.testing.assert_close(scored[key], data[key], **close)
        chosen = [data[key] for key in actor.dist_sample_keys]
        log_prob = actor.get_dist(data.copy()).log_prob(*chosen)
        (key,) = actor.log_prob_keys
        torch.testing.assert_close(log_prob, data[key], **close)
        assert log_prob.shape[1:] in ((actor.num_agents,), ())
        value = critic(data.copy())[critic.out_keys[0]]
    assert value.shape[1:] in ((actor.num_agents, 1), (1,))
    for name in env.full_action_spec.keys(True, True):
        assert env.full_action_spec[name].is_in(data[name].to(env.full_action_spec[name].dtype))


def test_it_acts_whatever_actions_are_there():
    """The actions of an earlier step have no part in those that are chosen now."""
    env = game()
    actor, _ = make_transformer(env)
    data = double(env.reset())
    stale = data.copy().set(("agents", "action"), torch.full((16, 3), 2))
    results = []
    for each in (data, stale):
        torch.manual_seed(1)
        results.append(actor(each.copy()))
    assert torch.equal(results[0]["agents", "action"], results[1]["agents", "action"])


def test_the_order_is_that_of_choosing():
    """The last agent of the groups, first in the order, sees nobody; the first sees all."""
    env = DifferentialGame(n_agents=3, num_envs=4)
    actor, _ = make_transformer(env, order=[2, 1, 0])
    data = rollout(env, actor)[:, 0]
    action = data["agents", "action"].clone().requires_grad_()
    loc = actor[0](data.copy().set(("agents", "action"), action))["agents", "loc"]
    seen = [torch.autograd.grad(loc[:, i].sum(), action, retain_graph=True)[0] for i in range(3)]
    seen = [[bool(gradient[:, j].any()) for j in range(3)] for gradient in seen]
    assert seen == [[False, True, True], [False, False, True], [False] * 3]


@pytest.mark.parametrize("blocks", [1, 3])
def test_causality_is_exact(blocks):
    """Parameters have gradients, bit for bit, to the actions of the agents before alone."""
    env = DifferentialGame(n_agents=4, num_envs=4)
    actor, _ = make_transformer(env, num_blocks=blocks)
    data = rollout(env, actor)[:, 0]
    action = data["agents", "action"].clone().requires_grad_()
    loc = actor[0](data.copy().set(("agents", "action"), action))["agents", "loc"]
    for i in range(4):
        (gradient,) = torch.autograd.grad(loc[:, i].sum(), action, retain_graph=True)
        assert torch.equal(gradient[:, i:], torch.zeros_like(gradient[:, i:]))
        assert gradient[:, :i].ne(0).all()


def test_logits_do_not_know_later_choices():
    """The same with discrete actions: other choices from agent i on, the same logits up to i."""
    env = game(4)
    actor, _ = make_transformer(env)
    data = rollout(env, actor)[:, 0]
    before = actor[0](data.copy())["agents", "logits"]
    for i in range(4):
        other = data.clone()
        other["agents", "action"][:, i:] = (other["agents", "action"][:, i:] + 1) % 4
        after = actor[0](other)["agents", "logits"]
        assert torch.equal(after[:, : i + 1], before[:, : i + 1])
        assert i == 3 or not torch.equal(after[:, i + 1 :], before[:, i + 1 :])


def test_decentralized_policies_see_their_own_observation():
    """MAT-Dec: logits depend on the agent's own observation, the values on all."""
    env = UNLIKE
    actor, critic = make_transformer(env, decentralized=True)
    data = double(env.reset())
    seen = data["runner", "observation"].clone().requires_grad_()
    data["runner", "observation"] = seen
    output = critic(actor[0](data))
    (own,) = torch.autograd.grad(output["runner", "loc"][:, 0].sum(), seen, retain_graph=True)
    assert own[:, 0].ne(0).any()
    assert not own[:, 1].any()
    assert torch.autograd.grad(output["state_value"][:, 3].sum(), seen)[0][:, 1].ne(0).any()
    assert output["guide", "logits"].grad_fn is not None
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(actor[0](data)["guide", "logits"].sum(), seen)


def test_agents_that_carry_their_ids_permute_their_values():
    """Without embeddings the encoder treats agents alike; with them it does not."""
    env = game(4)
    shuffled = torch.tensor([2, 0, 3, 1])
    for embedding in (False, True):
        _, critic = make_transformer(env, agent_embedding=embedding)
        data = TensorDict({"agents": {"observation": torch.randn(16, 4, 4).double()}}, [16])
        value = critic(data.copy())["agents", "state_value"]
        data["agents", "observation"] = data["agents", "observation"][:, shuffled]
        permuted = critic(data)["agents", "state_value"]
        gap = (permuted - value[:, shuffled]).abs().max()
        assert (gap > 1e-3) if embedding else (gap < 1e-12)


def test_the_divergence_has_a_chain_rule():
    """Divergences by agent, averaged over the prefixes of the old policy: the joint divergence."""
    joint = torch.tensor(list(product(range(3), repeat=3)))
    env = game(num_envs=len(joint))
    data = double(env.reset()).set(("agents", "action"), joint)
    old, new = (make_transformer(env, seed=seed)[0].get_dist(data.copy()) for seed in (0, 1))
    log_old, log_new = (dist.log_prob(joint).sum(-1) for dist in (old, new))
    torch.testing.assert_close(log_old.exp().sum(), torch.ones((), dtype=torch.float64))
    whole = (log_old.exp() * (log_old - log_new)).sum()
    chain = (log_old.exp().unsqueeze(-1) * kl_divergence(old, new)).sum()
    torch.testing.assert_close(chain, whole, rtol=1e-12, atol=1e-12)
    assert whole > 0.01
