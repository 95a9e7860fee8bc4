"""Sweeps: what is finished is not run again, and a table and a figure say what came out.

``python -m torchrl_happo.train -m task=... algorithm=... seed=...`` runs every combination, each in
a folder that its settings name, so that the same command goes on where it was interrupted. Hydra's
launchers decide where: one after the other by default; with ``hydra/launcher=joblib`` in processes
of this machine, with ``submitit_slurm`` as Slurm jobs, with ``ray`` on a cluster (see
``conf/config.yaml``). At the end, or by ``python -m torchrl_happo.recipe.sweep FOLDER`` at any
time, the folder gets ``sweep.csv``, ``sweep.md`` and ``sweep.png``.
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from omegaconf import DictConfig, OmegaConf

from torchrl_happo.recipe import checkpoint
from torchrl_happo.recipe.compose import CHANGEABLE, changeable
from torchrl_happo.recipe.config import ConfigError, TrainConfig
from torchrl_happo.recipe.places import CHECKPOINTS
from torchrl_happo.recipe.records import EVALUATION, Row, read_table
from torchrl_happo.recipe.tables import cell, standard_error

logger = logging.getLogger(__name__)

SEED = "seed_"


def remaining(config: TrainConfig, folder: Path) -> TrainConfig | None:
    """What is left to do of a run of a sweep.

    Args:
        config (TrainConfig): the run.
        folder (Path): its own.

    Returns:
        ``None`` if it is finished; otherwise the run, to go on from its last checkpoint if it has
        one.

    Raises:
        ConfigError: if the folder holds another run.
    """
    written = checkpoint.list_checkpoints(folder / CHECKPOINTS)
    if not written:
        return config
    stored = checkpoint.read_config(checkpoint.read(folder))
    same = {name: getattr(config, name) for name in changeable(stored)}
    if replace(stored, **same) != config:
        raise ConfigError(
            f"The folder {folder} holds a run with other settings, perhaps of an earlier version: "
            "choose another hydra.sweep.dir, or remove it."
        )
    if written[-1].stem >= f"{config.iterations:08d}":
        return None
    return replace(config, resume=str(folder))


def check_swept(arguments: list[str]) -> None:
    """Refuses to sweep over what does not make another run: its folder would be the same.

    Args:
        arguments (list of str): the command line.

    Raises:
        ConfigError: naming the option.
    """
    words = [word for word in arguments if not word.startswith("-") and "=" in word]
    if len(words) == len(arguments):  # without -m Hydra refuses it
        return
    for override in OverridesParser.create().parse_overrides(words):
        key = override.key_or_group
        if override.is_sweep_override() and key.partition(".")[0] in CHANGEABLE - {"device"}:
            raise ConfigError(
                f"A sweep over {key} would put its runs into one folder, as {key} makes no other "
                "run: give each a command of its own, with its own hydra.sweep.dir."
            )


@dataclass(frozen=True)
class Run:
    """A run of a sweep, and what its evaluations say."""

    task: str
    label: str
    """Its algorithm, and its settings where they differ within the sweep."""
    seed: int
    rows: list[Row]


def read_runs(folder: Path) -> list[Run]:
    """The runs below a folder that have been evaluated, in order."""
    runs = []
    paths = sorted(folder.glob(f"**/{SEED}*/{EVALUATION}"))
    alike = len({path.parent.parent.name for path in paths}) == 1
    for path in paths:
        config: Any = OmegaConf.load(path.parent / "config.yaml")
        settings, name = path.parent.parent.name, config.algorithm.name
        label = name if alike or settings == "default" else f"{name} {settings}"
        rows = read_table(path)
        if rows:
            runs.append(Run(config.task.name, label, config.seed, rows))
    return runs


def write_summary(folder: Path) -> str:
    """Writes ``sweep.csv``, ``sweep.md`` and ``sweep.png``; returns the table, as Markdown."""
    runs = read_runs(folder)
    if not runs:
        raise ConfigError(f"There is no run with evaluations in {folder}.")
    columns = ["task", "label", "seed", "frames", "return", "return_stderr", "episodes"]
    with (folder / "sweep.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for run in runs:
            for row in run.rows:
                writer.writerow([run.task, run.label, run.seed, *(row[c] for c in columns[3:])])
    table = summarize(runs)
    (folder / "sweep.md").write_text(table + "\n")
    _draw(runs, folder / "sweep.png")
    return table


def summarize(runs: list[Run]) -> str:
    """Final returns: mean over the seeds, ± its standard error, and each seed.

    For one seed the standard error is that of its episodes. Of a task's runs of unlike lengths
    those are taken that all of them have come to; the row says where that is.
    """
    tasks, labels = _names(runs)
    lines = ["| task | " + " | ".join(labels) + " |", "|---" * (len(labels) + 1) + "|"]
    cells = _by_task_and_label(runs)
    for task in tasks:
        runs_of_task = [run for run in runs if run.task == task]
        frames = common_frames(runs_of_task)
        if not frames:
            none = " | ".join("-" for _ in labels)
            lines.append(f"| {task}, never evaluated alike | {none} |")
            continue
        is_last = all(run.rows[-1]["frames"] == frames[-1] for run in runs_of_task)
        finals = [[_at(run, frames[-1]) for run in cells[task, label]] for label in labels]
        line = [cell([r["return"] for r in f], [r["return_stderr"] for r in f]) for f in finals]
        name = task if is_last else f"{task}, at {frames[-1]:.0f} frames"
        lines.append(f"| {name} | " + " | ".join(line) + " |")
    return "\n".join(lines)


def common_frames(runs: list[Run]) -> list[float]:
    """After how many frames all of some runs were evaluated."""
    return sorted(set.intersection(*({row["frames"] for row in run.rows} for run in runs)))


def _at(run: Run, frames: float) -> Row:
    return next(row for row in run.rows if row["frames"] == frames)


def _names(runs: list[Run]) -> tuple[list[str], list[str]]:
    return sorted({run.task for run in runs}), sorted({run.label for run in runs})


def _by_task_and_label(runs: list[Run]) -> dict[tuple[str, str], list[Run]]:
    cells = defaultdict(list)
    for run in runs:
        cells[run.task, run.label].append(run)
    return cells


def _draw(runs: list[Run], path: Path) -> None:
    """Curves of the mean over the seeds, with a band of its standard error; axes for each task."""
    tasks, labels = _names(runs)
    cells = _by_task_and_label(runs)
    figure = Figure(figsize=(max(4.2 * len(tasks), 6), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for color, label in enumerate(labels):
            seeds = cells[task, label]
            frames = common_frames(seeds) if seeds else []
            returns = [[_at(run, point)["return"] for run in seeds] for point in frames]
            middle = [statistics.fmean(values) for values in returns]
            errors = [standard_error(values) for values in returns]
            low = [m - e for m, e in zip(middle, errors, strict=True)]
            high = [m + e for m, e in zip(middle, errors, strict=True)]
            axes.plot(frames, middle, color=f"C{color}", marker="o", markersize=3, label=label)
            axes.fill_between(frames, low, high, color=f"C{color}", alpha=0.2, linewidth=0)
        axes.set(title=task, xlabel="environment frames")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("team return of an episode, ± standard error")
    figure.axes[0].legend(loc="best", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


class SweepSummary(Callback):
    """Hydra's callback at the end of a sweep, whatever launcher ran it."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Summarises the folder of the sweep."""
        folder = Path(config.hydra.sweep.dir)
        if read_runs(folder):
            logger.info("%s\n\n%s", folder / "sweep.png", write_summary(folder))


def main() -> None:
    """Summarises the sweep whose folder stands on the command line."""
    parser = argparse.ArgumentParser(description="Writes sweep.csv, sweep.md and sweep.png.")
    parser.add_argument("folder", type=Path, help="hydra.sweep.dir of the sweep")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        logger.info("%s", write_summary(parser.parse_args().folder))
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
