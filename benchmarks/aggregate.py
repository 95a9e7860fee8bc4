"""Aggregate a suite over all of its tasks, and write its results in the format of marl-eval.

    python benchmarks/aggregate.py vmas
    python benchmarks/aggregate.py vmas --marl-eval benchmarks/results/vmas.json

Returns are the last evaluations that all algorithms of a task have in common. On each task they are
scaled so that the untrained policies are at 0 and the best seed of any algorithm is at 1. The table
shows, for the tasks that all algorithms were run on, the interquartile mean over tasks and seeds
with its 95 % interval, by a bootstrap that draws seeds anew within each task, and the probability
that a seed of an algorithm ends above one of HAPPO, averaged over the tasks (both after Agarwal et
al., 2021, https://arxiv.org/abs/2108.13264).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from learning import runs_of
from scipy import stats
from suites import SUITES

from torchrl_happo.recipe.report import Run, common_frames

RESAMPLES = 2000
REFERENCE = "happo"
#: By algorithm: an array of scores a task, one value a seed.
Scores = dict[str, list[np.ndarray]]


def scores_of(runs: Sequence[Run], algorithms: Sequence[str]) -> tuple[list[str], Scores]:
    """Return the tasks that all algorithms were run on, and their scaled last returns."""
    labels = {task: {run.label for run in runs if run.task == task} for task in _tasks(runs)}
    tasks = [task for task, known in labels.items() if known >= set(algorithms)]
    scores: Scores = {algorithm: [] for algorithm in algorithms}
    for task in tasks:
        own = [run for run in runs if run.task == task and run.label in algorithms]
        frames = common_frames(own)
        ends = frames[0], frames[-1]
        first, last = (np.array([run.at(end)["return"] for run in own]) for end in ends)
        scaled = (last - first.mean()) / (last.max() - first.mean())
        for algorithm in algorithms:
            scores[algorithm].append(scaled[[run.label == algorithm for run in own]])
    return tasks, scores


def interquartile_mean(
    tasks: Sequence[np.ndarray], generator: np.random.Generator
) -> tuple[float, float, float]:
    """Return the mean of the middle half of all values, and a 95 % interval of it."""
    drawn = [generator.choice(values, (RESAMPLES, len(values))) for values in tasks]
    resampled = stats.trim_mean(np.concatenate(drawn, 1), 0.25, axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(stats.trim_mean(np.concatenate(tasks), 0.25)), float(low), float(high)


def probability_above(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """Return how likely a seed of one is above a seed of the other; ties count half."""
    pairs = [np.sign(a[:, None] - b[None, :]) for a, b in zip(one, other, strict=True)]
    return float(np.mean([(1 + signs.mean()) / 2 for signs in pairs]))


def table(suite: str, algorithms: Sequence[str]) -> str:
    """Return the table of a suite in Markdown."""
    tasks, scores = scores_of(runs_of(suite), algorithms)
    if not tasks:
        return f"No task of {suite} has runs of all of {', '.join(algorithms)}."
    generator = np.random.default_rng(0)
    rows = [
        f"Over {len(tasks)} tasks: {', '.join(tasks)}",
        "",
        "| algorithm | IQM | 95 % interval | probability to end above HAPPO |",
        "|---|---|---|---|",
    ]
    for algorithm, by_task in scores.items():
        middle, low, high = interquartile_mean(by_task, generator)
        above = probability_above(by_task, scores[REFERENCE])
        shown = "-" if algorithm == REFERENCE else f"{above:.2f}"
        rows.append(f"| {algorithm} | {middle:.2f} | {low:.2f} to {high:.2f} | {shown} |")
    return "\n".join(rows)


def marl_eval(runs: Sequence[Run]) -> dict:
    """Return runs as marl-eval reads them (https://github.com/instadeepai/marl-eval).

    Each evaluation is one number, the mean over its episodes; the absolute metric is the last one.
    """
    data: dict = {}
    for run in runs:
        environment, _, name = run.task.rpartition("/")
        tasks = data.setdefault(environment or "all", {})
        seeds = tasks.setdefault(name, {}).setdefault(run.label, {})
        steps = {
            f"step_{index}": {"step_count": int(row["frames"]), "return": [row["return"]]}
            for index, row in enumerate(run.rows)
        }
        absolute = {"absolute_metrics": {"return": [run.rows[-1]["return"]]}}
        seeds[f"seed_{run.seed}"] = {**steps, **absolute}
    return data


def _tasks(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run.task for run in runs))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("suite", choices=list(SUITES))
    parser.add_argument("--algorithms", nargs="+", default=[REFERENCE, "hatrpo", "mappo"])
    parser.add_argument("--marl-eval", type=Path, help="JSON file to write")
    options = parser.parse_args()
    print(table(options.suite, options.algorithms))
    if options.marl_eval:
        options.marl_eval.write_text(json.dumps(marl_eval(runs_of(options.suite))) + "\n")


if __name__ == "__main__":
    main()
