"""Everything that needs a CUDA device, in one command that is worth something if it is cut short.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --tiny --results DIR     (a rehearsal)

Stages in order of worth, each in a process of its own with a limit in seconds:

1. ``tests``: the tests marked ``gpu``;
2. ``updates``: HAPPO and HATRPO eager, compiled, from CUDA graphs, and both, and TorchRL's MAPPO;
   3 and 10 agents, 4000 and 60000 samples; and how often an update waits for the device;
3. ``training``: frames per second of collecting and of training on VMAS against TorchRL's MAPPO and
   the raw simulator (``throughput.py``), each task and number of environments by itself;
4. ``learning``: the return of HAPPO on VMAS navigation by the clock.

Results are written as they come, to ``gpu.json`` with the device's name, and a table is printed at
the end. Without a CUDA device the command says so and ends.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
LIMITS = {"tests": 180, "updates": 300, "training": 240, "learning": 120}
OPTIONS = {
    "eager": {},
    "compiled": {"compile": True},
    "graphs": {"cudagraphs": True},
    "both": {"compile": True, "cudagraphs": True},
}


def run(command: list[Any], limit: float) -> str:
    """Run a command, and end it with all that it has started when its time is over."""
    process = subprocess.Popen(list(map(str, command)), start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "out of time"
    return "whole" if code == 0 else f"exit code {code}"


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize()


def waits(update: Callable[[], object], device: str) -> int | None:
    """Count how often an update waits for the device."""
    if device == "cpu":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        update()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def updates(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time updates, cell by cell and contestant by contestant."""
    import update_cost  # takes seconds, which the other stages need not wait

    from torchrl_happo import HAPPOLoss, HATRPOLoss

    for n_agents, samples in [(2, 40)] if args.tiny else [(3, 4000), (10, 4000), (3, 60_000)]:
        team = partial(update_cost.make_team, n_agents, 128, False, args.device)
        batch = update_cost.make_batch(team()[0], samples, n_agents, args.device)
        contestants = {"mappo": update_cost.mappo(batch, None, *team())}
        for loss_class in (HAPPOLoss, HATRPOLoss):
            for name, options in list(OPTIONS.items())[: 1 if args.tiny else None]:
                settings = {"check_finite": False, **options}
                updater = update_cost.sequential(loss_class, None, *team(), updater=settings)
                contestants[f"{loss_class.__name__[:-4].lower()} {name}"] = partial(updater, batch)
        for name, update in contestants.items():
            start = time.perf_counter()
            for _ in range(4):
                update()
            synchronize(args.device)
            row = {"agents": n_agents, "samples": samples, "contestant": name}
            row |= {"first": time.perf_counter() - start, "waits": waits(update, args.device)}
            times = []
            for _ in range(2 if args.tiny else 15):
                start = time.perf_counter()
                update()
                synchronize(args.device)
                times.append(1e3 * (time.perf_counter() - start))
            yield {**row, "ms": statistics.median(times)}


def training(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time collecting and training, by ``throughput.py``."""
    sizes = [2] if args.tiny else [1024, 8192, 32_768]
    for num_envs in sizes:
        for task in ["vmas/navigation"] if args.tiny else ["vmas/navigation", "vmas/balance"]:
            path = args.results / "throughput.json"
            command = ["--task", task, "--num-envs", num_envs, "--device", args.device]
            command += ["--json", path, "--minibatch", 16 if args.tiny else 100_000]
            command += ["--repetitions", 1 if args.tiny else 3, "--steps", 8 if args.tiny else 100]
            command += ["--learners", "mappo-unshared", "happo"]
            command += ["--epochs", "1"] if args.tiny else []
            script = HERE / "throughput.py"
            code = subprocess.call([sys.executable, script, *map(str, command)])
            row = {"task": task, "environments": num_envs, "code": code}
            yield {**row, "result": json.loads(path.read_text()) if code == 0 else None}


def learning(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train by the clock, and report the curve as far as it got."""
    folder = args.results / "learning"
    settings = [f"device={args.device}", f"hydra.run.dir={folder}", "task=vmas/navigation"]
    settings += ["algorithm=happo", "progress=false", "render=false"]
    size = {"num_envs": 2, "steps_per_batch": 8, "evaluation.episodes": 2, "total_frames": 32}
    size |= {"algorithm.minibatch_size": 16}
    size = size if args.tiny else {"num_envs": 1024, "total_frames": 1_000_000_000}
    settings += [f"{key}={value}" for key, value in size.items()]
    ended = run([sys.executable, "-m", "torchrl_happo.train", *settings], args.limit - 20)
    if ended.startswith("exit"):
        raise RuntimeError(f"the training ended with {ended}")
    for path in sorted(folder.rglob("*.csv")):
        with path.open() as file:
            yield {"file": path.name, "ended": ended, "rows": list(csv.DictReader(file))}


def tests(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run the tests that need a device."""
    chosen = HERE.parent / "tests" / "test_gpu.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", chosen]
    run = subprocess.run([*command, "-rf"], capture_output=True, text=True, check=False)
    yield {"code": run.returncode, "tail": run.stdout.splitlines()[-40:]}


STAGES = {"tests": tests, "updates": updates, "training": training, "learning": learning}


def write(path: Path, value: object) -> None:
    """Replace a file by JSON at once."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(value, indent=1) + "\n")
    draft.replace(path)


def run_stage(args: argparse.Namespace) -> None:
    """Run one stage in this process; its rows are in its file as soon as they are known."""
    rows: list[dict[str, Any]] = []
    for row in STAGES[args.stage](args):
        rows.append(row)
        write(args.results / f"{args.stage}.json", rows)


def report(results: dict[str, Any]) -> None:
    """Print what there is."""
    print(f"\n{results['about']}")
    for name, stage in results["stages"].items():
        print(f"{name}: {stage['seconds']:.0f} s, {stage['ended']}, {len(stage['rows'])} rows")
    print("| agents | samples | contestant | ms | waits | first calls |\n|---|---|---|---|---|---|")
    for row in results["stages"].get("updates", {"rows": []})["rows"]:
        cells = [row["agents"], row["samples"], row["contestant"], f"{row['ms']:.1f}"]
        print("| " + " | ".join(map(str, [*cells, row["waits"], f"{row['first']:.1f} s"])) + " |")


def main() -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, as a rehearsal")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "gpu")
    parser.add_argument("--only", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, help="seconds of each stage")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    if args.stage:
        run_stage(args)
        return 0
    if args.device != "cpu" and not torch.cuda.is_available():
        print("There is no CUDA device here: nothing was run.")
        return 1
    name = torch.cuda.get_device_name() if args.device != "cpu" else "cpu"
    results: dict[str, Any] = {"about": {"device": name, "torch": torch.__version__}, "stages": {}}
    write(args.results / "gpu.json", results)
    for stage in args.only:
        limit, start = args.limit or LIMITS[stage], time.perf_counter()
        command = [__file__, "--stage", stage, "--device", args.device, "--limit", str(limit)]
        command += ["--results", str(args.results), *(["--tiny"] if args.tiny else [])]
        (args.results / f"{stage}.json").unlink(missing_ok=True)
        ended = run([sys.executable, *command], limit)
        path = args.results / f"{stage}.json"
        rows = json.loads(path.read_text()) if path.exists() else []
        seconds = time.perf_counter() - start
        results["stages"][stage] = {"seconds": seconds, "ended": ended, "rows": rows}
        write(args.results / "gpu.json", results)
    report(results)
    return max(stage["ended"] != "whole" for stage in results["stages"].values())


if __name__ == "__main__":
    sys.exit(main())
