"""One thread, fixed seeds and repeatable examples for every test."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The compiler would start processes beside those that share the tests already.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# Two busy threads on a small machine spin each other to a standstill (up to 50 times slower).
torch.set_num_threads(1)

# The same examples on every run; the first one pays for imports, hence no deadline.
settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.load_profile("deterministic")


@pytest.fixture(autouse=True)
def seed():
    """Starts every test from the same random state."""
    torch.manual_seed(0)
    return 0


def pytest_collection_modifyitems(items):
    """Skips the tests that need a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    no_device = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_device)


#: What worker processes of collectors and learners import.
PRELOADED = ["vmas", "torchrl.envs.libs.vmas", "torchrl_happo.recipe.training"]


@pytest.fixture(scope="session")
def fork_server():
    """Return the name of the start method that imports once for all processes of a session.

    A process that torchrl starts by ``spawn`` imports it for ten seconds. One that a server forks
    is given the same, pickled, and shares no memory with the tests either.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    return "forkserver"


@pytest.fixture
def quick_workers(fork_server):
    """Lets collectors start their workers by the fork server."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(fork_server, force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.fixture(scope="session")
def pretended():
    """Return what crossed between host and a pretended device in one update, by case."""
    script = Path(__file__).with_name("pretended_device.py")
    command = [sys.executable, "-W", "ignore", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    rows = map(json.loads, result.stdout.splitlines())
    return {row["case"]: row["crossings"] for row in rows}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skips a test that the library refuses for the age of TorchRL; the sentence is the reason."""
    try:
        return (yield)
    except Exception as error:
        # A test of another sentence quotes the one that came in its place.
        found = re.search(r"[^\n\"']* needs TorchRL [\d.]+ or newer, but [\w.]+", str(error))
        if found is None:
            raise
        pytest.skip(f"{found[0]} is installed")
