"""All or nothing: what was changed so far is put back if an error interrupts the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch

__all__ = ["Undo", "all_or_nothing"]

#: Puts one change back to where it was.
Undo: TypeAlias = Callable[[], None]


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
