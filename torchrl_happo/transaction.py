"""The one rollback: parameters, states of steps, statistics, generators and slots of modules."""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, TypeAlias

import torch
from tensordict import LazyStackedTensorDict, TensorDictBase
from torch import Tensor, nn

__all__ = [
    "Transaction",
    "Undo",
    "clone_state",
    "global_generators",
    "kept_slots",
    "load_generator_state",
    "recordable",
    "recording",
    "restored_slots",
    "uncached_autocast",
]

#: Rolls one change back.
Undo: TypeAlias = Callable[[], None]

# In bytes: a Mersenne Twister on the CPU; seed and offset of Philox on CUDA.
STATE_SIZES = {"cpu": 5056, "cuda": 16}


class Restorable(Protocol):
    """The part of a :class:`~torchrl_happo.steps.Step` that a transaction needs."""

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that may move."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state beyond the parameters."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""


class Transaction:
    """Roll back what was remembered if an error or an interrupt ends the body.

    The latest change is rolled back first. A change that the body did not announce by one of the
    ``remember`` methods stays.

    Args:
        generators (iterable of torch.Generator): generators that are rolled back as well.

    Example:
        >>> weight = torch.zeros(2)
        >>> try:
        ...     with Transaction() as transaction:
        ...         _ = transaction.remember_values([weight])
        ...         _ = weight.add_(1)
        ...         raise RuntimeError("in the middle")
        ... except RuntimeError:
        ...     weight
        tensor([0., 0.])
    """

    def __init__(self, generators: Iterable[torch.Generator] = ()) -> None:
        self._generators = list(generators)
        self._undo: list[Undo] = []
        self._steps: set[int] = set()

    def __enter__(self) -> Transaction:
        self._states = [generator.get_state() for generator in self._generators]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.rollback()

    def add(self, undo: Undo) -> Undo:
        """Remember how one change is rolled back.

        Args:
            undo (callable): rolls the change back; may be called more than once.

        Returns:
            ``undo``.
        """
        self._undo.append(undo)
        return undo

    def remember_values(self, tensors: Iterable[Tensor]) -> Undo:
        """Remember the values of tensors, such as running statistics, bit for bit.

        Returns:
            a callable that puts these values back, now or later.
        """
        before = [(tensor, tensor.detach().clone()) for tensor in tensors]

        @torch.no_grad()
        def restore() -> None:
            for tensor, value in before:
                tensor.copy_(value)

        return self.add(restore)

    def remember(self, step: Restorable) -> Undo:
        """Remember a step: its parameters and its whole state, schedules included.

        Args:
            step (Step): the step, before it moves.

        Returns:
            a callable that rolls this step back, now or later.
        """
        self._steps.add(id(step))
        values = self.remember_values(step.parameters())
        state = clone_state(step.state_dict())

        def restore() -> None:
            values()
            # A copy: the state may be rolled back to once more.
            step.load_state_dict(clone_state(state))

        return self.add(restore)

    def remember_once(self, step: Restorable) -> None:
        """Remember a step unless this transaction has remembered it before."""
        if id(step) not in self._steps:
            self.remember(step)

    def rollback(self) -> None:
        """Put everything remembered back, the latest change first, then the generators."""
        for undo in reversed(self._undo):
            undo()
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)


def clone_state(value: Any) -> Any:
    """Copy a state: containers anew, tensors cloned however deeply nested, the rest deep-copied.

    Args:
        value (Any): a ``state_dict`` or a part of one.

    Returns:
        a copy that shares no tensor with ``value``.

    Example:
        >>> state = {"moments": [{"row": torch.zeros(2)}], "lr": 0.1}
        >>> copied = clone_state(state)
        >>> _ = state["moments"][0]["row"].add_(1)
        >>> copied
        {'moments': [{'row': tensor([0., 0.])}], 'lr': 0.1}
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    kind = type(value)
    if kind in (dict, OrderedDict):
        return kind((key, clone_state(item)) for key, item in value.items())
    if kind in (list, tuple):
        return kind(clone_state(item) for item in value)
    # Numbers and names are their own deep copies; anything else may be changed in place.
    return copy.deepcopy(value)


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


@contextmanager
def uncached_autocast() -> Iterator[None]:
    """Cast weights anew in each forward pass, where :func:`torch.autocast` would keep the casts.

    Autocast keeps the low-precision copy of a weight until its outermost block ends. A step moves
    the weight in the middle of the block: the next forward pass would still see the old copy, and
    with it a gradient of the old weights and a ratio of 1. Outside of autocast this does nothing.

    Example:
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), uncached_autocast():
        ...     before = layer(torch.ones(1))
        ...     layer.weight.data.add_(1)
        ...     (layer(torch.ones(1)) > before).item()
        tensor(...)
        True
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
        # What a caller's own forward pass has cached is of the parameters before.
        torch.clear_autocast_cache()


@contextmanager
def recording() -> Iterator[None]:
    """Record gradients of the weights of now, in any mode of torch.

    Gradients are recorded also under ``torch.no_grad`` and ``torch.inference_mode``, and autocast
    casts weights anew (:func:`uncached_autocast`).

    Example:
        >>> with torch.inference_mode(), recording():
        ...     torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        (True, False)
    """
    inference = torch.is_inference_mode_enabled()
    outside = torch.inference_mode(False) if inference else nullcontext()
    with outside, torch.enable_grad(), uncached_autocast():
        yield


def recordable(batch: TensorDictBase) -> TensorDictBase:
    """Return a batch that autograd can save: a copy, if it was made under ``inference_mode``.

    Args:
        batch (TensorDictBase): what a collector yields. Anything else is returned as it is.
    """
    return batch.clone() if _is_inference(batch) else batch


def _is_inference(value: Any) -> bool:
    """Whether a tensor, or any in a tensordict, was made under ``inference_mode``."""
    if isinstance(value, LazyStackedTensorDict):  # its rows may not fit one tensor
        return any(map(_is_inference, value.tensordicts))
    if isinstance(value, TensorDictBase):
        return any(map(_is_inference, value.values()))
    return isinstance(value, Tensor) and value.is_inference()
