r"""A VMAS team, first with MAPPO and then with HAPPO: what changes in a script of TorchRL.

    python -m torchrl_happo.examples.vmas_team

:func:`mappo` is the loop of TorchRL's own multi-agent PPO scripts; :func:`happo` is the same script
after the change of the README. Everything above them serves both. The example prints the mean
return of the episodes that ended in each batch, side by side.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from tensordict import TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.envs import EnvBase, RewardSum, TransformedEnv, VmasEnv
from torchrl.modules import MultiAgentMLP, ProbabilisticActor, TanhNormal
from torchrl.objectives import ClipPPOLoss, ValueEstimators

from torchrl_happo import HAPPOLoss, SequentialUpdater, TeamReward

BATCH, MINIBATCH, EPOCHS = 3_000, 750, 10
ADAM = partial(torch.optim.Adam, lr=3e-4)


def make_env() -> TransformedEnv:
    """Three agents that carry a ball to a goal on a platform, in 30 copies."""
    env = VmasEnv("balance", num_envs=30, max_steps=100, n_agents=3, seed=0)
    sums = RewardSum(in_keys=[env.reward_key], out_keys=[("agents", "episode_reward")])
    return TransformedEnv(env, sums)


def make_networks(env: EnvBase, share_params: bool) -> tuple[ProbabilisticActor, TensorDictModule]:
    """The actors of the team, with shared or with own parameters, and the centralised critic."""
    observed, loc_scale = [("agents", "observation")], [("agents", "loc"), ("agents", "scale")]
    obs_dim = env.observation_spec["agents", "observation"].shape[-1]
    outputs = 2 * env.full_action_spec[env.action_key].shape[-1]
    mlp = partial(MultiAgentMLP, obs_dim, n_agents=3, num_cells=(64, 64), activation_class=nn.Tanh)
    stack = mlp(n_agent_outputs=outputs, centralized=False, share_params=share_params)
    actor = ProbabilisticActor(
        TensorDictModule(nn.Sequential(stack, NormalParamExtractor()), observed, loc_scale),
        in_keys=loc_scale,
        out_keys=[env.action_key],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    central = mlp(n_agent_outputs=1, centralized=True, share_params=True)
    return actor, TensorDictModule(central, observed, [("agents", "state_value")])


def mean_return(batch: TensorDictBase) -> float:
    """Return the mean return of the episodes that ended in a batch."""
    ended = batch["next", "done"].squeeze(-1)
    return batch["next", "agents", "episode_reward"][ended].mean().item()


def mappo(total_frames: int) -> list[float]:
    """Before: one loss for all agents, one optimiser, minibatches from a replay buffer."""
    torch.manual_seed(0)
    env = make_env()
    actor, critic = make_networks(env, share_params=True)
    loss = ClipPPOLoss(actor, critic, clip_epsilon=0.2, entropy_coeff=0.0)
    value, ends = ("agents", "state_value"), [("agents", "done"), ("agents", "terminated")]
    loss.set_keys(reward=env.reward_key, value=value, done=ends[0], terminated=ends[1])
    loss.make_value_estimator(ValueEstimators.GAE, gamma=0.99, lmbda=0.9)
    optimizer = ADAM(loss.parameters())
    storage, sampler = LazyTensorStorage(BATCH), SamplerWithoutReplacement()
    buffer = TensorDictReplayBuffer(storage=storage, sampler=sampler, batch_size=MINIBATCH)
    returns = []
    for batch in Collector(env, actor, frames_per_batch=BATCH, total_frames=total_frames):
        for key in ends:
            batch["next", key] = batch["next", key[1]].unsqueeze(-1).expand(*batch.shape, 3, 1)
        with torch.no_grad():
            loss.value_estimator(batch)
        buffer.extend(batch.reshape(-1))
        for _ in range(EPOCHS * BATCH // MINIBATCH):
            losses = loss(buffer.sample())
            (losses["loss_objective"] + losses["loss_critic"]).backward()
            nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        returns.append(mean_return(batch))
    return returns


def happo(total_frames: int) -> list[float]:
    """After: networks of their own, one reward for the team, and the updater for the epochs."""
    torch.manual_seed(0)
    env = make_env()
    env.append_transform(TeamReward("mean", in_place=True))
    actor, critic = make_networks(env, share_params=False)
    loss = HAPPOLoss(actor, critic, clip_epsilon=0.2, entropy_coeff=0.0)
    loss.set_keys(reward=env.reward_key)
    loss.make_value_estimator(ValueEstimators.GAE, gamma=0.99, lmbda=0.9)
    updater = SequentialUpdater(
        loss, optimizer=ADAM, num_epochs=EPOCHS, minibatch_size=MINIBATCH, max_grad_norm=1.0
    )
    returns = []
    for batch in Collector(env, actor, frames_per_batch=BATCH, total_frames=total_frames):
        updater(batch)
        returns.append(mean_return(batch))
    return returns


def main(total_frames: int = 60_000) -> list[tuple[float, float]]:
    """Train both; return the mean returns of each batch."""
    returns = list(zip(mappo(total_frames), happo(total_frames), strict=True))
    print("   frames     MAPPO     HAPPO")
    for index, pair in enumerate(returns, 1):
        print("{:9d}{:10.2f}{:10.2f}".format(index * BATCH, *pair))
    return returns


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
