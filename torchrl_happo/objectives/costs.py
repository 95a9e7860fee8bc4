r"""Costs beside the reward: a critic and a bound for each.

A safe team maximises its return while the mean cost of an episode stays below a bound,
:math:`J_C \le d` (Gu et al., 2021, https://arxiv.org/abs/2110.02793). A loss with costs reads for
each of them, here called ``cost``:

- ``("next", "cost")``: ``[*B, 1]`` for the team or ``[*B, n_agents, 1]`` for each agent;
- ``("next", "episode_cost")``: the sum over the episode so far, as
  :class:`~torchrl.envs.RewardSum` writes it, read where an episode ends;
- optional ``"cost_advantage"`` and ``"cost_value_target"``, which are estimated if they are absent.

The cost of an episode that a time limit cuts is what was paid until then. A task that would go on
has ``bootstrap_truncated=True``: what the critic of the cost expects to come, discounted, is added.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

from tensordict import NestedKey
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import unravel_key
from torch import nn
from torchrl.objectives.value import ValueEstimatorBase

from torchrl_happo.objectives.base import SequentialLoss
from torchrl_happo.objectives.critic import Critic, critic_keys, value_estimator
from torchrl_happo.policy.memory import has_memory
from torchrl_happo.team.construction import check_separate
from torchrl_happo.team.entries import next_key, path_of
from torchrl_happo.team.team import CriticKeys

__all__ = ["WithCosts", "cost_name", "episode_key"]


class WithCosts(SequentialLoss):
    """A sequential loss with costs; stands before the loss of the reward in the bases of a class.

    Attributes:
        cost_limits (dict of str to float): bound of the mean cost of an episode, by name.
        cost_keys (dict of str to NestedKey): the costs, under ``"next"``, by name.
        bootstrap_truncated (bool): whether the cost of a truncated episode includes what its critic
            expects to come.
    """

    cost_limits: dict[str, float]
    cost_keys: dict[str, NestedKey]
    bootstrap_truncated: bool
    _cost_reads: dict[str, CriticKeys]

    def _init_costs(
        self,
        cost_critic: TensorDictModuleBase | Mapping[NestedKey, TensorDictModuleBase],
        cost_limit: float | Mapping[NestedKey, float],
        bootstrap_truncated: bool,
    ) -> None:
        """Take up the critics of the costs; the loss of the reward must be initialised."""
        critics = cost_critic if isinstance(cost_critic, Mapping) else {"cost": cost_critic}
        limits = cost_limit if isinstance(cost_limit, Mapping) else {"cost": cost_limit}
        critics = {unravel_key(key): network for key, network in critics.items()}
        limits = {unravel_key(key): limit for key, limit in limits.items()}
        if not critics or critics.keys() != limits.keys():
            raise ValueError(
                f"cost_limit has bounds for {list(limits)}, but cost_critic has critics for "
                f"{list(critics)}; give each cost both."
            )
        for key, limit in limits.items():
            check_limit(cost_name(key), limit)
        self.bootstrap_truncated = bootstrap_truncated
        self.cost_keys = {cost_name(key): key for key in critics}
        self.cost_limits = {cost_name(key): float(limit) for key, limit in limits.items()}
        networks = {cost_name(key): network for key, network in critics.items()}
        for name, network in networks.items():
            _check_critic(name, network, self.critic_network)
            if bootstrap_truncated and has_memory(network):
                raise ValueError(
                    f"bootstrap_truncated=True asks the critic of the cost {name!r} about states "
                    "after the last, but its memory is not in the batch; pass a critic without "
                    "memory, or bootstrap_truncated=False."
                )
            check_separate(self.agents, network)
        self.cost_critics = nn.ModuleDict(networks)
        # Each critic has statistics of its own: costs and rewards have scales of their own.
        norms = {name: copy.deepcopy(self.value_norm) for name in networks}
        self.cost_norms = nn.ModuleDict({n: norm for n, norm in norms.items() if norm is not None})
        self._cost_reads = {name: critic_keys(network) for name, network in networks.items()}

    def _critics(self) -> dict[str, Critic]:
        """Return the critic of the reward, ``"critic"``, and that of each cost, by its name."""
        critics = super()._critics()
        if not hasattr(self, "_cost_reads"):
            return critics
        reward = critics["critic"]
        for name, network in self.cost_critics.items():
            keys = replace(
                self._cost_reads[name],
                value=cast(Any, network).out_keys[0],
                advantage=f"{name}_advantage",
                value_target=f"{name}_value_target",
                reward=self.cost_keys[name],
                done=reward.keys.done,
                terminated=reward.keys.terminated,
                needs_next=reward.keys.needs_next,
            )
            norm = dict(self.cost_norms.items()).get(name)
            critic = replace(reward, network=network, keys=keys, value_norm=norm)
            critics[name] = replace(critic, estimator=partial(self._estimator, critic))
        return critics

    def _estimator(self, critic: Critic) -> ValueEstimatorBase:
        """Return the reward's kind of estimator for a cost."""
        own: Any = self.value_estimator
        names = ("gamma", "lmbda", "shifted")
        settings = {name: getattr(own, name) for name in names if hasattr(own, name)}
        return value_estimator(critic, type(own), **settings)

    def __setattr__(self, name: str, value: Any) -> None:
        """Let a schedule move the bounds, by a mapping of their names."""
        if name == "cost_limits" and "cost_limits" in self.__dict__:
            if value.keys() != self.cost_limits.keys():
                raise ValueError(
                    f"cost_limits must have a bound for each of {list(self.cost_limits)}, got "
                    f"{value!r}."
                )
            for cost, limit in value.items():
                check_limit(cost, limit)
        super().__setattr__(name, value)


def cost_name(key: NestedKey) -> str:
    """Return the name of a cost, from its key.

    Example:
        >>> cost_name(("agents", "collisions"))
        'agents_collisions'
    """
    return "_".join(path_of(key))


def episode_key(key: NestedKey) -> NestedKey:
    """Return where the sum of a cost over the episode lies.

    Example:
        >>> episode_key(("agents", "cost"))
        ('next', 'agents', 'episode_cost')
    """
    *group, name = path_of(key)
    return next_key((*group, f"episode_{name}"))


def check_limit(name: str, limit: Any) -> None:
    """Refuse a bound that is no number; infinity is none to keep to."""
    if isinstance(limit, bool) or not isinstance(limit, int | float) or math.isnan(limit):
        raise ValueError(
            f"cost_limit of {name!r} must be a number, the bound of the mean cost of an episode, "
            f"got {limit!r}."
        )


def _check_critic(name: str, network: Any, critic: nn.Module | None) -> None:
    if not isinstance(network, TensorDictModuleBase) or len(network.out_keys) != 1:
        raise TypeError(
            f"The critic of the cost {name!r} is a {type(network).__name__}; pass a "
            "TensorDictModule that writes one entry, the value of the cost, as make_critic does."
        )
    if critic is None:
        raise ValueError(
            "A loss with costs needs a critic of the reward too, whose estimator the costs share; "
            "pass critic_network."
        )
    shared = {id(parameter) for parameter in critic.parameters()}
    for parameter_name, parameter in network.named_parameters():
        if id(parameter) in shared:
            raise ValueError(
                f"The critics of the reward and of the cost {name!r} share the parameter "
                f"{parameter_name!r}, which would be fitted to both; give each its own network."
            )
