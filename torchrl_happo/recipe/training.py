"""A run from beginning to end: collect, learn, evaluate, save.

:func:`run` is the story; the other modules of the recipe are its parts. The folder of the run
(``outputs/<task>/<algorithm>/<time>``) ends up with ``config.yaml``, ``metrics.csv``,
``evaluation.csv``, ``checkpoints/``, ``curve.png`` and ``rollout.gif``.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from torchrl_happo.recipe import checkpoint, compose
from torchrl_happo.recipe.algorithms import make_learner
from torchrl_happo.recipe.checkpoint import Checkpoints, Progress
from torchrl_happo.recipe.collection import Batches
from torchrl_happo.recipe.compose import CHECKPOINTS, run_folder
from torchrl_happo.recipe.config import ConfigError, TrainConfig
from torchrl_happo.recipe.environments import check_device, make_env
from torchrl_happo.recipe.evaluation import Evaluation
from torchrl_happo.recipe.interrupt import Interrupt
from torchrl_happo.recipe.learner import Learner
from torchrl_happo.recipe.progress import ProgressDisplay
from torchrl_happo.recipe.randomness import derive_seed, seed_everything
from torchrl_happo.recipe.ranks import Ranks, part_of, restarts, world_size
from torchrl_happo.recipe.records import Records, Row, episode_statistics, flatten
from torchrl_happo.recipe.report import short, write_report
from torchrl_happo.recipe.validation import validate

logger = logging.getLogger(__name__)


def run(config: TrainConfig, folder: Path) -> Path:
    """Train a team from beginning, or from ``config.resume``, to end.

    Each ``collector.restart_interval`` iterations a run begins anew: it reseeds every random state
    by the seed of the run and the iteration, and resets the environments. Checkpoints fall only
    there, and a process that reads one does the same. That makes a resumed run equal to one that
    was never interrupted, bit for bit, whatever the simulator. (A run that was stopped by Ctrl-C
    between two restarts has one more of them, and so goes on with other numbers.)

    Args:
        config (TrainConfig): for instance from :func:`torchrl_happo.recipe.compose.compose_config`.
        folder (Path): where everything is written; made when there is something to write.

    Returns:
        the folder.

    Raises:
        ConfigError: if the configuration cannot be run, or the folder is another run's.
        CheckpointError: if ``config.resume`` cannot be used.
        KeyboardInterrupt: after a Ctrl-C, when the checkpoint has been written.
    """
    validate(config)
    _check_folder(config, folder)
    own = part_of(config, world_size())
    check_device(own.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with Ranks(own.device, config.learner_timeout) as ranks:
            return _run(config, own, folder, ranks)
    finally:
        torch.set_num_threads(threads)


def _run(config: TrainConfig, own: TrainConfig, folder: Path, ranks: Ranks) -> Path:
    """The run as one of its learners sees it, who has ``own`` part; the first one writes."""
    seed_everything(derive_seed(config.seed))
    env = make_env(own.task, num_envs=1, seed=0, device=own.device)
    learner = make_learner(own, env, ranks.group)
    progress = Progress()
    stored = ranks.from_first(partial(_stored, config, folder))
    if stored is not None:
        progress = checkpoint.restore(stored, learner.updater)
        _check_left(config, folder, progress)
    # Several learners draw numbers of their own.
    own_seed = partial(derive_seed, config.seed, *([ranks.rank] if ranks.size > 1 else []))

    with (
        closing(_Writing(config, folder, progress)) if ranks.is_first else nullcontext() as writing,
        closing(Batches(own, learner.policy)) as batches,
        Interrupt() as interrupt,
    ):
        if writing and progress.iteration == 0 and config.evaluation.interval > 0:
            writing.evaluation(learner)
        fresh_start = True
        while progress.iteration < config.iterations:
            if fresh_start:
                batches.restart(own_seed(progress.iteration))
            row = _learn(batches, learner, progress, ranks)
            if writing:
                writing.iteration(row)
                if _due(config.evaluation.interval, progress, config):
                    writing.evaluation(learner)

            stopping = ranks.any(interrupt.requested)
            fresh_start = stopping or _due(config.collector.restart_interval, progress, config)
            if writing and (stopping or _due(config.checkpoint.interval, progress, config)):
                writing.checkpoint(learner)
            if stopping:
                logger.info("Stopped and saved; go on with: resume=%s", folder)
                raise KeyboardInterrupt
        if writing:
            writing.last_evaluation(learner)
    if writing:
        writing.report()
    return folder


def _check_folder(config: TrainConfig, folder: Path) -> None:
    """Refuse to write over the checkpoints of a run that this one does not go on from."""
    goes_on = config.resume is not None and (
        run_folder(Path(config.resume)).resolve() == folder.resolve()
    )
    if not goes_on and not restarts() and checkpoint.list_checkpoints(folder / CHECKPOINTS):
        raise ConfigError(
            f"The folder {folder} holds the checkpoints of a run: go on from them by "
            f"resume={folder}, or choose another hydra.run.dir."
        )


def _check_left(config: TrainConfig, folder: Path, progress: Progress) -> None:
    """Refuse to branch off where there is nothing left to learn, which would leave no run."""
    is_new = not checkpoint.list_checkpoints(folder / CHECKPOINTS)
    if is_new and progress.iteration >= config.iterations:
        raise ConfigError(
            f"{config.resume} has come to the end of its total_frames={config.total_frames}: raise "
            "total_frames to go on from it."
        )


def _stored(config: TrainConfig, folder: Path) -> dict[str, Any] | None:
    """The checkpoint to go on from: of ``config.resume`` or, after a restart, of this very run."""
    if restarts() and checkpoint.list_checkpoints(folder / CHECKPOINTS):
        return checkpoint.read(folder)
    return None if config.resume is None else checkpoint.read(Path(config.resume))


class _Writing:
    """Everything that a run leaves in its folder."""

    def __init__(self, config: TrainConfig, folder: Path, progress: Progress) -> None:
        self.config, self.folder, self.progress = config, folder, progress
        folder.mkdir(parents=True, exist_ok=True)
        frames = config.iterations * config.frames_per_batch
        if frames != config.total_frames:
            logger.info(
                "total_frames=%d is rounded up to %d: %d batches of %d frames.",
                *(config.total_frames, frames, config.iterations, config.frames_per_batch),
            )
        OmegaConf.save(compose.to_dict(config), folder / "config.yaml")
        with ExitStack() as stack:
            self.checkpoints = Checkpoints(folder, config.checkpoint.keep)
            self.records = stack.enter_context(
                closing(Records(config, folder, progress.training, progress.evaluation))
            )
            self.display = stack.enter_context(closing(ProgressDisplay(config, progress.frames)))
            self.evaluate = stack.enter_context(closing(Evaluation(config)))
            self._open = stack.pop_all()

    def iteration(self, row: Row) -> None:
        self.records.add_training(row)
        self.display.update(self.progress.frames, row["return"])

    def evaluation(self, learner: Learner) -> None:
        self.records.add_evaluation({**self.progress.position, **self.evaluate(learner.result)})

    def checkpoint(self, learner: Learner) -> None:
        self.checkpoints.save(self.config, learner.updater, self.progress)

    def last_evaluation(self, learner: Learner) -> None:
        evaluated = self.progress.evaluation
        # A run that was stopped and had no iteration left was not evaluated where it ends.
        if not evaluated or evaluated[-1]["iteration"] != self.progress.iteration:
            self.evaluation(learner)

    def report(self) -> None:
        write_report(self.config, self.folder)
        result = self.progress.evaluation[-1]
        logger.info(
            "Return %s +- %s (%d episodes after %d frames); everything is in %s",
            *(short(result["return"], 4), short(result["return_stderr"], 2)),
            *(result["episodes"], result["frames"]),
            self.folder,
        )

    def close(self) -> None:
        self._open.close()


def _learn(batches: Batches, learner: Learner, progress: Progress, ranks: Ranks) -> Row:
    """Collects a batch and learns from it; returns what there is to record about both."""
    start = time.perf_counter()
    batch = batches.next()
    collected = time.perf_counter()
    metrics = flatten(learner.updater(batch))
    batches.policy_changed()
    updated = time.perf_counter()
    frames = batch.numel() * ranks.size
    progress.iteration += 1
    progress.frames += frames
    progress.seconds += updated - start
    return {
        **progress.position,
        **ranks.pooled(episode_statistics(batch)),
        "frames_per_second": frames / (updated - start),
        "collect_seconds": collected - start,
        "update_seconds": updated - collected,
        **metrics,
    }


def _due(interval: int, progress: Progress, config: TrainConfig) -> bool:
    """Whether something happens now: at each interval (0: never), and always at the end."""
    last = progress.iteration >= config.iterations
    return last or (interval > 0 and progress.iteration % interval == 0)
