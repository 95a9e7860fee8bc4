"""How the data of an epoch is cut into minibatches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import LazyTensorStorage, ReplayBuffer

from torchrl_happo.arguments import check_counts
from torchrl_happo.masked import VALID
from torchrl_happo.versions import buffer_parts

__all__ = ["MinibatchSampler", "ReplayBufferMinibatches", "ShuffledMinibatches", "draw_rows"]


class MinibatchSampler(Protocol):
    """From the data of one agent, or of a critic, to the minibatches of one epoch."""

    def __call__(self, data: TensorDictBase) -> Iterator[TensorDictBase]:
        """Yield the minibatches, at least one."""

    def count(self, data: TensorDictBase) -> int:
        """Return the number of minibatches."""


class ShuffledMinibatches:
    """Minibatches without replacement, in a new random order each epoch.

    Items lie along the first dimension: single steps, or whole sequences for recurrent policies.
    A remainder makes a smaller last minibatch: no sample is dropped. Items that do not count (all
    of their ``"valid"`` is false) are spread evenly, so that no minibatch is without one that does;
    where there are fewer such items than minibatches, they come again.

    Args:
        size (int, optional): steps in a minibatch; for sequences the nearest whole number of
            sequences below it (at least one). ``None``: everything at once, in its own order.
        generator (torch.Generator): source of the permutations.

    Example:
        >>> from tensordict import TensorDict
        >>> data = TensorDict({"x": torch.arange(5)}, batch_size=[5])
        >>> batches = ShuffledMinibatches(2, torch.Generator().manual_seed(0))
        >>> [len(minibatch) for minibatch in batches(data)]
        [2, 2, 1]
    """

    def __init__(self, size: int | None, generator: torch.Generator) -> None:
        check_counts(optional=True, minibatch_size=size)
        self.size = size
        self.generator = generator

    def __call__(self, data: TensorDictBase) -> Iterator[TensorDictBase]:
        """Yield the minibatches of one epoch over ``data``."""
        num_items, size = len(data), self._items(data)
        if size >= num_items:
            yield data
            return
        order = torch.randperm(num_items, generator=self.generator, device=self.generator.device)
        valid = _valid_of(data)
        parts = order.split(size) if valid is None else _spread(order, valid, self.count(data))
        for index in parts:
            yield _rows(data, index)

    def count(self, data: TensorDictBase) -> int:
        """Return the number of minibatches that ``data`` makes."""
        return max(-(-len(data) // max(self._items(data), 1)), 1)

    def _items(self, data: TensorDictBase) -> int:
        """Return the number of items in a minibatch."""
        num_items = len(data)
        steps_per_item = max(data.numel() // max(num_items, 1), 1)
        return num_items if self.size is None else max(self.size // steps_per_item, 1)


def _spread(order: Tensor, valid: Tensor, num_parts: int) -> list[Tensor]:
    """Split an order into parts that have as many items that count, and one at least."""
    counts = valid.flatten(1).any(1) if valid.ndim > 1 else valid
    order = order.to(valid.device)
    order = order[(~counts[order]).to(torch.uint8).argsort(stable=True)]
    places = torch.arange(len(order), device=order.device)
    number = counts.sum()
    is_empty = (places < num_parts) & (places >= number)
    order = order[torch.where(is_empty, places % number.clamp_min(1), places)]
    return [order[first::num_parts] for first in range(num_parts)]


def _rows(data: TensorDictBase, index: Tensor) -> TensorDictBase:
    """Return ``data[index]``, by a kernel that copies whole rows in a third of the time."""
    if not isinstance(data, TensorDict):
        return data[index]
    rows = {}
    for key, value in data.items():
        # The generator stays where it was made, when a team is moved.
        is_tensor = isinstance(value, Tensor)
        rows[key] = (
            value.index_select(0, index.to(value.device)) if is_tensor else _rows(value, index)
        )
    return TensorDict(rows, batch_size=[len(index), *data.batch_size[1:]], device=data.device)


def draw_rows(
    num_rows: int, valid: Tensor | None, share: float, generator: torch.Generator | None
) -> Tensor:
    """Draw a random share of the rows, those with a valid sample first; return their indices."""
    device = None if generator is None else generator.device
    priority = torch.rand(num_rows, generator=generator, device=device)
    if valid is not None:
        has_valid = valid.reshape(num_rows, -1).any(1)
        priority = priority.to(valid.device) - has_valid.to(priority.dtype)
    return priority.argsort()[: max(1, round(share * num_rows))]


class ReplayBufferMinibatches:
    """Minibatches from a replay buffer of the user's own.

    Its sampler, transform and batch size draw them, from a storage in memory that holds the present
    batch and nothing else. So the buffer's own storage, be it full or on disk, stays as it is, and
    nothing is drawn ahead of the batch. (Each agent has a storage of its own, because the entries
    of unlike agents and of the critic have unlike shapes.)

    Args:
        buffer (ReplayBuffer): a buffer with a batch size and room for the whole batch.

    Raises:
        TypeError: if it is no replay buffer.
        ValueError: if it has no batch size or, at a call, not enough room.
    """

    def __init__(self, buffer: ReplayBuffer) -> None:
        if not isinstance(buffer, ReplayBuffer):
            raise TypeError(
                f"replay_buffer must be a ReplayBuffer or None, got a {type(buffer).__name__}."
            )
        if buffer.batch_size is None:
            raise ValueError(
                "The replay buffer has no batch_size; build it with ReplayBuffer(batch_size=...)."
            )
        self.room = buffer.storage.max_size
        parts = buffer_parts(buffer)
        parts |= copy.deepcopy({name: parts[name] for name in ("transform", "generator")})
        self.buffer = ReplayBuffer(
            storage=LazyTensorStorage(self.room, device="auto"),
            sampler=copy.deepcopy(buffer.sampler),
            batch_size=buffer.batch_size,
            **parts,
        )

    def __call__(self, data: TensorDictBase) -> Iterator[TensorDictBase]:
        """Yield the minibatches of one epoch over ``data``."""
        data = _counting(data)
        if self.room < len(data):
            raise ValueError(
                f"The replay buffer has room for {self.room} items, but the batch has {len(data)}, "
                "some of which would be lost; give its storage a max_size of at least that."
            )
        self.buffer.empty()
        self.buffer.extend(data)
        for _ in range(self.count(data)):
            yield self.buffer.sample()

    def count(self, data: TensorDictBase) -> int:
        """Return the number of minibatches that ``data`` makes."""
        return -(-len(_counting(data)) // self.buffer.batch_size)


def _counting(data: TensorDictBase) -> TensorDictBase:
    """Leave out items that do not count, which a sampler does not know; waits for the device."""
    valid = _valid_of(data)
    counts = None if valid is None else valid.reshape(len(data), -1).any(1)
    return data if counts is None or not counts.any() else data[counts]


def _valid_of(data: TensorDictBase | Tensor) -> Tensor | None:
    """Return which entries count; ``None``: all, as of rows that stand for data elsewhere."""
    return None if isinstance(data, Tensor) else data.get(VALID, None)
