"""Memory of a run's process."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

ALLOCATE = """
import resource, torch
from torchrl_happo.recipe.memory import keep_freed_memory
if {keep}:
    keep_freed_memory()
def use():
    for _ in range(4):
        torch.ones(2**21).add(1)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is Linux's")
def test_freed_memory_is_used_again():
    """Tensors of 8 MiB come out of memory that is mapped already, where otherwise it is not."""
    faults = [
        int(subprocess.check_output([sys.executable, "-c", ALLOCATE.format(keep=keep)]))
        for keep in (True, False)
    ]
    pages = 2**23 // resource.getpagesize()
    # The heap may still grow by some of them, once; it does not go on to do so.
    assert faults[0] <= 4 * pages + faults[1] / 10
