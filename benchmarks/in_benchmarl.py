"""HAPPO and HATRPO against BenchMARL's own MAPPO, in BenchMARL's Experiment, with its settings.

    python benchmarks/in_benchmarl.py run           # what is finished is not run again
    python benchmarks/in_benchmarl.py run --tasks balance --algorithms happo --seeds 0
    python benchmarks/in_benchmarl.py report        # table from the committed CSV

Needs ``pip install 'torchrl_happo[benchmarl]'``, and with it TorchRL below 0.12. Settings of
experiment, task, networks and MAPPO are BenchMARL's defaults, but for 300 thousand frames, and an
evaluation of 100 episodes every 60 thousand. MAPPO runs as it is, with one network for all agents,
and unshared, which is the fair opponent. Each run adds its evaluations, the mean returns of the
deterministic policy, to ``benchmarks/runs/benchmarl/returns.csv``; copied to
``benchmarks/results/benchmarl.csv`` they are what ``report`` shows where there are no runs.

A run of HAPPO or MAPPO on balance takes about 45 minutes of a core: training by BenchMARL's 45
epochs took 41 s and 39 s of CPU time in one iteration of 6000 frames, of which there are 50.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarl.algorithms import MappoConfig
from benchmarl.environments import VmasTask
from benchmarl.experiment import Experiment, ExperimentConfig
from benchmarl.models import MlpConfig

from torchrl_happo.benchmarl import HappoConfig, HatrpoConfig

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "benchmarl.csv"
COLUMNS = ["task", "algorithm", "seed", "frames", "return", "seconds"]
TASKS = {
    "balance": VmasTask.BALANCE,
    "navigation": VmasTask.NAVIGATION,
    "sampling": VmasTask.SAMPLING,
}
ALGORITHMS = {
    "mappo": (MappoConfig.get_from_yaml, True),
    "mappo_unshared": (MappoConfig.get_from_yaml, False),
    "happo": (HappoConfig, False),
    "hatrpo": (HatrpoConfig, False),
}
FRAMES, INTERVAL = 300_000, 60_000


def run(task: str, algorithm: str, seed: int, frames: int, folder: Path) -> None:
    """Train once, and add the returns of all evaluations to the results."""
    make, shared = ALGORITHMS[algorithm]
    config = ExperimentConfig.get_from_yaml()
    config.share_policy_params = shared
    config.max_n_frames = frames
    # A rehearsal is shorter than a batch.
    batch = min(config.on_policy_collected_frames_per_batch, frames)
    config.on_policy_collected_frames_per_batch = batch
    config.on_policy_minibatch_size = min(config.on_policy_minibatch_size, batch)
    config.evaluation_interval = min(INTERVAL, batch * (frames // batch))
    config.evaluation_episodes = 100
    config.render = False
    config.loggers = []
    config.create_json = True
    config.save_folder = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    experiment = Experiment(
        TASKS[task].get_from_yaml(), make(), MlpConfig.get_from_yaml(), seed=seed, config=config
    )
    experiment.run()
    seconds = time.perf_counter() - start
    (report,) = Path(experiment.folder_name).rglob("*.json")
    rows = [
        {
            "task": task,
            "algorithm": algorithm,
            "seed": seed,
            "frames": frames_seen,
            "return": f"{np.mean(values):.4f}",
            "seconds": f"{seconds:.0f}",
        }
        for frames_seen, values in _returns(json.loads(report.read_text()))
    ]
    with (folder / "returns.csv").open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def _returns(report: Any) -> list[tuple[int, list[float]]]:
    """Return frames and returns of each evaluation in a JSON file of BenchMARL."""
    for _ in ("environment", "task", "algorithm", "seed"):
        (report,) = report.values()
    steps = [value for name, value in report.items() if name.startswith("step_")]
    return [(step["step_count"], step["return"]) for step in steps]


def report(path: Path) -> None:
    """Print the mean of the last evaluations, with the standard error over the seeds."""
    last: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    with path.open() as file:
        for row in csv.DictReader(file):  # a later row is a later evaluation
            last[row["task"], row["algorithm"]][int(row["seed"])] = float(row["return"])
    print("| task | " + " | ".join(ALGORITHMS) + " |\n" + "|---" * (len(ALGORITHMS) + 1) + "|")
    for task in TASKS:
        cells = []
        for algorithm in ALGORITHMS:
            values = list(last[task, algorithm].values())
            error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
            cells.append(f"{np.mean(values):.2f} ± {error:.2f}" if values else "")
        print(f"| {task} | " + " | ".join(cells) + " |")


def main() -> None:
    """Run what is asked for, or report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--folder", type=Path, default=HERE / "runs" / "benchmarl")
    args = parser.parse_args()
    own = args.folder / "returns.csv"
    if args.command == "report":
        report(own if own.exists() else RESULTS)
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for seed in args.seeds:
        for task in args.tasks:
            for algorithm in args.algorithms:
                words = f"{task},{algorithm},{seed},"
                if own.exists() and words in own.read_text():
                    continue
                run(task, algorithm, seed, args.frames, args.folder)


if __name__ == "__main__":
    main()
