"""The joint batch of one update, made ready once: masks, advantages, and each agent's data.

Data has *items* along the first dimension: single steps, or chunks of ``sequence_length``
consecutive steps for recurrent networks.

An update without checks of values (``check_finite=False``) reads numbers back from the device at
these places alone, each of which waits for it:

- with a value normalisation and masks, the returns that count: ``TeamBatch.valid_returns``;
- with masks and several processes: which items count, ``selected_rows``, and with whom;
- with masks and a replay buffer: which items it may draw, ``ReplayBufferMinibatches``;
- with masks, where an optimiser has just got its state or keeps a part of it on the host: whether
  anything counted, ``Idle``;
- ``target_kl``: the divergence after each epoch, ``FirstOrderStep.run``;
- ``line_search="sequential"``: a flag for each try, ``sequential_line_search``;
- ``kl_split`` ``"weighted"`` and ``"greedy"``: gains and divergences, ``TeamBudget``;
- ``order="semi_greedy"``, and an order of the user's own, may read what they look at.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor

from torchrl_happo.distributed import Learners
from torchrl_happo.masked import moments, standardize, standardize_members
from torchrl_happo.objectives.critic import Critic
from torchrl_happo.policy.memory import write_states
from torchrl_happo.team.agent import Agent
from torchrl_happo.team.agreement import check_agreement
from torchrl_happo.team.checks import check_batch, check_team_shape
from torchrl_happo.team.entries import compact, has, next_key
from torchrl_happo.team.masks import Masks, shared_reward
from torchrl_happo.team.team import Team
from torchrl_happo.team.values import check_finite, explained, fill_ends, share_ends, share_group
from torchrl_happo.transaction import Undo, recordable
from torchrl_happo.update.rows import Rows, padded_rows, selected_rows, taken

__all__ = ["TeamBatch"]


class TeamBatch:
    """A collector's batch, made ready for the sequential update.

    The advantage is estimated if the batch has none. It is standardised before any factor: a joint
    advantage for each agent over the decisions of its own that count, an advantage per agent over
    those of all agents.

    Args:
        team (Team): the agents and the keys that are read.
        critics (mapping of str to Critic): the critics of the team.
        batch (TensorDictBase): joint data of batch size ``[*B]``, time last. Not modified.

    Keyword Args:
        standardize_advantage (bool): whether to standardise the advantage. Defaults to ``True``.
        each_for_itself (bool): whether to standardise an advantage per agent over the decisions of
            each agent alone, members of blocks included. Defaults to ``False``.
        sequence_length (int, optional): steps in a chunk. ``None``: the whole length of the batch
            where a network is recurrent (an actor, or the critic), otherwise single steps.
        read_values (bool): whether to look for numbers that are not finite, which waits for the
            device. Defaults to ``False``.
        learners (Learners, optional): over whose entries statistics are taken. Defaults to
            ``None``: this batch's alone.
        pads (bool): whether the data of an agent that dies has as many rows as that of one that
            does not, which waits for no device. Defaults to ``False``.

    Raises:
        KeyError: if an entry is missing.
        ValueError: if an entry does not fit, or ``sequence_length`` does not divide the length of
            the batch.
    """

    def __init__(
        self,
        team: Team,
        critics: Mapping[str, Critic],
        batch: TensorDictBase,
        *,
        standardize_advantage: bool = True,
        each_for_itself: bool = False,
        sequence_length: int | None = None,
        read_values: bool = False,
        learners: Learners | None = None,
        pads: bool = False,
    ) -> None:
        batch = recordable(batch)
        if isinstance(batch, TensorDictBase):  # anything else is refused below
            team, batch = team.seen_in(batch), share_ends(team, batch)
        self.team = team
        self.critics = critics
        self.source = batch
        self.learners = Learners() if learners is None else learners
        self.standardize_advantage = standardize_advantage
        self.each_for_itself = each_for_itself
        self.pads = pads and self.learners.alone
        networks = [agent.source for agent in team.agents]
        check_batch(team, batch, [*networks, *(critic.network for critic in critics.values())])
        if not all(agent.is_checked for agent in team.agents):
            check_agreement(team.agents, batch)
        batch = fill_ends(team, batch)
        self.masks = Masks(team, batch) if team.is_masked(batch) else None
        if read_values:
            check_finite(team, batch, self.masks)
        # A copy: estimators write into the tensordicts of groups.
        self.batch = (
            batch.copy() if self.masks is None else self.masks.fill(team.entries_read(batch))
        )
        self._set_lengths(sequence_length)
        #: The batch as each critic sees it.
        self.critic_batches = {name: self._estimate(critic) for name, critic in critics.items()}
        self._rows: dict[str, Rows | None] = {}

    def _set_lengths(self, length: int | None) -> None:
        """Choose how many steps make an item, for the agents and for the critics."""
        steps = self.batch.shape[-1]
        self.sequence_length = self.critic_sequence_length = length
        if length is None:
            if any(agent.has_memory for agent in self.team.agents):
                self.sequence_length = steps
            if any(critic.keys.states for critic in self.critics.values()):
                self.critic_sequence_length = steps
        elif steps % length:
            raise ValueError(
                f"sequence_length={length} does not divide the {steps} "
                "steps of the batch; choose a divisor of frames_per_batch / num_envs."
            )

    def _estimate(self, critic: Critic) -> TensorDictBase:
        """Return the batch as a critic sees it; add values and advantages to the agents' batch.

        States of a critic with memory are made anew. An advantage that is there already stays.
        """
        keys, batch = critic.keys, self.batch
        if self.masks is not None:
            seen = [place(key) for key in keys.reads for place in (unravel_key, next_key)]
            batch = self.masks.hide_inactive(batch, seen)
        reads = [*keys.reads, next_key(keys.reward)]
        with torch.no_grad(), explained("The critic", batch, reads):
            if keys.states:
                batch = batch.copy()
                write_states(critic.network, batch)
            if not has(batch, keys.advantage):
                # A policy may have written values before; the present ones are wanted.
                batch = self._with_ends(critic, batch).exclude(keys.value)
                batch = share_group(batch, keys.value)
                critic.estimate(batch)
                made = [keys.advantage, keys.value_target, keys.value, "shifted_valid"]
                self.batch = self.batch.copy().update(batch.select(*made, strict=False))
        check_team_shape(self.team, self.batch, keys.advantage, self.team.num_agents)
        return batch

    def _with_ends(self, critic: Critic, batch: TensorDictBase) -> TensorDictBase:
        """Return a copy of a batch that says ``done`` wherever a trajectory ends.

        In a row, other trajectories may follow without a ``done``: of other workers, or of other
        environments. A cut is no termination: the last step bootstraps from its next observation.
        """
        keys, dims = critic.keys, batch.batch_dims
        batch = batch.copy() if self.masks is None else self.masks.cut_at_padding(batch).copy()
        places = [next_key(key) for key in (keys.done, keys.terminated)]
        per_agent = [k for k in (*places, next_key(keys.reward)) if batch.get(k).ndim > dims + 1]
        if per_agent and critic.values_the_team(batch):
            for key in per_agent:
                value = batch.get(key)
                # The team is done when all of its agents are; they are paid the same.
                value = (
                    value.all(dims)
                    if key in places
                    else shared_reward(value, key, self.masks, dims)
                )
                for group in (key[1:-1], key[:-1]) if len(key) > 2 else ():
                    # A group with an agent dimension has no place for an entry of the team.
                    batch.set(group, TensorDict(dict(batch.get(group).items()), batch.batch_size))
                batch.set(key, value)
        ids = batch.get(("collector", "traj_ids"), None)
        if ids is not None and batch.shape[-1] > 1:
            ids = ids.reshape(batch.shape)
            done = batch.get(places[0])
            last = torch.zeros_like(ids, dtype=torch.bool)
            last[..., :-1] = ids[..., 1:] != ids[..., :-1]
            batch.set(places[0], done | last.reshape(*last.shape, *(1,) * (done.ndim - dims)))
        return batch

    # -- the agents ----------------------------------------------------------------------------

    def valid(self, agent: Agent) -> Tensor | None:
        """Where an agent's decisions count: ``[*B]`` or ``[*B, n_members]``; ``None``: always."""
        return None if self.masks is None else self.masks.decisions(agent)

    @cached_property
    def _acting_somewhere(self) -> list[bool]:
        """Of each agent, whether any of its decisions counts with any of the learners."""
        masks = [self.valid(agent) for agent in self.team.agents]
        device = self.batch.get(self.team.keys.advantage).device
        always = torch.ones((), dtype=torch.int32, device=device)
        acting = [always if mask is None else mask.any().to(always) for mask in masks]
        flags = self.learners.maximum(torch.stack(acting)).tolist()
        return [flag > 0 for flag in flags]

    def acts(self, agent: Agent) -> bool:
        """Whether there is anything to update an agent with."""
        if self.learners.alone:
            return self.valid(agent) is None or self.rows(agent) is not None
        return self._acting_somewhere[self.team.agents.index(agent)]

    def advantage(self, agent: Agent, joint: Tensor | None = None) -> Tensor:
        """Return an agent's advantage, of the shape of its log-probability.

        Args:
            agent (Agent): the agent.
            joint (Tensor, optional): the advantage of the team, ``[*B, 1]``, or of each agent,
                ``[*B, n_agents, 1]``, before it is standardised. Defaults to ``None``: that of
                the batch.
        """
        dims = self.batch.batch_dims
        advantage = self._advantage if joint is None else self._standardized_together(joint)
        own = agent.share_of(advantage, dims)
        is_alone = advantage.ndim == dims + 1 or self.each_for_itself
        return self.standardized(agent, own) if is_alone else own

    def standardized(self, agent: Agent, advantage: Tensor) -> Tensor:
        """Standardise an agent's advantage, ``[*B]`` or ``[*B, n_members]``, where it counts."""
        if not self.standardize_advantage:
            return advantage
        by_member = self.each_for_itself and advantage.ndim > self.batch.batch_dims
        rule = standardize_members if by_member else standardize
        return rule(advantage, self.valid(agent), average=self.learners.mean)

    @cached_property
    def _advantage(self) -> Tensor:
        """The advantage; one per agent is standardised, once, over the decisions of all."""
        return self._standardized_together(self.batch.get(self.team.keys.advantage))

    def _standardized_together(self, advantage: Tensor) -> Tensor:
        one = advantage.ndim == self.batch.batch_dims + 1 or self.each_for_itself
        if one or not self.standardize_advantage:
            return advantage
        valid = None if self.masks is None else self.masks.team_decisions()
        return standardize(advantage.squeeze(-1), valid, average=self.learners.mean).unsqueeze(-1)

    def agent_data(self, agent: Agent, corrections: Mapping[str, Tensor]) -> TensorDict:
        """Return the data of an agent's update, as items.

        Args:
            agent (Agent): the agent.
            corrections (mapping of str to Tensor): entries that the agents before have changed, as
                items: the factor, or another advantage.

        Returns:
            the agent's observations, actions and log-probabilities, the advantage, and the
            corrections. Items without a valid decision are left out, or replaced, so that no
            minibatch is without one; ``"valid"`` marks the decisions that count, unless all do.
        """
        data = agent.view(self.batch, agent.update_keys)
        length = self.sequence_length
        data = data.reshape(-1) if length is None else data.reshape(-1, length)
        own = {self.team.keys.advantage: self.items(self.advantage(agent)), **corrections}
        ndim = own[self.team.keys.advantage].ndim
        for key, value in own.items():
            data.set(key, value.unsqueeze(-1) if value.ndim < ndim else value)
        valid = self.valid(agent)
        if valid is None:
            return compact(data)
        return taken(data, self.items(valid), self.rows(agent))

    def rows(self, agent: Agent) -> Rows | None:
        """Which items make the rows of an agent's data; ``None``: all, each once."""
        if agent.name not in self._rows:  # selecting them waits for the device
            valid = self.valid(agent)
            self._rows[agent.name] = None if valid is None else self._choose(self.items(valid))
        return self._rows[agent.name]

    def _choose(self, valid: Tensor) -> Rows | None:
        return padded_rows(valid) if self.pads else selected_rows(valid)

    def valid_rows(self, agent: Agent) -> Tensor | None:
        """Which entries of an agent's data count; ``None``: all."""
        rows, valid = self.rows(agent), self.valid(agent)
        if rows is not None or valid is None:
            return None if rows is None else rows.valid
        return self.items(valid)

    def items(self, tensor: Tensor) -> Tensor:
        """Lay a tensor of leading shape ``[*B]`` out as items."""
        tail = tensor.shape[self.batch.batch_dims :]
        head = (-1,) if self.sequence_length is None else (-1, self.sequence_length)
        return tensor.reshape(*head, *tail)

    def zeros(self) -> Tensor:
        """Return one zero per step, as items, of the advantage's type and device."""
        advantage = self.batch.get(self.team.keys.advantage)
        return self.items(torch.zeros_like(advantage.flatten(self.batch.batch_dims)[..., 0]))

    # -- the critics ---------------------------------------------------------------------------

    def critic_data(self, critic: str) -> TensorDictBase:
        """Return everything that a critic reads and is fitted to, as items."""
        keys = self.critics[critic].keys
        names = [*keys.reads, keys.value_target, keys.value]
        data = self.critic_batches[critic].select(*map(unravel_key, names), strict=False)
        length = self.critic_sequence_length
        data = data.reshape(-1) if length is None else data.reshape(-1, length)
        valid = self._valid_values(critic)
        if valid is None:
            return compact(data)
        valid = valid.reshape(*data.batch_size, *valid.shape[self.batch.batch_dims :])
        return taken(data, valid, self._choose(valid))

    def has_values(self, critic: str) -> bool:
        """Whether there may be anything to fit a critic to, here or with another learner."""
        valid = self._valid_values(critic)
        if self.learners.alone:
            return valid is None or self.pads or bool(valid.any())
        return self.learners.most(1 if valid is None else int(valid.any())) > 0

    def _valid_values(self, critic: str) -> Tensor | None:
        """Which of a critic's values count."""
        returns = self.critic_batches[critic].get(self.critics[critic].keys.value_target)
        return None if self.masks is None else self.masks.values(returns)

    def valid_returns(self, critic: str) -> Tensor:
        """Return the returns of all learners that count, ``[num_returns, 1]``."""
        returns = self.critic_batches[critic].get(self.critics[critic].keys.value_target)
        valid = self._valid_values(critic)
        own = returns.reshape(-1, 1) if valid is None else returns[valid].unsqueeze(-1)
        return self.learners.gather(own)

    def renormalize(self, critic: str, data: TensorDictBase) -> Undo:
        """Update the statistics of a critic's values; return a callable that puts them back."""
        own = self.critics[critic]
        if own.value_norm is None:
            return lambda: None
        return own.update_norm(self.valid_returns(critic), data)

    def explained_variance(self, critic: str) -> Tensor:
        """Return the share of the variance of the returns that a critic's values explain."""
        keys, batch = self.critics[critic].keys, self.critic_batches[critic]
        value, target = batch.get(keys.value, None), batch.get(keys.value_target)
        if value is None:
            return torch.full((), float("nan"), device=target.device)
        valid = self._valid_values(critic)
        _, residual = moments(target - value, valid, average=self.learners.mean)
        _, variance = moments(target, valid, average=self.learners.mean)
        return 1 - residual / variance.clamp_min(torch.finfo(variance.dtype).eps)
