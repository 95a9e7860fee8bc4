"""The smaller parts of the recipe: random states, evaluation, tables, curve and rollout."""

from __future__ import annotations

import contextlib
import logging
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recipe_helpers import tiny_config
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, exploration_type, set_exploration_type
from vmas.simulator.environment.environment import Environment

from torchrl_happo import make_actor
from torchrl_happo.recipe import cli, report, trained, training
from torchrl_happo.recipe.algorithms import make_learner
from torchrl_happo.recipe.collection import Batches
from torchrl_happo.recipe.compose import compose_config
from torchrl_happo.recipe.config import ConfigError
from torchrl_happo.recipe.environments import make_env
from torchrl_happo.recipe.evaluation import Evaluation
from torchrl_happo.recipe.interrupt import deaf_children
from torchrl_happo.recipe.progress import ProgressDisplay
from torchrl_happo.recipe.randomness import derive_seed, isolated_randomness, seed_everything
from torchrl_happo.recipe.records import Table, flatten, read_table


def random_states():
    """A number from each of the four random states, none of which is moved."""
    states = [torch.get_rng_state(), Environment.vmas_random_state[0]]
    return [
        *(state.sum().item() for state in states),
        np.random.get_state()[1].sum(),
        hash(random.getstate()),
    ]


def draw_from_everything(env):
    env.reset()
    return torch.rand(()).item(), np.random.rand(), random.random()


class TestRandomness:
    """Seeding and isolation reach every random state there is."""

    def test_isolation_leaves_no_trace(self):
        """Not even after an error in the middle."""
        env = make_env(tiny_config().task, num_envs=2, seed=0)
        before = random_states()
        with isolated_randomness(3):
            inside = draw_from_everything(env)
        assert random_states() == before
        with contextlib.suppress(RuntimeError), isolated_randomness(3):
            assert draw_from_everything(env) == inside
            raise RuntimeError("in the middle")
        assert random_states() == before

    def test_seeding_covers_the_simulator(self):
        """Environments built after the same seed start in the same state."""
        starts = []
        for _ in range(2):
            seed_everything(4)
            starts.append(make_env(tiny_config().task, num_envs=2, seed=9).reset())
        first, second = (start["agents", "observation"] for start in starts)
        assert torch.equal(first, second)

    @given(st.lists(st.tuples(st.integers(0, 2**32), st.integers(0, 10**6)), unique=True))
    def test_derived_seeds_are_apart(self, purposes):
        """Neighbouring seeds and iterations share no stream."""
        seeds = [derive_seed(*purpose) for purpose in purposes]
        assert len(set(seeds)) == len(seeds)
        assert all(0 <= seed < 2**32 for seed in seeds)


class TestEvaluation:
    """The first episode of each environment, always the same ones."""

    def test_equals_a_rollout(self):
        """The mean return is that of TorchRL's own rollout from the same seed."""
        config = tiny_config("task=vmas/wheel", "evaluation.episodes=5")
        env = make_env(config.task, num_envs=5, seed=0)
        policy = make_learner(config, env).policy
        result = Evaluation(config)(policy)
        with isolated_randomness(config.evaluation.seed), torch.no_grad():
            env.set_seed(config.evaluation.seed)
            with set_exploration_type(ExplorationType.DETERMINISTIC):
                returns = env.rollout(4, policy)["next", "reward"].sum(1)
        assert result["return"] == pytest.approx(returns.mean().item())
        assert result["return_std"] == pytest.approx(returns.std(correction=0).item())
        assert (result["episodes"], result["episode_length"]) == (5, 4)

    def test_episodes_without_an_end_are_named(self, monkeypatch, caplog):
        """Where nothing ends a sentence says so while it waits, and another one refuses."""
        config = tiny_config("task=vmas/wheel", "evaluation.episodes=3", "task.max_steps=null")
        evaluation = Evaluation(config)
        monkeypatch.setattr("torchrl_happo.recipe.evaluation.PATIENCE", 0)
        monkeypatch.setattr("torchrl_happo.recipe.evaluation.LONGEST", 30)
        env = make_env(config.task, num_envs=3, seed=0)
        with pytest.raises(ConfigError, match=r"3 of 3 go on after 30 steps; set task\.max_steps"):
            evaluation(make_actor(env))
        assert caplog.text.count("set task.max_steps if they have no end") == 1

    def test_counts_one_episode_of_each(self):
        """Environments that end early and start again do not count twice."""
        config = tiny_config("task=vmas/buzz_wire", "task.max_steps=40", "evaluation.episodes=20")
        env = make_env(config.task, num_envs=1, seed=0)

        def reckless(tensordict):
            """Runs into the wire."""
            assert exploration_type() == ExplorationType.DETERMINISTIC
            shape = (*tensordict.batch_size, 2, 2)
            return tensordict.set(("agents", "action"), torch.ones(shape))

        result = Evaluation(config)(reckless)
        assert result["episode_length"] < 40
        assert result["episodes"] == 20
        assert Evaluation(config)(reckless)["return"] == result["return"]
        env.close()


class TestTables:
    """CSV files that can be read while a run writes them."""

    @given(st.lists(st.dictionaries(st.sampled_from("abc"), st.floats(allow_nan=False))))
    def test_what_is_written_is_read(self, tmp_path_factory, rows):
        """Bit for bit, also when columns appear late."""
        path = tmp_path_factory.mktemp("table") / "table.csv"
        table = Table(path, [])
        for row in rows:
            table.append(dict(row))
        assert [row for row in read_table(path) if row] == [row for row in rows if row]

    def test_a_resumed_table_forgets_what_came_after(self, tmp_path):
        """Opening it with the rows of a checkpoint drops the abandoned ones."""
        path = tmp_path / "table.csv"
        table = Table(path, [])
        for iteration in range(5):
            table.append({"iteration": float(iteration)})
        Table(path, table.rows[:2])
        assert [row["iteration"] for row in read_table(path)] == [0, 1]

    def test_metrics_are_named_by_path(self):
        """Nested scalars of any type become flat floats."""
        metrics = TensorDict({"critic": {"loss": torch.tensor(0.5)}, "n": torch.tensor(3)})
        assert flatten(metrics) == {"critic/loss": 0.5, "n": 3.0}
        assert flatten(TensorDict()) == {}


class TestReport:
    """What is left to look at."""

    def test_the_curve_shows_both_returns(self, tmp_path, monkeypatch):
        """Title, labels, and the numbers of both tables."""
        figures = []
        monkeypatch.setattr(report.Figure, "savefig", lambda self, *a, **k: figures.append(self))
        training = [{"frames": 10.0, "return": float("nan")}, {"frames": 20.0, "return": 2.0}]
        evaluation = [{"frames": 0.0, "return": 1.0, "return_stderr": 0.1}]
        report.draw_curve(training, evaluation, title="HAPPO on balance", path=tmp_path / "c.png")
        (axes,) = figures[0].axes
        assert axes.get_title() == "HAPPO on balance"
        assert axes.get_xlabel() == "environment frames"
        assert axes.lines[0].get_ydata()[-1] == 2.0
        labels = {text.get_text().split()[0] for text in axes.get_legend().get_texts()}
        assert labels == {"training", "evaluation"}

    def test_a_machine_without_graphics_gets_one_sentence(self, tmp_path, monkeypatch, caplog):
        """A drawing process that dies is no reason for a run to fail."""
        dead = subprocess.CompletedProcess([], -11, "", "first\nno display")
        monkeypatch.setattr(report.subprocess, "run", lambda *args, **kwargs: dead)
        with caplog.at_level(logging.INFO):
            assert report.record_rollout(tmp_path) is None
        assert caplog.messages == ["No rollout.gif: this machine could not draw it (no display)."]

    def test_only_vmas_is_drawn(self, tmp_path, monkeypatch, caplog):
        """Other simulators do not draw, whatever the machine: nothing is tried, and it is said."""
        monkeypatch.setattr(report, "draw_curve", lambda *args, **kwargs: None)
        monkeypatch.setattr(report, "read_table", lambda path: [])
        drawn = []
        monkeypatch.setattr(report, "record_rollout", drawn.append)
        with caplog.at_level(logging.INFO):
            for task in ("lbforaging/8x8_2p_3f", "pettingzoo/simple_line", "vmas/wheel"):
                report.write_report(compose_config(f"task={task}", "render=true"), tmp_path)
        assert drawn == [tmp_path]
        assert caplog.messages == [
            f"No rollout.gif: tasks of VMAS alone are drawn, not {task}."
            for task in ("lbforaging/8x8_2p_3f", "pettingzoo/simple_line")
        ]

    def test_what_cannot_be_drawn_is_said(self, tmp_path, monkeypatch, capsys):
        """In one sentence: another simulator, no checkpoint."""
        monkeypatch.setattr(training, "write_report", lambda config, folder: None)
        # Without it SDL, which mpe2 loads, writes lines of its own beside the sentence.
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        run = training.run(tiny_config("task=pettingzoo/simple_line"), tmp_path / "run")
        for folder, words in ((run, "not pettingzoo/simple_line"), (tmp_path, "holds no")):
            assert cli.command_line(["render", f"run={folder}"]) == 2
            (said,) = capsys.readouterr().err.splitlines()
            assert words in said

    def test_a_rollout_is_a_film_of_one_episode(self, tmp_path, monkeypatch):
        """One picture for each step of the newest checkpoint, whatever draws it."""
        from PIL import Image

        monkeypatch.setattr(training, "write_report", lambda config, folder: None)
        folder = training.run(tiny_config("task=vmas/wheel"), tmp_path)
        shades = iter(range(0, 250, 40))
        monkeypatch.setattr(
            trained, "draw", lambda env: Image.new("RGB", (8, 8), (next(shades),) * 3)
        )
        assert cli.command_line(["render", f"run={folder}"]) == 0
        with Image.open(folder / "rollout.gif") as film:
            assert film.n_frames == 4


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys, caplog):
    """It shows how far the run is and the last return, and no lines are logged beside it."""
    config = tiny_config("progress=true")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    caplog.set_level("INFO")
    display = ProgressDisplay(config, 0)
    display.update(24, 1.5)
    display.update(48, float("nan"))
    display.close()
    shown = capsys.readouterr().err
    assert "happo vmas/balance" in shown
    assert "return 1.5" in shown
    assert not caplog.records


def test_progress_lines_are_few_and_end_with_the_last(monkeypatch, caplog):
    """Without a terminal there is a line now and then, and one for the last iteration."""
    config = tiny_config("progress=true")
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    with caplog.at_level(logging.INFO):
        display = ProgressDisplay(config, 0)
        for frames, value in ((24, 1.5), (48, float("nan")), (72, float("nan"))):
            display.update(frames, value)
        display.close()
    assert len(caplog.messages) == 1
    assert "72 of 72 frames, return 1.5" in caplog.messages[0]


@pytest.mark.slow
def test_children_do_not_hear_ctrl_c():
    """Nor does this process while they start: it does when they have."""
    heard = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    ask = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    try:
        with deaf_children():
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            child = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
            assert not heard
        assert heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, previous)
    assert child.stdout == "True\n"


@pytest.mark.usefixtures("quick_workers")
def test_workers_collect_like_this_process():
    """Two processes give whole batches, act with the newest weights, and repeat from a seed."""
    config = tiny_config("collector=multi", "task=vmas/wheel")
    env = make_env(config.task, num_envs=1, seed=0)
    learner = make_learner(config, env)
    batches = Batches(config, learner.policy)
    try:
        batches.restart(5)
        first = batches.next().clone()
        assert first.shape == (4, 6)
        observations = first["agents", "observation"]
        assert not torch.equal(observations[:2], observations[2:])  # workers differ
        learner.updater(first)
        batches.policy_changed()
        second = batches.next().clone()
        with torch.no_grad():
            expected = learner.policy(second.select(("agents", "observation")))
        torch.testing.assert_close(second["agents", "loc"], expected["agents", "loc"])
        batches.restart(5)
        again = batches.next()["agents", "observation"]
        assert torch.equal(again[:, 0], observations[:, 0])
    finally:
        batches.close()


def test_a_command_with_a_slip(capsys):
    """One sentence with the command that was meant."""
    assert cli.command_line(["evaluat", "run=outputs"]) == cli.REFUSED
    assert "There is no command 'evaluat'; near: evaluate." in capsys.readouterr().err
