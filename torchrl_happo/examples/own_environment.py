r"""An environment of one's own: unlike agents, one of which drops out during the episode.

    python -m torchrl_happo.examples.own_environment

A *tug* and a *crane* bring a load to a target on a line. The tug sees the distance and pulls with
any force; the crane sees load and target, and shifts the load left, not at all, or right. The team
is paid for the load's nearness to the target. After three steps the tug's battery is empty: its
entry ``("tug", "active")`` says that it is not active, and what happens then teaches it nothing.

All that the library needs of an environment is TorchRL's layout: one entry a group with an agent
dimension, a reward and ends at the root. The example prints the mean reward and, at the end, where
the load is for five targets.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import Collector
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, check_env_specs, set_exploration_type

from torchrl_happo import HAPPOLoss, SequentialUpdater, joint_policy, make_actor, make_critic

LENGTH, BATTERY, BATCH = 10, 3, 2_000


class Harbour(EnvBase):
    """A tug and a crane that move a load, in ``num_envs`` copies."""

    def __init__(self, num_envs: int = 50) -> None:
        super().__init__(batch_size=torch.Size([num_envs]))
        shape, one = (num_envs,), (num_envs, 1)  # each group has one agent
        flag = Binary(1, one, dtype=torch.bool)
        self.observation_spec = Composite(
            tug=Composite(observation=Unbounded((*one, 1)), active=flag, shape=one),
            crane=Composite(observation=Unbounded((*one, 2)), shape=one),
            time=Unbounded(one, dtype=torch.int64),
            shape=shape,
        )
        self.action_spec = Composite(
            tug=Composite(action=Bounded(-1.0, 1.0, (*one, 1)), shape=one),
            crane=Composite(action=Categorical(3, one), shape=one),
            shape=shape,
        )
        self.reward_spec = Unbounded(one)
        self.done_spec = Composite(done=flag.clone(), terminated=flag.clone(), shape=shape)

    def _seen(self, load: torch.Tensor, target: torch.Tensor, time: torch.Tensor) -> TensorDict:
        groups = {
            "tug": {"observation": target - load, "active": time < BATTERY},
            "crane": {"observation": torch.cat([load, target], -1)},
        }
        one = [*self.batch_size, 1]
        agents = {name: TensorDict(group, one) for name, group in groups.items()}
        return TensorDict({**agents, "time": time}, self.batch_size)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDict:
        target = 2 * torch.rand(*self.batch_size, 1, 1) - 1
        time = torch.zeros(*self.batch_size, 1, dtype=torch.int64)
        return self._seen(torch.zeros_like(target), target, time)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        load, target = tensordict["crane", "observation"].split(1, -1)
        pulls = tensordict["tug", "active"].unsqueeze(-1)
        load = load + 0.3 * pulls * tensordict["tug", "action"]
        load = load + 0.1 * (tensordict["crane", "action"].unsqueeze(-1) - 1)
        time = tensordict["time"] + 1
        done, reward = time == LENGTH, 1 - (load - target).abs().squeeze(-1)
        ends = {"reward": reward, "done": done, "terminated": done.clone()}
        return self._seen(load, target, time).update(ends)

    def _set_seed(self, seed: int | None) -> None:
        torch.manual_seed(seed or 0)


def main(total_frames: int = 60_000) -> list[float]:
    """Train the team; return the mean reward of each batch."""
    torch.manual_seed(0)
    env = Harbour()
    check_env_specs(env)
    actors = make_actor(env, num_cells=(32, 32))
    loss = HAPPOLoss(actors, make_critic(env, num_cells=(32, 32)), entropy_coeff=0.01)
    adam = partial(torch.optim.Adam, lr=3e-3)
    updater = SequentialUpdater(loss, optimizer=adam, num_epochs=5, minibatch_size=500)
    policy, rewards = joint_policy(actors), []
    for batch in Collector(env, policy, frames_per_batch=BATCH, total_frames=total_frames):
        updater(batch)
        rewards.append(batch["next", "reward"].mean().item())
        print(f"{len(rewards) * BATCH:7d} frames: reward {rewards[-1]:.3f}")
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        last = env.rollout(LENGTH, policy)[:5, -1]["next"]
    for load, target in last["crane", "observation"].squeeze(1).tolist():
        print(f"target {target:5.2f}: the load ends at {load:5.2f}")
    return rewards


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
