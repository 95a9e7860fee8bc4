r"""Coordinated proximal policy optimisation (CoPPO): all agents at once, in view of the others.

At every step of one common optimiser agent :math:`i` maximises
:math:`\mathbb{E}[\min(l_i A, \mathrm{clip}(l_i, 1 \pm \epsilon) A)]` with
:math:`l_i = r_i \, \mathrm{clip}(\prod_{j \ne i} r_j, 1 \pm \epsilon / 2)`.

**Keys.** Those of HAPPO, of one group. There is no factor: the group is one unit of the update.
**Defaults.** Those of HAPPO; the inner range is half of ``clip_epsilon``.

**When to use it.** With many agents of one group, for which one after the other takes too long, and
with agents that share parameters.
"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import dispatch
from torch import Tensor

from torchrl_happo.objectives.base import SequentialLoss
from torchrl_happo.objectives.block import BlockLoss
from torchrl_happo.objectives.surrogate import clipped_surrogate, corrected_advantage
from torchrl_happo.team.agent import Agent

__all__ = ["CoPPOLoss", "doubly_clipped_surrogate"]


def doubly_clipped_surrogate(
    log_ratio: Tensor,
    log_others: Tensor,
    advantage: Tensor,
    inner: tuple[Tensor, Tensor],
    outer: tuple[Tensor, Tensor],
) -> Tensor:
    r"""Clipped surrogate of an agent's ratio times the clipped ratio of others.

    With :math:`g = \mathrm{clip}(\rho, 1 \pm \epsilon_\text{inner})` and :math:`l = r g`:
    :math:`\min(l A, \mathrm{clip}(l, 1 \pm \epsilon) A)`. No gradient goes through :math:`g`.

    Args:
        log_ratio (Tensor): :math:`\log r` of the agent, of any shape.
        log_others (Tensor): :math:`\log \rho`, of the product of the ratios of others.
        advantage (Tensor): :math:`A`; broadcastable.
        inner (tuple of Tensor): logs of the bounds of :math:`g`.
        outer (tuple of Tensor): logs of the bounds of :math:`l`.

    Example:
        >>> log = lambda *values: tuple(torch.tensor(value).log() for value in values)
        >>> ratio, others = log(1.1, 3.0)
        >>> doubly_clipped_surrogate(ratio, others, torch.ones(()), log(0.9, 1.05), log(0.8, 1.2))
        tensor(1.1550)
    """
    known = torch.where(log_others.isfinite(), log_others, 0.0).detach()
    clipped = torch.maximum(torch.minimum(known, inner[1]), inner[0])
    return clipped_surrogate(log_ratio + clipped, advantage, *outer)


class CoPPOLoss(BlockLoss):
    r"""Coordinated PPO loss (Wu et al., 2021, https://arxiv.org/abs/2111.04051).

    All agents of a group move at once. At every step of the optimiser agent :math:`i` maximises

    .. math::
        \mathbb{E}[\min(l_i A, \mathrm{clip}(l_i, 1 \pm \epsilon) A)], \qquad
        l_i = r_i \, \mathrm{clip}\Bigl(\prod_{j \ne i} r_j, 1 \pm \epsilon / 2\Bigr),

    with the present ratios :math:`r_j` of its companions, through which no gradient goes. The
    group is one unit of the update, named after the group: one optimiser, whose ``max_grad_norm``
    is that of all its agents together, and which may hold shared parameters. For one agent it is
    PPO. The clip of the companions is that of A2PO's code (``use_MA_ratio``); the credit
    assignment of the paper is not part of it.

    Args:
        actor_network (ProbabilisticTensorDictSequential or mapping of str to it): the joint actor
            of the only group.
        critic_network (TensorDictModule): as for :class:`HAPPOLoss`.

    Keyword Args:
        **kwargs: as for :class:`HAPPOLoss`, without ``blocks``.

    Raises:
        TypeError: if ``blocks`` is passed.
        ValueError: if there are several groups, or as :class:`HAPPOLoss` does.

    Example:
        >>> from torchrl.collectors import Collector
        >>> from torchrl_happo import CoPPOLoss, SequentialUpdater, make_actor, make_critic
        >>> from torchrl_happo.envs import MatrixGame
        >>> env = MatrixGame(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), num_envs=64)
        >>> actor, critic = make_actor(env), make_critic(env)
        >>> updater = SequentialUpdater(CoPPOLoss(actor, critic), num_epochs=2)
        >>> batch = next(iter(Collector(env, actor, frames_per_batch=64, total_frames=64)))
        >>> sorted(updater(batch).keys())
        ['agents', 'critic']
    """

    def agent_gain(self, agent: Agent, log_ratio: Tensor, data: TensorDictBase) -> Tensor:
        """Return each member's surrogate in view of its companions, element by element."""
        if log_ratio.ndim == data.batch_dims:  # one agent has no companions
            return super().agent_gain(agent, log_ratio, data)
        known = torch.where(log_ratio.isfinite(), log_ratio, 0.0)
        companions = known.sum(-1, keepdim=True) - known
        low, high = self._bounds(agent)
        inner = (low.expm1() / 2).log1p(), (high.expm1() / 2).log1p()
        advantage = corrected_advantage(data, self.tensor_keys)
        return doubly_clipped_surrogate(log_ratio, companions, advantage, inner, (low, high))

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the losses of the whole team."""
        return SequentialLoss.forward(self, tensordict)
