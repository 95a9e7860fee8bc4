"""Tensordicts as lists of tensors, whose number of items may be a symbol of the compiler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, is_tensor_collection
from torch import Tensor

__all__ = ["Layout"]


class Layout(NamedTuple):
    """The layout of a tensordict of items: all but the number of items.

    Attributes:
        leaves (tuple): key, shape of an item, type and device of each tensor.
        batch_size (torch.Size, optional): of an item; ``None``: of the whole, which has no items.
        nested (tuple): keys and batch sizes of nested tensordicts, of an item again.

    Example:
        >>> import torch
        >>> one, two = (TensorDict({"x": torch.zeros(n, 3)}, [n]) for n in (1, 2))
        >>> layout = Layout.of(one)
        >>> layout == Layout.of(two)
        True
        >>> layout.fill(layout.tensors(two)).shape
        torch.Size([2])
    """

    leaves: tuple[tuple[NestedKey, torch.Size, torch.dtype, torch.device], ...]
    batch_size: torch.Size | None
    nested: tuple[tuple[NestedKey, torch.Size], ...]

    @classmethod
    def of(cls, data: TensorDictBase) -> Layout:
        """Return the layout of ``data``."""
        leaves, nested = [], []
        for key, value in data.items(include_nested=True):
            if is_tensor_collection(value):
                nested.append((key, value.batch_size[1:]))
            else:
                leaves.append((key, value.shape[1:], value.dtype, value.device))
        return cls(tuple(leaves), data.batch_size[1:] if data.batch_dims else None, tuple(nested))

    def tensors(self, data: TensorDictBase) -> list[Tensor]:
        """Return the tensors of ``data``, which has this layout."""
        return [data.get(key) for key, *_ in self.leaves]

    def fill(self, tensors: Sequence[Tensor]) -> TensorDict:
        """Return the tensordict of this layout that holds these tensors."""
        values = {leaf[0]: tensor for leaf, tensor in zip(self.leaves, tensors, strict=True)}
        if self.batch_size is None:
            return TensorDict(values)
        items = tensors[0].shape[0]
        data = TensorDict(values, batch_size=[items, *self.batch_size])
        for key, size in self.nested:
            if data.get(key, None) is None:
                data.set(key, TensorDict(batch_size=[items, *size]))
            data.get(key).batch_size = [items, *size]
        return data
