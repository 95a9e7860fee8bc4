"""How the process of a run deals with memory."""

from __future__ import annotations

import ctypes
import sys

# Names and numbers of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_THRESHOLD = 32 * 2**20
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Lets the process keep the memory that tensors free, for the next ones.

    An update allocates activations of some megabytes and frees them again, thousands of times.
    By default glibc hands blocks of that size back to the kernel, which clears every page before
    it gives it out anew. Does nothing where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
