"""The trained teams that ship with the library play as well as was recorded."""

from __future__ import annotations

import pytest
import torch
from recipe_helpers import tiny_config

from torchrl_happo.recipe import load, training, zoo
from torchrl_happo.recipe.checkpoint import CheckpointError, DamagedCheckpointError
from torchrl_happo.recipe.config import ConfigError
from torchrl_happo.recipe.zoo import pack


@pytest.mark.parametrize("name", zoo.names())
def test_a_team_plays_as_recorded(name):
    """The same episodes again, within twice the error of their mean; its files are small."""
    if name.startswith("mujoco"):
        pytest.importorskip("envpool", reason="of the extra `mujoco`")
    record = zoo.read_record(name)
    episodes = int(record["episodes"])
    played = load(f"zoo:{name}").evaluate(episodes)
    assert abs(played["return"] - record["return"]) <= 2 * record["return_stderr"]
    files = {path.name: path.stat().st_size for path in zoo.find(name).parent.iterdir()}
    assert files.keys() == {"policy.pt", "record.json", "curve.png"}
    assert sum(files.values()) < 1_000_000


def test_there_are_teams_to_load():
    """Of more than one task."""
    assert len({name.rpartition("/")[0] for name in zoo.names()}) > 1


def test_a_run_goes_into_the_zoo_and_comes_back(tmp_path, monkeypatch):
    """With the weights of its policy, its record, and its curve."""
    config = tiny_config("evaluation.episodes=4")
    run, place = tmp_path / "run", tmp_path / "zoo"
    training.run(config, run)
    policy = load(run).policy
    pack(run, "vmas/mine/happo", policy, "abc", place)
    monkeypatch.setattr(zoo, "ZOO", place)
    assert zoo.names() == ["vmas/mine/happo"]
    again = dict(load("zoo:vmas/mine/happo").policy.named_parameters())
    assert all(torch.equal(value, again[key]) for key, value in policy.named_parameters())
    with pytest.raises(CheckpointError, match=r"do not fit this policy: \['bias', 'module\.0"):
        zoo.restore(torch.nn.Linear(1, 1), again)
    assert zoo.read_record("vmas/mine/happo")["revision"] == "abc"

    policy = place / "vmas" / "mine" / "happo" / "policy.pt"
    policy.write_bytes(policy.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpointError, match="vmas/mine/happo are not those"):
        load("zoo:vmas/mine/happo")


def test_an_unknown_team_is_refused_with_a_near_one():
    """And what it is near to can be loaded."""
    known = zoo.names()[0]
    with pytest.raises(ConfigError, match=f"There is no team .* in the zoo; near: .*{known}"):
        load(f"zoo:{known}x")
