"""Trains a team: ``python -m torchrl_happo.train task=vmas/balance algorithm=happo``.

:func:`run` is the story of a run; the parts are in :mod:`torchrl_happo.recipe`. The folder of the
run (``outputs/<task>/<algorithm>/<time>``) ends up with ``config.yaml``, ``metrics.csv``,
``evaluation.csv``, ``checkpoints/``, ``curve.png`` and ``rollout.gif``.
"""

from __future__ import annotations

import logging
import sys
import time
from contextlib import closing
from pathlib import Path

import torch
from omegaconf import OmegaConf

from torchrl_happo.recipe import checkpoint, compose
from torchrl_happo.recipe.algorithms import Learner, make_learner
from torchrl_happo.recipe.checkpoint import Checkpoints, Progress
from torchrl_happo.recipe.cli import command_line
from torchrl_happo.recipe.collection import Batches
from torchrl_happo.recipe.config import TrainConfig, validate
from torchrl_happo.recipe.environments import make_env
from torchrl_happo.recipe.evaluation import Evaluation
from torchrl_happo.recipe.interrupt import Interrupt
from torchrl_happo.recipe.memory import keep_freed_memory
from torchrl_happo.recipe.progress import ProgressDisplay
from torchrl_happo.recipe.randomness import derive_seed, seed_everything
from torchrl_happo.recipe.records import Records, Row, episode_statistics, flatten
from torchrl_happo.recipe.report import write_report

logger = logging.getLogger(__name__)


def run(config: TrainConfig, folder: Path) -> Path:
    """Trains a team from beginning, or from ``config.resume``, to end.

    A checkpoint is a point from which a run begins anew: whoever goes on from it, this process
    after writing it or another one after reading it, reseeds every random state by the seed of the
    run and the iteration, and resets the environments. That makes a resumed run equal to one that
    was never interrupted, bit for bit, whatever the simulator.

    Args:
        config (TrainConfig): for instance from :func:`torchrl_happo.recipe.compose.compose_config`.
        folder (Path): where everything is written; made if it does not exist.

    Returns:
        the folder.

    Raises:
        ConfigError: if the configuration cannot be run.
        CheckpointError: if ``config.resume`` cannot be used.
        KeyboardInterrupt: after a Ctrl-C, when the checkpoint has been written.
    """
    validate(config)
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    seed_everything(derive_seed(config.seed))
    learner = make_learner(config, make_env(config.task, num_envs=1, seed=0, device=config.device))
    progress = Progress()
    if config.resume is not None:
        progress = checkpoint.restore(checkpoint.read(Path(config.resume)), learner.updater)

    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(compose.to_dict(config), folder / "config.yaml")
    checkpoints = Checkpoints(folder, config.checkpoint.keep)
    with (
        closing(Records(config, folder, progress.training, progress.evaluation)) as records,
        closing(ProgressDisplay(config, progress.frames)) as display,
        closing(Evaluation(config)) as evaluate,
        closing(Batches(config, learner.policy)) as batches,
        Interrupt() as interrupt,
    ):
        if progress.iteration == 0 and config.evaluation.interval > 0:
            records.add_evaluation({**progress.position, **evaluate(learner.policy)})
        fresh_start = True
        while progress.iteration < config.iterations:
            if fresh_start:
                batches.restart(derive_seed(config.seed, progress.iteration))
            row = _learn(batches, learner, progress)
            records.add_training(row)
            display.update(progress.frames, row["return"])

            if _due(config.evaluation.interval, progress, config):
                records.add_evaluation({**progress.position, **evaluate(learner.policy)})

            fresh_start = interrupt.requested or _due(config.checkpoint.interval, progress, config)
            if fresh_start:
                checkpoints.save(config, learner.updater, progress)
            if interrupt.requested:
                logger.info("Stopped and saved; go on with: resume=%s", folder)
                raise KeyboardInterrupt

    write_report(config, folder)
    result = progress.evaluation[-1]
    logger.info(
        "Return %.4g +- %.2g (%d episodes after %d frames); everything is in %s",
        *(result["return"], result["return_stderr"], result["episodes"], result["frames"], folder),
    )
    return folder


def _learn(batches: Batches, learner: Learner, progress: Progress) -> Row:
    """Collects a batch and learns from it; returns what there is to record about both."""
    start = time.perf_counter()
    batch = batches.next()
    collected = time.perf_counter()
    metrics = flatten(learner.updater(batch))
    batches.policy_changed()
    updated = time.perf_counter()
    progress.iteration += 1
    progress.frames += batch.numel()
    progress.seconds += updated - start
    return {
        **progress.position,
        **episode_statistics(batch),
        "frames_per_second": batch.numel() / (updated - start),
        "collect_seconds": collected - start,
        "update_seconds": updated - collected,
        **metrics,
    }


def _due(interval: int, progress: Progress, config: TrainConfig) -> bool:
    """Whether something happens now: at each interval (0: never), and always at the end."""
    last = progress.iteration >= config.iterations
    return last or (interval > 0 and progress.iteration % interval == 0)


def main() -> int:
    """The command line; returns its exit code."""
    return command_line(run)


if __name__ == "__main__":
    sys.exit(main())
