"""Entries of a joint tensordict: keys, groups, and the tensors under them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tensordict import LazyStackedTensorDict, NestedKey, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor

__all__ = ["compact", "group_of", "has", "leaves", "next_key", "path_of", "tensors_of"]


def path_of(key: NestedKey) -> tuple[str, ...]:
    """Return a key as a tuple of names.

    Example:
        >>> path_of("action"), path_of(("agents", "action"))
        (('action',), ('agents', 'action'))
    """
    key = unravel_key(key)
    return (key,) if isinstance(key, str) else key


def group_of(key: NestedKey) -> NestedKey | None:
    """Return the group of a key: all but its last name, ``None`` at the root.

    Example:
        >>> group_of(("agents", "action")), group_of("action"), group_of(("team", "left", "action"))
        ('agents', None, ('team', 'left'))
    """
    *group, _ = path_of(key)
    return unravel_key(tuple(group)) if group else None


def next_key(key: NestedKey) -> tuple[str, ...]:
    """Return the key of the same entry at the next step."""
    return ("next", *path_of(key))


def has(batch: TensorDictBase, key: NestedKey) -> bool:
    """Whether a batch has an entry."""
    return key in batch.keys(include_nested=True)


def tensors_of(batch: TensorDictBase, key: NestedKey) -> Iterator[Tensor]:
    """Yield the tensors under a key: one, one for each agent of unlike shapes, or none."""
    for _, holder, name in leaves(batch, key):
        yield holder.get(name)


def compact(data: TensorDictBase) -> TensorDictBase:
    """Copy data into memory of its own: a step reads it many times, in minibatches or whole."""
    return data.apply(lambda tensor: tensor.clone(memory_format=torch.contiguous_format))


def leaves(
    batch: TensorDictBase, key: NestedKey
) -> Iterator[tuple[int | None, TensorDictBase, NestedKey]]:
    """Find the tensors under a key: several where a group stacks agents of unlike shapes.

    Yields:
        the agent that the tensor belongs to (``None``: all agents), the tensordict that holds the
        tensor, and its key there.
    """
    path = path_of(key)
    for depth in range(1, len(path)):
        group = batch.get(path[:depth], None)
        if isinstance(group, LazyStackedTensorDict) and group.stack_dim == batch.batch_dims:
            for agent, row in enumerate(group.tensordicts):
                yield from ((agent, row, name) for name in _names(row, path[depth:]))
            return
    yield from ((None, batch, name) for name in _names(batch, path))


def _names(holder: TensorDictBase, path: tuple[str, ...]) -> list[NestedKey]:
    """Return the keys of the tensors under a path: its own, or those of a nested tensordict."""
    value = holder.get(path, None)
    if isinstance(value, TensorDictBase):
        return [(*path, *path_of(name)) for name in value.keys(True, True)]
    return [] if value is None else [path]
