r"""Agents with memory: a cue is shown once, and must be remembered.

    python -m torchrl_happo.examples.memory

Both agents see a cue at the first step of an episode, and nothing afterwards. The team is paid 1 at
the last step if *both* name the cue then. Agents without memory can do no better than to name the
same cue always, which is right in half of the episodes; agents with a GRU remember. The example
trains both teams and prints the share of successes.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import Collector
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, InitTracker, TransformedEnv

from torchrl_happo import HAPPOLoss, SequentialUpdater, make_actor, make_critic, memory_transforms

LENGTH, BATCH = 4, 800


class Recall(EnvBase):
    """Two agents that are shown one of two cues, and asked for it at the end of the episode."""

    def __init__(self, num_envs: int = 40) -> None:
        super().__init__(batch_size=torch.Size([num_envs]))
        group = (num_envs, 2)
        see = Unbounded((*group, 3))
        self.observation_spec = Composite(
            agents=Composite(observation=see, shape=group),
            cue=Categorical(2, (num_envs,)),
            time=Unbounded((num_envs,), dtype=torch.int64),
            shape=(num_envs,),
        )
        self.action_spec = Composite(
            agents=Composite(action=Categorical(2, group), shape=group), shape=(num_envs,)
        )
        self.reward_spec = Unbounded((num_envs, 1))
        self.done_spec = Composite(
            done=Binary(1, (num_envs, 1), dtype=torch.bool),
            terminated=Binary(1, (num_envs, 1), dtype=torch.bool),
            shape=(num_envs,),
        )

    def _observe(self, cue: torch.Tensor, time: torch.Tensor) -> TensorDict:
        shown = torch.nn.functional.one_hot(cue, 2) * (time == 0).unsqueeze(-1)
        seen = torch.cat([shown, time.unsqueeze(-1) / LENGTH], -1)
        agents = TensorDict(
            {"observation": seen.unsqueeze(1).expand(-1, 2, 3).clone()}, [len(cue), 2]
        )
        return TensorDict({"agents": agents, "cue": cue, "time": time}, self.batch_size)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDict:
        cue = torch.randint(2, self.batch_size)
        return self._observe(cue, torch.zeros_like(cue))

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        cue, time = tensordict["cue"], tensordict["time"] + 1
        done = (time == LENGTH).unsqueeze(-1)
        right = (tensordict["agents", "action"] == cue.unsqueeze(-1)).all(-1, keepdim=True)
        ends = {"reward": (right & done).float(), "done": done, "terminated": done.clone()}
        return self._observe(cue, time).update(ends)

    def _set_seed(self, seed: int | None) -> None:
        torch.manual_seed(seed or 0)


def train(total_frames: int, recurrent: str | None) -> list[float]:
    """Train a team with or without memory; return its share of successes in each batch."""
    torch.manual_seed(0)
    env = TransformedEnv(Recall(), InitTracker())
    actor = make_actor(env, recurrent=recurrent, hidden_size=16, num_cells=(16,))
    for transform in memory_transforms(actor):
        env.append_transform(transform)
    loss = HAPPOLoss(actor, make_critic(env, num_cells=(16,)), entropy_coeff=0.01)
    adam = partial(torch.optim.Adam, lr=1e-2)
    updater = SequentialUpdater(loss, optimizer=adam, num_epochs=5, sequence_length=LENGTH)
    shares = []
    for batch in Collector(env, actor, frames_per_batch=BATCH, total_frames=total_frames):
        updater(batch)
        shares.append(batch["next", "reward"][batch["next", "done"]].mean().item())
    return shares


def main(total_frames: int = 16_000) -> tuple[list[float], list[float]]:
    """Train both teams; return their shares of successes in each batch."""
    without, memory = train(total_frames, None), train(total_frames, "gru")
    print("   frames   without      GRU")
    for index, pair in enumerate(zip(without, memory, strict=True), 1):
        print("{:9d}{:10.2f}{:9.2f}".format(index * BATCH, *pair))
    return without, memory


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
