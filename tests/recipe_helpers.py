"""Small runs for the tests of the recipe."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

from torchrl_happo.recipe.compose import compose_config
from torchrl_happo.recipe.config import TrainConfig

TINY = (
    "num_envs=4",
    "steps_per_batch=6",
    "total_frames=72",  # three iterations
    "task.max_steps=4",  # so that episodes end inside a batch
    "model.num_cells=[8]",
    "algorithm.minibatch_size=15",
    "algorithm.num_epochs=2",
    "evaluation.episodes=3",
    "evaluation.interval=0",
    "collector.restart_interval=0",
    "progress=false",
    "render=false",
)

CLOCKS = {"seconds", "frames_per_second", "collect_seconds", "update_seconds", "evaluation_seconds"}


@cache  # a composition takes as long as an update
def tiny_config(*overrides: str) -> TrainConfig:
    """A run of three iterations of 24 frames on VMAS balance, not to be changed."""
    task = () if any(word.startswith("task=") for word in overrides) else ("task=vmas/balance",)
    return compose_config(*TINY, *task, *overrides)


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file as they are written, to the last digit, without what clocks say."""
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in CLOCKS} for row in csv.DictReader(file)]
