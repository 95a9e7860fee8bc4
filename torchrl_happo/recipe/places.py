"""Where the files of a run lie."""

from __future__ import annotations

from pathlib import Path

CHECKPOINTS = "checkpoints"
SUFFIX = ".pt"


def run_folder(place: Path) -> Path:
    """The folder of a run, from itself, its folder of checkpoints or one of these.

    Examples:
        >>> run_folder(Path("outputs/a/checkpoints/00000004.pt")).name
        'a'
    """
    folder = place.parent if place.suffix == SUFFIX else place
    return folder.parent if folder.name == CHECKPOINTS else folder
