"""One critic of a team: its network, the scale of its values, its loss and its weight.

A loss has one critic by default, under the name ``"critic"``. A second one, such as the critic of
a cost, is another entry of the mapping ``loss.critics``, with an advantage under a key of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import unravel_key
from torch import Tensor, nn
from torchrl.objectives import PPOLoss
from torchrl.objectives.utils import ValueEstimators, distance_loss
from torchrl.objectives.value import ValueEstimatorBase

from torchrl_happo.masked import VALID, count, masked_mean
from torchrl_happo.objectives.team_gae import TEAM_GAE, MultiAgentGAE
from torchrl_happo.objectives.value_norm import RealValues, update_value_norm
from torchrl_happo.policy.memory import INIT, StepwiseCritic, has_memory, state_specs
from torchrl_happo.steps.step import Problem
from torchrl_happo.team.agent import Agent
from torchrl_happo.team.team import CriticKeys
from torchrl_happo.team.values import explained, filling_in_place
from torchrl_happo.versions import ValueNorm

__all__ = ["Critic", "WithCritics", "critic_keys", "value_estimator"]


@dataclass(frozen=True, eq=False)
class Critic:
    r"""A critic, and how it is fitted to the returns.

    The loss is that of TorchRL's PPO losses: the distance of the values from the returns and, with
    ``clip_value``, the larger of it and the distance of values that moved by at most this much.
    With a ``value_norm`` both are on the scale of the critic, which predicts normalised values.

    Args:
        network (TensorDictModuleBase): writes one value for the team, ``[*B, 1]``, or one for each
            agent, ``[*B, n_agents, 1]``.
        keys (CriticKeys): the entries that belong to the critic (see :func:`critic_keys`).
        coeff (Tensor or float, optional): weight of the loss; ``None`` or 0 leaves the critic as
            it is. Defaults to ``1.0``.
        loss_type (str): ``"l1"``, ``"l2"`` or ``"smooth_l1"``. Defaults to ``"smooth_l1"``.
        clip_value (Tensor or float, optional): bound of a value's move from the one in the data.
            Defaults to ``None``.
        value_norm (ValueNorm, optional): normalises the returns. Defaults to ``None``.
        popart (bool): whether to rescale the last layer when the statistics move. Defaults to
            ``False``.
        estimator (callable, optional): returns the estimator of values and advantages. Defaults to
            ``None``: a :class:`~torchrl.objectives.value.MultiAgentGAE` with TorchRL's defaults.
        is_owned (bool): whether an agent owns the critic, such as a block that shares an encoder
            with it: its step then fits both by one optimiser. Defaults to ``False``.

    Example:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> network = TensorDictModule(
        ...     torch.nn.Identity(), in_keys=["state"], out_keys=["state_value"]
        ... )
        >>> critic = Critic(network, critic_keys(network), loss_type="l2")
        >>> data = TensorDict({"state": torch.zeros(4, 1), "value_target": torch.ones(4, 1)}, [4])
        >>> critic.objective(data)
        tensor(1.)
    """

    network: TensorDictModuleBase
    keys: CriticKeys
    coeff: Tensor | float | None = 1.0
    loss_type: str = "smooth_l1"
    clip_value: Tensor | float | None = None
    value_norm: ValueNorm | None = None
    popart: bool = False
    estimator: Callable[[], ValueEstimatorBase] | None = None
    is_owned: bool = False

    @property
    def is_fitted(self) -> bool:
        """Whether the critic's loss has a weight."""
        return self.coeff is not None

    def values_the_team(self, batch: TensorDictBase) -> bool:
        """Whether the critic has one value for the team, and not one for each agent."""
        one = batch.select(*self.keys.reads, strict=False)[..., :1]
        return self.network(one.copy()).get(self.keys.value).ndim == batch.batch_dims + 1

    def estimate(self, batch: TensorDictBase) -> None:
        """Write advantage, returns and values into a batch, in place."""
        with torch.no_grad():
            if self.estimator is not None:
                estimator = self.estimator()
            else:
                estimator = value_estimator(self, MultiAgentGAE)
            with filling_in_place(estimator):
                estimator(batch)

    def loss(self, data: TensorDictBase) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the loss of each value, the share of clipped values, and the prediction.

        Args:
            data (TensorDictBase): a part of a batch, with the returns. Not modified.
        """
        keys, norm = self.keys, self.value_norm
        target = data.get(keys.value_target)
        # A copy: the critic writes its value where clip_value looks for the old one.
        value = self.network(data.copy()).get(keys.value)
        target = target if norm is None else norm.normalize(target)
        loss = distance_loss(target, value, loss_function=self.loss_type)
        clipped = None
        if self.clip_value is not None:
            old = data.get(keys.value)
            old = old if norm is None else norm.normalize(old)
            move = value - old
            within = move.clamp(-self.clip_value, self.clip_value)
            clipped = (move != within).to(value.dtype).mean()
            bounded = distance_loss(target, old + within, loss_function=self.loss_type)
            loss = torch.maximum(loss, bounded)
        return loss, clipped, value

    def objective(self, data: TensorDictBase) -> Tensor:
        """Return the weighted mean loss over the values that count, a scalar.

        Args:
            data (TensorDictBase): a part of a batch, with the returns and, if not every value
                counts, a boolean entry ``"valid"`` of their shape.
        """
        with explained("The critic", data, [*self.keys.reads, self.keys.value_target]):
            loss, _, _ = self.loss(data)
        loss = loss if self.coeff is None else self.coeff * loss
        return masked_mean(loss, data.get(VALID, None))

    def weight(self, data: TensorDictBase) -> Tensor | float:
        """Return the number of values that :meth:`objective` is a mean over."""
        return count(data.get(self.keys.value_target), data.get(VALID, None))

    def update_norm(
        self, returns: Tensor, data: TensorDictBase | None = None
    ) -> Callable[[], None]:
        """Update the statistics of the value normalisation with the valid returns of a batch.

        Args:
            returns (Tensor): ``[num_returns, 1]``.
            data (TensorDictBase, optional): data whose old values are restated on the new scale;
                ``clip_value`` bounds how far a prediction moves from them.

        Returns:
            a callable that puts statistics and critic back.
        """
        if self.value_norm is None:
            return lambda: None
        moved = update_value_norm(self.value_norm, returns, self.network if self.popart else None)
        old = None if data is None else data.get(self.keys.value, None)
        if data is not None and old is not None:
            data.set(self.keys.value, moved.restate(old))
        return moved.undo

    def with_values(self) -> TensorDictModuleBase:
        """Return the network as estimators need it: step by step, with values on the real scale."""
        network = self.network
        if has_memory(network):
            network = StepwiseCritic(network, self.keys.value)
        if self.value_norm is not None:
            network = RealValues(network, self.value_norm, self.keys.value)
        return network


def critic_keys(network: TensorDictModuleBase, **keys: NestedKey) -> CriticKeys:
    """Return the keys of a critic: what its network reads, and TorchRL's defaults for the rest.

    Args:
        network (TensorDictModuleBase): the critic's network.
        **keys (NestedKey): where entries lie that are not at TorchRL's place: ``value``,
            ``advantage``, ``value_target``, ``reward``, ``done``, ``terminated``.

    Example:
        >>> from tensordict.nn import TensorDictModule
        >>> network = TensorDictModule(
        ...     torch.nn.Identity(), in_keys=["state"], out_keys=["cost_value"]
        ... )
        >>> keys = critic_keys(
        ...     network, value="cost_value", reward="cost", advantage="cost_advantage"
        ... )
        >>> keys.reads, keys.value, keys.value_target
        (('state',), 'cost_value', 'value_target')
    """
    defaults = CriticKeys(
        reads=tuple(unravel_key(key) for key in network.in_keys),
        value="state_value",
        advantage="advantage",
        value_target="value_target",
        reward="reward",
        done="done",
        terminated="terminated",
        states=frozenset(state_specs(network)),
        init=INIT if INIT in network.in_keys else None,
    )
    return replace(defaults, **keys)


def value_estimator(
    critic: Critic, kind: type[ValueEstimatorBase], **hyperparams: object
) -> ValueEstimatorBase:
    """Build an estimator of a critic's values and advantages.

    Args:
        critic (Critic): the critic.
        kind (type): class of the estimator.
        **hyperparams: its arguments. ``gamma`` defaults to ``0.99`` and ``lmbda`` to ``0.95``.
    """
    keys = critic.keys
    settings = {"gamma": 0.99, "lmbda": 0.95, **hyperparams}
    estimator = kind(value_network=critic.with_values(), **settings)
    if has_memory(critic.network):
        estimator.deactivate_vmap = True  # recurrent kernels know no vmap
    estimator.set_keys(
        advantage=keys.advantage,
        value_target=keys.value_target,
        value=keys.value,
        reward=keys.reward,
        done=keys.done,
        terminated=keys.terminated,
    )
    return estimator


# Mixins stand before a PPO loss in the bases of a class. They cannot inherit from PPOLoss
# themselves: TorchRL's metaclass would put PPOLoss.forward in front of ClipPPOLoss.forward.
_Base: Any = PPOLoss if TYPE_CHECKING else object


class WithCritics(_Base):
    """The critics of a PPO loss of TorchRL: one by default, each fitted for itself."""

    #: Whether an agent owns the critic (see :class:`Critic`).
    owns_critic: bool = False

    @property
    def critic_apart(self) -> TensorDictModuleBase | None:
        """The critic that has parameters of its own; ``None`` if an agent owns it."""
        return None if self.owns_critic else self.critic_network

    def moved_by(self, agent: Agent) -> nn.Module:
        """Return everything that an agent's step moves: its actor, and a critic that it owns."""
        return agent.actor

    def __setattr__(self, name: str, value: Any) -> None:
        # A coefficient is written where it lies, as TorchRL itself does from 0.13 on.
        buffer = self.__dict__.get("_buffers", {}).get(name)
        if buffer is None or not isinstance(value, (int, float)):
            super().__setattr__(name, value)
        else:
            buffer.fill_(value)

    @property
    def critics(self) -> dict[str, Critic]:
        """The critics by name: ``"critic"``, if the loss has one."""
        return self._critics()

    def _critics(self) -> dict[str, Critic]:  # torch compiles no property of a superclass
        if self.critic_network is None:
            return {}
        keys = self.tensor_keys
        names = ("value", "advantage", "value_target", "reward", "done", "terminated")
        return {
            "critic": Critic(
                self.critic_network,
                replace(
                    self._own_keys,
                    **{name: getattr(keys, name) for name in names},
                    needs_next=not getattr(self._value_estimator, "shifted", False),
                ),
                coeff=self.critic_coeff,
                loss_type=self.loss_critic_type,
                clip_value=self.clip_value,
                value_norm=self.value_norm,
                popart=self.popart,
                estimator=lambda: self.value_estimator,
                is_owned=self.owns_critic,
            )
        }

    def critic_problem(self, name: str, **kwargs: Any) -> Problem:
        """Return what a critic's step is to solve; arguments as of :meth:`agent_problem`."""
        network = self.critics[name].network
        return Problem(
            name=name,
            loss=partial(self._critic_loss, name),
            named_parameters=network.named_parameters,
            weight=partial(self._critic_weight, name),
            **kwargs,
        )

    # Critics are read anew: coefficients follow schedules, and ``set_keys`` may move entries.
    def _critic_loss(self, name: str, data: TensorDictBase) -> Tensor:
        return self.critics[name].objective(data)

    def _critic_weight(self, name: str, data: TensorDictBase) -> Tensor | float:
        return self.critics[name].weight(data)

    def make_value_estimator(
        self, value_type: ValueEstimators | None = None, **hyperparams: Any
    ) -> WithCritics:
        """Choose the value estimator (see :meth:`LossModule.make_value_estimator`).

        ``ValueEstimators.GAE`` makes the multi-agent one, which gives the same numbers for a value
        of the team and reads the team's reward for a value of each agent.

        Raises:
            ValueError: for V-trace, whose ratio would have to be that of the joint action.
        """
        if value_type == ValueEstimators.VTrace:
            raise ValueError(
                "V-trace takes the ratio of one actor's action, but the value is that of the joint "
                "action of all agents; call make_value_estimator(ValueEstimators.GAE)."
            )
        if value_type == ValueEstimators.GAE:
            value_type = TEAM_GAE
        super().make_value_estimator(value_type, **hyperparams)
        self._forward_value_estimator_keys()
        return self

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        estimator = self._value_estimator
        if estimator is not None and self.critic_network is not None:
            estimator.value_network = self.critics["critic"].with_values()
            if has_memory(self.critic_network):
                estimator.deactivate_vmap = True  # recurrent kernels know no vmap
        super()._forward_value_estimator_keys(**kwargs)

    def loss_critic(
        self, tensordict: TensorDictBase
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the weighted loss of each value, the share of clipped ones, explained variance."""
        critic = self.critics["critic"]
        loss, clipped, value = critic.loss(tensordict)
        explained = None
        if self.log_explained_variance:
            target = tensordict.get(critic.keys.value_target).detach()
            if self.value_norm is not None:
                target = self.value_norm.normalize(target)
            residual = torch.var(target - value.detach(), correction=0, dim=0)
            total = torch.var(target, correction=0, dim=0)
            explained = 1.0 - residual / (total + torch.finfo(target.dtype).eps)
        return loss if critic.coeff is None else critic.coeff * loss, clipped, explained
