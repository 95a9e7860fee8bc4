"""HAA2C, and one trust region for the whole team: what their equations promise."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from recipe_helpers import table, tiny_config
from team import N_AGENTS, make_actor, make_batch, make_critic, perturb, same_state, state_of
from torchrl.modules import IndependentNormal

from torchrl_happo import HAA2CLoss, HAPPOLoss, SequentialUpdater
from torchrl_happo.recipe import training

NAMES = [f"agents_{i}" for i in range(N_AGENTS)]
KEYS = {"value": ("agents", "state_value"), "action": ("agents", "action")}


def updated(loss_class, batch, state, *, order="fixed", **kwargs):
    """The actor of a team after an update, and its metrics."""
    actor = make_actor()
    critic = make_critic()
    loss = loss_class(actor, critic, **{"entropy_coeff": 0.0, **kwargs})
    actor.load_state_dict(state[0])
    critic.load_state_dict(state[1])
    adam = partial(torch.optim.Adam, lr=3e-3)
    updater = SequentialUpdater(loss, optimizer=adam, num_epochs=5, order=order)
    return actor, updater(batch)


@pytest.fixture
def start():
    """A batch of a team, and the states of its networks."""
    actor, critic = make_actor(), make_critic()
    return make_batch(actor), (state_of(actor), state_of(critic))


def test_haa2c_is_the_unclipped_surrogate():
    """The mean of -r M over the valid decisions, with its gradient."""
    actor = make_actor(distribution=IndependentNormal).double()
    batch = make_batch(actor)
    batch["advantage"] = torch.randn(4, 6, 1, dtype=torch.float64)
    batch["factor"] = torch.rand(4, 6, 1, dtype=torch.float64)
    batch["agents", "active"] = torch.rand(4, 6, N_AGENTS) < 0.7
    perturb(actor, 0.3)
    loss = HAA2CLoss(actor, None, entropy_coeff=0.0)
    for index, agent in enumerate(loss.agents):
        data = loss.agent_data(agent, batch)
        log_prob = actor.get_dist(batch).log_prob(batch["agents", "action"])[..., index]
        ratio = (log_prob - batch["agents", "action_log_prob"][..., index]).exp()
        valid = batch["agents", "active"][..., index]
        product = (ratio * batch["factor"][..., 0] * batch["advantage"][..., 0])[valid]
        assert (ratio - 1).abs().max() > 0.3  # beyond the clipping range
        torch.testing.assert_close(loss.agent_loss(agent, data), -product.mean())


def test_haa2c_is_happo_with_an_unreachable_clip(start):
    """To round-off, through several epochs of all agents; a reachable one is another update."""
    ours, metrics = updated(HAA2CLoss, *start)
    wide, _ = updated(HAPPOLoss, *start, clip_epsilon=1 - 1e-6)
    narrow, _ = updated(HAPPOLoss, *start, clip_epsilon=0.01)
    assert max(metrics[name, "ratio_max"] for name in NAMES) < 2
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, wide.state_dict()[key], rtol=1e-6, atol=1e-7)
    assert not same_state(ours.state_dict(), narrow.state_dict())


def test_haa2c_reports_no_clipping_and_refuses_a_threshold(start):
    """Neither the updater nor ``forward`` speaks of a clip fraction."""
    _, metrics = updated(HAA2CLoss, *start)
    assert "clip_fraction" not in metrics[NAMES[0]].keys()
    actor = make_actor()
    loss = HAA2CLoss(actor, None, entropy_coeff=0.0)
    batch = make_batch(actor)
    batch["advantage"] = torch.randn(4, 6, 1)
    assert "clip_fraction" not in loss(batch).keys()
    with pytest.raises(TypeError, match="clips no ratio, so clip_epsilon would not act"):
        HAA2CLoss(actor, None, clip_epsilon=0.2)
    with pytest.raises(ValueError, match="clip_value=True takes clip_epsilon"):
        HAA2CLoss(actor, make_critic(), clip_value=True)
    with pytest.raises(AttributeError, match="clips no ratio"):
        loss.clip_epsilon = 0.1


@pytest.mark.parametrize("words", [("algorithm=haa2c",)], ids=" ".join)
def test_the_recipe_trains_them(tmp_path, words):
    """By their name, for some iterations."""
    config = tiny_config("task=vmas/wheel", *words)
    rows = table(training.run(config, tmp_path / "run") / "metrics.csv")
    assert len(rows) == 3
