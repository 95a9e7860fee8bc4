"""What a run measures: one table for training, one for evaluation, and TorchRL's loggers.

Every run writes ``metrics.csv`` and ``evaluation.csv``, one row per iteration or evaluation with
named columns, because that is what people and plotting tools open. (TorchRL's ``CSVLogger``
writes a file without header for each scalar, more than fifty of them here.) TensorBoard and
Weights & Biases come on top, through TorchRL.
"""

from __future__ import annotations

import csv
import importlib.util
from dataclasses import asdict
from pathlib import Path

import torch
from tensordict import TensorDictBase
from torchrl.record.loggers import Logger, get_logger

from torchrl_happo.recipe.config import ConfigError, TrainConfig
from torchrl_happo.versions import close_logger

Row = dict[str, float]

TRAINING = "metrics.csv"
EVALUATION = "evaluation.csv"


class Table:
    """Rows of numbers, in memory and in a CSV file at once.

    Args:
        path (Path): the file; what it held is replaced by ``rows``.
        rows (list of dict): the rows so far, to which :meth:`append` adds.
    """

    def __init__(self, path: Path, rows: list[Row]) -> None:
        self.path = path
        self.rows = rows
        self.columns: list[str] = []
        self._rewrite()

    def append(self, row: Row) -> None:
        """Adds a row; columns that are new appear, empty in the rows before."""
        self.rows.append(row)
        if row.keys() <= set(self.columns):
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        else:
            self._rewrite()

    def _rewrite(self) -> None:
        self.columns = list(dict.fromkeys(column for row in self.rows for column in row))
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)


def read_table(path: Path) -> list[Row]:
    """Reads back a CSV file of :class:`Table`; empty cells are left out of their rows."""
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


class Records:
    """Sends rows to their tables and to the logger that was asked for.

    Args:
        config (TrainConfig): the run.
        folder (Path): where the tables are written.
        training (list of dict): training rows so far, of a run that is resumed.
        evaluation (list of dict): evaluation rows so far.
    """

    def __init__(
        self, config: TrainConfig, folder: Path, training: list[Row], evaluation: list[Row]
    ) -> None:
        self.training = Table(folder / TRAINING, training)
        self.evaluation = Table(folder / EVALUATION, evaluation)
        self._logger = make_logger(config, folder)

    def add_training(self, row: Row) -> None:
        """Records an iteration."""
        self.training.append(row)
        self._log("train", row)

    def add_evaluation(self, row: Row) -> None:
        """Records an evaluation."""
        self.evaluation.append(row)
        self._log("eval", row)

    def close(self) -> None:
        """Flushes the logger."""
        if self._logger is not None:
            close_logger(self._logger)

    def _log(self, prefix: str, row: Row) -> None:
        if self._logger is not None:
            for name, value in row.items():
                self._logger.log_scalar(f"{prefix}/{name}", value, step=int(row["frames"]))


def make_logger(config: TrainConfig, folder: Path) -> Logger | None:
    """TorchRL's logger for TensorBoard or Weights & Biases; ``None`` for the tables alone.

    Raises:
        ConfigError: if its package is not installed.
    """
    if config.logger == "csv":
        return None
    if importlib.util.find_spec(config.logger) is None:
        raise ConfigError(
            f"logger={config.logger} needs the package {config.logger!r}, which is not installed: "
            f"pip install {config.logger}, or take logger=csv."
        )
    name = f"{config.task.name}/{config.algorithm.name}/seed_{config.seed}".replace("/", "_")
    project = {"project": "torchrl_happo", "config": asdict(config)}
    return get_logger(config.logger, str(folder), name, wandb_kwargs=project)


def episode_statistics(batch: TensorDictBase) -> Row:
    """Mean return and length of the episodes that end in a batch, and the mean reward of a step.

    Args:
        batch (TensorDictBase): with the root entries that :func:`make_env` promises.

    Returns:
        ``return`` and ``episode_length`` (NaN if no episode ends), ``episodes`` and ``reward``;
        where there are costs the mean ``cost`` of an episode, and where the environment says who
        has won, ``win_rate``, the share of episodes that the team has.
    """
    after = batch["next"]
    ended = after["done"]
    return {
        "return": after["episode_reward"][ended].mean().item(),
        "episode_length": after["step_count"][ended].float().mean().item(),
        "episodes": float(ended.sum()),
        "reward": after["reward"].mean().item(),
        **{
            name: after[key][ended].float().mean().item()
            for name, key in (("cost", "episode_cost"), ("win_rate", "won"))
            if key in after.keys()
        },
    }


def flatten(metrics: TensorDictBase) -> Row:
    """Nested scalars by path, for example ``"agents_0/kl"``, read from the device at once."""
    flat = dict(sorted(metrics.flatten_keys("/").items()))
    values = torch.stack([value.double() for value in flat.values()]).tolist() if flat else []
    return dict(zip(flat, values, strict=True))
