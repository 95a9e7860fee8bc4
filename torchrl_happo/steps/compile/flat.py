"""Networks and tensordicts as flat lists of tensors, and back.

What is compiled is a function of tensors. The objectives are functions of a tensordict, and read
the parameters of networks besides. These few functions lead from one to the other.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, is_tensor_collection
from torch import Tensor, nn

from torchrl_happo.transaction import restored_slots

__all__ = ["Layout", "network_tensors", "network_with", "settings"]


def network_tensors(network: nn.Module) -> list[Tensor]:
    """All parameters and buffers of a network, in a fixed order, each once.

    Example:
        >>> [tuple(tensor.shape) for tensor in network_tensors(nn.Linear(2, 1))]
        [(1, 2), (1,)]
    """
    return [*network.parameters(), *network.buffers()]


@contextmanager
def network_with(network: nn.Module, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Lets a network run with other tensors in the places of its own.

    Stacked networks keep their parameters in a tensordict, which
    :func:`torch.func.functional_call` does not reach.

    Args:
        network (nn.Module): the network.
        tensors (sequence of Tensor): in the order of :func:`network_tensors`.

    Example:
        >>> import torch
        >>> net = nn.Linear(2, 1)
        >>> with network_with(net, [torch.zeros(1, 2), torch.ones(1)]):
        ...     net(torch.zeros(2))
        tensor([1.])
    """
    replacement = {id(t): other for t, other in zip(network_tensors(network), tensors, strict=True)}
    own = TensorDict.from_module(network)
    other = own.apply(lambda tensor: replacement[id(tensor)])
    with restored_slots([network]):
        swapped = other.to_module(network, preserve_module_state=False)
        swapped.__enter__()
        try:
            yield
        finally:
            # Not told of an error: its exit would hide it behind one of its own.
            swapped.__exit__(None, None, None)


class Layout(NamedTuple):
    """What must not change from one tensordict of items to the next: all but their number.

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
        """The layout of ``data``."""
        leaves, nested = [], []
        for key, value in data.items(include_nested=True):
            if is_tensor_collection(value):
                nested.append((key, value.batch_size[1:]))
            else:
                leaves.append((key, value.shape[1:], value.dtype, value.device))
        return cls(tuple(leaves), data.batch_size[1:] if data.batch_dims else None, tuple(nested))

    def tensors(self, data: TensorDictBase) -> list[Tensor]:
        """The tensors of ``data``, which has this layout."""
        return [data.get(key) for key, *_ in self.leaves]

    def fill(self, tensors: Sequence[Tensor]) -> TensorDict:
        """The tensordict of this layout that holds these tensors."""
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


def settings(modules: Sequence[nn.Module]) -> Hashable:
    """The plain attributes of modules, such as ``training``, on which their code may branch.

    Example:
        >>> settings([nn.Dropout(0.1)]) == settings([nn.Dropout(0.2)])
        False
    """
    plain = (bool, int, float, str, type(None))
    return tuple(
        (name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, plain)
    )
