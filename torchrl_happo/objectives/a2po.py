r"""Agent-by-agent policy optimisation (A2PO): the advantage is estimated again for each agent.

With the product :math:`\rho` of the ratios of the agents before, the :math:`k`-th of :math:`n`
agents maximises :math:`\mathbb{E}[\min(l A, \mathrm{clip}(l, 1 \pm \epsilon_k) A)]`,
:math:`l = r \, \mathrm{clip}(\rho, 1 \pm \epsilon / 2)`, in ranges
:math:`\epsilon_k` that grow with its place. :math:`A` is
estimated with traces :math:`\lambda \min(\bar c, \rho)`.

**Keys.** Those of HAPPO, and the values of the batch. **Defaults.** Those of HAPPO,
``clip_growth=0.5``, ``c_thresh=1``; the order of the paper is
``SequentialUpdater(..., order="semi_greedy")``.

**When to use it.** When ``factor_ess`` falls far below 1 for the last agents: the traces forget
what the moves of the others have made improbable.
"""

from __future__ import annotations

from typing import Any, Literal

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor

from torchrl_happo.objectives.base import Actors, SequentialLoss
from torchrl_happo.objectives.coppo import doubly_clipped_surrogate
from torchrl_happo.objectives.happo import HAPPOLoss
from torchrl_happo.team.agent import Agent

__all__ = ["CLIP_SCALE", "A2POLoss"]

#: Entry of an agent's data that scales its clipping threshold; absent: 1.
CLIP_SCALE = "clip_scale"


class A2POLoss(HAPPOLoss):
    r"""Agent-by-agent policy optimisation (Wang et al., 2023, https://arxiv.org/abs/2302.06205).

    Agents are updated one after the other. With the product :math:`\rho` of the ratios of the
    agents that moved before, the :math:`k`-th of :math:`n` maximises

    .. math::
        \mathbb{E}[\min(l A, \mathrm{clip}(l, 1 \pm \epsilon_k) A)], \qquad
        l = r \, \mathrm{clip}(\rho, 1 \pm \epsilon / 2), \qquad
        \epsilon_k = \epsilon (w k / n + 1 - w).

    Its advantage :math:`A` is estimated again, for the policies as they are now:
    :math:`A_t = \delta_t + \gamma c_{t+1} A_{t+1}` with
    :math:`c = \lambda \min(\bar c, \rho)`, where a trajectory goes on, and then standardised
    (:class:`~torchrl_happo.update.reestimation.Reestimated`, which
    :class:`~torchrl_happo.SequentialUpdater` takes by itself). The order of the paper is
    ``order="semi_greedy"``. The critic is fitted to the returns of the first
    agent.

    Args:
        actor_network (ProbabilisticTensorDictSequential or mapping of str to it): as for
            :class:`HAPPOLoss`.
        critic_network (TensorDictModule): as for :class:`HAPPOLoss`; its value estimator must have
            ``gamma`` and ``lmbda``, as GAE has.

    Keyword Args:
        clip_growth (float): :math:`w`, by how much less than the last the first agent may move.
            Defaults to ``0.5``.
        trace (str): ``"paper"``: :math:`c` has one :math:`\lambda`; ``"code"``: two, from the
            second agent on, as in the authors' code. Defaults to ``"paper"``.
        c_thresh (float): :math:`\bar c`, the largest ratio that a trace takes; named as in
            :class:`~torchrl.objectives.value.VTrace`. With ``math.inf`` and ``lmbda=1`` the
            estimate is unbiased, at a variance that grows with every step. Defaults to ``1.0``.
        **kwargs: as for :class:`HAPPOLoss`.

    Raises:
        ValueError: if ``clip_growth`` is not in [0, 1], ``trace`` is another word, ``c_thresh`` is
            below 1, or as :class:`HAPPOLoss` does.

    Example:
        >>> import torch
        >>> from torchrl.collectors import Collector
        >>> from torchrl_happo import A2POLoss, SequentialUpdater, make_actor, make_critic
        >>> from torchrl_happo.envs import MatrixGame
        >>> env = MatrixGame(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), num_envs=64)
        >>> actor, critic = make_actor(env), make_critic(env)
        >>> updater = SequentialUpdater(A2POLoss(actor, critic), order="semi_greedy", num_epochs=2)
        >>> batch = next(iter(Collector(env, actor, frames_per_batch=64, total_frames=64)))
        >>> sorted(updater(batch).keys())
        ['agents_0', 'agents_1', 'critic']
    """

    def __init__(
        self,
        actor_network: Actors,
        critic_network: TensorDictModule | None = None,
        *,
        clip_growth: float = 0.5,
        trace: Literal["paper", "code"] = "paper",
        c_thresh: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if not 0 <= clip_growth <= 1:
            raise ValueError(f"clip_growth must be between 0 and 1, got {clip_growth!r}.")
        if trace not in ("paper", "code"):
            raise ValueError(f'trace must be "paper" or "code", got {trace!r}.')
        if not c_thresh >= 1:  # the first agent's ratio is 1, and its advantage that of GAE
            raise ValueError(f"c_thresh must be at least 1, got {c_thresh!r}.")
        super().__init__(actor_network, critic_network, **kwargs)
        self.clip_growth = clip_growth
        self.trace = trace
        self.c_thresh = c_thresh

    def clip_scale(self, place: int) -> float:
        """Return the clipping threshold of the agent at a place in the order, counted from 0."""
        return 1 + self.clip_growth * ((place + 1) / len(self.agents) - 1)

    def agent_gain(self, agent: Agent, log_ratio: Tensor, data: TensorDictBase) -> Tensor:
        """Return the surrogate in view of the agents that moved before, element by element."""
        keys, scale = self.tensor_keys, data.get(CLIP_SCALE, None)
        low, high = self._bounds(agent)
        inner = (low.expm1() / 2).log1p(), (high.expm1() / 2).log1p()
        if scale is not None:
            low, high = (low.expm1() * scale).log1p(), (high.expm1() * scale).log1p()
        advantage, factor = data.get(keys.advantage), data.get(keys.factor, None)
        before = advantage.new_zeros(()) if factor is None else factor.log()
        return doubly_clipped_surrogate(log_ratio, before, advantage, inner, (low, high))

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the losses of the whole team; ``"factor"`` is the product before clipping."""
        return SequentialLoss.forward(self, tensordict)
