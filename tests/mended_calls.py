"""Parts of the tables of mended calls."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from recipe_helpers import tiny_config
from team import make_observations
from torch import nn
from wrong_calls import (
    Team,
    run,
)

from torchrl_happo.recipe import checkpoint, training

ADAM = partial(torch.optim.Adam, lr=3e-4)


def trains(given=Team):
    """A call that updates a team with its own batch, from a factory of the team."""
    return lambda: (lambda team: team.updater(team.batch))(given())


def reads(change, **keys):
    """A call that updates a team with its batch as ``change`` edits it, under other keys."""

    def call():
        team = Team()
        if keys:
            team.loss.set_keys(**keys)
        other = change(team.batch)
        team.updater(team.batch if other is None else other)

    return call


def loads(make):
    """A call that loads the state of one team into another one, each made by ``make``."""
    return lambda: make().updater.load_state_dict(make().used().updater.state_dict())


def renamed(old, new):
    """A change of a batch: an entry under another key."""
    return lambda batch: batch.set(new, batch[old]).exclude(old)


def seen(actor):
    """An actor that has been run once, so that it has its sizes."""
    actor(make_observations())
    return actor


def in_double(team):
    """A team's batch in double precision, as its networks are from now on."""
    team.loss.double()
    return team.batch.apply(lambda entry: entry.double() if entry.is_floating_point() else entry)


def resumes(*words):
    """The run of the wrong calls goes on."""
    checkpoint.read(run().folder)
    config = tiny_config("total_frames=72", f"resume={run().folder}", *words)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as place:
        patch.setattr(training, "write_report", lambda config, folder: None)
        training.run(replace(config, total_frames=96), Path(place) / "new")


def weights():
    """A parameter with its name."""
    return [("w", nn.Parameter(torch.zeros(2)))]


def alike(names, call):
    """Several wrong calls with one cure."""
    return dict.fromkeys(names, call)
