"""What the sequential objectives share: the team of agents, its keys, and the factor.

:class:`SequentialLossMixin` turns a PPO loss of TorchRL into the loss of a team. ``forward`` stays
TorchRL's and reads the joint tensordict; its hooks are extended:

- ``_log_weight`` evaluates each group's actor and lines the agents up along one dimension;
- ``_get_entropy`` lines the entropies of the groups up in the same way;
- ``_maybe_normalize_advantage`` multiplies the advantage by the factor, if there is one;
- ``_critic_loss_inputs`` and ``_forward_value_estimator_keys`` put values on the scale of the
  critic, or of the returns, where they are normalised;
- ``_reduce_loss`` leaves out agents that were not active.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, is_tensor_collection
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, TensorDictSequential
from tensordict.utils import unravel_key
from torch import Tensor
from torch.distributions import Distribution
from torchrl.modules import ValueNorm
from torchrl.objectives import PPOLoss
from torchrl.objectives.utils import ValueEstimators, _sum_td_features

from torchrl_happo.arguments import check_keys
from torchrl_happo.masked import count
from torchrl_happo.objectives.value_norm import RealValues, update_value_norm
from torchrl_happo.policy.memory import StepwiseCritic, has_memory
from torchrl_happo.steps.compile.code import Code
from torchrl_happo.steps.compile.graphs import GraphCompiler
from torchrl_happo.steps.first_order import FirstOrder
from torchrl_happo.steps.step import VALID, Problem, StepFactory
from torchrl_happo.team.agents import Agent, behaviour_log_prob, split_actor, split_team
from torchrl_happo.team.checks import check_agent_keys, check_team_shape
from torchrl_happo.team.construction import (
    check_policy_keys,
    check_separate,
    check_value_key,
    check_value_norm,
)
from torchrl_happo.team.masks import step_mask, value_mask
from torchrl_happo.team.values import explained

__all__ = ["ADVANTAGE", "OLD_LOG_PROB", "VALID", "SequentialLossMixin"]

#: Entries that the updater adds to an agent's view of the batch, and its step reads:
#: the log-probability the ratio starts from, and the factor times the advantage (``VALID`` is
#: part of the contract of a step).
OLD_LOG_PROB = "old_log_prob"
ADVANTAGE = "factored_advantage"

Actors: TypeAlias = (
    ProbabilisticTensorDictSequential | Mapping[str, ProbabilisticTensorDictSequential]
)

# The mixin stands before a PPO loss in the bases of a class and calls its hooks through super().
# It cannot inherit from PPOLoss itself: TorchRL's metaclass would put PPOLoss.forward in front of
# ClipPPOLoss.forward.
_Base: Any = PPOLoss if TYPE_CHECKING else object


class SequentialLossMixin(_Base):
    """Makes a PPO loss of TorchRL the loss of a team that is updated agent by agent."""

    @dataclass
    class _AcceptedKeys(PPOLoss._AcceptedKeys):
        """Keys of :class:`~torchrl.objectives.PPOLoss`, and two more.

        Attributes:
            factor (NestedKey): the product of the ratios of the agents that were updated
                before, shape ``[*B, 1]`` or ``[*B, n_agents, 1]``. Absent: 1.
                Defaults to ``"factor"``.
            active (str): name of a boolean entry of each group, ``[*B, n_agents]`` or
                ``[*B, n_agents, 1]`` (at the root for an agent without a group, ``[*B]`` or
                ``[*B, 1]``), that is ``False`` where an agent is dead or not yet there.
                Nothing that it says or sees there has an influence: in an update the critic sees
                zeros in its place. Only the memory of a recurrent actor goes on, up to the next
                reset. Absent: all are active. Defaults to ``"active"``.
        """

        factor: NestedKey = "factor"
        active: str = "active"

    default_keys = _AcceptedKeys
    value_norm: ValueNorm | None
    default_value_estimator = ValueEstimators.MAGAE

    def _init_team(
        self,
        actors: Actors,
        blocks: Collection[str],
        value_norm: ValueNorm | None,
        popart: bool,
    ) -> None:
        """Splits the actors into agents; the module must be initialised."""
        if popart and value_norm is None:
            raise ValueError(
                "popart=True needs the statistics of a value_norm; pass e.g. "
                "value_norm=PopArtValueNorm(shape=1)."
            )
        check_value_norm(value_norm)
        self.value_norm = value_norm
        self.popart = popart
        self._agents = tuple(split_team(actors, blocks))
        groups = actors.items() if isinstance(actors, Mapping) else [(None, actors)]
        # What forward evaluates: a stack at once, the actors of an ActorList one by one.
        self._units = tuple(
            unit for name, actor in groups for unit in split_actor(actor, group=name, as_block=True)
        )
        if isinstance(actors, Mapping):
            self.set_keys(**{name: self._written(name) for name in ("action", "sample_log_prob")})
        critic = self.critic_network
        check_separate(self._agents, critic)
        if critic is None:
            return
        if self.tensor_keys.value not in critic.out_keys and len(critic.out_keys) == 1:
            self.set_keys(value=critic.out_keys[0])

    @staticmethod
    def _joint_network(actors: Actors) -> TensorDictModule:
        if isinstance(actors, Mapping):
            return TensorDictSequential(*actors.values())
        return actors

    def set_keys(self, **keys: Any) -> None:
        """Says where entries lie (see :meth:`LossModule.set_keys`)."""
        check_keys(keys, [entry.name for entry in fields(self._AcceptedKeys)])
        if keys.get("value") is not None and self.critic_network is not None:
            check_value_key(keys["value"], self.critic_network)
        for name in ("action", "sample_log_prob"):
            if keys.get(name) is not None and hasattr(self, "_units"):
                check_policy_keys(name, keys[name], self._written(name))
        super().set_keys(**keys)

    def _written(self, name: str) -> list[NestedKey]:
        """The keys of the actions, or of their log-probabilities, that the actors write."""
        kind = "action_keys" if name == "action" else "log_prob_keys"
        return list(dict.fromkeys(key for u in self._units for key in getattr(u.policy, kind)))

    @property
    def agents(self) -> tuple[Agent, ...]:
        """The units of the sequential update, in the order of the groups."""
        return self._agents

    @property
    def num_agents(self) -> int:
        """Number of agents in the team, the members of blocks counted one by one."""
        return self._agents[-1].position.stop

    def agent_keys(self, agent: Agent) -> list[NestedKey]:
        """The entries of the joint tensordict that the update of an agent reads."""
        keys = [
            *agent.actor.in_keys,
            *agent.policy.action_keys,
            *agent.policy.log_prob_keys,
            *agent.policy.parameter_keys,
        ]
        return list(dict.fromkeys(unravel_key(key) for key in keys))

    @abc.abstractmethod
    def agent_problem(self, agent: Agent, **kwargs: Any) -> Problem:
        """Return the problem that an agent's step solves.

        Args:
            agent (Agent): the agent.

        Keyword Args:
            **kwargs: entries of the problem that the updater knows.
        """

    def agent_factory(self, agent: Agent, first_order: FirstOrder) -> StepFactory:
        """Return what builds the step of an agent: by default the updater's first-order step."""
        return first_order

    def agent_weight(self, agent: Agent, data: TensorDictBase) -> Tensor | float:
        """Number of entries of an agent's view that its objective is a mean over."""
        valid = data.get(VALID, None)
        return agent.sample_shape(data).numel() if valid is None else valid.sum()

    def agent_code(self, agent: Agent, compiler: GraphCompiler | None) -> Code | None:
        """What an agent's objective and policy read besides their data, to compile them."""
        if compiler is None:
            return None
        return Code(compiler, [agent.actor], owner=self, template=agent.template)

    def agent_report(self, log_ratio: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        """Metrics of an agent's update that are this loss's own."""
        return {}

    # -- the critic ----------------------------------------------------------------------------

    def make_value_estimator(
        self, value_type: ValueEstimators | None = None, **hyperparams: Any
    ) -> SequentialLossMixin:
        """Chooses the value estimator (see :meth:`LossModule.make_value_estimator`)."""
        super().make_value_estimator(value_type, **hyperparams)
        self._forward_value_estimator_keys()
        return self

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        estimator, critic = self._value_estimator, self.critic_network
        if estimator is not None and has_memory(critic):
            critic = StepwiseCritic(critic, self.tensor_keys.value)
            estimator.deactivate_vmap = True  # recurrent kernels know no vmap
        if estimator is not None and self.value_norm is not None:
            critic = RealValues(critic, self.value_norm, self.tensor_keys.value)
        if critic is not self.critic_network:
            estimator.value_network = critic
        super()._forward_value_estimator_keys(**kwargs)

    def _critic_loss_inputs(
        self, target_return: Tensor, state_value: Tensor, old_state_value: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Puts the returns, and the old values for clipping, on the scale of the critic."""
        if self.value_norm is None:
            return target_return, state_value, old_state_value
        if old_state_value is not None:
            old_state_value = self.value_norm.normalize(old_state_value)
        return self.value_norm.normalize(target_return), state_value, old_state_value

    def update_value_norm(
        self, value_target: Tensor, data: TensorDictBase | None = None
    ) -> Callable[[], None]:
        """Takes the valid returns of a batch into the value normalisation, if there is one.

        Args:
            value_target (Tensor): the returns, ``[num_returns, 1]``.
            data (TensorDictBase, optional): whose old values become what the critic's predictions
                of then stand for now; ``clip_value`` bounds how far a prediction moves from these.

        Returns:
            a callable that takes back what happened to statistics and critic.
        """
        if self.value_norm is None:
            return lambda: None
        critic = self.critic_network if self.popart else None
        moved = update_value_norm(self.value_norm, value_target, critic)
        old = None if data is None else data.get(self.tensor_keys.value, None)
        if data is not None and old is not None:
            data.set(self.tensor_keys.value, moved.restate(old))
        return moved.undo

    @property
    def fits_critic(self) -> bool:
        """Whether there is a critic, and its loss has a weight."""
        return self.critic_network is not None and self.critic_coeff is not None

    def critic_objective(self, data: TensorDictBase) -> Tensor:
        """The critic's loss on (a part of) the batch, a scalar."""
        reads = [*self.critic_network.in_keys, self.tensor_keys.value_target]
        with explained("The critic", data, reads):
            # A copy: the critic writes its value where clip_value looks for the old one.
            value_loss, _, _ = self.loss_critic(data.copy())
        return self._reduce_loss(value_loss, data)

    def critic_weight(self, data: TensorDictBase) -> Tensor | float:
        """Number of values that :meth:`critic_objective` is a mean over."""
        values = data.get(self.tensor_keys.value_target)
        return count(values, value_mask(values, step_mask(self, data), self.active(data)))

    def critic_code(self, compiler: GraphCompiler | None) -> Code | None:
        """What :meth:`critic_objective` reads besides its data, to compile it."""
        if compiler is None:
            return None
        modules = [self.critic_network, self.value_norm]
        return Code(compiler, [module for module in modules if module is not None], owner=self)

    # -- the joint forward: hooks of PPOLoss ---------------------------------------------------

    def _log_weight(
        self, tensordict: TensorDictBase, adv_shape: torch.Size
    ) -> tuple[Tensor, Any, Tensor, None]:
        old, new, dists = [], [], []
        for unit in self._units:
            check_agent_keys(unit, tensordict)
            data = unit.view(tensordict, self.agent_keys(unit))
            parameters = unit.policy.parameters(data)
            unit.policy.prepare(data, parameters)
            old_log_prob = behaviour_log_prob(unit, data, None)
            if old_log_prob.requires_grad:
                raise RuntimeError(
                    f"The stored log-probability {unit.policy.log_prob_keys[0]!r} requires grad; "
                    "collect under torch.no_grad() or detach it."
                )
            old.append(self._line_up(old_log_prob, tensordict))
            new.append(self._line_up(unit.log_prob(parameters, data), tensordict))
            dists.append((unit.policy.distribution(parameters), tensordict.batch_dims))
        log_weight = (torch.cat(new, -1) - torch.cat(old, -1)).unsqueeze(-1)
        if log_weight.shape[-2] == 1 and log_weight.shape[:-2] == adv_shape:
            log_weight = log_weight.squeeze(-2)  # one agent, one advantage: as ClipPPOLoss
        elif adv_shape not in (tensordict.batch_size, log_weight.shape[:-1]):
            raise ValueError(
                f"The advantage has shape {[*adv_shape, 1]}; it must be "
                f"{[*tensordict.batch_size, 1]} for the team or {list(log_weight.shape)} for each "
                "agent."
            )
        return log_weight, dists, -log_weight, None

    def _line_up(self, per_agent: Tensor, tensordict: TensorDictBase) -> Tensor:
        """Gives a group without an agent dimension one of size 1."""
        return per_agent if per_agent.ndim > tensordict.batch_dims else per_agent.unsqueeze(-1)

    def _get_entropy(
        self, dist: Distribution | list[tuple[Distribution, int]], adv_shape: torch.Size
    ) -> Tensor | TensorDict:
        if not isinstance(dist, list):
            return super()._get_entropy(dist, adv_shape)
        if len(dist) == 1:
            return super()._get_entropy(dist[0][0], adv_shape)
        entropies = []
        for group_dist, batch_dims in dist:
            entropy = super()._get_entropy(group_dist, group_dist.batch_shape)
            if is_tensor_collection(entropy):
                entropy = _sum_td_features(entropy)
            entropies.append(entropy if entropy.ndim > batch_dims + 1 else entropy.unsqueeze(-2))
        return torch.cat(entropies, -2)

    def _maybe_normalize_advantage(
        self, advantage: Tensor, tensordict: TensorDictBase, *, update_norm: bool
    ) -> Tensor:
        advantage = super()._maybe_normalize_advantage(
            advantage, tensordict, update_norm=update_norm
        )
        factor = tensordict.get(self.tensor_keys.factor, None)
        if factor is None:
            return advantage
        check_team_shape(self, tensordict, self.tensor_keys.factor, self.num_agents)
        if factor.ndim < advantage.ndim:
            factor = factor.unsqueeze(-2)
        elif factor.ndim > advantage.ndim:
            advantage = advantage.unsqueeze(-2)
        return factor * advantage

    def active_key(self, agent: Agent) -> NestedKey:
        """Where a batch may say at which steps an agent acts."""
        name = self.tensor_keys.active
        return name if agent.group is None else (agent.group, name)

    def active(self, tensordict: TensorDictBase) -> Tensor | None:
        """Which agents act at which step, ``[*B, n_agents]``; ``None`` if nothing says so."""
        masks: list[Tensor | None] = []
        for agent in self._agents:
            key = self.active_key(agent)
            mask = agent.view(tensordict, [key]).get(key, None)
            if mask is not None:
                mask = mask.reshape(*tensordict.batch_size, agent.num_members).bool()
            masks.append(mask)
        known = next((mask for mask in masks if mask is not None), None)
        if known is None:
            return None
        always = torch.ones((), dtype=torch.bool, device=known.device)
        sizes = [agent.num_members for agent in self._agents]
        return torch.cat(
            [
                always.expand(*tensordict.batch_size, size) if mask is None else mask
                for mask, size in zip(masks, sizes, strict=True)
            ],
            -1,
        )

    def _reduce_loss(
        self, loss: Tensor, tensordict: TensorDictBase | None = None, **kwargs: Any
    ) -> Tensor:
        if tensordict is not None and kwargs.get("mask") is None:
            active = self.active(tensordict)
            if active is not None and active.shape != loss.shape:
                active = active.unsqueeze(-1)  # an agent without an agent dimension has none to add
            if active is not None and active.shape == loss.shape:
                if self.reduction == "none":
                    loss = torch.where(active, loss, torch.zeros_like(loss))
                else:
                    kwargs["mask"] = active
        return super()._reduce_loss(loss, tensordict, **kwargs)
