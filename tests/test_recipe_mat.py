"""MAT, MAT-Dec and T-PPO on the command line."""

from __future__ import annotations

import pytest
import torch
from recipe_helpers import table, tiny_config
from torchrl.envs import ExplorationType, set_exploration_type

from torchrl_happo.recipe import load, training
from torchrl_happo.recipe.compose import compose_config
from torchrl_happo.recipe.config import ConfigError
from torchrl_happo.recipe.validation import validate

SMALL = ("algorithm.size=8", "algorithm.num_heads=2", "task=vmas/balance")


@pytest.fixture(autouse=True)
def _without_reports(monkeypatch):
    monkeypatch.setattr(training, "write_report", lambda config, folder: None)


@pytest.mark.parametrize("algorithm", ["mat", "mat_dec"])
def test_it_trains_and_comes_back(algorithm, tmp_path):
    """Metrics of the block; the policy that ``load`` returns is that of the run, a whole team."""
    words = (f"algorithm={algorithm}", *SMALL, "algorithm.value_norm=running")
    folder = training.run(tiny_config(*words), tmp_path)
    row = table(folder / "metrics.csv")[-1]
    assert {"agents/kl", "agents/loss", "critic/explained_variance"} <= row.keys()
    assert float(row["agents/kl"]) > 0
    team = load(folder)
    before = table(folder / "evaluation.csv")[-1]["return"]
    assert team.evaluate(episodes=3)["return"] == pytest.approx(float(before))
    (alone,) = team.agents.values()
    state = team.env.reset()
    with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
        wanted = team.policy(state.clone())["agents", "action"]
        torch.testing.assert_close(alone(state["agents", "observation"])[0], wanted)


def test_tppo_teaches_agents_that_act_alone(tmp_path):
    """Evaluated and loaded are agents with a network each; a run goes on as if never stopped."""
    words = ("algorithm=tppo", *SMALL, "collector.restart_interval=1", "checkpoint.interval=1")
    whole = training.run(tiny_config(*words), tmp_path / "whole")
    rows = table(whole / "metrics.csv")
    assert {"agents/kl", "alone_agents_0/loss", "alone_agents_2/loss"} <= rows[-1].keys()
    assert float(rows[-1]["alone_agents_0/loss"]) < float(rows[0]["alone_agents_0/loss"])
    team = load(whole)
    assert sorted(team.agents) == ["agents_0", "agents_1", "agents_2"]
    assert "transformer" not in type(team.policy).__name__.lower()
    first = sorted((whole / "checkpoints").glob("*"))[0]
    resumed = training.run(tiny_config(*words, f"resume={first}"), tmp_path / "resumed")
    assert table(resumed / "metrics.csv") == rows
    assert table(resumed / "evaluation.csv")[-1] == table(whole / "evaluation.csv")[-1]


@pytest.mark.parametrize(
    ("wrong", "words", "mended"),
    [
        ("algorithm.num_heads=3", "does not divide algorithm.size=64", "algorithm.num_heads=4"),
        ("model=gru", "take model=mlp", "model=mlp"),
        ("critic.model=gru", "leave out what is set under critic", "critic.model=mlp"),
        ("algorithm.critic_epochs=3", "leave out algorithm.critic_epochs", ""),
        ("algorithm.order=fixed", "leave out algorithm.order", ""),
        (
            "algorithm.popart=true algorithm.value_norm=running",
            "leave out algorithm.popart",
            "algorithm.value_norm=running",
        ),
    ],
)
def test_wrong_settings_and_their_cures(wrong, words, mended):
    """In one sentence, before anything is built."""
    with pytest.raises(ConfigError, match=words) as caught:
        validate(compose_config("algorithm=mat", *wrong.split()))
    assert "\n" not in str(caught.value)
    validate(compose_config("algorithm=mat", *mended.split()))
