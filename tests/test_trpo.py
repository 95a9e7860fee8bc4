"""With one agent HATRPO is TRPO: the step of an independent implementation, from the same batch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import IndependentNormal, ProbabilisticActor

from torchrl_happo import HATRPOLoss, SequentialUpdater

sb3_contrib = pytest.importorskip("sb3_contrib")
gymnasium = pytest.importorskip("gymnasium")

SAMPLES, OBS_DIM, N_ACTIONS = 256, 3, 4


class Dummy(gymnasium.Env):
    """Says what the spaces are; never stepped."""

    def __init__(self, discrete: bool) -> None:
        self.observation_space = gymnasium.spaces.Box(-10, 10, (OBS_DIM,))
        # One dimension: sb3-contrib averages the divergence over the action's dimensions.
        box = gymnasium.spaces.Box(-10, 10, (1,))
        self.action_space = gymnasium.spaces.Discrete(N_ACTIONS) if discrete else box

    def reset(self, *, seed=None, options=None):
        return np.zeros(OBS_DIM, np.float32), {}


class GaussianPolicy(nn.Module):
    """sb3-contrib's networks and its state-independent standard deviation."""

    def __init__(self, policy) -> None:
        super().__init__()
        self.net = nn.Sequential(
            copy.deepcopy(policy.mlp_extractor.policy_net), copy.deepcopy(policy.action_net)
        )
        self.log_std = nn.Parameter(policy.log_std.detach().clone())

    def forward(self, x):
        loc = self.net(x)
        return loc, self.log_std.exp().expand_as(loc)


def make_actor(policy, discrete):
    """The same policy as a TorchRL actor."""
    if discrete:
        net = nn.Sequential(
            copy.deepcopy(policy.mlp_extractor.policy_net), copy.deepcopy(policy.action_net)
        )
        names, distribution = ["logits"], torch.distributions.Categorical
    else:
        net, names, distribution = GaussianPolicy(policy), ["loc", "scale"], IndependentNormal
    return ProbabilisticActor(
        TensorDictModule(net, in_keys=["observation"], out_keys=names),
        in_keys=names,
        out_keys=["action"],
        distribution_class=distribution,
        return_log_prob=True,
    )


@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "discrete"])
@pytest.mark.parametrize("max_kl", [0.01, 0.1])
def test_one_agent_is_trpo(discrete, max_kl):
    """The accepted parameters agree to single precision with sb3-contrib's TRPO."""
    trpo = sb3_contrib.TRPO(
        "MlpPolicy",
        Dummy(discrete),
        n_steps=SAMPLES,
        batch_size=SAMPLES,
        normalize_advantage=False,
        cg_max_steps=10,
        cg_damping=0.1,
        target_kl=max_kl,
        line_search_shrinking_factor=0.8,
        line_search_max_iter=10,
        n_critic_updates=1,
        seed=0,
        device="cpu",
    )
    trpo._setup_learn(1)
    observation = torch.randn(SAMPLES, OBS_DIM)
    advantage = torch.randn(SAMPLES)
    with torch.no_grad():
        dist = trpo.policy.get_distribution(observation)
        action = dist.sample()
        log_prob = dist.log_prob(action)
    actor = make_actor(trpo.policy, discrete)
    trpo.rollout_buffer.reset()
    for i in range(SAMPLES):
        trpo.rollout_buffer.add(
            observation[i : i + 1].numpy(),
            action[i : i + 1].numpy(),
            np.zeros(1),
            np.zeros(1),
            torch.zeros(1),
            log_prob[i : i + 1],
        )
    trpo.rollout_buffer.advantages[:] = advantage.numpy()[:, None]
    trpo.rollout_buffer.returns[:] = 0
    trpo.train()

    batch = TensorDict(
        {
            "observation": observation,
            "action": action,
            "action_log_prob": log_prob,
            "advantage": advantage.unsqueeze(-1),
        },
        [SAMPLES],
    )
    updater = SequentialUpdater(HATRPOLoss(actor, max_kl=max_kl), standardize_advantage=False)
    metrics = updater(batch)
    assert metrics["agent", "line_search_success"] == 1
    theirs = make_actor(trpo.policy, discrete)
    for (name, ours), value in zip(actor.named_parameters(), theirs.parameters(), strict=True):
        scale = value.detach().abs().max().clamp_min(1e-2)
        assert float((ours - value).detach().abs().max() / scale) < 1e-3, name
