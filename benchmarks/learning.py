"""Learning benchmarks: run a suite, and draw what came out.

    python benchmarks/learning.py run vmas              # what is finished is not run again
    python benchmarks/learning.py run vmas --algorithms happo --tasks vmas/balance --seeds 0
    python benchmarks/learning.py record mujoco         # also what unfinished runs have so far
    python benchmarks/learning.py report vmas           # table and figure from the committed CSV

A run is one call of the recipe (its command is logged); its folder lies under
``benchmarks/runs/<suite>``, which git ignores. When it has ended, its evaluations are added to
``benchmarks/results/<suite>.csv``, which is committed: the return of the deterministic policy and,
over the iterations since the evaluation before, the mean return of training episodes and the mean
seconds of collecting and of updating. The report shows the mean of the seeds' evaluations at the
end, or at the suite's milestones, with the standard error over the seeds, and curves of the
interquartile mean over all seeds with 95 % bootstrap confidence intervals (stratified by task: each
task has its own axes).
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from scipy import stats

from torchrl_happo.recipe.compose import compose_config
from torchrl_happo.recipe.report import Run, draw, table

logger = logging.getLogger("learning")

HERE = Path(__file__).parent
COLUMNS = ["suite", "task", "algorithm", "seed", "frames", "return", "return_stderr", "episodes"]
TRAINING = {
    "training_return": "return",
    "collect_seconds": "collect_seconds",
    "update_seconds": "update_seconds",
}


@dataclass(frozen=True)
class Suite:
    """What is run, with which settings beyond the recipe's defaults.

    ``tasks`` maps the name that a task has in the results to the words that select it. The table
    shows evaluations after ``milestones`` environment steps, or the last ones, and beside them the
    ``reference``: what its own code reached, by task, algorithm and milestone, one value a seed.
    """

    tasks: dict[str, list[str]]
    algorithms: dict[str, list[str]]
    overrides: list[str] = field(default_factory=list)
    seeds: tuple[int, ...] = (0, 1, 2)
    milestones: tuple[int, ...] = ()
    reference: dict[tuple[str, str, int], list[float]] = field(default_factory=dict)


ALGORITHMS = {
    "happo": ["algorithm=happo"],
    "hatrpo": ["algorithm=hatrpo"],
    "mappo": ["algorithm=mappo", "algorithm.share_params=true"],
    "mappo-unshared": ["algorithm=mappo", "algorithm.share_params=false"],
    "ippo": ["algorithm=ippo", "algorithm.share_params=true"],
}
COMPILED = {
    **ALGORITHMS,
    **{name: [*ALGORITHMS[name], "algorithm.compile=true"] for name in ("happo", "hatrpo")},
}
# At a checkpoint the environments begin anew: how often that is belongs to the command of a run.
SELDOM = ["progress=false", "collector.restart_interval=50"]
CHEETAH = "mujoco/halfcheetah_2x3"
SPEAKING = ["task=pettingzoo/simple_reference", "task.continuous_actions=false"]
SUITES = {
    "vmas": Suite(
        tasks={
            f"vmas/{name}": [f"task=vmas/{name}"]
            for name in ("balance", "navigation", "sampling", "wheel", "dispersion")
        },
        algorithms=ALGORITHMS,
        overrides=["total_frames=600000", "render=false", *SELDOM],
    ),
    "mujoco": Suite(
        tasks={
            CHEETAH: [f"task={CHEETAH}", "total_frames=2000000"],
            "mujoco/ant_4x2": ["task=mujoco/ant_4x2", "total_frames=1000000"],
            "mujoco/walker2d_2x3": ["task=mujoco/walker2d_2x3", "total_frames=1000000"],
        },
        algorithms={name: COMPILED[name] for name in ("happo", "hatrpo", "mappo-unshared")},
        overrides=SELDOM,
        milestones=(500_000, 1_000_000, 2_000_000),
        # HARL on EnvPool's -v4 tasks, with its tuned settings: means of 40 episodes.
        reference={
            (CHEETAH, "happo", 500_000): [1260, 1070, 1710, 1568, 1299, 1275, 1600, 1499],
            (CHEETAH, "happo", 1_000_000): [2500, 2040, 2360, 2538, 2415, 2403, 2326, 2407],
            (CHEETAH, "happo", 2_000_000): [4150, 4270, 4346, 4402, 3709, 3851, 3933],
            (CHEETAH, "hatrpo", 500_000): [1050, 570, 416],
            (CHEETAH, "hatrpo", 1_000_000): [1650, 1270, 591],
            (CHEETAH, "mappo-unshared", 500_000): [1560],
            (CHEETAH, "mappo-unshared", 1_000_000): [2270],
            ("mujoco/walker2d_2x3", "happo", 500_000): [704, 265],
            ("mujoco/walker2d_2x3", "happo", 1_000_000): [1618, 649],
        },
    ),
    # More and more agents on one robot; MAPPO with one network for all, as in the papers.
    "many_agents": Suite(
        tasks={
            f"mujoco/{name}": [f"task=mujoco/{name}", f"total_frames={frames}"]
            for name, frames in {
                "halfcheetah_2x3": 2_000_000,
                "halfcheetah_6x1": 2_000_000,
                "ant_2x4": 1_000_000,
                "ant_4x2": 1_000_000,
                "ant_8x1": 1_000_000,
            }.items()
        },
        algorithms={name: COMPILED[name] for name in ("happo", "hatrpo", "mappo")},
        overrides=SELDOM,
        milestones=(500_000, 1_000_000, 2_000_000),
    ),
    "mujoco_long": Suite(
        tasks={CHEETAH: [f"task={CHEETAH}", "total_frames=10000000"]},
        algorithms={"happo": COMPILED["happo"]},
        overrides=SELDOM,
        seeds=(0,),
        milestones=(2_000_000, 5_000_000, 10_000_000),
    ),
    "mpe2": Suite(
        tasks={
            f"pettingzoo/{name}{suffix}": [f"task=pettingzoo/{name}", *words]
            for name in ("simple_spread", "simple_reference")
            for suffix, words in (("", []), ("_discrete", ["task.continuous_actions=false"]))
        },
        algorithms={name: COMPILED[name] for name in ("happo", "hatrpo", "mappo", "ippo")},
        overrides=SELDOM,
        milestones=(500_000, 1_000_000),
    ),
    # How far HATRPO may move, where agents have to learn to speak.
    "mpe2_settings": Suite(
        tasks={
            name: [*SPEAKING, *words]
            for name, words in {
                "kl_0.01_damping_0.001": [
                    *("~tuned/task", "algorithm.max_kl=0.01", "algorithm.damping=0.001")
                ],
                "kl_0.03_damping_0.01_torch_init": [
                    *("~tuned/task", "algorithm.max_kl=0.03", "algorithm.damping=0.01"),
                    "model.actor_init=torch",
                ],
                # The task's own settings now (conf/tuned), for four times as long.
                "kl_0.02_batches_of_1000": [
                    "total_frames=4000000",
                    "checkpoint.interval=200",
                    "collector.restart_interval=200",
                ],
            }.items()
        },
        algorithms={"hatrpo": COMPILED["hatrpo"]},
        overrides=SELDOM,
        seeds=(0,),
        milestones=(500_000, 1_000_000, 2_000_000, 4_000_000),
    ),
    "speaker_listener": Suite(
        tasks={
            "pettingzoo/simple_speaker_listener": ["task=pettingzoo/simple_speaker_listener"],
            "pettingzoo/simple_speaker_listener_discrete": [
                *("task=pettingzoo/simple_speaker_listener", "task.continuous_actions=false")
            ],
            # VMAS draws one goal for all its copies: so a batch has six episodes of each, and not
            # every seed is evaluated with the same one.
            "vmas/simple_speaker_listener": [
                *("task=vmas/simple_speaker_listener", "evaluation.seed=${seed}"),
                *("num_envs=20", "steps_per_batch=600", "total_frames=600000"),
            ],
        },
        algorithms={name: ALGORITHMS[name] for name in ("happo", "mappo-unshared", "hatrpo")},
        overrides=[
            "total_frames=100000",
            "evaluation.interval=10",
            "render=false",
            "progress=false",
        ],
    ),
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
            subprocess.run(line, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        record(name, task, algorithm, seed, folder)


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
    before = 0.0
    for row in _read(folder / "evaluation.csv"):
        after = float(row["frames"])
        since = [r for r in training if before < float(r["frames"]) <= after]
        means = {column: _mean(since, source) for column, source in TRAINING.items()}
        rows.append({**{column: row.get(column, "") for column in COLUMNS}, **means, **known})
        before = after
    rows.sort(key=lambda r: (r["task"], r["algorithm"], int(r["seed"]), int(r["frames"])))
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        columns = [*COLUMNS, *TRAINING] if any("training_return" in r for r in rows) else COLUMNS
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def _mean(rows: list[dict], column: str) -> str:
    """Of what is there; training returns are only where an episode has ended."""
    values = [float(row[column]) for row in rows if row[column] not in ("", "nan")]
    return f"{np.mean(values):.5g}" if values else ""


def _is_recorded(name: str, task: str, algorithm: str, seed: int) -> bool:
    """Whether the results have all of a run, to its last evaluation."""
    suite = SUITES[name]
    config = compose_config(*suite.overrides, *suite.tasks[task], *suite.algorithms[algorithm])
    wanted = (task, algorithm, str(seed), str(config.iterations * config.frames_per_batch))
    rows = _read(HERE / "results" / f"{name}.csv")
    return any((r["task"], r["algorithm"], r["seed"], r["frames"]) == wanted for r in rows)


def runs_of(name: str) -> list[Run]:
    """The runs whose evaluations are in a suite's results."""
    rows: dict = defaultdict(list)
    for r in _read(HERE / "results" / f"{name}.csv"):
        numbers = {key: float(r[key]) for key in ("frames", "return", "return_stderr")}
        rows[r["task"], r["algorithm"], int(r["seed"])].append(numbers)
    return [Run(*key, of_run) for key, of_run in rows.items()]


def report(name: str) -> str:
    """Draws the suite's curves; returns its table and where the curves are."""
    suite, runs = SUITES[name], runs_of(name)
    layout = {"tasks": list(suite.tasks), "labels": list(suite.algorithms)}
    path = HERE / "results" / f"{name}.png"
    draw(
        runs,
        path,
        **layout,
        band=_interquartile_mean,
        ylabel="team return, deterministic",
        reference=suite.reference,
    )
    lines = table(runs, **layout, milestones=suite.milestones, reference=suite.reference)
    return f"{lines}\n\n{path}"


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
