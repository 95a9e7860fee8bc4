"""Runs of the recipe with several learners, started by ``torchrun``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recipe_helpers import TINY, table, tiny_config
from wrong_calls import same

import torchrl_happo
from torchrl_happo.recipe import checkpoint
from torchrl_happo.recipe.config import ConfigError
from torchrl_happo.recipe.ranks import Ranks, launch_time, part_of

pytest.importorskip("vmas")
HERE = Path(__file__).parent
LEARNERS = (
    *TINY,
    "algorithm.minibatch_size=12",
    "collector.restart_interval=1",
)


def torchrun(folder, *options):
    """Starts two learners in a folder; returns what they say on their standard error."""
    folder.mkdir()
    script = HERE / "rank_trainer.py"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(*options, script, folder, *LEARNERS),
        ],
        cwd=folder,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(torchrl_happo.__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def results(folder):
    """What the only run in a folder has learned and measured."""
    (run,) = (folder / "outputs" / "vmas" / "het_mass" / "happo").iterdir()
    written = {path.name for path in run.iterdir()}
    assert written >= {"config.yaml", "metrics.csv", "evaluation.csv", "curve.png", "train.log"}
    tables = [table(run / name) for name in ("metrics.csv", "evaluation.csv")]
    return checkpoint.read(run)["updater"], tables


@pytest.mark.slow
def test_a_learner_that_is_killed(tmp_path):
    """Torchrun names it, one sentence ends the other; restarted, the run ends as if undisturbed.

    It is killed in the third of three updates, the checkpoints of two are there. Both runs are of
    two learners with two environments each, and only the first of them writes.
    """
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "killed").touch()  # this one has its trouble behind it
    whole = tmp_path / "whole" / "run"
    (tmp_path / "broken").mkdir()
    calm = torchrun(whole, "--max-restarts=0")
    assert "cannot reach" not in calm
    said = torchrun(tmp_path / "broken" / "run", "--max-restarts=1")
    assert (tmp_path / "broken" / "killed").exists()
    assert said.count("Learner 0 of 2 cannot reach the others and stops") == 1
    assert "Traceback" not in said
    assert re.search(r"exitcode: -9\) local_rank: 1", said)
    state, (training, _) = results(whole)
    assert [row["frames"] for row in training] == ["24", "48", "72"]
    assert same(results(tmp_path / "broken" / "run"), (state, [training, results(whole)[1][1]]))


def test_alone_there_is_nobody_to_wait_for():
    """Without a launcher no group is made, and everything is one's own."""
    with Ranks("cpu", timeout=1) as ranks:
        assert ranks.is_first
        assert ranks.group is None
        assert ranks.any(True)
        assert ranks.from_first(lambda: 3) == 3
    assert not torch.distributed.is_initialized()
    assert launch_time().year >= 2025


def test_a_learner_has_its_part():
    """Of the environments and of each minibatch; what is left is that of the whole run."""
    config = tiny_config("algorithm.minibatch_size=12")
    own = part_of(config, 2)
    assert (own.num_envs, own.algorithm.minibatch_size, own.frames_per_batch) == (2, 6, 12)
    assert own.total_frames == config.total_frames
    assert part_of(config, 1) is config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm=mappo"], "algorithm=mappo learns in one process: take happo or hatrpo"),
        (["collector=distributed"], "both need the process group of torch"),
        (["num_envs=3"], "num_envs=3 cannot be split evenly over 2 learners: choose a multiple."),
        (["collector=multi", "num_envs=6"], "over 2 learners with 2 workers each: choose"),
        (["algorithm.minibatch_size=15"], "minibatch_size=15 cannot be split evenly over 2"),
        (["device=cuda"], "2 learners on this machine need as many CUDA devices"),
    ],
)
def test_runs_that_cannot_be_split(overrides, words, monkeypatch):
    """One sentence says why, and what to do."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=words):
        part_of(tiny_config("algorithm.minibatch_size=12", *overrides), 2)
