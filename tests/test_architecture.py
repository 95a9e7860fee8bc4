"""The house as a reader finds it: its floors, its root, and the way of one update through it."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from team import make_actor, make_batch, make_critic

import torchrl_happo
from torchrl_happo import HAPPOLoss, SequentialUpdater

ROOT = Path(torchrl_happo.__file__).parent
SMALL = {"arguments", "distributed", "masked", "transaction", "versions"}
#: In the place of TorchRL's own, where TorchRL is too old to have it: of ``versions.py``.
STAND_INS = {"objectives.team_gae"}
#: Modules that an update enters beside the small ones: one more is a decision.
MODULES = 21
FLOORS = ["policy", "team", "steps", "objectives", "update", "networks", "envs", "recipe"]
ENTRIES = {*SMALL, *FLOORS, "__init__", "conf", "examples", "train", "benchmarl"}


def module_of(code):
    """The module of the library that a piece of code belongs to, from the package on."""
    path = Path(code.co_filename)
    if ROOT not in path.parents:
        return None
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


class Calls:
    """The modules that a call enters, and which of them calls which."""

    def __init__(self):
        self.entered, self.edges = set(), set()

    def __call__(self, frame, event, arg):
        if event != "call" or (module := module_of(frame.f_code)) is None:
            return
        self.entered.add(module)
        caller = frame.f_back
        while caller is not None and module_of(caller.f_code) is None:
            caller = caller.f_back
        if caller is not None and (origin := module_of(caller.f_code)) != module:
            self.edges.add((origin, module))


def test_an_update_goes_one_way_through_few_modules():
    """HAPPO, MLP, eager: no module more than today beside the small ones, and no cycle of calls."""
    actor = make_actor()
    updater = SequentialUpdater(
        HAPPOLoss(actor, make_critic(), entropy_coeff=0.0),
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        num_epochs=2,
    )
    updater(make_batch(actor))  # networks are compared with the joint actor once
    calls = Calls()
    sys.setprofile(calls)
    try:
        updater(make_batch(actor))
    finally:
        sys.setprofile(None)
    entered = calls.entered - SMALL - STAND_INS - {"conftest"}
    assert len(entered) <= MODULES, sorted(entered)
    edges = {(a, b) for a, b in calls.edges if a in entered and b in entered}
    remaining = set(entered)
    while remaining:
        leaves = {m for m in remaining if not any(a == m and b in remaining for a, b in edges)}
        assert leaves, sorted((a, b) for a, b in edges if {a, b} <= remaining)
        remaining -= leaves


def test_the_root_has_the_entries_of_the_design():
    """The file list is the table of contents."""
    found = {path.stem for path in ROOT.iterdir() if not path.name.startswith(("_", "."))}
    assert found - {"py"} <= ENTRIES
    assert set(FLOORS) <= found


def test_no_file_is_longer_than_a_sitting():
    """350 lines."""
    long = {
        str(path.relative_to(ROOT)): count
        for path in ROOT.rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 350
    }
    assert not long


def test_the_readme_has_the_floors():
    """Its table of the architecture names each floor, in the order of the contract."""
    readme = (ROOT.parent / "README.md").read_text()
    rows = [line.split("`")[1].strip("/") for line in readme.splitlines() if line.startswith("| `")]
    named = [row for row in rows if row in FLOORS]
    assert named == FLOORS
