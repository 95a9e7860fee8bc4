"""Faults, injected: what was learned stays as it was, or a step further, and nothing between."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_writer import KEEP, Training
from newer import PopArtValueNorm, RunningValueNorm, tensors
from recipe_helpers import TINY, table, tiny_config
from team import N_AGENTS, SPOILED_GRADIENTS, make_actor, make_batch, make_critic
from torchrl.envs import VmasEnv
from wrong_calls import INF, NAN, Team, same

import torchrl_happo
from torchrl_happo import HAPPOLoss, HATRPOLoss, SequentialUpdater, train
from torchrl_happo.recipe import checkpoint, training
from torchrl_happo.recipe.checkpoint import CheckpointError, Checkpoints
from torchrl_happo.recipe.collection import Batches, WorkerError
from torchrl_happo.recipe.compose import compose_config

KILLS = int(os.environ.get("CHECKPOINT_KILLS", "20"))
LOSSES = pytest.mark.parametrize("kind", [HAPPOLoss, HATRPOLoss])


def with_advantage(batch):
    """The batch with an advantage and a target of its own."""
    shape = batch.batch_size
    return batch.update(
        {"advantage": torch.randn(*shape, 1), "value_target": torch.randn(*shape, N_AGENTS, 1)}
    )


# -- numbers that are not numbers ------------------------------------------------------------------


@LOSSES
@pytest.mark.parametrize("complete", [lambda batch: batch, with_advantage])
def test_every_entry_that_is_read_must_be_finite(kind, complete):
    """NaN or infinity in any one number of any entry is refused before anything moves."""
    team = Team(loss=kind).used()
    batch = complete(team.batch)
    # Behind a terminated step the next observation is not read.
    batch["next", "terminated"] = torch.zeros_like(batch["next", "terminated"])
    before = team.state()
    read = team.loss.team.entries_read(batch)
    assert len(read) >= 6
    for key in read:
        for value in (NAN, INF, -INF):
            spoiled = batch.clone()
            entry = spoiled[key].clone(memory_format=torch.contiguous_format)
            entry.view(-1)[random.randrange(entry.numel())] = value
            spoiled[key] = entry
            with pytest.raises(ValueError, match=f"{key!r}".replace("(", r"\(").rstrip(")")):
                team.updater(spoiled)
            assert same(team.state(), before)


def masks(batch):
    """Which agents act at which step, and which steps count."""
    active = torch.rand(*batch.shape, N_AGENTS) > 0.3
    counted = torch.rand(*batch.shape) > 0.2
    return active, counted


@LOSSES
@pytest.mark.parametrize("settings", [{}, {"sequence_length": 3}])
def test_what_masks_leave_out_may_hold_anything(kind, settings):
    """NaN where an agent is not active, or a step does not count, is as good as zero there."""
    team = Team(loss=kind, **settings)
    twin = copy.deepcopy(team)
    batch = with_advantage(team.batch)
    active, counted = masks(batch)
    batch["agents", "active"] = active
    batch["collector", "mask"] = counted
    spoiled, zeroed = batch.clone(), batch.clone()
    for key in team.loss.team.entries_read(batch):
        own = counted if key in ("advantage", "value_target") else active & counted.unsqueeze(-1)
        gaps = ~own.reshape(*own.shape, *(1,) * (batch[key].ndim - own.ndim)).expand_as(batch[key])
        spoiled[key] = batch[key].masked_fill(gaps, NAN)
        zeroed[key] = batch[key].masked_fill(gaps, 0.0)
    torch.manual_seed(1)  # of the entropy's estimate
    metrics = team.updater(spoiled)
    torch.manual_seed(1)
    expected = twin.updater(zeroed)
    assert same(tensors(team.loss), tensors(twin.loss))
    assert all(p.isfinite().all() for p in team.loss.parameters())
    for name in ("agents_0", "agents_1", "agents_2"):
        assert (metrics[name] == expected[name]).all()


def test_padding_does_not_reach_the_advantage():
    """The critic's view of a padded step or a dead agent, NaN, does not spoil the estimate."""
    team = Team()
    batch = team.batch
    active, counted = masks(batch)
    counted[:, 3:] = False  # all trajectories end here, the rest is padding
    batch["next", "done"][:, 2] = True
    batch["agents", "active"] = batch["next", "agents", "active"] = active
    batch["collector", "mask"] = counted
    own = (active & counted.unsqueeze(-1)).unsqueeze(-1)
    for key in (("agents", "observation"), ("next", "agents", "observation")):
        batch[key] = torch.where(own, batch[key], NAN)
    batch["next", "reward"] = torch.where(counted.unsqueeze(-1), batch["next", "reward"], NAN)
    metrics = team.updater(batch)
    assert all(value.isfinite() for value in metrics.values(True, True))
    assert all(p.isfinite().all() for p in team.loss.parameters())


@SPOILED_GRADIENTS
def test_a_gradient_of_the_critic_that_is_not_finite(spoil, caplog):
    """In the third minibatch: the critic keeps its values, the agents keep their new policies."""
    team = Team(num_epochs=2).used()
    before = copy.deepcopy(team.updater.state_dict())
    step = team.updater.steps["critic"]
    objective, calls = step.objective, []

    def spoiled(data):
        calls.append(data)
        loss = objective(data)
        return spoil(loss, step.parameters()[0]) if len(calls) == 3 else loss

    step.objective = spoiled
    team.updater(team.batch)
    after = team.updater.state_dict()
    assert same(after["steps"]["critic"], before["steps"]["critic"])
    for key, value in after["loss"].items():
        if key.startswith("critic_network."):
            assert torch.equal(value, before["loss"][key])
        elif key.startswith("actor_network."):
            assert not torch.equal(value, before["loss"][key])
    assert "critic was not finite" in caplog.text


def test_a_surrogate_that_is_not_finite_is_not_followed():
    """HATRPO: the agent whose surrogate is NaN keeps its policy, the others take their steps."""
    team = Team(loss=HATRPOLoss)
    before = {key: value.clone() for key, value in tensors(team.actor).items()}
    step = team.updater.steps["agents_1"]
    surrogate = step.surrogate
    step.surrogate = lambda dist, data: surrogate(dist, data) * NAN
    metrics = team.updater(team.batch)
    assert metrics["agents_1", "line_search_success"] == 0
    for key, value in tensors(team.actor).items():
        assert torch.equal(value[1], before[key][1])
        assert not torch.equal(value[0], before[key][0])


@LOSSES
@pytest.mark.parametrize("place", ["agent", "critic"])
def test_an_error_inside_a_network_leaves_its_parameters_in_place(kind, place):
    """A network that fails in the middle of a call does not keep what was swapped in for it."""
    team = Team(loss=kind)
    network = team.critic if place == "critic" else team.actor
    before, parameters = team.state(), list(network.parameters())
    layer = next(module for module in network.modules() if isinstance(module, torch.nn.Linear))

    def fails(*args):
        raise RuntimeError("in the middle")

    hook = layer.register_forward_hook(fails)
    with pytest.raises(ValueError, match=r"cannot read the batch .*: in the middle"):
        team.updater(team.batch)
    hook.remove()
    assert same(team.state(), before)
    assert all(now is then for now, then in zip(network.parameters(), parameters, strict=True))
    team.updater(team.batch)


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Leaves out the figures, which take longer than these runs."""
    monkeypatch.setattr(training, "write_report", lambda config, folder: None)


def finished(config, folder):
    """A run, and what it has learned and measured."""
    training.run(config, folder)
    return checkpoint.read(folder)["updater"], table(folder / "metrics.csv")


def test_an_environment_that_raises(tmp_path, monkeypatch):
    """In the middle of the third batch: resumed from its last checkpoint, the run is the same."""
    config = tiny_config("collector.restart_interval=1")
    whole = finished(config, tmp_path / "whole")
    step, calls = VmasEnv._step, []

    def breaks(self, tensordict):
        calls.append(tensordict)
        if len(calls) == 15:
            raise RuntimeError("the simulator broke")
        return step(self, tensordict)

    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(VmasEnv, "_step", breaks)
        with pytest.raises(RuntimeError, match="the simulator broke"):
            training.run(config, broken)
    assert checkpoint.read(broken)["progress"]["iteration"] == 2
    assert same(finished(replace(config, resume=str(broken)), broken), whole)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_workers")
@pytest.mark.parametrize("moment", ["next", "policy_changed"])
def test_a_worker_that_is_killed(tmp_path, monkeypatch, moment):
    """Before a batch, or while the policy is sent: one sentence, no deadlock, the checkpoint stays.

    ``moment`` is the method of the recipe's collection that finds the worker dead.
    """
    config = tiny_config("collector=multi", "collector.restart_interval=1")
    method, calls = getattr(Batches, moment), []

    def killing(self):
        calls.append(moment)
        if len(calls) == 2:
            worker = self._collector.procs[0]
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
        return method(self)

    monkeypatch.setattr(Batches, moment, killing)
    with pytest.raises(WorkerError, match=r"1 of 2 processes .* \(exit codes: -9\).*: resume"):
        training.run(config, tmp_path)
    assert checkpoint.read(tmp_path)["progress"]["iteration"] == 1


class Disk:
    """A disk that is full from the ``last``-th file of a kind on; ``/dev/full`` stands for it."""

    def __init__(self, monkeypatch, matches, last):
        self.open, self.matches, self.left = Path.open, matches, last
        monkeypatch.setattr(Path, "open", lambda path, *args, **kwargs: self(path, args, kwargs))

    def __call__(self, path, args, kwargs):
        writes = "w" in "".join(map(str, args)) or "a" in "".join(map(str, args))
        if writes and self.matches(path):
            self.left -= 1
            path = Path("/dev/full") if self.left < 0 else path
        return self.open(path, *args, **kwargs)


needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


@needs_dev_full
def test_a_full_disk(tmp_path, monkeypatch):
    """At the second checkpoint: one sentence, the first is intact, and the run resumes from it."""
    config = tiny_config("collector.restart_interval=1")
    whole = finished(config, tmp_path / "whole")
    folder = tmp_path / "full"
    with monkeypatch.context() as patch:
        Disk(patch, lambda path: checkpoint.SUFFIX in path.name, last=1)
        with pytest.raises(CheckpointError) as caught:
            training.run(config, folder)
    sentence = str(caught.value)
    assert "00000002.pt cannot be written" in sentence
    assert "No space left on device" in sentence
    assert "\n" not in sentence
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["00000001.pt"]
    assert same(finished(replace(config, resume=str(folder)), folder), whole)


@needs_dev_full
@pytest.mark.parametrize("name", [checkpoint.SUFFIX, "metrics.csv"])
def test_a_full_disk_on_the_command_line(tmp_path, monkeypatch, capsys, name):
    """Whatever file does not fit: exit code 2 and one sentence, no traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["torchrl-happo", *TINY])
    with monkeypatch.context() as patch:
        Disk(patch, lambda path: name in path.name, last=0)
        with pytest.raises(SystemExit) as caught:
            train.main()
    assert caught.value.code == 2
    words = capsys.readouterr().err
    assert "No space left on device" in words
    assert words.count("\n") == 1


@pytest.mark.slow
def test_killed_while_checkpoints_are_written(tmp_path, record_property):
    """Killed at random moments, again and again: every checkpoint is whole, and none is lost.

    The chain of processes, each going on from where the one before was killed, ends with the
    numbers of a run that was never interrupted, bit for bit. ``CHECKPOINT_KILLS`` sets how often;
    ``--junitxml`` shows how many kills left half a file.
    """
    script = Path(__file__).with_name("checkpoint_writer.py")
    moments, newest, torn = random.Random(0), 0, set()
    folder = tmp_path / "checkpoints"
    with subprocess.Popen(
        [sys.executable, script, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(torchrl_happo.__file__).parents[1])},
    ) as server:
        for _ in range(KILLS):
            server.stdin.write("go\n")
            server.stdin.flush()
            child = int(server.stdout.readline())
            time.sleep(moments.uniform(0.0, 0.1))
            os.kill(child, signal.SIGKILL)
            assert server.stdout.readline() == "ended\n"
            written = checkpoint.list_checkpoints(folder)
            for path in written:
                assert checkpoint.read(path)["progress"]["iteration"] == int(path.stem)
            iterations = [int(path.stem) for path in written] or [0]
            assert newest <= iterations[-1]
            newest = iterations[-1]
            torn |= {path.name for path in folder.glob(".*")}
        server.stdin.close()
    for name, number in {"kills": KILLS, "torn": len(torn), "iterations": newest}.items():
        record_property(name, number)
    assert newest > 0

    uninterrupted = Training()
    while uninterrupted.progress.iteration < newest:
        uninterrupted.iterate()
    assert same(checkpoint.read(tmp_path)["updater"], uninterrupted.updater.state_dict())

    resumed = Training().resume(tmp_path)
    resumed.iterate()
    Checkpoints(tmp_path, KEEP).save(compose_config(), resumed.updater, resumed.progress)
    assert len(list(folder.iterdir())) == KEEP  # what the killed ones left about is gone


@pytest.mark.parametrize("value_norm", [RunningValueNorm, PopArtValueNorm])
@pytest.mark.parametrize("scale", [1e18, 1e25, 1e36])
def test_returns_too_large_for_the_statistics(scale, value_norm):
    """They are not taken in where they would overflow; the next batch is learned from as ever."""
    actor, critic = make_actor(), make_critic()
    loss = HAPPOLoss(actor, critic, value_norm=value_norm(shape=1), loss_critic_type="l2")
    updater = SequentialUpdater(loss, num_epochs=1, max_grad_norm=1.0)
    batch = make_batch(actor)
    updater(batch)
    before = copy.deepcopy(loss.value_norm.state_dict())
    huge = batch.clone()
    huge["next", "reward"] *= scale
    updater(huge)
    assert all(value.isfinite().all() for value in tensors(loss).values())
    if scale > 1e20:
        assert same(loss.value_norm.state_dict(), before)
    before = copy.deepcopy(updater.state_dict()["steps"])
    metrics = updater(batch)
    assert all(value.isfinite() for value in metrics.values(True, True))
    for name, step in updater.state_dict()["steps"].items():
        assert not same(step, before[name])
