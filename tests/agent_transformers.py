"""Transformers over agents in double precision, for the tests."""

from __future__ import annotations

import torch
from tensordict.nn import TensorDictModuleBase
from test_networks import SpecEnv, team
from test_observations import KINDS
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import ExplorationType, set_exploration_type

from torchrl_happo import make_transformer as make
from torchrl_happo.envs import MatrixGame, permutation_payoff

#: Two groups of unlike agents, one of which has no agent dimension.
UNLIKE = SpecEnv(
    Composite(
        runner=Composite(observation=Unbounded((2, 4)), shape=(2,)),
        guide=Composite(observation=Unbounded((3,))),
        boss=Composite(observation=Unbounded((1, 6)), shape=(1,)),
    ),
    Composite(
        runner=Composite(action=Bounded(-1.0, 1.0, (2, 2)), shape=(2,)),
        guide=Composite(action=Categorical(5)),
        boss=Composite(action=Categorical(2, shape=(1,)), shape=(1,)),
    ),
    (4,),
)
TEAMS = {
    **KINDS,
    "continuous": (team(Bounded(-1.0, 2.0, (3, 2)), batch_size=(4,)), {}),
    "unbounded": (team(Unbounded((3, 2)), batch_size=(4,)), {"state_dependent_std": True}),
    "unlike agents": (UNLIKE, {}),
}


def double(data):
    return data.apply(lambda x: x.double() if x.is_floating_point() else x)


def make_transformer(env, *, seed=0, scale=0.3, **kwargs):
    """Policy and critic in double precision, away from their initialisation."""
    torch.manual_seed(seed)
    actor, critic = make(env, **{"size": 8, "num_heads": 2, **kwargs})
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return actor.double(), critic.double()


class InDouble(TensorDictModuleBase):
    """A policy in double precision, for environments in single."""

    def __init__(self, actor):
        super().__init__()
        self.actor = actor
        self.in_keys, self.out_keys = actor.in_keys, actor.out_keys

    def forward(self, data):
        return data.update(self.actor(double(data)).select(*self.out_keys))


def rollout(env, actor, steps=1):
    """Steps of an environment, however many episodes they are of."""
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        return double(env.rollout(steps, InDouble(actor), break_when_any_done=False))


def game(n_agents=3, num_envs=16):
    return MatrixGame(permutation_payoff(n_agents), num_envs=num_envs)
