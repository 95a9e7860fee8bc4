"""Whole runs: repeatable, resumable bit for bit, and undisturbed by what only looks on."""

from __future__ import annotations

import logging
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from compilation import forget_graphs, num_graphs
from newer import needs
from recipe_helpers import TINY, table, tiny_config

from torchrl_happo import SequentialUpdater, train
from torchrl_happo.recipe import checkpoint, training
from torchrl_happo.recipe.algorithms.simultaneous import SimultaneousUpdater
from torchrl_happo.recipe.checkpoint import CheckpointError
from torchrl_happo.recipe.config import ConfigError
from torchrl_happo.steps.compile.code import Compiler
from torchrl_happo.update import assembly

ALGORITHMS = ("happo", "hatrpo", "mappo", "ippo")


@pytest.fixture(autouse=True)
def drawn(request, monkeypatch):
    """Leaves the report out, which takes longer than these runs, but where it is what is tested."""
    if "draws" not in request.fixturenames:
        monkeypatch.setattr(training, "write_report", lambda config, folder: None)


@pytest.fixture
def draws():
    """Asks for the report at the end of a run."""


def final(folder):
    """Everything that a finished run has learned."""
    return checkpoint.read(folder)["updater"]


def same(first, second):
    """Whether two runs measured and learned the same, bit for bit."""
    torch.testing.assert_close(final(first), final(second), rtol=0, atol=0)
    assert table(first / "metrics.csv") == table(second / "metrics.csv")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_can_be_repeated(tmp_path, algorithm):
    """The seed decides everything, also for a second run in the same process."""
    config = tiny_config(f"algorithm={algorithm}", "seed=5")
    same(training.run(config, tmp_path / "a"), training.run(config, tmp_path / "b"))
    other = training.run(replace(config, seed=6), tmp_path / "c")
    assert table(other / "metrics.csv") != table(tmp_path / "a" / "metrics.csv")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, algorithm):
    """From each checkpoint, in place or branched off, the run ends with the same numbers."""
    config = tiny_config(
        f"algorithm={algorithm}",
        "collector.restart_interval=1",
        "evaluation.interval=1",
    )
    whole = training.run(config, tmp_path / "whole")
    branch = whole / "checkpoints" / "00000001.pt"
    same(whole, training.run(replace(config, resume=str(branch)), tmp_path / "branch"))

    stopped = shutil.copytree(whole, tmp_path / "stopped")
    (stopped / "checkpoints" / "00000003.pt").unlink()
    same(whole, training.run(replace(config, resume=str(stopped)), stopped))
    assert table(whole / "evaluation.csv") == table(stopped / "evaluation.csv")


def test_how_often_a_checkpoint_is_written_changes_no_number(tmp_path):
    """The environments begin anew by the restart interval alone, and checkpoints fall there."""
    words = ("collector.restart_interval=1", "total_frames=96")
    ends = [
        training.run(tiny_config(*words, f"checkpoint.interval={n}"), tmp_path / f"{n}")
        for n in (0, 1, 2)
    ]
    for other in ends[1:]:
        same(ends[0], other)
    names = [[file.name[:-3] for file in sorted(end.glob("checkpoints/*"))] for end in ends]
    assert [[int(name) for name in run] for run in names] == [[4], [2, 3, 4], [2, 4]]
    never = training.run(tiny_config("total_frames=96"), tmp_path / "never")
    assert table(never / "metrics.csv") != table(ends[0] / "metrics.csv")


def test_a_finished_run_can_be_made_longer(tmp_path):
    """Resuming with more frames adds iterations to what is there."""
    config = tiny_config()
    folder = training.run(config, tmp_path)
    before = table(folder / "metrics.csv")
    training.run(replace(config, resume=str(folder), total_frames=120), folder)
    after = table(folder / "metrics.csv")
    assert after[: len(before)] == before
    assert [row["iteration"] for row in after] == ["1", "2", "3", "4", "5"]


def test_branching_off_where_nothing_is_left(tmp_path):
    """It is refused: it would leave a folder without a checkpoint, which cannot be resumed."""
    config = tiny_config()
    last = training.run(config, tmp_path / "run") / "checkpoints" / "00000003.pt"
    with pytest.raises(ConfigError, match=r"end of its total_frames=72: raise total_frames"):
        training.run(replace(config, resume=str(last)), tmp_path / "branch")
    assert not (tmp_path / "branch").exists()
    training.run(replace(config, resume=str(last), total_frames=96), tmp_path / "branch")
    assert len(table(tmp_path / "branch" / "metrics.csv")) == 4


def test_the_folder_of_another_run_is_refused(tmp_path):
    """A new run does not write over what another one has saved, a resumed one does not mix."""
    config = tiny_config()
    folder = training.run(config, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    for other in (replace(config, seed=6), replace(config, resume=str(elsewhere))):
        with pytest.raises(ConfigError, match=r"holds the checkpoints of a run: go on .*resume="):
            training.run(other, folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("evaluates", [0, 1])
def test_what_is_reported_is_where_the_run_ends(tmp_path, evaluates):
    """Also of a run that was stopped, and is resumed with nothing left to learn."""
    config = tiny_config("total_frames=48", f"evaluation.interval={evaluates}")
    folder = training.run(config, tmp_path)
    content = checkpoint.read(folder)
    content["progress"]["evaluation"] = content["progress"]["evaluation"][:-1]
    checkpoint.write_atomically(folder / "checkpoints" / "00000002.pt", content)
    training.run(replace(config, resume=str(folder)), folder)
    assert table(folder / "evaluation.csv")[-1]["iteration"] == "2"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_evaluation_does_not_disturb_training(tmp_path, algorithm):
    """With and without evaluation the training run is the same, bit for bit.

    VMAS environments of a process share a random state, so a second one disturbs the first.
    """
    config = tiny_config(f"algorithm={algorithm}", "task=vmas/navigation")
    often = replace(config, evaluation=replace(config.evaluation, interval=1))
    never, always = (
        training.run(config, tmp_path / "never"),
        training.run(often, tmp_path / "always"),
    )
    same(never, always)
    assert [row["iteration"] for row in table(always / "evaluation.csv")] == ["0", "1", "2", "3"]
    assert [row["iteration"] for row in table(never / "evaluation.csv")] == ["3"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_can_be_resumed(tmp_path, monkeypatch, number):
    """The iteration that is interrupted is finished, saved, and gone on from."""
    config = tiny_config()
    update = SequentialUpdater.__call__

    def interrupted(self, batch):
        if self.num_updates == 1:
            signal.raise_signal(number)
        return update(self, batch)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(SequentialUpdater, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            training.run(config, tmp_path)
    assert signal.getsignal(number) is handler
    assert checkpoint.read(tmp_path)["progress"]["iteration"] == 2
    training.run(replace(config, resume=str(tmp_path)), tmp_path)
    assert len(table(tmp_path / "metrics.csv")) == 3


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where the tests were started in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_acts_at_once(tmp_path, monkeypatch):
    """Whoever presses twice does not wait for the iteration, and nothing is written."""

    def interrupted_twice(self, batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not interrupted")

    monkeypatch.setattr(SequentialUpdater, "__call__", interrupted_twice)
    with pytest.raises(KeyboardInterrupt):
        training.run(tiny_config(), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_an_error_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """A run that breaks in the middle is resumed from where it last saved."""
    config = tiny_config("algorithm=mappo", "collector.restart_interval=1")
    whole = training.run(config, tmp_path / "whole")
    update = SimultaneousUpdater.__call__
    calls = []

    def broken(self, batch):
        calls.append(batch)
        if len(calls) == 3:
            raise RuntimeError("the third update breaks")
        return update(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(SimultaneousUpdater, "__call__", broken)
        with pytest.raises(RuntimeError, match="third update"):
            training.run(config, tmp_path / "broken")
    broken_run = tmp_path / "broken"
    same(whole, training.run(replace(config, resume=str(broken_run)), broken_run))


def test_a_run_leaves_what_it_promises(tmp_path, draws):
    """Configuration, tables with named columns, checkpoint and curve."""
    folder = training.run(tiny_config("evaluation.interval=2"), tmp_path / "new" / "folder")
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "curve.png",
        "evaluation.csv",
        "metrics.csv",
    }
    rows = table(folder / "metrics.csv")
    assert [int(row["frames"]) for row in rows] == [24, 48, 72]
    assert {"return", "episode_length", "agents_0/kl", "critic/loss"} <= rows[0].keys()
    assert float(rows[0]["episode_length"]) == 4
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_gets_the_same_numbers(tmp_path):
    """``logger=tensorboard`` adds an event file with what the tables hold."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = training.run(tiny_config("logger=tensorboard"), tmp_path)
    events = EventAccumulator(str(next(folder.glob("vmas_*"))))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("train/return")]
    rows = table(folder / "metrics.csv")
    assert logged == [(int(r["frames"]), pytest.approx(float(r["return"]))) for r in rows]


def test_a_logger_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    """The sentence says what to install."""
    monkeypatch.setattr("torchrl_happo.recipe.records.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        training.run(tiny_config("logger=wandb"), tmp_path)


def test_a_checkpoint_of_other_networks_is_refused(tmp_path):
    """A change of the networks is named before anything is trained."""
    folder = training.run(tiny_config(), tmp_path)
    wider = tiny_config("model.num_cells=[9]", f"resume={folder}")
    with pytest.raises(CheckpointError, match=r"does not fit this run: .*architecture"):
        training.run(wider, folder)
    assert len(table(folder / "metrics.csv")) == 3


class TestCommandLine:
    """What a shell sees."""

    @pytest.fixture(autouse=True)
    def restored_logging(self):
        """Hydra sets up logging for the whole process."""
        root = logging.getLogger()
        handlers, level = list(root.handlers), root.level
        yield
        root.handlers[:] = handlers
        root.setLevel(level)

    def call(self, monkeypatch, folder, *overrides):
        monkeypatch.setattr("sys.argv", ["torchrl-happo", *overrides, *TINY])
        monkeypatch.chdir(folder)
        return train.main()

    @needs("algorithm=ippo", "0.13")
    def test_runs_in_a_folder_of_its_own(self, monkeypatch, tmp_path):
        """Task and algorithm are in the path."""
        assert self.call(monkeypatch, tmp_path, "algorithm=ippo") == 0
        assert len(list(tmp_path.glob("outputs/vmas/het_mass/ippo/*/metrics.csv"))) == 1

    @needs("algorithm=mappo", "0.13")
    def test_sweeps(self, monkeypatch, tmp_path):
        """``-m`` runs every combination, each in its own folder."""
        assert self.call(monkeypatch, tmp_path, "-m", "algorithm=happo,mappo", "seed=0,1") == 0
        assert len(list(tmp_path.glob("multirun/vmas/het_mass/*/*/seed_*/metrics.csv"))) == 4

    def test_ctrl_c_has_the_exit_code_of_ctrl_c(self, monkeypatch, tmp_path):
        """The shell, and whoever runs a sweep, can tell it from a failure."""

        def interrupted(config, folder):
            raise KeyboardInterrupt

        monkeypatch.setattr(training, "run", interrupted)
        assert self.call(monkeypatch, tmp_path) == 130

    def test_an_error_of_the_system_that_is_not_about_writing_is_not_hidden(
        self, monkeypatch, tmp_path
    ):
        """Only a disk that takes nothing more gets a sentence of ours."""

        def broken(config, folder):
            raise ConnectionError("no simulator answers")

        monkeypatch.setattr(training, "run", broken)
        with pytest.raises(ConnectionError, match="no simulator answers"):
            self.call(monkeypatch, tmp_path)

    def test_resumes_in_place(self, monkeypatch, tmp_path):
        """``resume=FOLDER`` goes on in that folder with the stored task and algorithm."""
        run = training.run(tiny_config("algorithm=mappo", "task=vmas/wheel"), tmp_path / "run")
        monkeypatch.setattr("sys.argv", ["torchrl-happo", f"resume={run}", "total_frames=96"])
        assert train.main() == 0
        assert len(table(run / "metrics.csv")) == 4

    def test_options_of_the_resumed_task(self, monkeypatch, tmp_path, capsys):
        """They are known with the name of the task, and the sentence says so without it."""
        run = training.run(tiny_config("algorithm=hatrpo"), tmp_path / "run")
        words = ["torchrl-happo", f"resume={run}", "algorithm.max_kl=0.01"]
        monkeypatch.setattr("sys.argv", words)
        assert train.main() == 2
        assert "want task=... and algorithm=... too.\n" in capsys.readouterr().err
        monkeypatch.setattr("sys.argv", [*words, "algorithm=hatrpo"])
        assert train.main() == 0

    @pytest.mark.parametrize(
        ("override", "words"),
        [
            ("task=vmas/whel", "There is no task 'vmas/whel'; near: vmas/wheel."),
            ("algorithm.lr=-1", "algorithm.lr is -1.0, but must be above 0."),
            ("resume=nowhere", "There is no checkpoint or run folder at nowhere."),
            (
                "task=vmas/flocking task.team_reward=null",
                "task.team_reward=null takes the reward that all agents share, but in "
                "vmas/flocking theirs differ: take mean or sum.",
            ),
            (
                "hydra.run.dir=here/run",
                "The folder of the run cannot be made: here/run (Not a directory).",
            ),
            (
                "-m evaluation.seed=1,2",
                "A sweep over evaluation.seed would put its runs into one folder, as "
                "evaluation.seed makes no other run: give each a command of its own, with its own "
                "hydra.sweep.dir.",
            ),
        ],
    )
    def test_refuses_in_one_sentence(self, monkeypatch, tmp_path, capsys, override, words):
        """Exit code 2, one line, no traceback."""
        (tmp_path / "here").write_text("a file")
        try:
            code = self.call(monkeypatch, tmp_path, *override.split())
        except SystemExit as error:
            code = error.code
        assert code == 2
        assert capsys.readouterr().err == words + "\n"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs a C++ compiler")
def test_compiled_run(tmp_path, caplog, monkeypatch):
    """``algorithm.compile`` and ``collector.compile_policy`` change speed, not what is learned.

    Torch's own code is made of the collector's policy; of updates, in ``test_compile.py``.
    """
    rows = []
    options = {"backend": "eager"}
    monkeypatch.setattr(
        assembly,
        "make_compiler",
        lambda compile, cudagraphs, device: Compiler(options) if compile is True else None,
    )
    forget_graphs()
    for compiled in ("false", "true"):
        assert num_graphs() == 0
        config = tiny_config(
            f"algorithm.compile={compiled}", f"collector.compile_policy={compiled}"
        )
        folder = training.run(config, tmp_path / compiled)
        rows.append(table(folder / "metrics.csv"))
    assert [row.keys() for row in rows[0]] == [row.keys() for row in rows[1]]
    # The first batch is the same but for rounding, on which each action afterwards depends.
    for name in ("critic/loss", "agents_0/entropy"):
        assert float(rows[1][0][name]) == pytest.approx(float(rows[0][0][name]), rel=1e-3)
    assert num_graphs() == 6  # the agents' step and passes, the critic's, the collector's policy
    assert "not compiled" not in caplog.text
