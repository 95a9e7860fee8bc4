"""The base of all losses here: a PPO loss of TorchRL, as the loss of a team of agents.

An objective says what one agent wants, in one place: :meth:`SequentialLoss.agent_terms` returns
the terms of its loss, element by element. The mean of their sum is ``agent_loss``, which the
updater minimises agent by agent. ``forward`` returns the weighted mean of the agents' losses.
"""

from __future__ import annotations

import abc
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, TypeAlias

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, TensorDictSequential
from torch import Tensor
from torch.distributions import Distribution
from torchrl.objectives import PPOLoss

from torchrl_happo.arguments import check_keys
from torchrl_happo.masked import VALID, masked, masked_mean
from torchrl_happo.objectives.critic import WithCritics, critic_keys
from torchrl_happo.objectives.joint import JointTerms
from torchrl_happo.objectives.surrogate import corrected_advantage
from torchrl_happo.objectives.team_gae import TEAM_GAE
from torchrl_happo.policy.joint_row import gradients_in_rows
from torchrl_happo.steps.first_order import FirstOrder
from torchrl_happo.steps.step import Problem, StepFactory
from torchrl_happo.team.agent import OLD_LOG_PROB, Agent
from torchrl_happo.team.checks import check_agent_keys, check_team_shape
from torchrl_happo.team.construction import (
    check_policy_keys,
    check_separate,
    check_value_key,
    check_value_norm,
)
from torchrl_happo.team.masks import Masks
from torchrl_happo.team.split import split_team, split_units
from torchrl_happo.team.team import Team
from torchrl_happo.versions import ValueNorm, mask_keys, standardized

__all__ = ["Actors", "SequentialLoss"]

Actors: TypeAlias = (
    ProbabilisticTensorDictSequential | Mapping[str, ProbabilisticTensorDictSequential]
)


class SequentialLoss(WithCritics):
    """Makes a PPO loss of TorchRL the loss of a team that is updated agent by agent."""

    @dataclass
    class _AcceptedKeys(PPOLoss._AcceptedKeys):
        """Keys of :class:`~torchrl.objectives.PPOLoss`, and two more.

        Attributes:
            factor (NestedKey): the product of the ratios of the agents that were updated
                before, shape ``[*B, 1]`` or ``[*B, n_agents, 1]``. Absent: 1.
                Defaults to ``"factor"``.
            active (NestedKey): name of a boolean entry of each group, ``[*B, n_agents]`` or
                ``[*B, n_agents, 1]`` (at the root for an agent without a group, ``[*B]`` or
                ``[*B, 1]``), that is ``False`` where an agent is dead or not yet there.
                Nothing that it says or sees there has an influence: in an update the critic sees
                zeros in its place. Only the memory of a recurrent actor goes on, up to the next
                reset. Absent: all are active. Defaults to ``"active"``.
        """

        factor: NestedKey = "factor"
        active: NestedKey = "active"

    default_keys = _AcceptedKeys
    value_norm: ValueNorm | None
    default_value_estimator = TEAM_GAE
    #: Whether an updater standardises the advantage, unless it is told otherwise.
    standardizes: bool = True
    #: Whether agents of one architecture read unlike settings of the loss.
    has_settings_by_agent: bool = False
    _instead: ClassVar[Mapping[str, str]] = {}  # cures for arguments the loss has not
    _warned = False

    def _init_team(
        self,
        actors: Actors,
        blocks: Collection[str],
        value_norm: ValueNorm | None,
        popart: bool,
    ) -> None:
        """Split the actors into agents; the module must be initialised."""
        if popart and value_norm is None:
            raise ValueError(
                "popart=True needs the statistics of a value_norm; pass e.g. "
                "value_norm=PopArtValueNorm(shape=1)."
            )
        check_value_norm(value_norm)
        self.value_norm = value_norm
        self.popart = popart
        self._agents = tuple(split_team(actors, blocks))
        self._units = tuple(split_units(actors))
        if self.critic_network is not None:
            self._own_keys = critic_keys(self.critic_network)
        if isinstance(actors, Mapping):
            self.set_keys(**{name: self._written(name) for name in ("action", "sample_log_prob")})
        check_separate(self._agents, self.critic_apart)
        written = [] if self.critic_network is None else self.critic_network.out_keys
        if self.tensor_keys.value not in written and len(written) == 1:
            self.set_keys(value=written[0])

    @staticmethod
    def _joint_network(actors: Actors) -> TensorDictModule:
        if isinstance(actors, Mapping):
            return TensorDictSequential(*actors.values())
        return actors

    # -- the team and its entries --------------------------------------------------------------

    @property
    def agents(self) -> tuple[Agent, ...]:
        """The units of the sequential update, in the order of the groups."""
        return self._agents

    @property
    def num_agents(self) -> int:
        """Number of agents in the team, the members of blocks counted one by one."""
        return self._agents[-1].position.stop

    @property
    def team(self) -> Team:
        """The agents and the keys of everything that an update reads."""
        critics = {name: critic.keys for name, critic in self.critics.items()}
        return Team(self._agents, self.tensor_keys, critics, mask_keys(self))

    def set_keys(self, **keys: Any) -> None:
        """Set where entries lie (see :meth:`LossModule.set_keys`)."""
        check_keys(keys, [entry.name for entry in fields(self._AcceptedKeys)])
        if keys.get("value") is not None and self.critic_network is not None:
            check_value_key(keys["value"], self.critic_network)
        for name in ("action", "sample_log_prob"):
            if keys.get(name) is not None and hasattr(self, "_units"):
                check_policy_keys(name, keys[name], self._written(name))
        super().set_keys(**keys)

    def _written(self, name: str) -> list[NestedKey]:
        """Return the keys of the actions, or of their log-probabilities, that the actors write."""
        kind = "action_keys" if name == "action" else "log_prob_keys"
        return list(dict.fromkeys(key for u in self._units for key in getattr(u.policy, kind)))

    # -- one agent -----------------------------------------------------------------------------

    @abc.abstractmethod
    def agent_terms(self, agent: Agent, data: TensorDictBase) -> dict[str, Any]:
        """Return the terms of an agent's loss, element by element.

        Args:
            agent (Agent): the agent, or a whole group.
            data (TensorDictBase): its part of the batch, as :meth:`agent_data` returns it.

        Returns:
            ``"log_ratio"`` and, under names that begin with ``"loss_"``, terms to minimise. All
            have the shape of the log-probability, ``[*B]`` or ``[*B, n_members]``.
        """

    @abc.abstractmethod
    def step_factory(self, first_order: FirstOrder) -> StepFactory:
        """Return the factory of the agents' steps; ``first_order`` has the updater's settings."""

    def agent_loss(self, agent: Agent, data: TensorDictBase) -> Tensor:
        """Return the loss of one agent: the mean of its terms over the valid decisions.

        Args:
            agent (Agent): one of :attr:`agents`.
            data (TensorDictBase): its part of the batch (see :meth:`agent_data`), or some rows.

        Returns:
            a scalar to minimise with respect to ``agent.parameters()``.
        """
        valid = data.get(VALID, None)
        terms = self.agent_terms(agent, data)
        means = [masked_mean(t, valid) for name, t in terms.items() if name.startswith("loss_")]
        return sum(means[1:], means[0])

    def agent_data(self, agent: Agent, tensordict: TensorDictBase) -> TensorDict:
        """Return an agent's part of a joint tensordict, as :meth:`agent_loss` reads it.

        Args:
            agent (Agent): one of :attr:`agents`.
            tensordict (TensorDictBase): joint data of batch size ``[*B]`` with an advantage and,
                where agents were updated before, the factor, each ``[*B, 1]`` or
                ``[*B, n_agents, 1]``.

        Returns:
            a new tensordict of batch size ``[*B]``: the agent's observations, actions and
            log-probabilities, and per decision ``"old_log_prob"``, the advantage, the factor and,
            if there are masks, ``"valid"``.
        """
        return self._agent_data(agent, tensordict, Masks(self.team.seen_in(tensordict), tensordict))

    def _agent_data(self, agent: Agent, tensordict: TensorDictBase, masks: Masks) -> TensorDict:
        check_agent_keys(agent, tensordict)
        data = agent.view(tensordict, agent.update_keys)
        agent.policy.prepare(data)
        old_log_prob = agent.behaviour_log_prob(data)
        if old_log_prob.requires_grad:
            raise RuntimeError(
                f"The stored log-probability {agent.policy.log_prob_keys[0]!r} requires grad; "
                "collect under torch.no_grad() or detach it."
            )
        data.set(OLD_LOG_PROB, old_log_prob)
        for key in (self.tensor_keys.advantage, self.tensor_keys.factor):
            value = tensordict.get(key, None)
            if value is not None:
                check_team_shape(self.team, tensordict, key, self.num_agents)
                data.set(key, agent.share_of(value, tensordict.batch_dims))
        valid = masks.decisions(agent)
        return data if valid is None else data.set(VALID, valid)

    def agent_weight(self, agent: Agent, data: TensorDictBase) -> Tensor | float:
        """Return the number of decisions that an agent's loss is a mean over."""
        valid = data.get(VALID, None)
        return agent.sample_shape(data).numel() if valid is None else valid.sum()

    def agent_divergence(self, agent: Agent, data: TensorDictBase) -> Tensor:
        r"""Estimate the mean divergence from the policy that acted, by :math:`r - 1 - \log r`."""
        with torch.no_grad():
            log_prob = agent.log_prob(agent.policy.parameters(data), data)
            log_ratio = log_prob - data.get(OLD_LOG_PROB)
            return masked_mean(log_ratio.exp() - 1 - log_ratio, data.get(VALID, None))

    def agent_distribution(
        self, agent: Agent, parameters: Mapping[str, Tensor], data: TensorDictBase
    ) -> Distribution:
        """Return the policy of one agent with other parameters, at the observations of ``data``."""
        return agent.policy.scored(agent.policy.parameters(data, parameters or None), data)

    def agent_surrogate(self, agent: Agent, dist: Distribution, data: TensorDictBase) -> Tensor:
        """Return the mean of the ratio times the factor times the advantage, a scalar.

        Args:
            agent (Agent): the agent whose turn it is.
            dist (Distribution): its policy (see :meth:`agent_distribution`).
            data (TensorDictBase): its part of the batch.
        """
        log_prob = agent.joint_log_prob(agent.policy.scored_log_prob(dist, data), data)
        valid = data.get(VALID, None)
        log_ratio = masked(log_prob - data.get(OLD_LOG_PROB), valid)
        return masked_mean(log_ratio.exp() * corrected_advantage(data, self.tensor_keys), valid)

    def agent_report(self, agent: Agent, log_ratio: Tensor, valid: Tensor | None) -> dict[str, Any]:
        """Return metrics of an agent's update that are this loss's own."""
        return {}

    def agent_problem(self, agent: Agent, **kwargs: Any) -> Problem:
        """Return what an agent's step is to solve.

        Args:
            agent (Agent): the agent.
            **kwargs: the updater's part: process group, generator, compiler.
        """
        return Problem(
            name=agent.name,
            group=agent.group_name,
            loss=partial(self.agent_loss, agent),
            named_parameters=agent.named_parameters,
            weight=partial(self.agent_weight, agent),
            distribution=partial(self.agent_distribution, agent),
            surrogate=partial(self.agent_surrogate, agent),
            divergence=partial(self.agent_divergence, agent),
            sample_shape=agent.sample_shape,
            **kwargs,
        )

    # -- the whole team ------------------------------------------------------------------------

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Return the losses of the whole team.

        Args:
            tensordict (TensorDictBase): joint data. Absent advantages and returns are estimated.
                An entry ``"factor"`` multiplies the advantage.

        Returns:
            ``loss_objective`` and what else TorchRL's loss of the same kind writes.
        """
        tensordict = tensordict.clone(False)
        keys = self.tensor_keys
        estimates = tensordict.get(keys.advantage, None) is None
        if estimates:
            self.value_estimator(tensordict)
        advantage = standardized(
            self, tensordict.get(keys.advantage), tensordict, is_fresh=estimates
        )
        tensordict.set(keys.advantage, advantage)
        masks = Masks(self.team.seen_in(tensordict), tensordict)
        replace(self.team, agents=self._units).seen_in(tensordict)
        own = [self._agent_data(unit, tensordict, masks) for unit in self._units]
        terms = JointTerms(
            [self._unit_terms(*pair) for pair in zip(self._units, own, strict=True)],
            masks.team_decisions(),
            tensordict.batch_dims,
            # One agent, one advantage: the shapes of ClipPPOLoss.
            squeezes=self.num_agents == 1 and advantage.ndim == tensordict.batch_dims + 1,
        )
        output = self._summary(terms)
        losses = {name: self._reduced(terms[name], terms.valid) for name in terms.losses}
        if self.critics and self.critics["critic"].is_fitted:
            loss, clipped, explained = self.loss_critic(tensordict)
            valid = None if (counts := masks.values(loss)) is None else counts.squeeze(-1)
            losses["loss_critic"] = self._reduced(loss.squeeze(-1), valid)
            reports = {"value_clip_fraction": clipped, "explained_variance": explained}
            output.update({k: v for k, v in reports.items() if v is not None})
        if tensordict.get(keys.factor, None) is None and len(self._agents) > 1:
            self._warn_without_factor(losses["loss_objective"])
        return output.update(losses)

    def _unit_terms(self, unit: Agent, data: TensorDictBase) -> dict[str, Any]:
        """Return the terms of a whole group; their gradients reach the agents' parameters."""
        ties = [tie for agent in self._agents if agent.source is unit.actor for tie in agent.ties]
        with gradients_in_rows(unit.actor, ties):
            return self.agent_terms(unit, data)

    def _summary(self, terms: JointTerms) -> TensorDict:
        """Return metrics that ``forward`` reports besides the losses."""
        return TensorDict({"kl_approx": masked_mean(-terms["log_ratio"].detach(), terms.valid)})

    def _reduced(self, loss: Tensor, valid: Tensor | None) -> Tensor:
        """Reduce a loss as the user asked for, over what counts."""
        if self.reduction == "mean":
            return masked_mean(loss, valid)
        loss = masked(loss, valid)
        return loss if self.reduction == "none" else loss.sum()

    def _warn_without_factor(self, loss: Tensor) -> None:
        """Say once, when the loss of several agents is differentiated, that this is not HAPPO."""

        def warn(gradient: Tensor) -> None:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{type(self).__name__} of {len(self._agents)} agents was differentiated "
                    f"without an entry {self.tensor_keys.factor!r}, so that all agents move at "
                    "once, as in MAPPO; train with a SequentialUpdater, or write the factor and "
                    "minimise agent_loss agent by agent.",
                    stacklevel=2,
                )

        if loss.requires_grad:
            loss.register_hook(warn)
