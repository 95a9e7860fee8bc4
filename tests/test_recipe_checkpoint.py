"""Checkpoints: whole or not at all, and one sentence for whatever is wrong with one."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipe_helpers import tiny_config
from torch import nn

from torchrl_happo.recipe import checkpoint
from torchrl_happo.recipe.checkpoint import CheckpointError, Checkpoints, Progress


class Updater(nn.Module):
    """The least that can be checkpointed."""

    def __init__(self, size=3):
        super().__init__()
        self.layer = nn.Linear(size, size)


@pytest.fixture
def config():
    return tiny_config()


@pytest.fixture
def saved(tmp_path, config):
    """A run's folder with checkpoints of iterations 1 and 2, and the updater they are of."""
    checkpoints, updater = Checkpoints(tmp_path, keep=5), Updater()
    for iteration in (1, 2):
        checkpoints.save(config, updater, Progress(iteration, 40 * iteration, 0.5))
    return tmp_path, updater


def files(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_checkpoint_brings_everything_back(saved, config):
    """Configuration, progress and state are what was saved, and load as weights only."""
    folder, updater = saved
    content = checkpoint.read(folder)
    other = Updater()
    progress = checkpoint.restore(content, other)
    assert (progress.iteration, progress.frames, progress.seconds) == (2, 80, 0.5)
    assert checkpoint.read_config(content) == config
    torch.testing.assert_close(other.state_dict(), updater.state_dict(), rtol=0, atol=0)


def test_the_oldest_go(tmp_path, config):
    """Only the newest ``keep`` stay."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for iteration in range(1, 6):
        checkpoints.save(config, Updater(), Progress(iteration))
    assert files(tmp_path) == ["00000004.pt", "00000005.pt"]


def test_the_one_just_written_stays(tmp_path, config):
    """Whatever lies in the folder."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for iteration in (7, 8, 3):
        checkpoints.save(config, Updater(), Progress(iteration))
    assert "00000003.pt" in files(tmp_path)


@pytest.mark.parametrize("step", ["save", "fsync", "replace"])
def test_a_failed_write_leaves_what_was_there(saved, config, monkeypatch, step):
    """Whatever breaks while a checkpoint is written, the last one is intact and no rest remains."""
    folder, updater = saved
    before = (folder / "checkpoints" / "00000002.pt").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(torch if step == "save" else os, step, fail)
    with pytest.raises(OSError, match="no space left"):
        Checkpoints(folder, keep=5).save(config, updater, Progress(2))
    assert files(folder) == ["00000001.pt", "00000002.pt"]
    assert (folder / "checkpoints" / "00000002.pt").read_bytes() == before


def test_a_folder_gives_its_newest_complete_checkpoint(saved, caplog):
    """A truncated file is passed over, with a word in the log."""
    folder, _ = saved
    newest = folder / "checkpoints" / "00000002.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert checkpoint.read(folder)["progress"]["iteration"] == 1
    assert "00000002.pt is truncated or damaged" in caplog.text


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_found(saved, data):
    """A file that is cut, or has a flipped bit, is refused or still says exactly the same."""
    folder, _ = saved
    path = folder / "checkpoints" / "00000002.pt"
    damaged = folder / "damaged.pt"
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    damaged.write_bytes(content)
    try:
        read = checkpoint.read(damaged)
    except CheckpointError:
        pass
    else:
        intact = checkpoint.read(path)
        torch.testing.assert_close(read.pop("updater"), intact.pop("updater"), rtol=0, atol=0)
        assert read == intact


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"format": 99}, "has format 99, but this version reads format 1"),
        ({"weights": torch.zeros(2)}, "is no checkpoint of this recipe"),
        ([1, 2], "is no checkpoint of this recipe"),
    ],
)
def test_other_files_are_refused(tmp_path, content, words):
    """Files of another version or origin get a sentence."""
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=words):
        checkpoint.read(tmp_path / "other.pt")


def test_missing_places_are_refused(tmp_path):
    """Neither a path that does not exist nor a folder without checkpoints raises a traceback."""
    with pytest.raises(CheckpointError, match="There is no checkpoint or run folder"):
        checkpoint.read(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no checkpoints"):
        checkpoint.read(tmp_path)


def test_a_folder_of_ruins_is_refused(saved):
    """If no checkpoint is complete the sentence says how many there are."""
    folder, _ = saved
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="None of the 2 checkpoints"):
        checkpoint.read(folder)


def test_another_architecture_is_refused(saved):
    """The sentence comes from the updater, which says what differs."""
    folder, _ = saved
    with pytest.raises(CheckpointError, match="does not fit this run: "):
        checkpoint.restore(checkpoint.read(folder), Updater(size=4))


def test_a_copied_checkpoint_needs_no_folder(saved, tmp_path):
    """A single file is enough to go on elsewhere."""
    folder, _ = saved
    copy = shutil.copy(folder / "checkpoints" / "00000001.pt", tmp_path / "elsewhere.pt")
    assert checkpoint.read(tmp_path / copy)["progress"]["iteration"] == 1


def test_ctrl_c_while_a_checkpoint_is_written(saved, config, monkeypatch):
    """The half that was written is removed, and the checkpoint before is the last one."""
    folder, updater = saved
    save = torch.save

    def interrupted(content, file):
        save(content, file)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Checkpoints(folder, keep=5).save(config, updater, Progress(3))
    assert files(folder) == ["00000001.pt", "00000002.pt"]
