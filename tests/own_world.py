"""An environment and networks of a user's own, which the tests hand to the recipe by name."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

from torchrl_happo import make_actor, make_critic
from torchrl_happo.envs import MatrixGame

BUILT = []


def make_env(num_envs, device, bonus=0.0):
    """Games side by side, in which two agents should do the same."""
    BUILT.append((num_envs, bonus))
    return MatrixGame(torch.eye(2) + bonus, num_envs=num_envs).to(device)


class Corridor(EnvBase):
    """Two agents, each paid for how far to the right it has gone; one copy."""

    def __init__(self, length=4.0):
        super().__init__(batch_size=[])
        self.length, self.place = length, torch.zeros(2, 1)
        row = (2, 1)
        inside = {"observation": Unbounded(row)}
        self.observation_spec = Composite(agents=Composite(inside, shape=(2,)))
        action = Bounded(-torch.ones(row), torch.ones(row))
        self.action_spec = Composite(agents=Composite(action=action, shape=(2,)))
        self.reward_spec = Composite(agents=Composite(reward=Unbounded(row), shape=(2,)))

    def _agents(self, **entries):
        return {"agents": TensorDict(entries, [2])}

    def _reset(self, tensordict):
        self.place = torch.rand(2, 1, generator=self.source)
        return TensorDict(self._agents(observation=self.place.clone()), [])

    def _step(self, tensordict):
        self.place = self.place + tensordict["agents", "action"]
        done = (self.place.max() > self.length).reshape(1)
        agents = self._agents(observation=self.place.clone(), reward=self.place.clone())
        return TensorDict({**agents, "done": done, "terminated": done.clone()}, [])

    def _set_seed(self, seed):
        self.source = torch.Generator().manual_seed(seed)


def make_one(length=4.0):
    BUILT.append(length)
    return Corridor(length)


def small_actor(env):
    BUILT.append("actor")
    return make_actor(env, num_cells=(4,))


def small_critic(env):
    BUILT.append("critic")
    return make_critic(env, num_cells=(4,))


def no_env(num_envs):
    return None


def no_network(env):
    return 3
