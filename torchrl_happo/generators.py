"""Random generators whose states go on from one kind of device to another."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["global_generators", "load_generator_state"]

# In bytes: a Mersenne Twister on the CPU; seed and offset of Philox on CUDA.
STATE_SIZES = {"cpu": 5056, "cuda": 16}


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
