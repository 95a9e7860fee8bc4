"""Every random state of a process: seeded together, and set aside while something else draws.

There are four: torch's, numpy's, Python's and the one that all VMAS environments of a process
share. A second VMAS environment, such as the one for evaluation, moves the stream of the first.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch


def derive_seed(*numbers: int) -> int:
    """A seed for one purpose: well apart for neighbouring numbers, the same on every machine.

    Examples:
        >>> derive_seed(0, 1) == derive_seed(0, 1), derive_seed(0, 1) == derive_seed(1, 0)
        (True, False)
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Starts every random state of this process from ``seed``."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    vmas_state = _vmas_state()
    if vmas_state is not None:
        vmas_state[:] = [torch.get_rng_state(), np.random.get_state(), random.getstate()]


@contextmanager
def isolated_randomness(seed: int) -> Iterator[None]:
    """Runs its body from ``seed`` and leaves every random state as it was found."""
    vmas_state = _vmas_state()
    saved_vmas = list(vmas_state or [])
    saved_python, saved_numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            seed_everything(seed)
            yield
        finally:
            random.setstate(saved_python)
            np.random.set_state(saved_numpy)
            if vmas_state is not None:
                vmas_state[:] = saved_vmas


def _vmas_state() -> list[Any] | None:
    """The list in which VMAS keeps its random states; ``None`` where VMAS is not installed."""
    if find_spec("vmas") is None:
        return None
    from vmas.simulator.environment.environment import Environment

    return Environment.vmas_random_state
