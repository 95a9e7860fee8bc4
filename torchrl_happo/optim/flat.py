"""Networks and tensordicts as flat lists of tensors, and back.

What is compiled is a function of tensors. The objectives are functions of a tensordict, and read
the parameters of networks besides. These few functions lead from one to the other.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, is_tensor_collection
from torch import Tensor, nn

from torchrl_happo.slots import restored_slots

__all__ = ["data_keys", "data_layout", "data_of", "network_tensors", "network_with", "settings"]


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


def data_keys(data: TensorDictBase) -> list[NestedKey]:
    """The keys of all tensors in ``data``, in its own order."""
    return list(data.keys(include_nested=True, leaves_only=True))


def data_layout(data: TensorDictBase) -> Hashable:
    """What must not change from one batch to the next: all but the number of items.

    Example:
        >>> import torch
        >>> one, two = (TensorDict({"x": torch.zeros(n, 3)}, [n]) for n in (1, 2))
        >>> data_layout(one) == data_layout(two)
        True
    """
    leaves = tuple(
        (key, value.shape[1:], value.dtype, value.device)
        for key, value in data.items(include_nested=True, leaves_only=True)
    )
    return leaves, tuple(_batch_sizes(data))


def data_of(tensors: Sequence[Tensor], like: TensorDictBase) -> TensorDict:
    """The tensordict of some tensors, with keys and nested batch sizes of another.

    Args:
        tensors (sequence of Tensor): in the order of :func:`data_keys`.
        like (TensorDictBase): any of the same :func:`data_layout`.

    Example:
        >>> import torch
        >>> like = TensorDict({"x": torch.zeros(5), "empty": TensorDict(batch_size=[5, 3])}, [5])
        >>> data = data_of([torch.ones(2)], like)
        >>> data["x"], data["empty"].batch_size
        (tensor([1., 1.]), torch.Size([2, 3]))
    """
    values = dict(zip(data_keys(like), tensors, strict=True))
    items = tensors[0].shape[0]
    data = TensorDict(values, batch_size=[items, *like.batch_size[1:]])
    for key, size in _batch_sizes(like):
        if data.get(key, None) is None:
            data.set(key, TensorDict(batch_size=[items, *size]))
        data.get(key).batch_size = [items, *size]
    return data


def _batch_sizes(data: TensorDictBase) -> Iterator[tuple[NestedKey, torch.Size]]:
    """The batch sizes of nested tensordicts, but for the number of items."""
    for key, value in data.items(include_nested=True):
        if is_tensor_collection(value):
            yield key, value.batch_size[1:]


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
