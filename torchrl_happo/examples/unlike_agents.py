r"""Unlike agents: a speaker that knows the goal and a listener that can move.

    python -m torchrl_happo.examples.unlike_agents

The speaker sees 3 numbers and only talks; the listener sees 11 and only moves. Each has an entry of
its own in the tensordict, and so a network of its own size: there is no padding. Both have HATRPO's
exact trust region here, with another radius for each. The example prints the return of the
episodes that ended, and how far each agent moved.
"""

from __future__ import annotations

import sys

import torch
from torchrl.collectors import Collector
from torchrl.envs import Compose, RewardSum, StepCounter, TransformedEnv, VmasEnv

from torchrl_happo import (
    HATRPOLoss,
    SequentialUpdater,
    TeamReward,
    joint_policy,
    make_actor,
    make_critic,
)

BATCH = 3_000


def main(total_frames: int = 90_000) -> list[float]:
    """Train both agents; return the mean return of each batch."""
    torch.manual_seed(0)
    base = VmasEnv("simple_speaker_listener", num_envs=60, max_steps=None, seed=0)
    env = TransformedEnv(base, Compose(StepCounter(25), TeamReward("mean"), RewardSum()))
    actors = make_actor(env)  # {"speaker": ..., "listener": ...}
    loss = HATRPOLoss(actors, make_critic(env), max_kl={"speaker": 0.005, "listener": 0.01})
    updater = SequentialUpdater(loss, num_epochs=10, minibatch_size=750)
    print("   frames    return  kl of speaker  kl of listener")
    returns = []
    collector = Collector(
        env, joint_policy(actors), frames_per_batch=BATCH, total_frames=total_frames
    )
    for batch in collector:
        metrics = updater(batch)
        ended = batch["next", "done"]
        returns.append(batch["next", "episode_reward"][ended].mean().item())
        kls = [metrics[name, "kl"].item() for name in ("speaker", "listener")]
        print("{:9d}{:10.2f}{:15.4f}{:16.4f}".format(len(returns) * BATCH, returns[-1], *kls))
    return returns


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
