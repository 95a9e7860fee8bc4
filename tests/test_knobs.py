"""Knobs that turn: what is set between updates acts in the next one.

Every optimiser of torch.optim is resumed in ``test_steps.py``.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from newer import needs
from team import make_actor, make_batch, make_critic
from torchrl.modules import IndependentNormal
from torchrl.objectives.utils import ValueEstimators

from torchrl_happo import HAPPOLoss, HATRPOLoss, SequentialUpdater


def team(loss_class=HAPPOLoss, rate=0.05, updater=(), **kwargs):
    torch.manual_seed(0)
    loss = loss_class(make_actor(distribution=IndependentNormal), make_critic(), **kwargs)
    settings = {"num_epochs": 3, "optimizer": partial(torch.optim.SGD, lr=rate), **dict(updater)}
    return SequentialUpdater(loss, **settings), make_batch(loss.actor_network)


KNOBS = {
    "clip_epsilon": (HAPPOLoss, 0.2, 1e-4),
    "entropy_coeff": (HAPPOLoss, 0.01, 0.5),
    "entropy_coeff from 0": (HAPPOLoss, 0.0, 0.5),
    "critic_coeff": (HAPPOLoss, 1.0, 0.1),
    "clip_value": (HAPPOLoss, 0.5, 1e-4),
    "max_kl": (HATRPOLoss, 1e-2, 1e-5),
    "critic_coeff of HATRPO": (HATRPOLoss, 1.0, 0.1),
}


@pytest.mark.parametrize("case", KNOBS)
def test_a_number_that_is_set_between_updates_acts(case):
    """As if the loss had been built with it, and otherwise than before."""
    loss_class, first, second = KNOBS[case]
    name = case.split()[0]
    outcomes = []
    for built, later in ((first, second), (second, second), (first, first)):
        updater, batch = team(loss_class, **{name: built})
        setattr(updater.loss, name, later)
        metrics = updater(batch)
        outcomes.append([p.detach().clone() for p in updater.loss.parameters()])
        assert metrics["critic", "loss"].isfinite()
    assert all(map(torch.equal, outcomes[0], outcomes[1]))
    assert not all(map(torch.equal, outcomes[0], outcomes[2]))


def test_a_pair_of_thresholds_is_set_anew():
    """A number, or another pair; a form that the loss was not built for is refused."""
    loss = team(clip_epsilon=(0.1, 0.3))[0].loss
    loss.clip_epsilon = (0.2, 0.4)
    bounds = [loss.clip_epsilon_low.item(), loss.clip_epsilon_high.item()]
    assert bounds == pytest.approx([0.2, 0.4])
    loss.clip_epsilon = 0.15
    bounds = [loss.clip_epsilon_low.item(), loss.clip_epsilon_high.item()]
    assert bounds == pytest.approx([0.15, 0.15])
    with pytest.raises(ValueError, match="was not built for clip_epsilon"):
        team()[0].loss.clip_epsilon = (0.1, 0.2)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        team()[0].loss.clip_epsilon = 1.5


@needs("ValueEstimators.MAGAE", "0.13")
def test_gae_is_the_one_of_several_agents():
    """ValueEstimators.GAE stands in most scripts: the numbers equal MAGAE's."""
    outcomes = []
    for kind in (ValueEstimators.GAE, ValueEstimators.MAGAE):
        updater, batch = team()
        updater.loss.make_value_estimator(kind, gamma=0.9, lmbda=0.8)
        outcomes.append(updater(batch))
    assert (outcomes[0] == outcomes[1]).all()


def test_vtrace_is_refused_where_it_is_chosen():
    """It would want the log-probability of the whole team."""
    loss = team()[0].loss
    with pytest.raises((ValueError, NotImplementedError), match=r"(?i)v-?trace"):
        loss.make_value_estimator(ValueEstimators.VTrace)


@pytest.mark.parametrize("loss_class", [HAPPOLoss, HATRPOLoss])
def test_normalize_advantage_acts_in_the_updater(loss_class):
    """And the updater's own setting goes before it."""
    means = []
    for own, chosen in ((None, None), (False, None), (False, True), (None, False), (True, False)):
        updater, batch = team(
            loss_class, normalize_advantage=own, updater={"standardize_advantage": chosen}
        )
        batch["advantage"] = 5 + torch.ones(4, 6, 1).cumsum(1)
        batch["value_target"] = torch.zeros(4, 6, 3, 1)
        metrics = updater(batch)
        first = next(n for n in metrics.keys() if metrics[n].get("position", None) == 0)
        means.append(metrics[first, "surrogate_before"].item())
    assert means == pytest.approx([0, 8.5, 0, 8.5, 8.5], abs=1e-4)
