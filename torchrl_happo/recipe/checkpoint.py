"""Checkpoints: written whole or not at all, read with one sentence for whatever is wrong."""

from __future__ import annotations

import logging
import os
import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from torchrl_happo.arguments import first_line
from torchrl_happo.recipe.compose import CHECKPOINTS, SUFFIX, Functions, from_dict, to_dict
from torchrl_happo.recipe.config import TrainConfig

logger = logging.getLogger(__name__)

FORMAT = 1

Row = dict[str, float]


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; its message is one sentence for the user."""


@dataclass
class Progress:
    """How far a run has come, and what it has measured on the way."""

    iteration: int = 0
    frames: int = 0
    seconds: float = 0.0
    training: list[Row] = field(default_factory=list)
    evaluation: list[Row] = field(default_factory=list)

    @property
    def position(self) -> Row:
        """The columns every row begins with."""
        return {
            "iteration": self.iteration,
            "frames": self.frames,
            "seconds": self.seconds,
        }


class Checkpoints:
    """The checkpoints of one run, the newest few of which are kept.

    Args:
        folder (Path): the run's folder.
        keep (int): how many stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder / CHECKPOINTS
        self.keep = keep

    def save(self, config: TrainConfig, updater: Any, progress: Progress) -> Path:
        """Writes a checkpoint, then removes the oldest beyond :attr:`keep`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{progress.iteration:08d}{SUFFIX}"
        content = {
            "format": FORMAT,
            "config": to_dict(config),
            "progress": vars(progress),
            "updater": updater.state_dict(),
        }
        write_atomically(path, content)
        for old in list_checkpoints(self.folder)[: -self.keep]:
            if old != path:  # those of later iterations are another run's
                old.unlink()
        for rest in self.folder.glob(f".[0-9]*{SUFFIX}.*"):
            rest.unlink(missing_ok=True)  # of a process that was killed while it wrote
        return path


def write_atomically(path: Path, content: dict[str, Any]) -> None:
    """Writes a file that is there in full or, whatever happens on the way, not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UnwritableCheckpointError(
            f"The checkpoint {path} cannot be written ({first_line(_cause(error))}): what was "
            "there before is intact, make room and resume from it."
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself must survive a power cut
    finally:
        os.close(folder)


def _cause(error: BaseException) -> BaseException:
    """The operating system's error, where torch's writer covers it with one of its own."""
    while not isinstance(error, OSError) and error.__context__ is not None:
        error = error.__context__
    return error


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(folder.glob(f"[0-9]*{SUFFIX}"))


def read(path: Path) -> dict[str, Any]:
    """Reads a checkpoint, or the newest complete one of a run's folder.

    Raises:
        CheckpointError: in one sentence, if there is none or it cannot be used.
    """
    if not path.exists():
        raise CheckpointError(f"There is no checkpoint or run folder at {path}.")
    if path.is_file():
        return _read_file(path)
    candidates = list_checkpoints(path / CHECKPOINTS) or list_checkpoints(path)
    if not candidates:
        raise CheckpointError(f"The folder {path} holds no checkpoints/*{SUFFIX}.")
    for candidate in reversed(candidates):
        try:
            return _read_file(candidate)
        except DamagedCheckpointError as error:
            logger.warning("%s The one before it is used.", error)
    raise CheckpointError(f"None of the {len(candidates)} checkpoints in {path} is complete.")


class UnwritableCheckpointError(CheckpointError, OSError):
    """A checkpoint that the disk did not take."""


class DamagedCheckpointError(CheckpointError):
    """A file that is truncated, altered or no checkpoint at all."""


def _read_file(path: Path) -> dict[str, Any]:
    try:
        # torch does not look at the checksums in its files.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DamagedCheckpointError(
            f"The checkpoint {path} is truncated or damaged ({type(error).__name__})."
        ) from error
    if damaged:
        raise DamagedCheckpointError(f"The checkpoint {path} is damaged (at {damaged}).")
    if not isinstance(content, dict) or "format" not in content:
        raise DamagedCheckpointError(f"The file {path} is no checkpoint of this recipe.")
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"The checkpoint {path} has format {content['format']!r}, but this version reads "
            f"format {FORMAT}: resume it with the version that wrote it."
        )
    return content


def read_config(content: dict[str, Any], functions: Functions | None = None) -> TrainConfig:
    """Return the configuration of the run that wrote a checkpoint.

    Args:
        content (dict): of the checkpoint.
        functions (dict of str to callable, optional): in place of those that the configuration
            names. Defaults to ``None``.
    """
    return from_dict(_part(content, "config"), functions)


def _part(content: dict[str, Any], name: str) -> dict[str, Any]:
    part = content.get(name)
    if not isinstance(part, dict):
        raise CheckpointError(
            f"The checkpoint holds no {name} of a run (got {part!r}): take another one."
        )
    return part


def restore(content: dict[str, Any], updater: Any) -> Progress:
    """Loads a checkpoint into ``updater``, which is left as it was if that fails.

    Raises:
        CheckpointError: in one sentence, if the networks or optimisers do not fit.
    """
    progress = _read_progress(_part(content, "progress"))
    try:
        updater.load_state_dict(_part(content, "updater"))
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint does not fit this run: {first_line(error)}."
        ) from error
    return progress


def _read_progress(values: dict[str, Any]) -> Progress:
    counts = [values.get(name) for name in ("iteration", "frames")]
    known = values.keys() == {entry.name for entry in fields(Progress)}
    if not known or not all(isinstance(count, int) and count >= 0 for count in counts):
        raise CheckpointError(
            "The checkpoint does not say how far its run has come: take another one."
        )
    return Progress(**values)
