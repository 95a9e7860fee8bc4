"""The joint batch of one update: advantage, validity, and a flat view for each agent."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor

from torchrl_happo.agents import Agent
from torchrl_happo.masks import fill_masked, step_mask
from torchrl_happo.objectives.common import ADVANTAGE, VALID, SequentialLossMixin
from torchrl_happo.objectives.functional import masked_mean, standardize
from torchrl_happo.validation.entries import entries_read
from torchrl_happo.validation.values import explained

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
        sequence_length (int, optional): steps in a chunk. ``None``: single steps.

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
    ) -> None:
        self.loss = loss
        self.batch = fill_masked(loss, batch, entries_read(loss, batch))
        self.standardize_advantage = standardize_advantage
        self.sequence_length = sequence_length
        if sequence_length is not None and batch.batch_size[-1] % sequence_length:
            raise ValueError(
                f"sequence_length={sequence_length} does not divide the {batch.batch_size[-1]} "
                "steps of the batch; choose a divisor of frames_per_batch / num_envs."
            )
        if loss.tensor_keys.advantage not in batch.keys(include_nested=True):
            reads = [*loss.critic_network.in_keys, ("next", loss.tensor_keys.reward)]
            with torch.no_grad(), explained("The critic", batch, reads):
                loss.value_estimator(self.batch)
        self._active = loss.active(self.batch)
        self._valid = step_mask(loss, self.batch)
        #: Log of the product of the ratios of the agents updated so far, at each item.
        self.log_factor = self._as_items(torch.zeros_like(self._advantage_column()))

    def _items(self, data: TensorDictBase) -> TensorDictBase:
        """Lays the batch out as items along the first dimension."""
        if self.sequence_length is None:
            return data.reshape(-1)
        return data.reshape(-1, self.sequence_length)

    def _advantage_column(self) -> Tensor:
        """One number per step, of the advantage's type and device."""
        advantage = self.batch.get(self.loss.tensor_keys.advantage)
        return advantage.flatten(self.batch.batch_dims)[..., 0]

    def valid(self, agent: Agent) -> Tensor | None:
        """Where the agent's decisions count: ``[*B]`` or ``[*B, n_members]``; ``None``: always."""
        active = self._active
        if active is None:
            return self._valid
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
        valid = self.valid(agent)
        if is_joint:
            if valid is not None and valid.ndim > advantage.ndim:
                advantage = advantage.unsqueeze(-1).expand_as(valid)
            elif agent.num_members > 1:
                advantage = advantage.unsqueeze(-1)
            return standardize(advantage, valid) if self.standardize_advantage else advantage
        if self.standardize_advantage:
            team = self._active
            if self._valid is not None:
                steps = self._valid.unsqueeze(-1).expand_as(advantage)
                team = steps if team is None else team & steps
            advantage = standardize(advantage, team)
        own = advantage[..., agent.position]
        return own.squeeze(-1) if agent.num_members == 1 else own

    def agent_view(self, agent: Agent) -> TensorDict:
        """What the agent's update reads, as items.

        Returns:
            the agent's observations, actions and log-probabilities, and ``ADVANTAGE``: the factor
            times the advantage. Single steps at which the agent was not valid are left out; in
            chunks and blocks they stay and ``VALID`` marks the others.
        """
        data = self._items(agent.view(self.batch, self.loss.agent_keys(agent)))
        advantage = self._as_items(self.advantage(agent))
        factor = self.log_factor.exp()
        if advantage.ndim > factor.ndim:
            factor = factor.unsqueeze(-1)
        data.set(ADVANTAGE, factor * advantage)
        valid = self.valid(agent)
        if valid is not None:
            data.set(VALID, self._as_items(valid))
        kept = self._kept(agent)
        return data.contiguous() if kept is None else data[kept].exclude(VALID)

    def include(self, agent: Agent, log_ratio: Tensor) -> None:
        """Multiplies the factor by an agent's ratio, which is 1 where the agent was not valid.

        Args:
            agent (Agent): the agent whose update is done.
            log_ratio (Tensor): log of its new over its old policy, at the items of its view.
        """
        valid, kept = self.valid(agent), self._kept(agent)
        if kept is not None:
            self.log_factor = self.log_factor.index_add(0, kept, log_ratio)
            return
        if valid is not None:
            log_ratio = torch.where(self._as_items(valid), log_ratio, torch.zeros_like(log_ratio))
        if log_ratio.ndim > self.log_factor.ndim:
            log_ratio = log_ratio.sum(-1)
        self.log_factor = self.log_factor + log_ratio

    def _kept(self, agent: Agent) -> Tensor | None:
        """Positions of the valid items, where items can be left out one by one."""
        valid = self.valid(agent)
        if valid is None or self.sequence_length is not None or agent.num_members > 1:
            return None
        return valid.flatten().nonzero().squeeze(-1)

    def _as_items(self, tensor: Tensor) -> Tensor:
        """Lays a tensor of leading shape ``[*B]`` out as items."""
        tail = tensor.shape[self.batch.batch_dims :]
        head = (-1,) if self.sequence_length is None else (-1, self.sequence_length)
        return tensor.reshape(*head, *tail)

    def critic_view(self) -> TensorDictBase:
        """What the critic reads and regresses on, as items."""
        keys = self.loss.tensor_keys
        names = [*self.loss.critic_network.in_keys, keys.value_target, keys.value]
        names += [agent.group and (agent.group, keys.active) for agent in self.loss.agents]
        names += self.loss._loss_mask_keys()
        names = [unravel_key(name) for name in names if name is not None]
        return self._items(self.batch.select(*names, strict=False)).contiguous()

    def valid_returns(self) -> Tensor:
        """The returns that count, ``[num_returns, 1]``."""
        returns = self.batch.get(self.loss.tensor_keys.value_target)
        valid = self._valid_values(returns)
        return returns.reshape(-1, 1) if valid is None else returns[valid].unsqueeze(-1)

    def _valid_values(self, values: Tensor) -> Tensor | None:
        """Which of the critic's values count; those of an agent only where it was active."""
        valid = self._valid
        if self._active is not None and values.shape[:-1] == self._active.shape:
            steps = True if valid is None else valid.unsqueeze(-1)
            return (self._active & steps).unsqueeze(-1)
        if valid is None:
            return None
        return valid.reshape(*valid.shape, *(1,) * (values.ndim - valid.ndim)).expand_as(values)

    def explained_variance(self) -> Tensor:
        """Share of the variance of the returns that the critic's values explain."""
        keys = self.loss.tensor_keys
        value, target = self.batch.get(keys.value), self.batch.get(keys.value_target)
        if value is None:
            return torch.full((), float("nan"), device=target.device)
        valid = self._valid_values(target)
        residual = target - value
        residual_variance = masked_mean((residual - masked_mean(residual, valid)).square(), valid)
        variance = masked_mean((target - masked_mean(target, valid)).square(), valid)
        return 1 - residual_variance / variance.clamp_min(torch.finfo(variance.dtype).eps)
