"""The command line: Hydra in front, one sentence instead of a traceback for a user's mistake."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch.distributed.elastic.multiprocessing.errors import record

from torchrl_happo.envs.team_reward import UnlikeRewardsError
from torchrl_happo.recipe import compose, training
from torchrl_happo.recipe.checkpoint import CheckpointError
from torchrl_happo.recipe.collection import WorkerError
from torchrl_happo.recipe.commands import COMMANDS, command
from torchrl_happo.recipe.config import ConfigError, TrainConfig
from torchrl_happo.recipe.overrides import normalize
from torchrl_happo.recipe.ranks import LearnerError, world_rank, world_size
from torchrl_happo.recipe.sweep import check_swept, remaining
from torchrl_happo.recipe.validation import near

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


def main(arguments: list[str]) -> int:
    """Run a command line; torchrun is told why a learner failed, and says which one was first."""
    is_learner = "TORCHELASTIC_RUN_ID" in os.environ
    return int((record(command_line) if is_learner else command_line)(arguments) or 0)


def command_line(arguments: list[str]) -> int:
    """Run what the words of a command line ask for: one run, or with ``-m`` a sweep.

    Args:
        arguments (list of str): the words after the program's name.

    Returns:
        the exit code: 0, 2 for what cannot be run, 130 after Ctrl-C.
    """
    if arguments and arguments[0] in COMMANDS:
        try:
            with _process([]):
                command(arguments[0], arguments[1:])
        except (ConfigError, CheckpointError) as error:
            return _refuse(str(error))
        return 0
    meant = near(arguments[0], COMMANDS, "") if arguments else ""
    if meant.startswith("near"):
        return _refuse(f"There is no command {arguments[0]!r}; {meant}.")
    compose.register()
    words = [normalize(word) for word in arguments]
    overrides = [word for word in words if not word.startswith("-") and "=" in word]
    try:
        if len(overrides) < len(words):  # without -m Hydra refuses to sweep
            check_swept(overrides)
        with _process(words):
            _job()
    except ConfigError as error:
        return _refuse(str(error))
    except (HydraException, MissingConfigException, OmegaConfBaseException) as error:
        return _refuse(compose.sentence(error) + _resumed(words))
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:  # of the folder, which Hydra makes
        if error.errno not in {*UNWRITABLE, errno.ENOENT} or error.filename is None:
            raise
        return _refuse(
            f"The folder of the run cannot be made: {error.filename} ({error.strerror})."
        )
    return 0


@hydra.main(f"pkg://{compose.CONFIG_MODULE}", "config", version_base="1.3")
def _job(composed: DictConfig) -> None:
    """Run one job of Hydra's: the only one, or one of a sweep."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    try:
        if hydra_config.mode == RunMode.MULTIRUN and world_size() > 1:
            raise ConfigError("torchrun trains one run: leave out -m, or leave out torchrun.")
        config = compose.from_composed(composed, list(hydra_config.overrides.task))
        left = remaining(config, folder) if hydra_config.mode == RunMode.MULTIRUN else config
        if left is None:
            logger.info("Finished before: %s", folder)
        else:
            _run(left, folder)
    except (ConfigError, CheckpointError) as error:
        raise _leaving(folder, _refuse(str(error))) from error
    except (LearnerError, WorkerError) as error:
        raise SystemExit(_say(str(error))) from error
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise SystemExit(
            _refuse(
                f"The run cannot write into {folder} ({error.strerror}): what was saved before "
                "is intact, make room and resume from it."
            )
        ) from error


def _run(config: TrainConfig, folder: Path) -> None:
    try:
        training.run(config, folder)
    except UnlikeRewardsError as error:
        raise ConfigError(
            "task.team_reward=null takes the reward that all agents share, but in "
            f"{config.task.name} theirs differ: take mean or sum."
        ) from error


@contextmanager
def _process(words: list[str]) -> Iterator[None]:
    """Give Hydra its arguments, and leave the process as it was."""
    if world_rank() > 0:
        words = [*words, "hydra/job_logging=none", "hydra/hydra_logging=none"]
    torchrl = logging.getLogger("torchrl")
    level = torchrl.level
    torchrl.setLevel(logging.WARNING)
    # By default Hydra prints an error and ends the process; this makes it hand the error over.
    environment = {"HYDRA_FULL_ERROR": os.environ.get("HYDRA_FULL_ERROR", "1")}
    try:
        with (
            mock.patch.object(sys, "argv", [sys.argv[0], *words]),
            mock.patch.dict(os.environ, environment),
            warnings.catch_warnings(),
        ):
            # What the packages below have to say to their developers is no user's concern.
            warnings.filterwarnings("ignore", module=r"(?!torchrl_happo)")
            yield
    finally:
        torchrl.setLevel(level)


def _leaving(folder: Path, code: int) -> SystemExit:
    """End with an exit code; a folder with nothing but an empty log goes, and its empty parents."""
    left = list(folder.iterdir()) if folder.is_dir() else []
    if all(path.suffix == ".log" and not path.read_text() for path in left):
        for path in left:
            path.unlink()
        for place in (folder, *folder.parents):
            if place == Path.cwd() or not place.is_dir() or any(place.iterdir()):
                break
            place.rmdir()
    return SystemExit(code)


def _resumed(words: list[str]) -> str:
    """Say what an option may lack that is the resumed run's own."""
    if not any(word.startswith("resume=") for word in words):
        return ""
    return " Options of the resumed run's task and algorithm want task=... and algorithm=... too."


def _refuse(sentence: str) -> int:
    """Say what all learners of a run find wrong, once."""
    return _say(sentence if world_rank() == 0 else "")


def _say(sentence: str) -> int:
    if sentence:
        sys.stderr.write(sentence + "\n")
    return REFUSED
