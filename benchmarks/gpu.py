"""Everything that needs a CUDA device, in one command: the tests, then the benchmarks.

    python benchmarks/gpu.py

Runs the tests marked ``gpu``, counts the synchronisations of an update, and times updates (eager,
and compiled with CUDA graphs) and training on VMAS. Writes ``benchmarks/results/gpu/`` with the
device's name in each file. Without a CUDA device it says so and ends.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from pathlib import Path

import torch
import update_cost

from torchrl_happo import HAPPOLoss, HATRPOLoss

HERE = Path(__file__).parent
SIZES = ["--agents", "3", "--samples", "4000", "60000", "--hidden", "128"]
ENVIRONMENTS = ["1024", "4096", "16384", "32768"]


def synchronisations() -> dict[str, int]:
    """How often an update waits for the device, after two that warm up."""
    counts = {}
    for loss_class in (HAPPOLoss, HATRPOLoss):
        for cudagraphs in (False, True):
            team = update_cost.make_team(3, 128, discrete=False, device="cuda")
            batch = update_cost.make_batch(team[0], 4000, 3, "cuda")
            settings = {"cudagraphs": cudagraphs, "check_finite": False}
            updater = update_cost.sequential(loss_class, None, *team, updater=settings)
            for _ in range(2):
                updater(batch)
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                updater(batch)
            torch.cuda.set_sync_debug_mode("default")
            waits = sum("synchronizing" in str(warning.message) for warning in caught)
            counts[f"{loss_class.__name__}{', graphs' if cudagraphs else ''}"] = waits
    return counts


def run(script: str, *arguments: str) -> int:
    """Runs one of the other benchmarks on the device."""
    return subprocess.call([sys.executable, HERE / script, "--device", "cuda", *arguments])


def main() -> int:
    """The command line; returns its exit code."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    if not torch.cuda.is_available():
        print("There is no CUDA device here: nothing was run.")
        return 1
    results = HERE / "results" / "gpu"
    results.mkdir(parents=True, exist_ok=True)
    tests = subprocess.call(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", HERE.parent / "tests"]
    )
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    about |= {"tests_passed": tests == 0, "synchronisations": synchronisations()}
    print(json.dumps(about, indent=1))
    (results / "about.json").write_text(json.dumps(about, indent=1))
    codes = [
        tests,
        run("update_cost.py", *SIZES, "--json", str(results / "update_cost.json")),
        run(
            *("throughput.py", "--num-envs", *ENVIRONMENTS, "--minibatch", "100000"),
            *("--repetitions", "3", "--json", str(results / "throughput.json")),
        ),
    ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
