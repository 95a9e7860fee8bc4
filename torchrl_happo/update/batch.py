"""The joint batch of one update: advantage, validity, and a flat view for each agent."""

from __future__ import annotations

from functools import cached_property

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import unravel_key
from torch import Tensor

from torchrl_happo.distributed import Learners
from torchrl_happo.masked import masked, moments
from torchrl_happo.objectives.base import ADVANTAGE, VALID, SequentialLossMixin
from torchrl_happo.objectives.surrogate import standardize
from torchrl_happo.policy.memory import has_memory, write_states
from torchrl_happo.team.agents import Agent
from torchrl_happo.team.entries import entries_read, has, next_key
from torchrl_happo.team.masks import (
    cut_at_padding,
    fill_masked,
    hide_inactive,
    step_mask,
    value_mask,
)
from torchrl_happo.team.values import explained

__all__ = ["TeamBatch"]


class TeamBatch:
    """A collector's batch, made ready for the sequential update.

    The advantage is estimated if the batch has none, and standardised once over the valid
    entries, before any factor. Views have *items* along their first dimension: single steps, or
    chunks of ``sequence_length`` consecutive steps for recurrent networks.

    Args:
        loss (HAPPOLoss or HATRPOLoss): says which keys are read.
        batch (TensorDictBase): joint data of batch size ``[*B]``, time last. Not modified.

    Keyword Args:
        standardize_advantage (bool): whether to standardise the advantage.
        sequence_length (int, optional): steps in a chunk. ``None``: the whole length of the batch
            where a network is recurrent (an actor, or the critic), otherwise single steps.
        learners (Learners, optional): over whose entries statistics are taken. Defaults to
            ``None``: this batch's alone.

    Raises:
        ValueError: if ``sequence_length`` does not divide the length of the batch.
    """

    def __init__(
        self,
        loss: SequentialLossMixin,
        batch: TensorDictBase,
        *,
        standardize_advantage: bool = True,
        sequence_length: int | None = None,
        learners: Learners | None = None,
    ) -> None:
        self.loss = loss
        self.learners = Learners() if learners is None else learners
        self.batch = fill_masked(loss, batch, entries_read(loss, batch))
        self.standardize_advantage = standardize_advantage
        critic, length = loss.critic_network, batch.shape[-1]
        self.sequence_length = self.critic_sequence_length = sequence_length
        if sequence_length is None and any(has_memory(agent.actor) for agent in loss.agents):
            self.sequence_length = length
        if sequence_length is None and has_memory(critic):
            self.critic_sequence_length = length
        if sequence_length is not None and batch.batch_size[-1] % sequence_length:
            raise ValueError(
                f"sequence_length={sequence_length} does not divide the {batch.batch_size[-1]} "
                "steps of the batch; choose a divisor of frames_per_batch / num_envs."
            )
        #: What the critic reads and regresses on.
        self.critic_batch = self.batch
        if critic is not None:
            self.critic_batch = self._values(critic)
        self._active = loss.active(self.batch)
        self._valid = step_mask(loss, self.batch)
        self._kept_items: dict[str, Tensor | None] = {}
        #: Log of the product of the ratios of the agents updated so far, at each item.
        self.log_factor = self._as_items(torch.zeros_like(self._advantage_column()))

    def _values(self, critic: TensorDictModuleBase) -> TensorDictBase:
        """The batch as the critic sees it, with values and advantages; gives these to the agents.

        States of a critic with memory are made anew. An advantage that is there already stays.
        """
        keys = self.loss.tensor_keys
        seen = [place(key) for key in critic.in_keys for place in (unravel_key, next_key)]
        batch = hide_inactive(self.loss, self.batch, seen)
        reads = [*critic.in_keys, next_key(keys.reward)]
        with torch.no_grad(), explained("The critic", batch, reads):
            if has_memory(critic):
                batch = batch.copy()
                write_states(critic, batch)
            if not has(batch, keys.advantage):
                # A policy may have written values, too; those of now are wanted.
                batch = cut_at_padding(self.loss, batch).exclude(keys.value)
                self.loss.value_estimator(batch)
                made = [keys.advantage, keys.value_target, keys.value, "shifted_valid"]
                self.batch = self.batch.copy().update(batch.select(*made, strict=False))
        return batch

    def _advantage_column(self) -> Tensor:
        """One number per step, of the advantage's type and device."""
        advantage = self.batch.get(self.loss.tensor_keys.advantage)
        return advantage.flatten(self.batch.batch_dims)[..., 0]

    @cached_property
    def _acting_somewhere(self) -> list[bool]:
        """Of each agent, whether any of its entries counts with any of the learners."""
        masks = [self.valid(agent) for agent in self.loss.agents]
        always = torch.ones((), dtype=torch.int32, device=self.log_factor.device)
        acting = [always if mask is None else mask.any().to(always) for mask in masks]
        flags = self.learners.maximum(torch.stack(acting)).tolist()
        return [flag > 0 for flag in flags]

    def acts(self, agent: Agent) -> bool:
        """Whether there is anything to update an agent with."""
        if self.learners.alone:
            return self.valid(agent) is None or self._kept(agent) is not None
        return self._acting_somewhere[self.loss.agents.index(agent)]

    def valid(self, agent: Agent) -> Tensor | None:
        """Where the agent's decisions count: ``[*B]`` or ``[*B, n_members]``; ``None``: always."""
        active = self._active
        if active is None:
            if self._valid is None or agent.num_members == 1:
                return self._valid
            return self._valid.unsqueeze(-1).expand(*self._valid.shape, agent.num_members)
        active = active[..., agent.position]
        if active.shape[-1] == 1:
            active = active.squeeze(-1)
            return active if self._valid is None else active & self._valid
        return active if self._valid is None else active & self._valid.unsqueeze(-1)

    def advantage(self, agent: Agent) -> Tensor:
        """The (standardised) advantage of an agent, broadcastable to its log-probability.

        One joint advantage is standardised over the entries where the agent is valid; an
        advantage per agent over the valid entries of all agents together.
        """
        advantage = self.batch.get(self.loss.tensor_keys.advantage).squeeze(-1)
        is_joint = advantage.ndim == self.batch.batch_dims
        average = self.learners.mean
        if is_joint:
            if agent.num_members > 1:
                advantage = advantage.unsqueeze(-1).expand(*advantage.shape, agent.num_members)
            if not self.standardize_advantage:
                return advantage
            return standardize(advantage, self.valid(agent), average=average)
        if self.standardize_advantage:
            team = self._active
            if self._valid is not None:
                steps = self._valid.unsqueeze(-1).expand_as(advantage)
                team = steps if team is None else team & steps
            advantage = standardize(advantage, team, average=average)
        own = advantage[..., agent.position]
        return own.squeeze(-1) if agent.num_members == 1 else own

    def agent_view(self, agent: Agent) -> TensorDict:
        """What the agent's update reads, as items.

        Returns:
            the agent's observations, actions and log-probabilities, and ``ADVANTAGE``: the factor
            times the advantage. Items at which the agent was never valid are left out, so that no
            minibatch is without a valid entry; in the others, chunks and blocks, ``VALID`` marks
            the entries that are.
        """
        data = _items(agent.view(self.batch, self.loss.agent_keys(agent)), self.sequence_length)
        advantage = self._as_items(self.advantage(agent))
        factor = self.log_factor.exp()
        if advantage.ndim > factor.ndim:
            factor = factor.unsqueeze(-1)
        data.set(ADVANTAGE, factor * advantage)
        valid = self.valid(agent)
        if valid is not None:
            data.set(VALID, self._as_items(valid))
        kept = self._kept(agent)
        data = _compact(data) if kept is None else data[kept]
        # Single steps of a single agent that are left all count.
        return data.exclude(VALID) if kept is not None and data.get(VALID).ndim == 1 else data

    def starts_from(self, agent: Agent) -> tuple[Tensor, Tensor | None]:
        """The log of the factor when an agent's turn comes, and where the agent acts.

        Returns:
            two tensors of one shape, items first; the second is ``None`` if the agent acts at
            every step, or nowhere.
        """
        valid = self.valid(agent) if self.acts(agent) else None
        if valid is None:
            return self.log_factor, None
        valid = self._as_items(valid)
        return self.log_factor, valid.any(-1) if valid.ndim > self.log_factor.ndim else valid

    def include(self, agent: Agent, log_ratio: Tensor) -> None:
        """Multiplies the factor by an agent's ratio, which is 1 where the agent was not valid.

        Args:
            agent (Agent): the agent whose update is done.
            log_ratio (Tensor): log of its new over its old policy, at the items of its view.
        """
        valid, kept = self.valid(agent), self._kept(agent)
        if valid is not None:
            valid = self._as_items(valid)
            valid = valid if kept is None else valid[kept]
            log_ratio = masked(log_ratio, valid)
        if log_ratio.ndim > self.log_factor.ndim:
            log_ratio = log_ratio.sum(-1)
        if kept is None:
            self.log_factor = self.log_factor + log_ratio
        else:
            self.log_factor = self.log_factor.index_add(0, kept, log_ratio)

    def _kept(self, agent: Agent) -> Tensor | None:
        """Positions of the items with a valid entry; ``None``: all of them."""
        if agent.name not in self._kept_items:  # counting them waits for the device
            valid = self.valid(agent)
            kept = None if valid is None else _somewhere(self._as_items(valid))
            self._kept_items[agent.name] = kept
        return self._kept_items[agent.name]

    def _as_items(self, tensor: Tensor) -> Tensor:
        """Lays a tensor of leading shape ``[*B]`` out as items."""
        tail = tensor.shape[self.batch.batch_dims :]
        head = (-1,) if self.sequence_length is None else (-1, self.sequence_length)
        return tensor.reshape(*head, *tail)

    def critic_view(self) -> TensorDictBase:
        """What the critic reads and regresses on, as items."""
        keys = self.loss.tensor_keys
        names = [*self.loss.critic_network.in_keys, keys.value_target, keys.value]
        names += [self.loss.active_key(agent) for agent in self.loss.agents]
        names += self.loss._loss_mask_keys()
        names = [unravel_key(name) for name in names]
        data = self.critic_batch.select(*names, strict=False)
        data = _items(data, self.critic_sequence_length)
        valid, kept = self._counted, None
        if valid is not None:
            tail = valid.shape[self.batch.batch_dims :]
            kept = _somewhere(valid.reshape(*data.batch_size, *tail))
        return _compact(data) if kept is None else data[kept]

    def has_values(self) -> bool:
        """Whether there is anything to fit the critic to, here or with another learner."""
        valid = self._counted
        if self.learners.alone:
            return valid is None or bool(valid.any())
        return self.learners.most(1 if valid is None else int(valid.any())) > 0

    @cached_property
    def _counted(self) -> Tensor | None:
        """Which of the critic's values count."""
        returns = self.batch.get(self.loss.tensor_keys.value_target)
        return value_mask(returns, self._valid, self._active)

    def valid_returns(self) -> Tensor:
        """The returns of all learners that count, ``[num_returns, 1]``."""
        returns = self.batch.get(self.loss.tensor_keys.value_target)
        valid = self._counted
        own = returns.reshape(-1, 1) if valid is None else returns[valid].unsqueeze(-1)
        return self.learners.gather(own)

    def explained_variance(self) -> Tensor:
        """Share of the variance of the returns that the critic's values explain."""
        keys = self.loss.tensor_keys
        value, target = self.batch.get(keys.value), self.batch.get(keys.value_target)
        if value is None:
            return torch.full((), float("nan"), device=target.device)
        valid = self._counted
        _, residual = moments(target - value, valid, average=self.learners.mean)
        _, variance = moments(target, valid, average=self.learners.mean)
        return 1 - residual / variance.clamp_min(torch.finfo(variance.dtype).eps)


def _items(data: TensorDictBase, sequence_length: int | None) -> TensorDictBase:
    """Lays data out as items along the first dimension."""
    return data.reshape(-1) if sequence_length is None else data.reshape(-1, sequence_length)


def _compact(data: TensorDictBase) -> TensorDictBase:
    """A copy in memory of its own: an inner step reads it many times, and minibatches are such."""
    return data.apply(lambda tensor: tensor.clone(memory_format=torch.contiguous_format))


def _somewhere(valid: Tensor) -> Tensor | None:
    """Positions of the items with a valid entry.

    ``None`` if there is none: with nothing to contribute, a learner computes along with others.
    """
    kept = valid.flatten(1).any(1) if valid.ndim > 1 else valid
    positions = kept.nonzero().squeeze(-1)
    return positions if len(positions) > 0 else None
