"""Teams on tabular games: the library's own actors, batches that hold every state and action."""

from __future__ import annotations

import random
from functools import partial
from itertools import product

import torch
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.modules import MultiAgentMLP, ProbabilisticActor

from torchrl_happo import SequentialUpdater
from torchrl_happo.envs import TabularGame


def random_game(seed, n_states, n_actions, gamma, batch_size=()):
    """A game and policies, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    game = TabularGame.random(
        n_states, n_actions, gamma=gamma, batch_size=batch_size, generator=generator
    )
    return game, game.random_policies(generator=generator)


def games(*, max_agents=4, max_states=4, max_actions=3, gamma=None, min_agents=1, **kwargs):
    """Random games with random policies, as ``(game, policies)``."""
    return st.builds(
        partial(random_game, **kwargs),
        st.integers(0, 2**32),
        st.integers(1, max_states),
        st.lists(st.integers(2, max_actions), min_size=min_agents, max_size=max_agents),
        st.floats(0, 0.99) if gamma is None else gamma,
    )


#: Sources of orders, for :func:`shuffled`.
orders = st.integers(0, 2**32).map(random.Random)


def shuffled(n_agents, source):
    """An order of the agents."""
    return source.sample(range(n_agents), n_agents)


def ratio(game, old, new, agents):
    """Product of the ratios of some agents, ``[*G, S, k_1, ..., k_n]``."""
    tables = [
        q / p if agent in agents else torch.ones_like(p)
        for agent, (p, q) in enumerate(zip(old, new, strict=True))
    ]
    return game.joint_policy(tables)


def gain_of_turn(game, old, new, order, turn):
    r"""An agent's term of the sum, exactly and from its definition, ``[*G]``.

    .. math::
        \sum_s \rho(s) E_{a^{i_{1:m-1}} \sim \bar\pi, a^{i_m} \sim \bar\pi}
        [A^{i_m}(s, a^{i_{1:m-1}}, a^{i_m})]
    """
    before, agent = order[:turn], order[turn]
    advantage = game.multi_agent_advantage(old, [agent], given=before)
    mean = game.mean(advantage, new, [*before, agent])
    return (game.occupancy(old) * mean.flatten(game.batch_dims)).sum(-1)


class TabularTeam:
    """The library's actors with a table of logits for each agent.

    Args:
        game (TabularGame): what they play.
        policies (sequence of Tensor): their first policies ``[S, k_i]``.
        stacked (bool): one group with a stack of tables, if the agents have equal actions;
            otherwise every agent is a group of its own, without an agent dimension.
    """

    def __init__(self, game, policies, *, stacked=True):
        self.game = game
        self.stacked = stacked and len(set(game.n_actions)) == 1
        if self.stacked:
            self.actors = self._stack(torch.stack([p.log() for p in policies]))
        else:
            self.actors = {
                f"agent{i}": self._single(f"agent{i}", p.log()) for i, p in enumerate(policies)
            }

    def _stack(self, logits):
        n_agents, n_states, n_actions = logits.shape
        net = MultiAgentMLP(
            n_agent_inputs=n_states,
            n_agent_outputs=n_actions,
            n_agents=n_agents,
            centralized=False,
            share_params=False,
            depth=0,
        ).double()
        weight, bias = net.params["0", "weight"], net.params["0", "bias"]
        with torch.no_grad():
            weight.copy_(logits.mT)
            bias.zero_()
        return self._actor(net, "agents")

    def _single(self, group, logits):
        net = nn.Linear(*logits.shape).double()
        with torch.no_grad():
            net.weight.copy_(logits.mT)
            net.bias.zero_()
        return self._actor(net, group)

    @staticmethod
    def _actor(net, group):
        return ProbabilisticActor(
            TensorDictModule(net, in_keys=[(group, "observation")], out_keys=[(group, "logits")]),
            in_keys=[(group, "logits")],
            out_keys=[(group, "action")],
            distribution_class=Categorical,
            return_log_prob=True,
        )

    @torch.no_grad()
    def policies(self):
        """The present policy of each agent, ``[S, k_i]``."""
        state = torch.eye(self.game.n_states, dtype=torch.float64)
        if self.stacked:
            seen = state.unsqueeze(1).expand(-1, self.game.n_agents, -1)
            data = TensorDict({"agents": TensorDict({"observation": seen}, seen.shape[:2])}, [])
            return list(self.actors.get_dist(data).probs.unbind(1))
        return [
            actor.get_dist(TensorDict({name: {"observation": state}}, [])).probs
            for name, actor in self.actors.items()
        ]

    @torch.no_grad()
    def batch(self):
        """Every state and joint action once, with an advantage that weighs them.

        The mean over the batch of anything times this advantage is the exact expectation of that
        thing times the joint advantage, over the discounted visits of the present policies.
        """
        game, policies = self.game, self.policies()
        joint = list(product(range(game.n_states), *map(range, game.n_actions)))
        state, *actions = torch.tensor(joint).unbind(-1)
        weight = game.joint_policy(policies) * game.occupancy(policies).reshape(
            -1, *[1] * game.n_agents
        )
        advantage = (len(joint) * weight * game.advantage(policies)).flatten()
        data = TensorDict({"advantage": advantage.unsqueeze(-1)}, [len(joint)])
        seen = nn.functional.one_hot(state, game.n_states).double()
        if self.stacked:
            shape = [len(joint), game.n_agents]
            group = {"observation": seen.unsqueeze(1).expand(*shape, -1).contiguous()}
            group["action"] = torch.stack(actions, -1)
            data["agents"] = TensorDict(group, shape)
            self._score(self.actors, "agents", data)
        else:
            for name, action in zip(self.actors, actions, strict=True):
                data[name] = TensorDict({"observation": seen, "action": action}, [len(joint)])
                self._score(self.actors[name], name, data)
        return data

    @staticmethod
    def _score(actor, group, data):
        """What a collector leaves beside the actions."""
        dist = actor.get_dist(data)
        data[group, "logits"] = dist.logits
        data[group, "action_log_prob"] = dist.log_prob(data[group, "action"])


def exact_updater(loss, **kwargs):
    """This library's updater on exact expectations: nothing is standardised."""
    settings = {"optimizer": partial(torch.optim.Adam, lr=0.1), "num_epochs": 20, **kwargs}
    return SequentialUpdater(loss, standardize_advantage=False, **settings)
