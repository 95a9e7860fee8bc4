r"""Transformed PPO (T-PPO): each agent's choice has the credit of its own, given those before it.

A step of :math:`n` agents is taken as :math:`n` steps of one, with the values of *prefixes*
:math:`V(o, a^{1:k})`. The advantage of agent :math:`k+1` then begins with
:math:`V(o, a^{1:k+1}) - V(o, a^{1:k})`, the gain of its own choice, and any optimum of this chain
is one of the team. The surrogate is that of MAT.

**Keys.** Those of MAT, of which the critic reads the actions as well:
``make_transformer(env, prefix_values=True)``.

**Defaults.** Those of MAT; ``gamma`` discounts a step, and ``lmbda`` decays over it, by its
:math:`n`-th root at each choice.

**When to use it.** When one reward of the team is to be divided among the choices that made it. For
decentralised execution :class:`~torchrl_happo.update.distillation.Distillation` teaches the
coordinated policy to one network of each agent.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import unravel_key
from torchrl.objectives.utils import ValueEstimators

from torchrl_happo.objectives.base import Actors, SequentialLoss
from torchrl_happo.objectives.mat import MATLoss
from torchrl_happo.objectives.prefix_gae import PrefixGAE
from torchrl_happo.objectives.team_gae import TEAM_GAE

__all__ = ["TPPOLoss"]


class TPPOLoss(MATLoss):
    r"""Loss of the transformed PPO, or TAD-PPO (Ye et al., 2022, https://arxiv.org/abs/2207.11143).

    It is :class:`MATLoss` with a critic of prefixes: :mod:`torchrl_happo.objectives.tppo` has the
    idea, :mod:`torchrl_happo.objectives.prefix_gae` the estimate of the advantage.

    Args:
        actor_network (ProbabilisticTensorDictSequential): the policy of the team.
        critic_network (TensorDictModule): writes the value of the prefix before each agent,
            ``[*B, n_agents, 1]``, from the observations and actions.

    Keyword Args:
        **kwargs: as for :class:`MATLoss`.

    Raises:
        ValueError: if the critic does not read the actions, or as :class:`MATLoss` does.

    Example:
        >>> from torchrl.collectors import Collector
        >>> from torchrl_happo import SequentialUpdater, TPPOLoss, make_transformer
        >>> from torchrl_happo.envs import MatrixGame, climbing_payoff
        >>> env = MatrixGame(climbing_payoff(), num_envs=64)
        >>> actor, critic = make_transformer(env, size=16, prefix_values=True)
        >>> updater = SequentialUpdater(TPPOLoss(actor, critic), num_epochs=2)
        >>> batch = next(iter(Collector(env, actor, frames_per_batch=64, total_frames=64)))
        >>> sorted(updater(batch).keys())
        ['agents', 'critic']
    """

    def __init__(self, actor_network: Actors, critic_network: Any = None, **kwargs: Any) -> None:
        super().__init__(actor_network, critic_network, **kwargs)
        (block,) = self.agents
        self.chosen = tuple(map(unravel_key, block.policy.action_keys))
        reads = [] if critic_network is None else self._own_keys.reads
        if missing := [key for key in self.chosen if key not in reads and reads]:
            raise ValueError(
                f"The critic reads {list(reads)}, but the value of a prefix depends on the action "
                f"{missing[0]!r}; build it by make_transformer(env, prefix_values=True), or take "
                "MATLoss."
            )
        if critic_network is not None:
            self._own_keys = replace(self._own_keys, actions=frozenset(self.chosen))

    def make_value_estimator(
        self, value_type: ValueEstimators | None = None, **hyperparams: Any
    ) -> TPPOLoss:
        """Build the estimator of the chain of choices.

        Args:
            value_type (ValueEstimators, optional): must be a kind of GAE. Defaults to ``None``.
            **hyperparams: ``gamma`` and ``lmbda``, ``0.99`` and ``0.95`` by default.

        Raises:
            ValueError: for another kind of estimator.
        """
        if value_type not in (None, ValueEstimators.GAE, TEAM_GAE):
            raise ValueError(
                f"The chain of choices is estimated by GAE, not by {value_type}; call "
                "make_value_estimator(gamma=..., lmbda=...)."
            )
        settings = {"gamma": 0.99, "lmbda": 0.95, **hyperparams}
        net = getattr(self.actor_network, "transformer", None)
        order = range(self.num_agents) if net is None else net.choosing
        self._value_estimator = PrefixGAE(
            actions=self.chosen, order=order, value_network=self.critic_network, **settings
        )
        self._forward_value_estimator_keys()
        return self

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the losses of the whole team."""
        return SequentialLoss.forward(self, tensordict)
