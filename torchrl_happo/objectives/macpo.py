r"""Multi-agent constrained policy optimisation (MACPO): HATRPO within a bound of a cost.

Each agent in turn solves the problem of :mod:`torchrl_happo.objectives.hatrpo` among the steps that
keep :math:`(1 - \gamma)(J_C - d) + \mathbb{E}[(r M - 1) A_C] \le 0`, with the mean cost
:math:`J_C` of an episode and its bound :math:`d`. What the agents before it have added to the cost
is counted by their factor :math:`M`.

**Keys.** The keys of HAPPO, and the keys of costs (:mod:`torchrl_happo.objectives.costs`).
**Defaults.** Those of HATRPO; ``cost_limit`` has none.

**When to use it.** When a bound must be kept from the first update on. One cost, few agents, large
batches; HAPPO-Lagrangian is cheaper and may exceed the bound on its way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, dispatch
from torch import Tensor
from torch.distributions import Distribution

from torchrl_happo.masked import masked, masked_mean
from torchrl_happo.objectives.base import Actors, SequentialLoss
from torchrl_happo.objectives.costs import WithCosts
from torchrl_happo.objectives.hatrpo import HATRPOLoss
from torchrl_happo.steps.first_order import FirstOrder
from torchrl_happo.steps.step import Problem, StepFactory
from torchrl_happo.steps.trust_region.constrained import (
    ConstrainedProblem,
    ConstrainedTrustRegion,
)
from torchrl_happo.team.agent import OLD_LOG_PROB, Agent

__all__ = ["COST_ADVANTAGE", "COST_EXCESS", "MACPOLoss"]

#: Entries of an agent's data: the advantage of the cost, and the cost less its bound.
COST_ADVANTAGE, COST_EXCESS = "macpo_cost_advantage", "macpo_cost_excess"


class MACPOLoss(WithCosts, HATRPOLoss):
    r"""Multi-agent constrained policy optimisation (Gu et al., 2021).

    Agents are updated one after the other (https://arxiv.org/abs/2110.02793). With its ratio
    :math:`r`, the joint advantages :math:`A` of the reward and :math:`A_C` of the cost, and the
    factor :math:`M` of the agents before it, each solves

    .. math::
        \max_\theta \mathbb{E}[r M A] \quad \text{such that} \quad
        (1 - \gamma)(J_C - d) + \mathbb{E}[(r M - 1) A_C] \le 0, \quad
        \mathbb{E}[D_{KL}(\pi_\text{old} \| \pi_\theta)] \le \delta,

    by the natural gradients of gain and cost. Where the bound cannot be kept within the trust
    region, the step lowers the cost alone. The line search restores the parameters bit for bit if
    no step keeps to the conditions. With an infinite bound the step is that of
    :class:`HATRPOLoss`.

    :math:`J_C` is the mean cost of the episodes that ended in the batch; while none has, that of
    the last batch in which one did, and before the first :math:`J_C = d`: the cost may not grow.
    :math:`A_C` is not standardised, as the bound is not either. What a batch must hold is in
    :mod:`torchrl_happo.objectives.costs`.

    The report of an agent says ``case`` (0: recovery, 1: the bound is being restored, 2: bound and
    trust region limit the step, 3: the bound is out of reach, 4: the cost has no slope),
    ``excess`` :math:`(1 - \gamma)(J_C - d) + \mathbb{E}[(M - 1) A_C]` at its turn, ``price``
    :math:`\nu` and ``cost_change``.

    Args:
        actor_network (ProbabilisticTensorDictSequential or mapping of str to it): as for
            :class:`HAPPOLoss`.
        critic_network (TensorDictModule): as for :class:`HAPPOLoss`.
        cost_critic (TensorDictModule or mapping): predicts the cost to come; under the key of the
            cost if that is not ``"cost"``.

    Keyword Args:
        cost_limit (float or mapping): bound :math:`d` of the mean cost of an episode, summed
            without discount.
        bootstrap_truncated (bool): whether the cost of an episode that was truncated includes what
            the critic of the cost expects to come. Defaults to ``False``: an episode costs what was
            paid until it was cut.
        **kwargs: as for :class:`HATRPOLoss`, but ``kl_split="weighted"`` and ``"greedy"``.

    Raises:
        ValueError: for several costs, a budget of the team that compares gains, or as
            :class:`HATRPOLoss` and :class:`HAPPOLagrangianLoss` do.

    Example:
        >>> from torchrl.collectors import Collector
        >>> from torchrl_happo import SequentialUpdater, make_actor, make_critic
        >>> from torchrl_happo.envs import MatrixGame
        >>> env = MatrixGame(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), num_envs=64)
        >>> actor = make_actor(env)
        >>> loss = MACPOLoss(actor, make_critic(env), make_critic(env), cost_limit=0.3)
        >>> updater = SequentialUpdater(loss, num_epochs=2)
        >>> batch = next(iter(Collector(env, actor, frames_per_batch=64, total_frames=64)))
        >>> cost = (batch["agents", "action"] == 1).float().mean(-1, keepdim=True)
        >>> batch["next", "cost"] = batch["next", "episode_cost"] = cost
        >>> metrics = updater(batch)
        >>> bool(metrics["agents_0", "cost_change"] <= 0)
        True
    """

    def __init__(
        self,
        actor_network: Actors,
        critic_network: TensorDictModule,
        cost_critic: TensorDictModuleBase | Mapping[NestedKey, TensorDictModuleBase],
        *,
        cost_limit: float | Mapping[NestedKey, float],
        bootstrap_truncated: bool = False,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("kl_split") in ("weighted", "greedy"):
            raise ValueError(
                f"kl_split={kwargs['kl_split']!r} divides the divergence by gains, but a step of "
                "MACPO may have to give gain up; pass None or 'equal'."
            )
        super().__init__(actor_network, critic_network, **kwargs)
        self._init_costs(cost_critic, cost_limit, bootstrap_truncated)
        if len(self.cost_limits) > 1:
            raise ValueError(
                f"MACPO keeps one cost below its bound, got {list(self.cost_limits)}; add them up "
                "to one, or take HAPPOLagrangianLoss."
            )
        own = {f.name: getattr(self.trust_region, f.name) for f in fields(self.trust_region)}
        self.trust_region = ConstrainedTrustRegion(**own)
        known = torch.full((1, len(self.agents)), float("nan"))
        #: Mean cost of an episode when it was last known, of each agent.
        self.register_buffer("last_costs", known.to(next(critic_network.parameters())))

    def agent_cost(self, agent: Agent, dist: Distribution, data: TensorDictBase) -> Tensor:
        """Return the mean of the ratio times the factor times the advantage of the cost."""
        log_prob = agent.joint_log_prob(agent.policy.scored_log_prob(dist, data), data)
        valid = data.get("valid", None)
        log_ratio = masked(log_prob - data.get(OLD_LOG_PROB), valid)
        factor = data.get(self.tensor_keys.factor, None)
        advantage = data.get(COST_ADVANTAGE)
        advantage = advantage if factor is None else factor * advantage
        return masked_mean(log_ratio.exp() * advantage, valid)

    def agent_problem(self, agent: Agent, **kwargs: Any) -> Problem:
        """Return what an agent's step is to solve, the cost included."""
        plain = super().agent_problem(agent, **kwargs)
        return ConstrainedProblem(
            **{entry.name: getattr(plain, entry.name) for entry in fields(plain)},
            cost=lambda dist, data: self.agent_cost(agent, dist, data),
            excess=lambda data: data.get(COST_EXCESS).flatten()[0],
        )

    def step_factory(self, first_order: FirstOrder) -> StepFactory:
        """Return one constrained trust-region step on the whole batch."""
        return super().step_factory(first_order)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the losses of the whole team by the reward alone, as :class:`HATRPOLoss` does."""
        return SequentialLoss.forward(self, tensordict)
