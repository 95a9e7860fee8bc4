"""Learning benchmarks: run a suite, and draw what came out.

    python benchmarks/learning.py run vmas              # what is finished is not run again
    python benchmarks/learning.py run vmas --algorithms happo --tasks vmas/balance --seeds 0
    python benchmarks/learning.py report vmas           # table and figure from the committed CSV

A run is one call of the recipe (its command is logged); its folder lies under
``benchmarks/runs``, which git ignores. When it has ended, its evaluations are added to
``benchmarks/results/<suite>.csv``, which is committed. The report shows the mean of the seeds'
final evaluations with the standard error over the seeds, and curves of the interquartile mean over
all seeds with 95 % bootstrap confidence intervals (stratified by task: each task has its own axes).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import logging
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import numpy as np
from scipy import stats

logger = logging.getLogger("learning")

HERE = Path(__file__).parent
COLUMNS = ["suite", "task", "algorithm", "seed", "frames", "return", "return_stderr", "episodes"]


@dataclass(frozen=True)
class Suite:
    """What is run, with which settings beyond the recipe's defaults.

    ``tasks`` maps the name that a task has in the results to the words that select it.
    """

    tasks: dict[str, list[str]]
    algorithms: dict[str, list[str]]
    overrides: list[str] = field(default_factory=list)
    seeds: tuple[int, ...] = (0, 1, 2)


ALGORITHMS = {
    "happo": ["algorithm=happo"],
    "hatrpo": ["algorithm=hatrpo"],
    "mappo": ["algorithm=mappo", "algorithm.share_params=true"],
    "mappo-unshared": ["algorithm=mappo", "algorithm.share_params=false"],
}
SUITES = {
    "vmas": Suite(
        tasks={
            f"vmas/{name}": [f"task=vmas/{name}"]
            for name in ("balance", "navigation", "sampling", "wheel", "dispersion")
        },
        algorithms=ALGORITHMS,
        overrides=["total_frames=600000", "render=false", "progress=false"],
    ),
    "speaker_listener": Suite(
        tasks={
            "vmas/simple_speaker_listener": ["task=vmas/simple_speaker_listener"],
            "pettingzoo/simple_speaker_listener": ["task=pettingzoo/simple_speaker_listener"],
            "pettingzoo/simple_speaker_listener_discrete": [
                *("task=pettingzoo/simple_speaker_listener", "task.continuous_actions=false")
            ],
        },
        algorithms={
            # As for MAPPO, whose critic the recipe does not normalise.
            "happo": [*ALGORITHMS["happo"], "algorithm.value_norm=null"],
            "hatrpo": [*ALGORITHMS["hatrpo"], "algorithm.value_norm=null"],
            "mappo-unshared": ALGORITHMS["mappo-unshared"],
        },
        overrides=["total_frames=600000", "render=false", "progress=false"],
    ),
}


def command(suite: Suite, task: str, algorithm: str, seed: int, folder: Path) -> list[str]:
    """The recipe's command line for one run."""
    return [
        *(sys.executable, "-m", "torchrl_happo.train", *suite.tasks[task], f"seed={seed}"),
        *suite.algorithms[algorithm],
        *suite.overrides,
        f"hydra.run.dir={folder}",
    ]


def run(name: str, tasks: list[str], algorithms: list[str], seeds: list[int]) -> None:
    """Runs what is not in the suite's results yet, one after the other."""
    suite = SUITES[name]
    for seed, task, algorithm in itertools.product(seeds, tasks, algorithms):
        folder = HERE / "runs" / task / algorithm / f"seed_{seed}"
        if _is_recorded(name, task, algorithm, seed):
            continue
        line = command(suite, task, algorithm, seed, folder)
        logger.info("%s", " ".join(["python", *line[1:]]))
        if not (folder / "curve.png").exists():
            subprocess.run(line, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        record(name, task, algorithm, seed, folder)


def record(name: str, task: str, algorithm: str, seed: int, folder: Path) -> None:
    """Adds the evaluations of a finished run to the suite's results."""
    path = HERE / "results" / f"{name}.csv"
    rows = _read(path)
    with (folder / "evaluation.csv").open() as file:
        for row in csv.DictReader(file):
            known = {"suite": name, "task": task, "algorithm": algorithm, "seed": seed}
            rows.append({**{column: row.get(column, "") for column in COLUMNS}, **known})
    rows.sort(key=lambda r: (r["task"], r["algorithm"], int(r["seed"]), int(r["frames"])))
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def _is_recorded(name: str, task: str, algorithm: str, seed: int) -> bool:
    wanted = (task, algorithm, str(seed))
    rows = _read(HERE / "results" / f"{name}.csv")
    return any((r["task"], r["algorithm"], r["seed"]) == wanted for r in rows)


Curves = dict[str, dict[str, dict[int, np.ndarray]]]


def _curves(name: str) -> Curves:
    """``[task][algorithm][seed]``: frames, returns and standard errors as columns."""
    curves: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for r in _read(HERE / "results" / f"{name}.csv"):
        numbers = [float(r["frames"]), float(r["return"]), float(r["return_stderr"])]
        curves[r["task"]][r["algorithm"]][int(r["seed"])].append(numbers)
    return {
        task: {
            algorithm: {seed: np.array(rows) for seed, rows in seeds.items()}
            for algorithm, seeds in algorithms.items()
        }
        for task, algorithms in curves.items()
    }


def table(name: str) -> str:
    """Final evaluations as a Markdown table: mean of the seeds, its standard error, each seed."""
    curves = _curves(name)
    algorithms = [a for a in SUITES[name].algorithms if any(a in c for c in curves.values())]
    lines = ["| task | " + " | ".join(algorithms) + " |", "|---" * (len(algorithms) + 1) + "|"]
    for task in SUITES[name].tasks:
        cells = []
        for algorithm in algorithms:
            seeds = curves.get(task, {}).get(algorithm, {})
            finals = np.array([rows[-1, 1] for rows in seeds.values()])
            if not len(finals):
                cells.append("-")
                continue
            if len(finals) > 1:
                error = finals.std(ddof=1) / np.sqrt(len(finals))
            else:
                error = next(iter(seeds.values()))[-1, 2]
            each = ", ".join(f"{value:.3g}" for value in finals)
            cells.append(f"{finals.mean():.3g} ± {error:.2g} ({each})")
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(name: str) -> Path:
    """Curves of all tasks, one pair of axes each."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    curves = _curves(name)
    tasks = [task for task in SUITES[name].tasks if task in curves]
    fig, axes = plt.subplots(1, len(tasks), figsize=(3.1 * len(tasks), 3.0), squeeze=False)
    colors = {a: f"C{i}" for i, a in enumerate(SUITES[name].algorithms)}
    for ax, task in zip(axes[0], tasks, strict=True):
        for algorithm, seeds in curves[task].items():
            length = min(len(rows) for rows in seeds.values())
            frames = next(iter(seeds.values()))[:length, 0] / 1000
            returns = np.stack([rows[:length, 1] for rows in seeds.values()])
            middle, low, high = _interquartile_mean(returns)
            label = f"{algorithm} ({len(returns)} seed{'s' if len(returns) > 1 else ''})"
            ax.plot(frames, middle, color=colors[algorithm], label=label, lw=1.5)
            ax.fill_between(frames, low, high, color=colors[algorithm], alpha=0.2, lw=0)
        ax.set_title(task, fontsize=10)
        ax.set_xlabel("environment steps (thousands)", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("team return, deterministic", fontsize=8)
    labelled = {
        label: handle
        for ax in axes[0]
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    handles, labels = list(labelled.values()), list(labelled)
    fig.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=8, frameon=False)
    fig.tight_layout(rect=(0, 0.07, 1, 1))
    path = HERE / "results" / f"{name}.png"
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path


def _interquartile_mean(returns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Interquartile mean over the seeds (rows) and its 95 % bootstrap confidence interval."""

    def iqm(x: np.ndarray, axis: int = -1) -> np.ndarray:
        return stats.trim_mean(x, 0.25, axis=axis)

    middle = iqm(returns, axis=0)
    if len(returns) < 2:
        return middle, middle, middle
    generator = np.random.default_rng(0)
    draws = generator.integers(len(returns), size=(2000, len(returns)))
    low, high = np.quantile(iqm(returns[draws], axis=1), [0.025, 0.975], axis=0)
    return middle, low, high


def main() -> None:
    """The command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("action", choices=["run", "report"])
    parser.add_argument("suite", choices=list(SUITES))
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--algorithms", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int)
    args = parser.parse_args()
    suite = SUITES[args.suite]
    if args.action == "run":
        run(
            args.suite,
            args.tasks or list(suite.tasks),
            args.algorithms or list(suite.algorithms),
            args.seeds or list(suite.seeds),
        )
    logger.info("%s\n\n%s", table(args.suite), figure(args.suite))


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the module's docstring."""


if __name__ == "__main__":
    main()
