"""Which numbers of a batch count, and what replaces those that do not.

Two kinds of masks say that an entry is not experience: TorchRL's validity masks of whole steps
(padding of trajectories of unlike lengths), and the ``active`` entry of a group, ``False`` where
an agent is dead or not yet there. Environments write anything there, NaN included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from torchrl_happo.team.agent import Agent
from torchrl_happo.team.entries import leaves, next_key, path_of
from torchrl_happo.team.team import Team

__all__ = ["Masks", "shared_reward"]


class Masks:
    """The masks of one batch, worked out once.

    Args:
        team (Team): says what the masks are called.
        batch (TensorDictBase): joint data of batch size ``[*B]``.

    Attributes:
        steps (Tensor, optional): which steps count at all, ``[*B]``. ``None``: all.
        active (Tensor, optional): which agents act, ``[*B, n_agents]``. ``None``: all.
    """

    def __init__(self, team: Team, batch: TensorDictBase) -> None:
        self._team = team
        self._batch = batch
        rewards = [team.keys.reward, *(critic.reward for critic in team.critics.values())]
        self._paid = {path_of(key) for key in rewards}
        self.steps = _step_mask(team, batch)
        self.active = _activity(team, batch)

    def __bool__(self) -> bool:
        """Whether anything is masked."""
        return self.steps is not None or self.active is not None

    def decisions(self, agent: Agent) -> Tensor | None:
        """Where an agent's decisions count: ``[*B]`` or ``[*B, n_members]``; ``None``: always."""
        if self.active is None:
            if self.steps is None or agent.num_members == 1:
                return self.steps
            return self.steps.unsqueeze(-1).expand(*self.steps.shape, agent.num_members)
        active = self.active[..., agent.position]
        if active.shape[-1] == 1:
            active = active.squeeze(-1)
            return active if self.steps is None else active & self.steps
        return active if self.steps is None else active & self.steps.unsqueeze(-1)

    def team_decisions(self) -> Tensor | None:
        """Where any agent's decisions count, ``[*B, n_agents]``; ``None``: always."""
        if self.active is None:
            if self.steps is None:
                return None
            return self.steps.unsqueeze(-1).expand(*self.steps.shape, self._team.num_agents)
        return self.active if self.steps is None else self.active & self.steps.unsqueeze(-1)

    def values(self, values: Tensor) -> Tensor | None:
        """Which of a critic's values count; those of an agent only where it was active.

        Args:
            values (Tensor): ``[*B, 1]`` for the team or ``[*B, n_agents, 1]`` for each agent. The
                value of a team of one is that of its agent.

        Returns:
            booleans of the shape of ``values``; ``None`` if all of them count.
        """
        steps, active = self.steps, self.active
        if active is not None and values.shape[:-1] == active.shape:
            return (active if steps is None else active & steps.unsqueeze(-1)).unsqueeze(-1)
        if active is not None and values.shape == active.shape:  # a team of one
            return active if steps is None else active & steps.unsqueeze(-1)
        if steps is None:
            return None
        return steps.reshape(*steps.shape, *(1,) * (values.ndim - steps.ndim)).expand_as(values)

    def entry(self, key: NestedKey) -> Tensor | None:
        """Which numbers of an entry count.

        Args:
            key (NestedKey): an entry, perhaps under ``"next"``.

        Returns:
            booleans ``[*B]``, or ``[*B, n_agents]`` for an entry of a group whose agents' activity
            is known; ``None`` if all of them count.
        """
        steps, active = self.steps, self._activity_at(key)
        if active is None or steps is None:
            return steps if active is None else active
        return active & steps.reshape(*steps.shape, *(1,) * (active.ndim - steps.ndim))

    def _activity_at(self, key: NestedKey) -> Tensor | None:
        """Which agents of the entry's group act, at the step that the entry belongs to.

        Rewards belong to the step of the action; observations under ``next`` to the following
        step.
        """
        path = path_of(key)
        at_next = path[0] == "next"
        own = path[1:] if at_next else path
        name = _active_key(self._team, own)
        mask = None if name is None else self._batch.get(name, None)
        if name is not None and at_next and own not in self._paid:
            mask = self._batch.get(next_key(name), mask)
        if mask is None:
            return None
        mask = mask.bool()
        is_column = mask.ndim > self._batch.batch_dims and mask.shape[-1] == 1
        return mask.squeeze(-1) if is_column else mask

    def fill(self, keys: Iterable[NestedKey]) -> TensorDictBase:
        """Return a copy of the batch with zeros in place of NaN and infinity where nothing counts.

        A mask alone does not stop them: a centralised critic sees all agents at once, and the
        gradient of a masked NaN is NaN. All other numbers are left alone.

        Args:
            keys (iterable of NestedKey): the entries to fill.

        Returns:
            a tensordict that shares all other entries with the batch.
        """
        filled = self._batch.copy()
        for key in keys:
            for holder, name, counts in _masked_leaves(filled, key, self.entry(key)):
                value = holder.get(name)
                if counts is not None and value.is_floating_point():
                    holder.set(name, torch.where(counts, value, value.nan_to_num(0.0, 0.0, 0.0)))
        return filled

    def cut_at_padding(self, batch: TensorDictBase) -> TensorDictBase:
        """Return a copy of a batch that says ``done`` where padding follows a step that counts.

        The advantage of a step sums over those after it until the trajectory is done. A trajectory
        that was cut off by the end of a batch is not done, but in a row of padded trajectories
        padding follows it. Its last step is not terminated and so bootstraps from its true next
        observation, as before.
        """
        if self.steps is None:
            return batch
        last = self.steps.clone()
        last[..., :-1] &= ~self.steps[..., 1:]
        last[..., -1] = False  # nothing follows it
        return _done_at(batch, self._team, last)

    def hide_inactive(self, batch: TensorDictBase, keys: Iterable[NestedKey]) -> TensorDictBase:
        """Return a copy of a batch in which agents that are not active show zeros.

        For a critic that sees all agents at once: what stands where an agent is dead would move
        the values of those that live (*death masking*, Yu et al., 2022,
        https://arxiv.org/abs/2103.01955). The agents' own networks see what they saw when they
        acted.

        Args:
            batch (TensorDictBase): the batch, perhaps :meth:`filled <fill>`. Not modified.
            keys (iterable of NestedKey): the entries that the critic reads, also under ``"next"``.

        Returns:
            a tensordict that shares all other entries with ``batch``, or ``batch`` itself if
            nothing says who is active.
        """
        masks = {key: mask for key in keys if (mask := self._activity_at(key)) is not None}
        hidden = batch.copy() if masks else batch
        for key, mask in masks.items():
            for holder, name, counts in _masked_leaves(hidden, key, mask):
                if counts is not None:
                    value = holder.get(name)
                    holder.set(name, torch.where(counts, value, torch.zeros_like(value)))
        return hidden

    def finite(self, key: NestedKey) -> Iterator[Tensor]:
        """Yield for each tensor of an entry whether all of its numbers that count are finite."""
        for holder, name, counts in _masked_leaves(self._batch, key, self.entry(key)):
            value = holder.get(name)
            if value.is_floating_point():
                finite = value.isfinite()
                yield (finite if counts is None else finite | ~counts).all()


def shared_reward(reward: Tensor, key: NestedKey, masks: Masks | None, dims: int) -> Tensor:
    """Return the one reward of the agents that act at a step; 0 where nobody acts.

    Args:
        reward (Tensor): that of each agent, ``[*B, n_agents, 1]``, the same for all that act.
        key (NestedKey): where it lies.
        masks (Masks, optional): the masks of the batch. ``None``: everything counts.
        dims (int): number of dimensions of ``B``.
    """
    mask = None if masks is None else masks.entry(key)
    if mask is None:
        return reward.select(dims, 0)
    mask = mask.reshape(*mask.shape, *(1,) * (reward.ndim - mask.ndim))
    paid = torch.where(mask, reward, -torch.inf).amax(dims)
    return torch.where(mask.any(dims), paid, torch.zeros_like(paid))


def _done_at(batch: TensorDictBase, team: Team, last: Tensor) -> TensorDictBase:
    """Return a copy of a batch that also says ``done`` at the steps ``last``, ``[*B]``."""
    key = next_key(team.keys.done)
    done = batch.get(key)
    last = last.reshape(*last.shape, *(1,) * (done.ndim - last.ndim))
    return batch.copy().set(key, done | last)


def _step_mask(team: Team, batch: TensorDictBase) -> Tensor | None:
    valid = None
    for name in team.mask_keys:
        mask = batch.get(name, None)
        if mask is not None:
            mask = mask.reshape(batch.batch_size)
            valid = mask if valid is None else valid & mask
    return valid


def _activity(team: Team, batch: TensorDictBase) -> Tensor | None:
    masks: list[Tensor | None] = []
    for agent in team.agents:
        masks.append(_activity_of(agent, team.active_keys(agent), batch))
    known = next((mask for mask in masks if mask is not None), None)
    if known is None:
        return None
    always = torch.ones((), dtype=torch.bool, device=known.device)
    sizes = [agent.num_members for agent in team.agents]
    return torch.cat(
        [
            always.expand(*batch.batch_size, size) if mask is None else mask
            for mask, size in zip(masks, sizes, strict=True)
        ],
        -1,
    )


def _activity_of(agent: Agent, keys: list[NestedKey], batch: TensorDictBase) -> Tensor | None:
    """Return at which steps a unit's members act, ``[*B, n_members]``; ``None``: always."""
    view = agent.view(batch, keys)
    masks = [view.get(key, None) for key in keys]
    if all(mask is None for mask in masks):
        return None
    rows = []
    for group, mask in zip(agent.groups, masks, strict=True):
        if mask is None:  # of a block's groups, one that says nothing is there always
            shape, device = (
                batch.get(group).batch_size,
                batch.get(agent.policy.action_keys[0]).device,
            )
            mask = torch.ones(shape, dtype=torch.bool, device=device)
        rows.append(mask.reshape(*batch.batch_size, -1))
    return torch.cat(rows, -1).reshape(*batch.batch_size, agent.num_members).bool()


def _active_key(team: Team, path: tuple[str, ...]) -> NestedKey | None:
    """Return the key that says who of an entry's group acts; ``None`` if nobody owns the entry."""
    for agent in team.agents:
        at_root = agent.group is None and len(path) == 1
        if agent.owns(path) or (at_root and path[0] in agent.update_keys):
            return team.active_keys(agent)[0]
    return (*path[:1], *path_of(team.keys.active)) if len(path) > 1 else None


def _masked_leaves(
    batch: TensorDictBase, key: NestedKey, mask: Tensor | None
) -> Iterator[tuple[TensorDictBase, NestedKey, Tensor | None]]:
    """Yield the tensors under a key, each with its own part of the mask, broadcastable to it."""
    for agent, holder, name in leaves(batch, key):
        value, counts, dims = holder.get(name), mask, batch.batch_dims
        if counts is None:
            yield holder, name, None
            continue
        if counts.ndim > dims and agent is not None:
            counts = counts.select(dims, agent)
        if counts.shape != value.shape[: counts.ndim]:
            counts = counts.any(dims)  # what a group shares counts as long as one of it acts
        yield holder, name, counts.reshape(*counts.shape, *(1,) * (value.ndim - counts.ndim))
