"""One rollback: parameters, places of tensors, and generators go back to where they were."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

__all__ = [
    "Undo",
    "all_or_nothing",
    "global_generators",
    "kept_slots",
    "load_generator_state",
    "restored_slots",
]

#: Puts one change back to where it was.
Undo: TypeAlias = Callable[[], None]

# In bytes: a Mersenne Twister on the CPU; seed and offset of Philox on CUDA.
STATE_SIZES = {"cpu": 5056, "cuda": 16}


@contextmanager
def all_or_nothing(generators: Iterable[torch.Generator]) -> Iterator[list[Undo]]:
    """Takes everything back if an error or an interrupt ends the body.

    Args:
        generators (iterable of torch.Generator): whose states are put back, too.

    Yields:
        a list, to which the body appends how each of its changes is taken back. The last one is
        taken back first.

    Example:
        >>> done = []
        >>> try:
        ...     with all_or_nothing([]) as undo:
        ...         done.append("half of it")
        ...         undo.append(done.clear)
        ...         raise RuntimeError
        ... except RuntimeError:
        ...     done
        []
    """
    sources = list(generators)
    states = [generator.get_state() for generator in sources]
    undo: list[Undo] = []
    try:
        yield undo
    except BaseException:
        for restore in reversed(undo):
            restore()
        for generator, state in zip(sources, states, strict=True):
            generator.set_state(state)
        raise


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


def global_generators() -> list[torch.Generator]:
    """Those that torch draws from where it is handed none: one on each device that is in use."""
    return [torch.default_generator, *torch.cuda.default_generators]


def load_generator_state(generator: torch.Generator, state: Tensor) -> None:
    """Puts a generator to where another one was, be it on another kind of device.

    Args:
        generator (torch.Generator): goes on from ``state``, bit for bit if that is from the same
            kind of device. The generators of the CPU and of CUDA are unlike: between them, it
            starts from a seed that ``state`` alone decides.
        state (Tensor): what :meth:`torch.Generator.get_state` returned, uint8.

    Raises:
        RuntimeError: if ``state`` is none of a generator; ``generator`` is unchanged.

    Example:
        >>> there, here = torch.Generator().manual_seed(0), torch.Generator()
        >>> load_generator_state(here, there.get_state())
        >>> torch.equal(torch.rand(3, generator=here), torch.rand(3, generator=there))
        True
    """
    others = [size for kind, size in STATE_SIZES.items() if kind != generator.device.type]
    if state.numel() in others:
        digest = hashlib.sha256(state.cpu().numpy().tobytes()).digest()
        generator.manual_seed(int.from_bytes(digest[:8]))
    else:
        generator.set_state(state.cpu())
