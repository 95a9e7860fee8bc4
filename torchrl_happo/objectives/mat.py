r"""Multi-agent transformer (MAT): agents that choose one after the other, trained as one block.

The policy of the team is :math:`\prod_k \pi(a^k | o, a^{1:k-1})`. With the ratio :math:`r_k` of
agent :math:`k`, given the stored actions before its own, and its advantage :math:`A_k`,

.. math::
    \frac{1}{n} \sum_k \mathbb{E}\left[\min\left(r_k A_k, \mathrm{clip}(r_k, 1 - \epsilon,
    1 + \epsilon) A_k\right)\right] - c_V L_V

is maximised by one optimiser, also in the parameters of the encoder that policies and values share.

**Keys.** Those of HAPPO, of one group or of all groups at once; the critic writes a value of each
agent, ``("agents", "state_value")`` ``[*B, n_agents, 1]``, or one of the team. There is no factor.
Decisions of agents that are not active do not count; but the others attend to what the environment
shows of them, when they act as in training.

**Defaults.** Those of HAPPO, ``ratio="agent"``. If actor and critic share parameters, one optimiser
trains both, and there is no step of the critic.

**When to use it.** When the best action of an agent depends on what the others choose at the same
step, and the team may choose in one place. For decentralised execution take
``make_transformer(env, decentralized=True)`` (MAT-Dec).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor, nn
from torch.distributions import Independent

from torchrl_happo.arguments import check_choice
from torchrl_happo.masked import VALID, masked
from torchrl_happo.objectives.base import Actors, SequentialLoss
from torchrl_happo.objectives.block import BlockLoss
from torchrl_happo.objectives.surrogate import clipped_surrogate, corrected_advantage
from torchrl_happo.policy.policy import PREIMAGE
from torchrl_happo.steps.step import Problem
from torchrl_happo.team.agent import Agent
from torchrl_happo.versions import ValueNorm

__all__ = ["OLD_DIMENSIONS", "MATLoss"]

#: Entry of a block's data: log-probabilities of each dimension of the actions before it moves.
OLD_DIMENSIONS = "old_dimensions"


class MATLoss(BlockLoss):
    r"""Loss of the multi-agent transformer (Wen et al., 2022, https://arxiv.org/abs/2205.14953).

    Each agent has the clipped surrogate of its own ratio and advantage, given the actions of the
    agents before it; :mod:`torchrl_happo.objectives.mat` has the equation. The team is one unit of
    the update. If actor and critic share parameters, as those of
    :func:`~torchrl_happo.make_transformer` do, the unit owns the critic: its one optimiser
    minimises both losses, and the settings of critic steps do not act. For a team of one it is PPO.

    Args:
        actor_network (ProbabilisticTensorDictSequential): the policy of the team.
        critic_network (TensorDictModule): writes a value of each agent, ``[*B, n_agents, 1]``, or
            one of the team.

    Keyword Args:
        ratio (str): ``"agent"``: one ratio of each agent, the product over the dimensions of its
            action; ``"dimensions"``: one of each dimension, whose surrogates are summed, as in
            the authors' code. Defaults to ``"agent"``.
        **kwargs: as for :class:`HAPPOLoss`, without ``blocks``.

    Raises:
        TypeError: if ``blocks`` is passed.
        ValueError: if ``ratio`` is another word, there are several actors, or as
            :class:`HAPPOLoss` does.

    Example:
        >>> from torchrl.collectors import Collector
        >>> from torchrl_happo import MATLoss, SequentialUpdater, make_transformer
        >>> from torchrl_happo.envs import MatrixGame, permutation_payoff
        >>> env = MatrixGame(permutation_payoff(3), num_envs=64)
        >>> actor, critic = make_transformer(env, size=16)
        >>> updater = SequentialUpdater(MATLoss(actor, critic), num_epochs=2)
        >>> batch = next(iter(Collector(env, actor, frames_per_batch=64, total_frames=64)))
        >>> sorted(updater(batch).keys())
        ['agents', 'critic']
    """

    _instead: ClassVar[Mapping[str, str]] = {
        "separate_losses": "leave it out, as both losses train what the networks share"
    }

    def __init__(
        self,
        actor_network: Actors,
        critic_network: TensorDictModule | None = None,
        *,
        ratio: Literal["agent", "dimensions"] = "agent",
        **kwargs: Any,
    ) -> None:
        check_choice("ratio", ratio, ("agent", "dimensions"))
        super().__init__(actor_network, critic_network, **kwargs)
        self.ratio = ratio

    def _init_team(
        self, actors: Actors, blocks: Collection[str], value_norm: ValueNorm | None, popart: bool
    ) -> None:
        """Look whether the block owns the critic."""
        critic, actor = self.critic_network, self.actor_network
        if critic is not None:
            own = {id(parameter) for parameter in actor.parameters()}
            self.owns_critic = any(id(parameter) in own for parameter in critic.parameters())
        super()._init_team(actors, blocks, value_norm, popart)

    def moved_by(self, agent: Agent) -> nn.Module:
        """Return everything that the agent's step moves: its actor, and the critic it owns."""
        if not self.owns_critic:
            return super().moved_by(agent)
        return nn.ModuleDict({"actor": agent.actor, "critic": self.critic_network})

    def agent_problem(self, agent: Agent, **kwargs: Any) -> Problem:
        """Return what the block's step is to solve; arguments as of :class:`HAPPOLoss`."""
        problem = super().agent_problem(agent, **kwargs)
        return replace(problem, named_parameters=self.moved_by(agent).named_parameters)

    def agent_terms(self, agent: Agent, data: TensorDictBase) -> dict[str, Any]:
        """Return surrogate and entropy bonus and, if the block owns it, the critic's loss."""
        terms = super().agent_terms(agent, data)
        if self.ratio == "dimensions" and OLD_DIMENSIONS in data.keys():
            terms["loss_objective"] = -self._gain_of_dimensions(agent, data)
        critic = self.critics.get("critic")
        if critic is None or not critic.is_owned or critic.coeff is None:
            return terms
        if data.get(critic.keys.value_target, None) is not None:
            loss = critic.coeff * critic.loss(data)[0].squeeze(-1)
            shape = agent.sample_shape(data)
            # One value of the team counts for each agent.
            loss = loss.unsqueeze(-1) if loss.ndim < len(shape) else loss.reshape(shape)
            terms["loss_critic"] = loss.expand(shape)
        return terms

    def dimension_log_prob(self, agent: Agent, data: TensorDictBase) -> Tensor:
        """Return the log-probability of each dimension of the stored actions.

        Args:
            agent (Agent): the block.
            data (TensorDictBase): its prepared part of the batch.

        Returns:
            ``[*B, n_members, action_dim]``, without the fixed term of a squashing.
        """
        policy = agent.policy
        dist = policy.scored(policy.parameters(data), data)
        action = data.get(PREIMAGE) if PREIMAGE in data.keys() else policy.action(data)
        if isinstance(dist, Independent):
            return dist.base_dist.log_prob(action)
        return dist.log_prob(action).unsqueeze(-1)

    def _gain_of_dimensions(self, agent: Agent, data: TensorDictBase) -> Tensor:
        """Return the sum of the surrogates of all dimensions, by agent."""
        log_ratio = self.dimension_log_prob(agent, data) - data.get(OLD_DIMENSIONS)
        log_ratio = log_ratio.reshape(*agent.sample_shape(data), -1)
        valid = data.get(VALID, None)
        log_ratio = masked(log_ratio, None if valid is None else valid.unsqueeze(-1))
        advantage = corrected_advantage(data, self.tensor_keys).unsqueeze(-1)
        low, high = (b.unsqueeze(-1) if b.ndim else b for b in self._bounds(agent))
        return clipped_surrogate(log_ratio, advantage, low, high).sum(-1)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the losses of the whole team."""
        return SequentialLoss.forward(self, tensordict)
