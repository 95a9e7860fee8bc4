r"""HAPPO with a price on costs: MAPPO-Lagrangian for agents that are updated one after the other.

The advantage of :mod:`torchrl_happo.objectives.happo` becomes
:math:`A - \sum_k \lambda_k A_{C_k}`, with multipliers that grow while costs are above their bounds.

**Keys.** The keys of HAPPO, and the keys of costs (:mod:`torchrl_happo.objectives.costs`).
**Defaults.** Those of HAPPO; learned multipliers from 0.5, with a learning rate of 0.05.

**When to use it.** When the mean cost of an episode has a bound, which training may exceed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, dispatch
from torch import Tensor
from torch.nn import functional as F

from torchrl_happo.arguments import check_positive
from torchrl_happo.objectives.base import Actors, SequentialLoss
from torchrl_happo.objectives.costs import WithCosts
from torchrl_happo.objectives.happo import HAPPOLoss

__all__ = ["HAPPOLagrangianLoss", "adam_ascent", "projected_ascent"]

_KINDS = ("learned", "projected", "fixed")


class HAPPOLagrangianLoss(WithCosts, HAPPOLoss):
    r"""HAPPO that keeps costs below bounds by Lagrange multipliers (Gu et al., 2021).

    The team maximises :math:`J - \sum_k \lambda_k (J_{C_k} - d_k)`
    (https://arxiv.org/abs/2110.02793). Each agent is updated as by :class:`HAPPOLoss`, with the
    advantage

    .. math:: A - \sum_k \lambda_k A_{C_k},

    which is standardised as a whole, so that :math:`\lambda` is a price in rewards per cost. A
    multiplier grows while the mean cost :math:`J_C` of the episodes that ended in the batch is
    above its bound :math:`d`, and falls below it. With all multipliers 0 the update is that of
    :class:`HAPPOLoss`, bit for bit.

    :class:`~torchrl_happo.SequentialUpdater` moves the multipliers and keeps them in its state.
    What a batch must hold is in :mod:`torchrl_happo.objectives.costs`.

    Args:
        actor_network (ProbabilisticTensorDictSequential or mapping of str to it): as for
            :class:`HAPPOLoss`.
        critic_network (TensorDictModule): as for :class:`HAPPOLoss`.
        cost_critic (TensorDictModule or mapping): predicts the cost to come; for several costs, a
            mapping from their keys under ``"next"``. A single cost lies under ``"cost"``.

    Keyword Args:
        cost_limit (float or mapping): bound :math:`d` of the mean cost of an episode, summed
            without discount; a mapping for several costs.
        multiplier (str): ``"learned"``: :math:`\lambda = \mathrm{softplus}(\xi)`, and :math:`\xi`
            makes a step of Adam before each update; ``"projected"``: as in the paper, after each
            agent's turn
            :math:`\lambda_i \leftarrow [\lambda_i + \eta ((1 - \gamma)(J_C - d) + E[r A_C])]_+`;
            ``"fixed"``: a penalty that stays. Defaults to ``"learned"``.
        initial_multiplier (float): :math:`\lambda` at the start. Defaults to ``0.5``.
        multiplier_lr (float): learning rate :math:`\eta`. Defaults to ``0.05``.
        by_agent (bool, optional): whether each agent has multipliers of its own. Defaults to
            ``None``: only ``"projected"`` ones, which follow each agent's own ratios.
        bootstrap_truncated (bool): whether the cost of an episode that was truncated includes what
            the critic of the cost expects to come. Defaults to ``False``: an episode costs what was
            paid until it was cut.
        **kwargs: as for :class:`HAPPOLoss`. ``value_norm``, ``clip_value`` and the other arguments
            about the critic hold for the critics of costs as well, each with its own statistics.

    Raises:
        TypeError: if a critic of a cost is no module that writes one value.
        ValueError: if a cost has no bound or no critic, critics share parameters, an argument is
            out of range, or as :class:`HAPPOLoss` does.

    Example:
        >>> from torchrl.collectors import Collector
        >>> from torchrl.envs import Compose, RewardSum, TransformedEnv
        >>> from torchrl_happo import SequentialUpdater, make_actor, make_critic
        >>> from torchrl_happo.envs import MatrixGame
        >>> env = MatrixGame(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), num_envs=64)
        >>> actor = make_actor(env)
        >>> loss = HAPPOLagrangianLoss(actor, make_critic(env), make_critic(env), cost_limit=0.3)
        >>> updater = SequentialUpdater(loss, num_epochs=2)
        >>> batch = next(iter(Collector(env, actor, frames_per_batch=64, total_frames=64)))
        >>> cost = (batch["agents", "action"] == 1).float().mean(-1, keepdim=True)
        >>> batch["next", "cost"] = batch["next", "episode_cost"] = cost
        >>> metrics = updater(batch)
        >>> bool(metrics["agents_0", "episode_cost"] == cost.mean())
        True
        >>> sorted(metrics.keys())
        ['agents_0', 'agents_1', 'cost', 'critic']
    """

    def __init__(
        self,
        actor_network: Actors,
        critic_network: TensorDictModule,
        cost_critic: TensorDictModuleBase | Mapping[NestedKey, TensorDictModuleBase],
        *,
        cost_limit: float | Mapping[NestedKey, float],
        multiplier: Literal["learned", "projected", "fixed"] = "learned",
        initial_multiplier: float = 0.5,
        multiplier_lr: float = 0.05,
        by_agent: bool | None = None,
        bootstrap_truncated: bool = False,
        **kwargs: Any,
    ) -> None:
        if multiplier not in _KINDS:
            raise ValueError(
                f'multiplier must be "learned", "projected" or "fixed", got {multiplier!r}.'
            )
        check_positive(multiplier_lr=multiplier_lr)
        least = "above 0" if multiplier == "learned" else "at least 0"
        is_number = isinstance(initial_multiplier, int | float) and math.isfinite(
            initial_multiplier
        )
        if (
            not is_number
            or initial_multiplier < 0
            or (multiplier == "learned" and initial_multiplier == 0)
        ):
            raise ValueError(
                f"initial_multiplier must be a finite number {least}, got {initial_multiplier!r}."
            )
        super().__init__(actor_network, critic_network, **kwargs)
        self._init_costs(cost_critic, cost_limit, bootstrap_truncated)
        self.multiplier = multiplier
        self.multiplier_lr = multiplier_lr
        self.by_agent = multiplier == "projected" if by_agent is None else by_agent
        columns = len(self.agents) if self.by_agent else 1
        start = torch.full((len(self.cost_limits), columns), float(initial_multiplier))
        if multiplier == "learned":
            start = start.expm1().log()  # the inverse of softplus
        start = start.to(next(critic_network.parameters()))
        #: Of each cost and agent: the multiplier, or what softplus makes it of; Adam's two moments
        #: and its number of steps.
        self.register_buffer(
            "multiplier_state", torch.stack([start, *[torch.zeros_like(start)] * 3])
        )

    @property
    def multipliers(self) -> Tensor:
        r"""The multipliers :math:`\lambda` of each cost and agent, ``[n_costs, n_agents]``."""
        return self.multipliers_of(self.multiplier_state).clone()

    def multipliers_of(self, state: Tensor) -> Tensor:
        """Return the multipliers that a state holds, ``[n_costs, n_agents]``."""
        own = F.softplus(state[0]) if self.multiplier == "learned" else state[0]
        return own.expand(-1, len(self.agents))

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the losses of the whole team by the reward alone, as :class:`HAPPOLoss` does."""
        return SequentialLoss.forward(self, tensordict)


def adam_ascent(state: Tensor, excess: Tensor, lr: float) -> Tensor:
    r"""Return the state of learned multipliers after a step of Adam up the dual.

    The dual's gradient is
    :math:`\partial \lambda (J_C - d) / \partial \xi = \sigma(\xi) (J_C - d)`.

    Args:
        state (Tensor): :math:`\xi`, Adam's two moments and its number of steps, ``[4, *shape]``.
        excess (Tensor): :math:`J_C - d`, broadcastable; NaN where nothing is known: no step.
        lr (float): learning rate.

    Example:
        >>> adam_ascent(torch.zeros(4, 1), torch.tensor([3.0]), lr=0.1)[0]
        tensor([0.1000])
    """
    xi, mean, square, steps = state
    gradient = xi.sigmoid() * excess
    steps = steps + 1
    mean = 0.9 * mean + 0.1 * gradient
    square = 0.999 * square + 0.001 * gradient.square()
    move = (mean / (1 - 0.9**steps)) / ((square / (1 - 0.999**steps)).sqrt() + 1e-8)
    moved = torch.stack([xi + lr * move, mean, square, steps])
    return torch.where(excess.isnan().expand_as(xi), state, moved)


def projected_ascent(multipliers: Tensor, excess: Tensor, lr: float) -> Tensor:
    r"""Return :math:`\max(0, \lambda + \eta e)`; where nothing is known (NaN), :math:`\lambda`.

    Example:
        >>> projected_ascent(torch.tensor([0.5, 0.5]), torch.tensor([1.0, -9.0]), lr=0.1)
        tensor([0.6000, 0.0000])
    """
    return torch.where(excess.isnan(), multipliers, (multipliers + lr * excess).clamp_min(0))
