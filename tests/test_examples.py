"""Every example runs with few frames, and ends in something to look at."""

from __future__ import annotations

import importlib
import pkgutil
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from torchrl_happo import examples

FOLDER = Path(examples.__file__).parent
#: Frames of a short run of each example; what it prints of them is below.
FRAMES = {
    "happo_by_hand": 1_000,
    "memory": 1_600,
    "own_environment": 4_000,
    "trainer": 2_000,
    "two_teams": 3_200,
    "unlike_agents": 3_000,
    "vmas_team": 3_000,
}
PRINTED = {
    "happo_by_hand": r"share of the best joint action: \d\.\d\d\n",
    "memory": r" +frames +without +GRU\n( +\d+ +\d\.\d\d +\d\.\d\d\n){2}",
    "own_environment": r"(.* frames: reward .*\n){2}(target .*: the load ends at .*\n){5}",
    "trainer": r"before the checkpoint:( \d\.\d\d){2}\n after the checkpoint:( \d\.\d\d){2}\n",
    "two_teams": r" +frames +predators +prey\n( +-?[\d.]+){3}\n",
    "unlike_agents": r" +frames +return .*\n( +-?[\d.]+){4}\n",
    "vmas_team": r" +frames +MAPPO +HAPPO\n( +-?[\d.]+){3}\n",
}
NEEDS = dict.fromkeys(("two_teams", "unlike_agents", "vmas_team"), "vmas")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FRAMES)
def test_an_example(name, monkeypatch, capsys):
    """``python -m torchrl_happo.examples.NAME FRAMES``, in this process."""
    pytest.importorskip(NEEDS.get(name, "torch"))
    monkeypatch.setattr(sys, "argv", [name, str(FRAMES[name])])
    sys.modules.pop(f"torchrl_happo.examples.{name}", None)
    runpy.run_module(f"torchrl_happo.examples.{name}", run_name="__main__")
    assert re.fullmatch(PRINTED[name], capsys.readouterr().out)


def test_all_of_them_are_run_and_short():
    """At most 120 lines each, with the command that runs it; the list of the package names all."""
    names = [module.name for module in pkgutil.iter_modules([str(FOLDER)])]
    assert sorted(names) == sorted(FRAMES)
    for name in names:
        text = (FOLDER / f"{name}.py").read_text()
        assert len(text.splitlines()) <= 120, name
        assert f"    python -m torchrl_happo.examples.{name}\n" in text
        assert f"`torchrl_happo.examples.{name}`" in examples.__doc__


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_goes_on_from_its_checkpoint(tmp_path):
    """A trainer saves the team, its optimisers and its counters, and another one loads them."""
    trainer = importlib.import_module("torchrl_happo.examples.trainer")
    (first, saved), (second, loaded) = (
        trainer.make_trainer(tmp_path / "trainer", 1_000, seed) for seed in (0, 1)
    )
    first.train()
    second.load_from_file(tmp_path / "trainer")
    assert second.collected_frames == 1_000
    assert loaded.updater.num_updates == saved.updater.num_updates == 2
    pairs = zip(saved.updater.loss.parameters(), loaded.updater.loss.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    for name, step in saved.updater.steps.items():
        other = loaded.updater.steps[name].optimizer.state_dict()["state"]
        for index, state in step.optimizer.state_dict()["state"].items():
            assert torch.equal(state["exp_avg"], other[index]["exp_avg"])
