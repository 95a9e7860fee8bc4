"""Sweeps: what is finished is not run again, and what came out is summarised."""

from __future__ import annotations

import csv
import logging
import shutil
from dataclasses import replace

import pytest
from recipe_helpers import TINY, table, tiny_config

from torchrl_happo import train
from torchrl_happo.recipe import checkpoint, training
from torchrl_happo.recipe import sweep as sweep_module
from torchrl_happo.recipe.algorithms import make_learner
from torchrl_happo.recipe.config import ConfigError
from torchrl_happo.recipe.environments import make_env
from torchrl_happo.recipe.report import Run, common_frames
from torchrl_happo.recipe.report import table as summarize
from torchrl_happo.recipe.sweep import remaining, write_summary

pytest.importorskip("vmas")
SWEEP = ("-m", "algorithm=happo,hatrpo", "seed=0,1", "evaluation.interval=1", *TINY)


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    """Runs a sweep on the command line; returns the folders of the runs that it has run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "write_report", lambda config, folder: None)
    root, run = logging.getLogger(), training.run
    handlers, level = list(root.handlers), root.level
    done = []

    def noting(config, folder):
        done.append(folder.relative_to(tmp_path))
        return run(config, folder)

    monkeypatch.setattr(training, "run", noting)

    def call(*overrides):
        done.clear()
        monkeypatch.setattr("sys.argv", ["torchrl-happo", *SWEEP, *overrides])
        assert train.main() == 0
        return list(done)

    yield call
    root.handlers[:] = handlers
    root.setLevel(level)


def check_what_comes_out(tmp_path, folders):
    """Every evaluation is in the table of all, and mean, error and seeds are in the short one."""
    with (tmp_path / "multirun" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    evaluations = sum(len(table(tmp_path / folder / "evaluation.csv")) for folder in folders)
    assert len(rows) == evaluations
    assert {(row["label"], row["seed"]) for row in rows} == {
        (label, seed) for label in ("happo", "hatrpo") for seed in "01"
    }
    text = (tmp_path / "multirun" / "sweep.md").read_text()
    assert text.startswith("| task | happo | hatrpo |\n|---|---|---|\n| vmas/het_mass | ")
    assert (tmp_path / "multirun" / "sweep.png").stat().st_size > 10_000


def test_a_sweep_goes_on_where_it_was(sweep, tmp_path):
    """Again: nothing runs. One is lost: that one runs. One was interrupted: it is resumed."""
    folders = sweep()
    assert len(set(folders)) == 4
    check_what_comes_out(tmp_path, folders)
    before = {folder: table(tmp_path / folder / "metrics.csv") for folder in folders}
    summary = (tmp_path / "multirun" / "sweep.csv").read_text()
    assert sweep() == []

    shutil.rmtree(tmp_path / folders[1])
    assert sweep() == [folders[1]]

    assert sorted(sweep("total_frames=96")) == sorted(folders)  # each has an iteration to go
    assert all(len(table(tmp_path / folder / "metrics.csv")) == 4 for folder in folders)
    for folder in folders:
        assert table(tmp_path / folder / "metrics.csv")[:3] == before[folder]
    assert (tmp_path / "multirun" / "sweep.csv").read_text() != summary


def test_the_folder_of_another_run(tmp_path):
    """A run whose settings are not the stored ones is refused and not mixed up."""
    config = tiny_config()
    assert remaining(config, tmp_path) is config
    learner = make_learner(config, make_env(config.task, num_envs=1, seed=0))
    progress = checkpoint.Progress(iteration=2)
    checkpoint.Checkpoints(tmp_path, keep=1).save(config, learner.updater, progress)
    assert remaining(config, tmp_path) == replace(config, resume=str(tmp_path))
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        remaining(replace(config, num_envs=8), tmp_path)
    assert remaining(replace(config, total_frames=48), tmp_path) is None
    falling = replace(config.algorithm, lr_schedule="linear")
    config = replace(config, algorithm=falling)
    shutil.rmtree(tmp_path / "checkpoints")
    checkpoint.Checkpoints(tmp_path, keep=1).save(config, learner.updater, progress)
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        remaining(replace(config, total_frames=480), tmp_path)
    with pytest.raises(ConfigError, match="There is no run with evaluations"):
        write_summary(tmp_path)


def evaluation(frames, mean, error):
    return {"frames": frames, "return": mean, "return_stderr": error}


def test_runs_of_unlike_lengths_are_compared_where_all_have_been():
    """Neither is one's end set against another's middle, nor points by their numbers."""
    short = Run("a/b", "happo", 0, [evaluation(40.0, 1.0, 1.0), evaluation(80.0, 2.0, 1.0)])
    long = Run("a/b", "happo", 1, [evaluation(80.0, 4.0, 1.0), evaluation(120.0, 9.0, 1.0)])
    assert common_frames([short, long]) == [80.0]
    assert summarize([short, long]).splitlines()[2] == "| a/b, at 80 frames | 3 ± 1 (2, 4) |"
    apart = replace(long, label="mappo", rows=long.rows[1:])
    assert summarize([short, apart]).splitlines()[2] == "| a/b, never evaluated alike | - | - |"


def test_the_summary_counts_right():
    """Mean and standard error over the seeds; of one seed that of its episodes; whole numbers."""

    def run(label, seed, final):
        rows = [(40.0, 0.0, 1.0), (80.0, final, 0.25)]
        return Run("a/b", label, seed, [evaluation(*row) for row in rows])

    runs = [run("happo", 0, 1.0), run("happo", 1, 3.0), run("mappo", 0, 2.0)]
    runs.append(replace(runs[0], task="c/d"))
    runs += [replace(run("happo", seed, 2700.0 + 100 * seed), task="e/f") for seed in (0, 1)]
    assert summarize(runs).splitlines()[2:] == [
        "| a/b | 2 ± 1 (1, 3) | 2 ± 0.25 (2) |",
        "| c/d | 1 ± 0.25 (1) | - |",
        "| e/f | 2750 ± 50 (2700, 2800) | - |",
    ]


def test_a_folder_without_runs(tmp_path, monkeypatch, capsys):
    """The command of the summary says in a sentence that there is nothing to summarise."""
    monkeypatch.setattr("sys.argv", ["sweep", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        sweep_module.main()
    assert "There is no run with evaluations in" in capsys.readouterr().err
