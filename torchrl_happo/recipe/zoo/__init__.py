"""Trained teams that ship with the library, by name: ``load("zoo:vmas/het_mass/happo")``.

Each has a folder here, named after its task and algorithm: ``policy.pt`` with the policy's weights
and the configuration of its run, ``curve.png``, and ``record.json`` with the run's last evaluation,
the revision that trained it, and the checksum of the weights.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchrl_happo.recipe import checkpoint
from torchrl_happo.recipe.config import ConfigError
from torchrl_happo.recipe.report import CURVE
from torchrl_happo.recipe.validation import near

__all__ = ["PREFIX", "find", "is_name", "names", "pack", "read_record", "restore"]

#: What a name begins with, where the folder of a run could stand.
PREFIX = "zoo:"
ZOO = Path(__file__).parent
POLICY, RECORD = "policy.pt", "record.json"


def names() -> list[str]:
    """Return the names of all teams, such as ``"vmas/het_mass/happo"``."""
    return sorted(path.parent.relative_to(ZOO).as_posix() for path in ZOO.rglob(RECORD))


def is_name(source: Path | str) -> bool:
    """Whether a run is named by its place in the zoo.

    Example:
        >>> is_name("zoo:vmas/het_mass/happo"), is_name("outputs/vmas")
        (True, False)
    """
    return str(source).startswith(PREFIX)


def find(source: Path | str) -> Path:
    """Return the file of a team's weights.

    Args:
        source (Path or str): a name, after :data:`PREFIX`.

    Raises:
        ConfigError: if there is no such team.
        DamagedCheckpointError: if its weights are not those that were recorded.
    """
    name = str(source).removeprefix(PREFIX)
    if name not in names():
        raise ConfigError(
            f"There is no team {name!r} in the zoo; {near(name, names(), 'there are')}."
        )
    path = ZOO / name / POLICY
    if not path.exists() or _checksum(path) != read_record(name)["sha256"]:
        raise checkpoint.DamagedCheckpointError(
            f"The weights of {name} are not those that were recorded: install the package again."
        )
    return path


def read_record(name: str) -> dict[str, Any]:
    """Return the last evaluation of a team's run, its revision, and the checksum of its weights."""
    record: dict[str, Any] = json.loads((ZOO / name / RECORD).read_text())
    return record


def restore(policy: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy a team's weights into its policy, by the names of parameters and buffers.

    The states of modules are not the same in all versions of tensordict.
    """
    own = _weights_of(policy)
    if own.keys() != weights.keys():
        unlike = sorted(own.keys() ^ weights.keys())
        raise checkpoint.CheckpointError(f"The weights do not fit this policy: {unlike}.")
    for key, tensor in own.items():
        tensor.copy_(weights[key])


def pack(run: Path, name: str, policy: nn.Module, revision: str, zoo: Path = ZOO) -> Path:
    """Put the policy of a finished run into the zoo.

    Args:
        run (Path): its folder.
        name (str): task and algorithm.
        policy (nn.Module): the policy, as :func:`~torchrl_happo.recipe.load` returns it.
        revision (str): of the code that trained it.
        zoo (Path, optional): the folder of all teams. Defaults to the library's own.

    Returns:
        the team's folder.
    """
    content = checkpoint.read(run)
    folder = zoo / name
    folder.mkdir(parents=True, exist_ok=True)
    weights = _weights_of(policy)
    kept = {"format": content["format"], "config": content["config"], "policy": weights}
    checkpoint.write_atomically(folder / POLICY, kept)
    last = content["progress"]["evaluation"][-1]
    measured = {key: last[key] for key in ("frames", "return", "return_stderr", "episodes")}
    record = {**measured, "revision": revision, "sha256": _checksum(folder / POLICY)}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    shutil.copyfile(run / CURVE, folder / CURVE)
    return folder


def _weights_of(policy: nn.Module) -> dict[str, Tensor]:
    named = [*policy.named_parameters(), *policy.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
