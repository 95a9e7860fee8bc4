"""The command line: Hydra in front, one sentence instead of a traceback for a user's mistake."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from torchrl_happo.envs.team_reward import UnlikeRewardsError
from torchrl_happo.recipe import checkpoint, compose
from torchrl_happo.recipe.checkpoint import CheckpointError
from torchrl_happo.recipe.collection import WorkerError
from torchrl_happo.recipe.config import ConfigError, TrainConfig
from torchrl_happo.recipe.ranks import LearnerError, world_rank, world_size
from torchrl_happo.recipe.sweep import check_swept, remaining

logger = logging.getLogger(__name__)

REFUSED = 2
INTERRUPTED = 130

# A full disk, a quota, a read-only or forbidden place, a file where a folder should be.
UNWRITABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOTDIR,
}


def command_line(run: Callable[[TrainConfig, Path], Path]) -> int:
    """Runs what ``sys.argv`` asks for: one run, or with ``-m`` a sweep.

    Args:
        run (callable): from a configuration and a folder to a finished run.

    Returns:
        the exit code: 0, 2 for what cannot be run, 130 after Ctrl-C.
    """

    @hydra.main(f"pkg://{compose.CONFIG_MODULE}", "config", version_base="1.3")
    def job(composed: DictConfig) -> None:
        logging.getLogger("torchrl").setLevel(logging.WARNING)
        hydra_config = HydraConfig.get()
        try:
            if hydra_config.mode == RunMode.MULTIRUN and world_size() > 1:
                raise ConfigError("torchrun trains one run: leave out -m, or leave out torchrun.")
            config = _load(composed, list(hydra_config.overrides.task))
            folder = Path(hydra_config.runtime.output_dir)
            left = remaining(config, folder) if hydra_config.mode == RunMode.MULTIRUN else config
            if left is None:
                logger.info("Finished before: %s", folder)
            else:
                run(left, folder)
        except (ConfigError, CheckpointError) as error:
            raise SystemExit(_refuse(str(error))) from error
        except (LearnerError, WorkerError) as error:
            raise SystemExit(_say(str(error))) from error
        except UnlikeRewardsError as error:
            raise SystemExit(
                _refuse(
                    "task.team_reward=null takes the reward that all agents share, but in "
                    f"{config.task.name} theirs differ: take mean or sum."
                )
            ) from error
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            place = hydra_config.runtime.output_dir
            raise SystemExit(
                _refuse(
                    f"The run cannot write into {place} ({error.strerror}): what was saved before "
                    "is intact, make room and resume from it."
                )
            ) from error

    compose.register()
    # By default Hydra prints an error and ends the process; this makes it hand the error over.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    if world_rank() > 0:
        sys.argv += ["hydra/job_logging=none", "hydra/hydra_logging=none"]
    try:
        check_swept(sys.argv[1:])
        job()
    except ConfigError as error:
        return _refuse(str(error))
    except (HydraException, MissingConfigException, OmegaConfBaseException) as error:
        return _refuse(compose.sentence(error) + _resumed(sys.argv[1:]))
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:  # of the folder, which Hydra makes
        if error.errno not in {*UNWRITABLE, errno.ENOENT} or error.filename is None:
            raise
        return _refuse(
            f"The folder of the run cannot be made: {error.filename} ({error.strerror})."
        )
    return 0


def _resumed(arguments: list[str]) -> str:
    """What an option may lack that is the resumed run's own."""
    if not any(argument.startswith("resume=") for argument in arguments):
        return ""
    return " Options of the resumed run's task and algorithm want task=... and algorithm=... too."


def _load(composed: DictConfig, overrides: list[str]) -> TrainConfig:
    """What Hydra composed or, for a resumed run, what its checkpoint says."""
    if composed.resume is None:
        return compose.to_config(composed)
    stored = checkpoint.read_config(checkpoint.read(Path(composed.resume)))
    return compose.resume_config(stored, composed, overrides)


def _refuse(sentence: str) -> int:
    """Says what all learners of a run find wrong, once."""
    return _say(sentence if world_rank() == 0 else "")


def _say(sentence: str) -> int:
    if sentence:
        sys.stderr.write(sentence + "\n")
    return REFUSED
