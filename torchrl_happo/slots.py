"""Where modules keep their tensors, remembered and put back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["kept_slots"]


@contextmanager
def kept_slots(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Puts the tensors of networks back into their places if an error interrupts the body.

    Stacked networks, and others that run with parameters not their own, swap tensors in for the
    time of a call (:meth:`~tensordict.TensorDictBase.to_module`). An error in the middle leaves
    them there: the module then holds another's parameters, or some that its state never had.

    Args:
        networks (iterable of nn.Module): whose modules to watch. Only the places are remembered,
            not the numbers.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> net = nn.Linear(2, 1)
        >>> weight = net.weight
        >>> other = TensorDict({"weight": torch.zeros(1, 2), "bias": torch.zeros(1)})
        >>> try:
        ...     with kept_slots([net]), other.to_module(net):
        ...         net(torch.zeros(3))
        ... except RuntimeError:
        ...     net.weight is weight
        True
    """
    modules = dict.fromkeys(module for network in networks for module in network.modules())
    before = {module: _slots(module) for module in modules}
    try:
        yield
    except BaseException:
        for module, (parameters, buffers, attributes) in before.items():
            for present, kept in ((module._parameters, parameters), (module._buffers, buffers)):
                present.clear()
                present.update(kept)
            for name in _slots(module)[2]:
                del vars(module)[name]
            vars(module).update(attributes)
        raise


def _slots(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A module's parameters, buffers and plain attributes that are tensors."""
    attributes = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
    return dict(module._parameters), dict(module._buffers), attributes
