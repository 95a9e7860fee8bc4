"""What remains to be looked at: curves and tables of runs, and the curve of one run.

Sweeps and ``benchmarks/learning.py`` read the evaluations of runs as :class:`Run` and report them
by :func:`table` and :func:`draw`.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from torchrl_happo.recipe.config import TrainConfig
from torchrl_happo.recipe.records import EVALUATION, TRAINING, Row, read_table
from torchrl_happo.recipe.simulators import SIMULATORS

logger = logging.getLogger(__name__)

CURVE = "curve.png"
ROLLOUT = "rollout.gif"
RENDER_SECONDS = 120

#: Of published figures: their returns, a value a seed, by task, label and frames.
Reference = Mapping[tuple[str, str, int], Sequence[float]]
#: From the returns of the seeds at one point to a middle, and the ends of a band around it.
Band = Callable[[Sequence[float]], tuple[float, float, float]]


@dataclass(frozen=True)
class Run:
    """A run, and what its evaluations say."""

    task: str
    label: str
    """Its column: the algorithm, and settings where they differ."""
    seed: int
    rows: list[Row]
    """With ``frames``, ``return`` and ``return_stderr``."""

    def at(self, frames: float) -> Row | None:
        """Return the evaluation after so many frames, if there was one."""
        return next((row for row in self.rows if row["frames"] == frames), None)


def common_frames(runs: Sequence[Run]) -> list[float]:
    """Return after how many frames all of some runs were evaluated."""
    return sorted(set.intersection(*({row["frames"] for row in run.rows} for run in runs)))


def short(value: float, digits: int = 3) -> str:
    """Write a number with so many significant digits, or with all of those before its point.

    Example:
        >>> [short(value) for value in (0.0171, -4.4231, 68.51, 2735.3)]
        ['0.0171', '-4.42', '68.5', '2735']
    """
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text else text


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of a sample; 0 for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def mean_band(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean over the seeds, and a band of its standard error."""
    middle, error = statistics.fmean(values), standard_error(values)
    return middle, middle - error, middle + error


def cell(rows: Sequence[Row]) -> str:
    """Write the mean over seeds, ± its standard error, and each seed.

    Args:
        rows (sequence of dict): the evaluation of each seed. For a single seed, which has no
            spread, the error is that of its episodes.

    Example:
        >>> cell([{"return": 2735.0, "return_stderr": 3.0}, {"return": 2645.0, "return_stderr": 4}])
        '2690 ± 45 (2735, 2645)'
        >>> cell([{"return": -4.423, "return_stderr": 0.0404}]), cell([])
        ('-4.42 ± 0.04 (-4.42)', '-')
    """
    if not rows:
        return "-"
    returns = [row["return"] for row in rows]
    error = standard_error(returns) if len(rows) > 1 else rows[0]["return_stderr"]
    return f"{short(statistics.fmean(returns))} ± {short(error, 2)} ({_listed(returns)})"


def table(
    runs: Sequence[Run],
    *,
    tasks: Sequence[str] = (),
    labels: Sequence[str] = (),
    milestones: Sequence[int] = (),
    reference: Reference | None = None,
) -> str:
    """Write returns as a Markdown table, a row a task and a column a label.

    Args:
        runs (sequence of Run): what was evaluated.

    Keyword Args:
        tasks (sequence of str): the rows, in order. Defaults to ``()``: all, by name.
        labels (sequence of str): the columns, in order. Defaults to ``()``: all, by name.
        milestones (sequence of int): frames, each with a row of its own. Defaults to ``()``: the
            last evaluation that all runs of the task have; the row says where that is, unless it
            is the end of all of them.
        reference (mapping, optional): a row of others' figures below each milestone.
    """
    labels = [name for name in labels or sorted({r.label for r in runs}) if _any(runs, name)]
    lines = ["| task | " + " | ".join(labels) + " |", "|---" * (len(labels) + 1) + "|"]
    for task in tasks or sorted({run.task for run in runs}):
        of_task = [run for run in runs if run.task == task]
        shared = common_frames(of_task) if of_task else []
        points = list(milestones) or shared[-1:]
        if of_task and not points:
            lines.append(f"| {task}, never evaluated alike |" + " - |" * len(labels))
        for frames in points:
            cells = [
                cell([row for r in of_task if r.label == label and (row := r.at(frames))])
                for label in labels
            ]
            when = f", {frames / 1e6:g}M" if milestones else ""
            if not milestones and any(run.rows[-1]["frames"] != frames for run in of_task):
                when = f", at {frames:.0f} frames"
            if set(cells) != {"-"}:
                lines.append(f"| {task}{when} | " + " | ".join(cells) + " |")
            theirs = [(reference or {}).get((task, label, int(frames)), ()) for label in labels]
            if any(theirs):
                cells = [
                    f"{short(statistics.fmean(v))} ({_listed(v)})" if v else "-" for v in theirs
                ]
                lines.append(f"| *reference implementation{when}* | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(
    runs: Sequence[Run],
    path: Path,
    *,
    tasks: Sequence[str] = (),
    labels: Sequence[str] = (),
    band: Band = mean_band,
    ylabel: str = "team return of an episode, ± standard error",
    reference: Reference | None = None,
) -> None:
    """Draw the curves of runs, one pair of axes a task, three beside each other.

    Two seeds say too little for a band: it is drawn for three and more.

    Args:
        runs (sequence of Run): what was evaluated.
        path (Path): the PNG file to write.

    Keyword Args:
        tasks (sequence of str): the axes, as the rows in :func:`table`.
        labels (sequence of str): the curves, as the columns there.
        band (callable): middle and band of the seeds' returns at a point. Defaults to mean and
            standard error.
        ylabel (str): of all axes.
        reference (mapping, optional): others' figures, drawn as crosses.
    """
    tasks = tasks or sorted({run.task for run in runs})
    labels = labels or sorted({run.label for run in runs})
    tasks = [task for task in tasks if any(run.task == task for run in runs)]
    labels = [label for label in labels if _any(runs, label)]
    columns = min(len(tasks), 3)
    rows = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(max(3.3 * columns, 6), 2.8 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    for place, task in enumerate(tasks):
        axes = figure.add_subplot(rows, columns, place + 1)
        for number, label in enumerate(labels):
            seeds = [run for run in runs if (run.task, run.label) == (task, label)]
            frames = common_frames(seeds) if seeds else []
            at = [[row["return"] for r in seeds if (row := r.at(point))] for point in frames]
            middle, low, high = zip(*map(band, at), strict=True) if at else ((), (), ())
            color = f"C{number}"
            axes.plot(frames, middle, color=color, marker="o", markersize=2.5, label=label)
            if len(seeds) > 2:
                axes.fill_between(frames, low, high, color=color, alpha=0.2, linewidth=0)
            for (where, whose, when), values in (reference or {}).items():
                if (where, whose) == (task, label):
                    axes.plot([when] * len(values), values, "x", color=color)
        _decorate(axes, task)
    figure.supylabel(ylabel, fontsize="medium")
    handles, names = figure.axes[0].get_legend_handles_labels()
    counted = [f"{name} ({_seeds(runs, name)})" for name in names]
    if reference:
        handles.append(Line2D([], [], color="gray", marker="x", linestyle=""))
        counted.append("reference implementation, a seed")
    figure.legend(handles, counted, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=130)


def write_report(config: TrainConfig, folder: Path) -> None:
    """Draw the learning curve and, if that is wanted and possible, record a rollout."""
    draw_curve(
        read_table(folder / TRAINING),
        read_table(folder / EVALUATION),
        title=f"{config.algorithm.name.upper()} on {config.task.name}, seed {config.seed}",
        path=folder / CURVE,
    )
    if config.render and SIMULATORS[config.task.simulator].draws:
        record_rollout(folder)
    elif config.render:
        logger.info("No %s: tasks of VMAS alone are drawn, not %s.", ROLLOUT, config.task.name)


def draw_curve(training: list[Row], evaluation: list[Row], *, title: str, path: Path) -> None:
    """Draw the return of training and evaluation episodes against the frames.

    Args:
        training (list of dict): rows with ``frames`` and ``return``.
        evaluation (list of dict): rows with ``frames``, ``return`` and ``return_stderr``.

    Keyword Args:
        title (str): above the axes.
        path (Path): the PNG file to write.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(
        [row["frames"] for row in training],
        [row["return"] for row in training],  # NaN, a gap, where no episode ended
        color="tab:blue",
        alpha=0.45,
        label="training (stochastic)",
    )
    axes.errorbar(
        [row["frames"] for row in evaluation],
        [row["return"] for row in evaluation],
        yerr=[row["return_stderr"] for row in evaluation],
        color="tab:blue",
        marker="o",
        markersize=4,
        capsize=3,
        label="evaluation (deterministic, ± standard error)",
    )
    _decorate(axes, title)
    axes.set_ylabel("team return of an episode")
    axes.legend(loc="best", frameon=False)
    figure.savefig(path, dpi=150)


def record_rollout(folder: Path) -> Path | None:
    """Record an episode of the newest checkpoint, in a process of its own.

    Drawing needs a display, EGL or Xvfb, and a missing one can take a process down with it; a run
    that is over must not fail on that. Without any of them one sentence is logged.
    """
    command = [sys.executable, "-m", "torchrl_happo.train", "render", f"run={folder}"]
    attempts = [command]
    if shutil.which("xvfb-run") and not os.environ.get("DISPLAY"):
        attempts.append(["xvfb-run", "-a", *command])
    reason = ""
    for attempt in attempts:
        try:
            done = subprocess.run(
                attempt, capture_output=True, text=True, timeout=RENDER_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = type(error).__name__
            continue
        if done.returncode == 0:
            return folder / ROLLOUT
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    logger.info("No %s: this machine could not draw it (%s).", ROLLOUT, reason)
    return None


def _decorate(axes: Any, title: str) -> None:
    axes.set(title=title, xlabel="environment frames")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)


def _any(runs: Sequence[Run], label: str) -> bool:
    return any(run.label == label for run in runs)


def _seeds(runs: Sequence[Run], label: str) -> str:
    """Say how many seeds the curves of a label have, over its tasks."""
    counts: dict[str, int] = {}
    for run in runs:
        if run.label == label:
            counts[run.task] = counts.get(run.task, 0) + 1
    few, many = min(counts.values()), max(counts.values())
    return f"{few if few == many else f'{few} to {many}'} seed{'s' if many > 1 else ''}"


def _listed(values: Sequence[float]) -> str:
    return ", ".join(map(short, values))
