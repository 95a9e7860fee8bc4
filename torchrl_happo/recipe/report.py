"""What remains to be looked at when a run is over: ``curve.png`` and ``rollout.gif``."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from torchrl_happo.recipe.config import TrainConfig, VmasTask
from torchrl_happo.recipe.records import EVALUATION, TRAINING, Row, read_table

logger = logging.getLogger(__name__)

CURVE = "curve.png"
ROLLOUT = "rollout.gif"
RENDER_SECONDS = 120


def write_report(config: TrainConfig, folder: Path) -> None:
    """Draws the learning curve and, if that is wanted and possible, records a rollout."""
    draw_curve(
        read_table(folder / TRAINING),
        read_table(folder / EVALUATION),
        title=f"{config.algorithm.name.upper()} on {config.task.name}, seed {config.seed}",
        path=folder / CURVE,
    )
    if not config.render:
        return
    if isinstance(config.task, VmasTask):
        record_rollout(folder)
    else:
        logger.info("No %s: tasks of VMAS alone are drawn, not %s.", ROLLOUT, config.task.name)


def draw_curve(training: list[Row], evaluation: list[Row], *, title: str, path: Path) -> None:
    """Draws the return of training and evaluation episodes against the frames.

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
    axes.set(title=title, xlabel="environment frames", ylabel="team return of an episode")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.legend(loc="best", frameon=False)
    figure.savefig(path, dpi=150)


def record_rollout(folder: Path) -> Path | None:
    """Records an episode of the newest checkpoint, in a process of its own.

    Drawing needs a display, EGL or Xvfb, and a missing one can take a process down with it; a run
    that is over must not fail on that. Without any of them one sentence is logged.
    """
    command = [sys.executable, "-m", "torchrl_happo.recipe.rollout", str(folder)]
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
