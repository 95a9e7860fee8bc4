"""Learning benchmarks: run a suite, and draw what came out.

    python benchmarks/learning.py run vmas              # what is finished is not run again
    python benchmarks/learning.py run vmas --algorithms happo --tasks vmas/balance --seeds 0
    python benchmarks/learning.py record mujoco         # also what unfinished runs have so far
    python benchmarks/learning.py report vmas           # table and figure from the committed CSV

A run is one call of the recipe (its command is logged); its folder lies under
``benchmarks/runs/<suite>``, which git ignores. When it has ended, its evaluations are added to
``benchmarks/results/<suite>.csv``, which is committed: the return of the deterministic policy and,
over the iterations since the evaluation before, the mean return of training episodes and the mean
seconds of collecting and of updating; where episodes can be won, the shares that are. Beside them
stand the seconds of training so far, by the clock, the revision of this repository and the
processor's name.

The report shows the mean of the seeds' evaluations at the end, or at the suite's milestones, with
the standard error over the seeds, and curves of the interquartile mean over all seeds with 95 %
bootstrap confidence intervals (stratified by task: each task has its own axes).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import logging
import os
import platform
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from scipy import stats
from suites import SUITES, Suite

from torchrl_happo.recipe.compose import compose_config
from torchrl_happo.recipe.report import Run, draw, table

logger = logging.getLogger("learning")

HERE = Path(__file__).parent
COLUMNS = ["suite", "task", "algorithm", "seed", "frames", "return", "return_stderr", "episodes"]
#: Where episodes can be won: the shares that are, in evaluation and in training.
WON = ("win_rate", "training_win_rate")
TRAINING = {
    "training_return": "return",
    "training_win_rate": "win_rate",
    "collect_seconds": "collect_seconds",
    "update_seconds": "update_seconds",
}
ORIGIN = ("revision", "processor")
#: Of tasks with a cost: an episode's, and the share of episodes within the bound, at an evaluation;
#: the share of training batches since the one before whose episodes cost more than the bound.
COSTS = ("cost", "within_limit", "batches_above")
MEASURES = {
    "return": "team return, deterministic",
    "win_rate": "share of episodes won, deterministic",
}


def command(suite: Suite, task: str, algorithm: str, seed: int, folder: Path) -> list[str]:
    """The recipe's command line for one run."""
    return [
        *(sys.executable, "-m", "torchrl_happo.train", *suite.overrides),
        *(*suite.tasks[task], f"seed={seed}", *suite.algorithms[algorithm]),
        f"hydra.run.dir={folder}",
    ]


def run(name: str, tasks: list[str], algorithms: list[str], seeds: list[int], runs: Path) -> None:
    """Runs what is not in the suite's results yet, one after the other."""
    suite = SUITES[name]
    for seed, task, algorithm in itertools.product(seeds, tasks, algorithms):
        folder = _folder(runs, name, task, algorithm, seed)
        if _is_recorded(name, task, algorithm, seed):
            continue
        line = command(suite, task, algorithm, seed, folder)
        logger.info("%s", " ".join(["python", *line[1:]]))
        if not (folder / "curve.png").exists():
            if any(folder.glob("checkpoints/*.pt")):  # it was interrupted
                line.append(f"resume={folder}")
            write_origin(folder)
            subprocess.run(line, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        record(name, task, algorithm, seed, folder)


def write_origin(folder: Path) -> None:
    """Write the revision and the processor of a run into its folder, which may not exist yet.

    A run that is resumed lists all its revisions.
    """
    describe = ["git", "describe", "--always", "--dirty"]
    revision = subprocess.run(describe, cwd=HERE, check=True, capture_output=True, text=True)
    folder.mkdir(parents=True, exist_ok=True)
    before = read_origin(folder)["revision"].split()
    revisions = dict.fromkeys([*before, revision.stdout.strip()])
    origin = {"revision": " ".join(revisions), "processor": processor()}
    (folder / "origin.json").write_text(json.dumps(origin))


def read_origin(folder: Path) -> dict[str, str]:
    """Return what :func:`write_origin` wrote, and empty words where it did not."""
    path = folder / "origin.json"
    return json.loads(path.read_text()) if path.exists() else dict.fromkeys(ORIGIN, "")


def processor() -> str:
    """Return the processor's name, which Linux tells in a file only."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def record_all(
    name: str, tasks: list[str], algorithms: list[str], seeds: list[int], runs: Path
) -> None:
    """Puts what all runs have so far into the suite's results."""
    for task, algorithm, seed in itertools.product(tasks, algorithms, seeds):
        folder = _folder(runs, name, task, algorithm, seed)
        if (folder / "evaluation.csv").exists():
            record(name, task, algorithm, seed, folder)


def _folder(runs: Path, name: str, task: str, algorithm: str, seed: int) -> Path:
    """Where a run lies: suites may share a task, with other settings."""
    return runs / name / task / algorithm / f"seed_{seed}"


def record(name: str, task: str, algorithm: str, seed: int, folder: Path) -> None:
    """Puts the evaluations of a run into the suite's results, in place of earlier ones."""
    path = HERE / "results" / f"{name}.csv"
    known = {"suite": name, "task": task, "algorithm": algorithm, "seed": str(seed)}
    rows = [row for row in _read(path) if any(row[k] != v for k, v in known.items())]
    training = _read(folder / "metrics.csv")
    before, origin = 0.0, read_origin(folder)
    for row in _read(folder / "evaluation.csv"):
        after = float(row["frames"])
        since = [r for r in training if before < float(r["frames"]) <= after]
        means = {column: _mean(since, source) for column, source in TRAINING.items()}
        own = {column: row.get(column, "") for column in (*COLUMNS, WON[0])}
        if (limit := SUITES[name].cost_limits.get(task)) is not None:
            costs = [float(r["cost"]) for r in since if r["cost"] not in ("", "nan")]
            above = f"{np.mean([cost > limit for cost in costs]):.3g}" if costs else ""
            own |= {"cost": row["cost"], "within_limit": row.get("within_limit", "")}
            own["batches_above"] = above
        seconds = f"{float(row['seconds']):.1f}"
        rows.append({**own, **means, "seconds": seconds, **origin, **known})
        before = after
    rows.sort(key=lambda r: (r["task"], r["algorithm"], int(r["seed"]), int(r["frames"])))
    path.parent.mkdir(exist_ok=True)
    costs = COSTS if SUITES[name].cost_limits else ()
    columns = [*COLUMNS, *costs, *TRAINING, "seconds", *ORIGIN, WON[0]]
    if not any(row.get(WON[0]) for row in rows):
        columns = [column for column in columns if column not in WON]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, columns, restval="", extrasaction="ignore", lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)


def _read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def _mean(rows: list[dict], column: str) -> str:
    """Of what is there; training returns are only where an episode has ended."""
    values = [float(row[column]) for row in rows if row.get(column, "") not in ("", "nan")]
    return f"{np.mean(values):.5g}" if values else ""


def _is_recorded(name: str, task: str, algorithm: str, seed: int) -> bool:
    """Whether the results have all of a run, to its last evaluation."""
    suite = SUITES[name]
    config = compose_config(*suite.overrides, *suite.tasks[task], *suite.algorithms[algorithm])
    wanted = (task, algorithm, str(seed), str(config.iterations * config.frames_per_batch))
    rows = _read(HERE / "results" / f"{name}.csv")
    return any((r["task"], r["algorithm"], r["seed"], r["frames"]) == wanted for r in rows)


def runs_of(name: str) -> list[Run]:
    """The runs whose evaluations are in a suite's results, by what the suite measures."""
    rows: dict = defaultdict(list)
    for r in _read(HERE / "results" / f"{name}.csv"):
        value, error = float(r["return"]), float(r["return_stderr"])
        if SUITES[name].measure == "win_rate":
            value = float(r["win_rate"])
            error = (value * (1 - value) / float(r["episodes"])) ** 0.5
        numbers = {"frames": float(r["frames"]), "return": value, "return_stderr": error}
        rows[r["task"], r["algorithm"], int(r["seed"])].append(numbers)
    return [Run(*key, of_run) for key, of_run in rows.items()]


def report(name: str) -> str:
    """Draws the suite's curves; returns its table and where the curves are."""
    suite, runs = SUITES[name], runs_of(name)
    for other in suite.beside:
        runs += [
            run
            for run in runs_of(other)
            if run.task in suite.tasks and run.label in suite.algorithms
        ]
    layout = {"tasks": list(suite.tasks), "labels": list(suite.algorithms)}
    path = HERE / "results" / f"{name}.png"
    draw(
        runs,
        path,
        **layout,
        band=_interquartile_mean,
        ylabel=MEASURES[suite.measure],
        reference=suite.reference,
    )
    lines = table(runs, **layout, milestones=suite.milestones, reference=suite.reference)
    return "\n\n".join([lines, *([cost_table(name)] if suite.cost_limits else []), str(path)])


def cost_table(name: str) -> str:
    """Write what the last evaluations of a suite cost, and how often training did more."""
    suite, rows = SUITES[name], _read(HERE / "results" / f"{name}.csv")
    lines = [
        "| task (bound) | algorithm | return | cost of an episode | episodes within the bound "
        "| training batches above it |",
        "|" + "---|" * 6,
    ]
    for (task, limit), algorithm in itertools.product(suite.cost_limits.items(), suite.algorithms):
        own = [row for row in rows if (row["task"], row["algorithm"]) == (task, algorithm)]
        of_seeds = [
            [row for row in own if row["seed"] == seed] for seed in {r["seed"] for r in own}
        ]
        if not of_seeds:
            continue
        ends = [max(of_seed, key=lambda row: int(row["frames"])) for of_seed in of_seeds]
        means = [
            _mean(ends, "return"),
            _mean(ends, "cost"),
            _mean(ends, "within_limit") or "-",
            _mean([row for of_seed in of_seeds for row in of_seed], "batches_above"),
        ]
        lines.append(f"| {task} ({limit:g}) | {algorithm} | " + " | ".join(means) + " |")
    return "\n".join(lines)


def _interquartile_mean(returns: Sequence[float]) -> tuple[float, float, float]:
    """Interquartile mean over the seeds and its 95 % bootstrap confidence interval."""
    iqm = partial(stats.trim_mean, proportiontocut=0.25)
    middle = float(iqm(returns))
    if len(returns) < 2:
        return middle, middle, middle
    low, high = stats.bootstrap(
        (returns,), iqm, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return middle, float(low), float(high)


def main() -> None:
    """The command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("action", choices=["run", "record", "report"])
    parser.add_argument("suite", choices=list(SUITES))
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--algorithms", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--runs", type=Path, default=HERE / "runs", help="where the runs lie")
    args = parser.parse_args()
    suite = SUITES[args.suite]
    for option in ("tasks", "algorithms"):
        unknown = set(getattr(args, option) or ()) - set(getattr(suite, option))
        if unknown:
            known = ", ".join(getattr(suite, option))
            parser.error(f"the suite has no {option} {sorted(unknown)}; it has {known}")
    if args.action != "report":
        make = run if args.action == "run" else record_all
        make(
            args.suite,
            args.tasks or list(suite.tasks),
            args.algorithms or list(suite.algorithms),
            args.seeds or list(suite.seeds),
            args.runs,
        )
    logger.info("%s", report(args.suite))


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the module's docstring."""


if __name__ == "__main__":
    main()
