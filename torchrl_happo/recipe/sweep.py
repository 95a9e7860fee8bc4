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
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from torchrl_happo.recipe import checkpoint, report
from torchrl_happo.recipe.compose import CHANGEABLE, CHECKPOINTS, changeable, to_dict
from torchrl_happo.recipe.config import ConfigError, TrainConfig
from torchrl_happo.recipe.records import EVALUATION, read_table
from torchrl_happo.recipe.report import Run

logger = logging.getLogger(__name__)

SEED = "seed_"


def remaining(config: TrainConfig, folder: Path) -> TrainConfig | None:
    """Return what is left to do of a run of a sweep.

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
    if to_dict(replace(stored, **same)) != to_dict(config):
        raise ConfigError(
            f"The folder {folder} holds a run with other settings, perhaps of an earlier version: "
            "choose another hydra.sweep.dir, or remove it."
        )
    if written[-1].stem >= f"{config.iterations:08d}":
        return None
    return replace(config, resume=str(folder))


def check_swept(words: list[str]) -> None:
    """Refuse to sweep over what does not make another run: its folder would be the same.

    Args:
        words (list of str): the overrides on the command line.

    Raises:
        ConfigError: naming the option.
    """
    for override in OverridesParser.create().parse_overrides(words):
        key = override.key_or_group
        if override.is_sweep_override() and key.partition(".")[0] in CHANGEABLE - {"device"}:
            raise ConfigError(
                f"A sweep over {key} would put its runs into one folder, as {key} makes no other "
                "run: give each a command of its own, with its own hydra.sweep.dir."
            )


def read_runs(folder: Path) -> list[Run]:
    """Read the runs below a folder that have been evaluated, in order.

    Their labels are their algorithms, with their settings where these differ within the sweep.
    """
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
    """Write ``sweep.csv``, ``sweep.md`` and ``sweep.png``; return the table, as Markdown."""
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
    table = report.table(runs)
    (folder / "sweep.md").write_text(table + "\n")
    report.draw(runs, folder / "sweep.png")
    return table


class SweepSummary(Callback):
    """Hydra's callback at the end of a sweep, whatever launcher ran it."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Summarise the folder of the sweep."""
        folder = Path(config.hydra.sweep.dir)
        if read_runs(folder):
            logger.info("%s\n\n%s", folder / "sweep.png", write_summary(folder))


def main() -> None:
    """Summarise the sweep whose folder stands on the command line."""
    parser = argparse.ArgumentParser(description="Writes sweep.csv, sweep.md and sweep.png.")
    parser.add_argument("folder", type=Path, help="hydra.sweep.dir of the sweep")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        logger.info("%s", write_summary(parser.parse_args().folder))
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
