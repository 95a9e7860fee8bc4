r"""Heterogeneous-agent advantage actor-critic (HAA2C).

Each agent in turn maximises :math:`\mathbb{E}[r M]`, with the factor of
:mod:`torchrl_happo.objectives.happo`, and nothing is clipped.

**Keys.** Those of HAPPO. **Defaults.** Those of HAPPO, without ``clip_epsilon``.

**When to use it.** As the plain member of the family: to see what clipping adds. Only few epochs
(the reference takes 5) and a small learning rate keep a policy near the one that acted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor

from torchrl_happo.objectives.base import Actors, SequentialLoss
from torchrl_happo.objectives.happo import HAPPOLoss
from torchrl_happo.objectives.joint import JointTerms
from torchrl_happo.objectives.surrogate import corrected_advantage, surrogate
from torchrl_happo.team.agent import Agent

__all__ = ["HAA2CLoss"]


class HAA2CLoss(HAPPOLoss):
    r"""Heterogeneous-agent A2C loss (Zhong et al., 2024, https://arxiv.org/abs/2304.09870).

    Agents are updated one after the other. Agent :math:`i_m` maximises
    :math:`\mathbb{E}[r M]` with its ratio :math:`r` and :math:`M`, the joint advantage times the
    factor (see :class:`HAPPOLoss`). Nothing is clipped, so that only few epochs and a small
    learning rate keep a policy near the one that acted: the reference takes 5 epochs.

    Args:
        actor_network (ProbabilisticTensorDictSequential or mapping of str to it): as for
            :class:`HAPPOLoss`.
        critic_network (TensorDictModule): as for :class:`HAPPOLoss`.

    Keyword Args:
        clip_value (float, optional): as for :class:`HAPPOLoss`, but a number: there is no
            ``clip_epsilon`` to take. Defaults to ``None``.
        **kwargs: the other arguments of :class:`HAPPOLoss`.

    Raises:
        TypeError: if ``clip_epsilon`` is passed.
        ValueError: if ``clip_value`` is ``True``, or as :class:`HAPPOLoss` does.

    Example:
        >>> import torch
        >>> from torchrl.collectors import Collector
        >>> from torchrl_happo import HAA2CLoss, SequentialUpdater, make_actor, make_critic
        >>> from torchrl_happo.envs import MatrixGame
        >>> env = MatrixGame(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), num_envs=64)
        >>> actor, critic = make_actor(env), make_critic(env)
        >>> updater = SequentialUpdater(HAA2CLoss(actor, critic), num_epochs=5)
        >>> batch = next(iter(Collector(env, actor, frames_per_batch=64, total_frames=64)))
        >>> metrics = updater(batch)
        >>> bool(metrics["agents_0", "surrogate"] > metrics["agents_0", "surrogate_before"])
        True
    """

    _instead: ClassVar[Mapping[str, str]] = {
        "max_importance_ratio": "take HAPPOLoss, whose clip_epsilon bounds the ratio"
    }

    def __init__(
        self,
        actor_network: Actors,
        critic_network: TensorDictModule | None = None,
        *,
        clip_value: float | None = None,
        **kwargs: Any,
    ) -> None:
        if "clip_epsilon" in kwargs:
            raise TypeError(
                "HAA2CLoss clips no ratio, so clip_epsilon would not act; leave it out, or take "
                "HAPPOLoss."
            )
        if clip_value is True:
            raise ValueError(
                "clip_value=True takes clip_epsilon, which HAA2CLoss does not have; pass a number."
            )
        super().__init__(actor_network, critic_network, clip_value=clip_value, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a clipping threshold, which would not act."""
        if name == "clip_epsilon":
            raise AttributeError("HAA2CLoss clips no ratio; take HAPPOLoss for a clip_epsilon.")
        super().__setattr__(name, value)

    def agent_gain(self, agent: Agent, log_ratio: Tensor, data: TensorDictBase) -> Tensor:
        """Return the ratio times the corrected advantage, element by element."""
        return surrogate(log_ratio, corrected_advantage(data, self.tensor_keys))

    def agent_report(
        self, agent: Agent, log_ratio: Tensor, valid: Tensor | None
    ) -> dict[str, Tensor]:
        """Return nothing beyond the metrics of every loss: no ratio is clipped."""
        return {}

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the losses of the whole team."""
        return SequentialLoss.forward(self, tensordict)

    def _summary(self, terms: JointTerms) -> TensorDict:
        return super()._summary(terms).exclude("clip_fraction")
