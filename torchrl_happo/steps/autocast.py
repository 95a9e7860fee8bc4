"""Mixed precision while parameters move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["uncached_autocast"]


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
