"""Where modules keep their tensors, remembered and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["kept_slots", "restored_slots"]


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
    restore = _restorer(networks)
    try:
        yield
    except BaseException:
        restore()
        raise


@contextmanager
def restored_slots(networks: Iterable[nn.Module]) -> Iterator[None]:
    """As :func:`kept_slots`, but also at the end of a body that went well.

    A module that has had other tensors in its places may hold its own in another order.

    Args:
        networks (iterable of nn.Module): whose modules to watch.

    Example:
        >>> import torch
        >>> net = nn.Linear(2, 1)
        >>> with restored_slots([net]):
        ...     net.weight = nn.Parameter(net._parameters.pop("weight") + 1)
        >>> [name for name, _ in net.named_parameters()]
        ['weight', 'bias']
    """
    restore = _restorer(networks)
    try:
        yield
    finally:
        restore()


def _restorer(networks: Iterable[nn.Module]) -> Callable[[], None]:
    """Puts the tensors that the networks hold now into their places again."""
    modules = dict.fromkeys(module for network in networks for module in network.modules())
    before = {module: _slots(module) for module in modules}

    def restore() -> None:
        for module, (parameters, buffers, attributes) in before.items():
            for present, kept in ((module._parameters, parameters), (module._buffers, buffers)):
                present.clear()
                present.update(kept)
            for name in _slots(module)[2]:
                del vars(module)[name]
            vars(module).update(attributes)

    return restore


def _slots(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A module's parameters, buffers and plain attributes that are tensors."""
    attributes = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
    return dict(module._parameters), dict(module._buffers), attributes
