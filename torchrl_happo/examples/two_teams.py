r"""Two teams in one environment: predators with HAPPO, prey with HATRPO.

    python -m torchrl_happo.examples.two_teams

Teams that play each other share an environment and a collector, and nothing else: each has its own
reward, critic, loss and updater. An update reads the batch and leaves it as it is, so the order of
the teams does not matter. The example prints the mean reward of each team in each batch.
"""

from __future__ import annotations

import sys

import torch
from torchrl.collectors import Collector
from torchrl.envs import Compose, StepCounter, TransformedEnv, VmasEnv

from torchrl_happo import (
    HAPPOLoss,
    HATRPOLoss,
    SequentialUpdater,
    TeamReward,
    joint_policy,
    make_actor,
    make_critic,
)

BATCH = 3_200


def main(total_frames: int = 64_000) -> list[list[float]]:
    """Train both teams; return the mean rewards of predators and prey in each batch."""
    torch.manual_seed(0)
    env = TransformedEnv(
        VmasEnv("simple_tag", num_envs=32, max_steps=None, seed=0),
        Compose(
            StepCounter(100),
            TeamReward(in_keys=[("adversary", "reward")], out_key=("predators", "reward")),
            TeamReward(in_keys=[("agent", "reward")], out_key=("prey", "reward")),
        ),
    )
    actors = make_actor(env)  # {"adversary": three agents, "agent": one}
    predators = HAPPOLoss({"adversary": actors["adversary"]}, make_critic(env))
    predators.set_keys(reward=("predators", "reward"))
    prey = HATRPOLoss({"agent": actors["agent"]}, make_critic(env))
    prey.set_keys(reward=("prey", "reward"))
    updaters = [
        SequentialUpdater(team, num_epochs=5, minibatch_size=800) for team in (predators, prey)
    ]
    print("   frames  predators      prey")
    rewards = []
    policy = joint_policy(actors)
    for batch in Collector(env, policy, frames_per_batch=BATCH, total_frames=total_frames):
        for updater in updaters:
            updater(batch)
        means = [batch["next", team, "reward"].mean().item() for team in ("predators", "prey")]
        rewards.append(means)
        print("{:9d}{:11.3f}{:10.3f}".format(len(rewards) * BATCH, *means))
    return rewards


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
