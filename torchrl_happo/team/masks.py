"""Which numbers of a batch count, and what stands where none does.

Two kinds of masks say that an entry is not experience: TorchRL's validity masks of whole steps
(padding of trajectories of unlike lengths), and the ``active`` entry of a group, ``False`` where
an agent is dead or not yet there. Environments write anything there, NaN included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from tensordict import LazyStackedTensorDict, NestedKey, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor

if TYPE_CHECKING:
    from torchrl_happo.objectives.base import SequentialLossMixin

__all__ = [
    "cut_at_padding",
    "entry_mask",
    "fill_masked",
    "hide_inactive",
    "leaves",
    "step_mask",
    "unmasked_finite",
    "value_mask",
]


def step_mask(loss: SequentialLossMixin, batch: TensorDictBase) -> Tensor | None:
    """Which steps count at all, ``[*B]``: TorchRL's own validity masks; ``None``: all."""
    valid = None
    for name in loss._loss_mask_keys():
        mask = batch.get(name, None)
        if mask is not None:
            mask = mask.reshape(batch.batch_size)
            valid = mask if valid is None else valid & mask
    return valid


def value_mask(values: Tensor, steps: Tensor | None, active: Tensor | None) -> Tensor | None:
    """Which of a critic's values count; those of an agent only where it was active.

    Args:
        values (Tensor): ``[*B, 1]`` for the team or ``[*B, n_agents, 1]`` for each agent. The
            value of a team of one is that of its agent.
        steps (Tensor, optional): which steps count, ``[*B]``. ``None``: all.
        active (Tensor, optional): which agents act, ``[*B, n_agents]``. ``None``: all.

    Returns:
        booleans of the shape of ``values``; ``None`` if all of them count.
    """
    if active is not None and values.shape[:-1] == active.shape:
        return (active if steps is None else active & steps.unsqueeze(-1)).unsqueeze(-1)
    if active is not None and values.shape == active.shape:  # a team of one
        return active if steps is None else active & steps.unsqueeze(-1)
    if steps is None:
        return None
    return steps.reshape(*steps.shape, *(1,) * (values.ndim - steps.ndim)).expand_as(values)


def entry_mask(loss: SequentialLossMixin, batch: TensorDictBase, key: NestedKey) -> Tensor | None:
    """Which numbers of an entry count.

    Args:
        loss (HAPPOLoss or HATRPOLoss): says how masks are called.
        batch (TensorDictBase): joint data of batch size ``[*B]``.
        key (NestedKey): an entry, perhaps under ``"next"``.

    Returns:
        booleans ``[*B]``, or ``[*B, n_agents]`` for an entry of a group whose agents' activity is
        known; ``None`` if all of them count.
    """
    steps = step_mask(loss, batch)
    active = _active(loss, batch, key)
    if active is None or steps is None:
        return steps if active is None else active
    return active & steps.reshape(*steps.shape, *(1,) * (active.ndim - steps.ndim))


def _active(loss: SequentialLossMixin, batch: TensorDictBase, key: NestedKey) -> Tensor | None:
    """Which agents of the entry's group act, at the step that the entry belongs to.

    What is observed next belongs to the next step, but what an action is paid to its own.
    """
    path = _path(key)
    at_next = path[0] == "next"
    own = path[1:] if at_next else path
    name = _active_key(loss, own)
    mask = None if name is None else batch.get(name, None)
    if name is not None and at_next and own != _path(loss.tensor_keys.reward):
        mask = batch.get(("next", *_path(name)), mask)
    if mask is None:
        return None
    mask = mask.bool()
    return mask.squeeze(-1) if mask.ndim > batch.batch_dims and mask.shape[-1] == 1 else mask


def _active_key(loss: SequentialLossMixin, path: tuple[str, ...]) -> NestedKey | None:
    """Where it says who of an entry's group acts; ``None`` for an entry of nobody's own."""
    if len(path) > 1:
        return (path[0], loss.tensor_keys.active)
    for agent in loss.agents:
        if agent.group is None and path[0] in loss.agent_keys(agent):
            return loss.active_key(agent)
    return None


def fill_masked(
    loss: SequentialLossMixin, batch: TensorDictBase, keys: Iterable[NestedKey]
) -> TensorDictBase:
    """A copy of a batch with zeros in place of NaN and infinity, where a mask says that they stand.

    A mask alone does not stop them: a centralised critic sees all agents at once, and the gradient
    of a masked NaN is NaN. All other numbers are left alone, whether they count or not.

    Args:
        loss (HAPPOLoss or HATRPOLoss): says how masks are called.
        batch (TensorDictBase): joint data of batch size ``[*B]``. It is not modified.
        keys (iterable of NestedKey): the entries to fill.

    Returns:
        a tensordict that shares all other entries with ``batch``.
    """
    filled = batch.copy()
    for key in keys:
        for holder, name, counts in _masked_leaves(filled, key, entry_mask(loss, batch, key)):
            value = holder.get(name)
            if counts is not None and value.is_floating_point():
                holder.set(name, torch.where(counts, value, value.nan_to_num(0.0, 0.0, 0.0)))
    return filled


def cut_at_padding(loss: SequentialLossMixin, batch: TensorDictBase) -> TensorDictBase:
    """A copy of a batch that says ``done`` where a step counts and the one after it does not.

    The advantage of a step takes in those after it until the trajectory is done. One that was cut
    off by the end of a batch is not, but in a row of padded trajectories padding follows it. Its
    last step is not terminated and so bootstraps from its true next observation, as before.
    """
    valid = step_mask(loss, batch)
    if valid is None:
        return batch
    last = valid.clone()
    last[..., :-1] &= ~valid[..., 1:]
    last[..., -1] = False  # nothing follows it
    key = ("next", *_path(loss.tensor_keys.done))
    done = batch.get(key)
    last = last.reshape(*last.shape, *(1,) * (done.ndim - last.ndim))
    return batch.copy().set(key, done | last)


def hide_inactive(
    loss: SequentialLossMixin, batch: TensorDictBase, keys: Iterable[NestedKey]
) -> TensorDictBase:
    """A copy of a batch in which agents that are not active show zeros.

    For a critic that sees all agents at once: what stands where an agent is dead would move the
    values of those that live (*death masking*, Yu et al., 2022,
    https://arxiv.org/abs/2103.01955). The agents' own networks see what they saw when they acted.

    Args:
        loss (HAPPOLoss or HATRPOLoss): says how the mask is called.
        batch (TensorDictBase): joint data of batch size ``[*B]``. It is not modified.
        keys (iterable of NestedKey): what the critic reads, also under ``"next"``.

    Returns:
        a tensordict that shares all other entries with ``batch``, or ``batch`` itself if nothing
        says who is active.
    """
    masks = {key: mask for key in keys if (mask := _active(loss, batch, key)) is not None}
    hidden = batch.copy() if masks else batch
    for key, mask in masks.items():
        for holder, name, counts in _masked_leaves(hidden, key, mask):
            if counts is not None:
                value = holder.get(name)
                holder.set(name, torch.where(counts, value, torch.zeros_like(value)))
    return hidden


def unmasked_finite(
    loss: SequentialLossMixin, batch: TensorDictBase, key: NestedKey
) -> Iterator[Tensor]:
    """Whether the numbers of an entry that count are finite: a boolean for each of its tensors."""
    mask = entry_mask(loss, batch, key)
    for holder, name, counts in _masked_leaves(batch, key, mask):
        value = holder.get(name)
        if value.is_floating_point():
            finite = value.isfinite()
            yield (finite if counts is None else finite | ~counts).all()


def _masked_leaves(
    batch: TensorDictBase, key: NestedKey, mask: Tensor | None
) -> Iterator[tuple[TensorDictBase, NestedKey, Tensor | None]]:
    """The tensors under a key, each with its own part of the mask, broadcastable to it."""
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


def leaves(
    batch: TensorDictBase, key: NestedKey
) -> Iterator[tuple[int | None, TensorDictBase, NestedKey]]:
    """Where the tensors under a key lie: several where a group stacks agents of unlike shapes.

    Yields:
        the agent whose tensor it is (``None``: all of them), the tensordict that holds it and its
        key there.
    """
    path = _path(key)
    for depth in range(1, len(path)):
        group = batch.get(path[:depth], None)
        if isinstance(group, LazyStackedTensorDict) and group.stack_dim == batch.batch_dims:
            for agent, row in enumerate(group.tensordicts):
                yield from ((agent, row, name) for name in _names(row, path[depth:]))
            return
    yield from ((None, batch, name) for name in _names(batch, path))


def _names(holder: TensorDictBase, path: tuple[str, ...]) -> list[NestedKey]:
    """The keys of the tensors under a path: the path's own, or those of a nested tensordict."""
    value = holder.get(path, None)
    if isinstance(value, TensorDictBase):
        return [(*path, *_path(name)) for name in value.keys(True, True)]
    return [] if value is None else [path]


def _path(key: NestedKey) -> tuple[str, ...]:
    key = unravel_key(key)
    return (key,) if isinstance(key, str) else key
