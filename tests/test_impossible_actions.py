"""One impossible action does not poison the rest of a batch."""

from __future__ import annotations

import pytest
import torch
from team import make_observations
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Beta, Independent
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import (
    MaskedCategorical,
    MultiAgentMLP,
    OneHotCategorical,
    ProbabilisticActor,
)

from torchrl_happo import HAPPOLoss, SequentialUpdater


class Positive(nn.Module):
    """Two positive parameters."""

    def forward(self, raw):
        return (nn.functional.softplus(raw) + 1.5).chunk(2, -1)


class Bounded(Independent):
    """Beta distributions over the dimensions of an action."""

    def __init__(self, concentration1, concentration0):
        super().__init__(Beta(concentration1, concentration0, validate_args=False), 1)


def masked():
    net = MultiAgentMLP(5, 3, 3, centralized=False, share_params=False, num_cells=[8])
    module = TensorDictModule(net, [("agents", "observation")], [("agents", "logits")])
    actor = ProbabilisticActor(
        module,
        {"logits": ("agents", "logits"), "mask": ("agents", "action_mask")},
        [("agents", "action")],
        distribution_class=MaskedCategorical,
        return_log_prob=True,
    )
    data = make_observations()
    data["agents", "action_mask"] = torch.ones(4, 6, 3, 3, dtype=torch.bool)
    return actor, data


def bounded():
    net = MultiAgentMLP(5, 4, 3, centralized=False, share_params=False, num_cells=[8])
    keys = [("agents", "concentration1"), ("agents", "concentration0")]
    module = TensorDictModule(nn.Sequential(net, Positive()), [("agents", "observation")], keys)
    actor = ProbabilisticActor(
        module, keys, [("agents", "action")], distribution_class=Bounded, return_log_prob=True
    )
    return actor, make_observations()


def mask_row(batch, agent, row):
    batch["agents", "action"][1, 2, agent] = 2
    batch["agents", "action_mask"][1, 2, agent] = torch.tensor(row)


def at_bound(batch, agent, value):
    batch["agents", "action"][1, 2, agent] = value


#: From a factory of an actor with observations, and what makes an action of an agent impossible.
CASES = {
    "forbidden": (masked, lambda batch, i: mask_row(batch, i, [True, True, False])),
    "one other choice": (masked, lambda batch, i: mask_row(batch, i, [True, False, False])),
    "nothing allowed": (masked, lambda batch, i: mask_row(batch, i, [False] * 3)),
    "lower bound of a Beta": (bounded, lambda batch, i: at_bound(batch, i, 0.0)),
    "upper bound of a Beta": (bounded, lambda batch, i: at_bound(batch, i, 1.0)),
}


def spoilt(case, agent, checks):
    torch.manual_seed(0)
    build, spoil = CASES[case]
    actor, data = build()
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        data = actor(data)
    data["advantage"] = torch.randn(4, 6, 1)
    loss = HAPPOLoss(actor, entropy_coeff=0.0)
    updater = SequentialUpdater(loss, num_epochs=1, order="fixed", check_finite=checks)
    if not checks:
        updater(data.clone())  # the first batch is looked at in any case
    spoil(data, agent)
    return updater, data


@pytest.mark.parametrize("agent", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_with_key_and_position(case, agent):
    """Nothing has moved; marked as inactive, as the sentence says, the batch can be used."""
    updater, data = spoilt(case, agent, True)
    before = [p.detach().clone() for p in updater.loss.parameters()]
    with pytest.raises(ValueError, match=rf"'action'\) of agent 'agents_{agent}' at item \[8\] "):
        updater(data)
    assert all(map(torch.equal, before, updater.loss.parameters()))
    active = torch.ones(4, 6, 3, dtype=torch.bool)
    active[1, 2, agent] = False
    metrics = updater(data.set(("agents", "active"), active))
    assert metrics["agents_2", "factor_mean"].isfinite()


@pytest.mark.parametrize("case", CASES)
def test_unchecked_the_factor_of_the_others_stays_finite(case):
    """With check_finite=False nothing is refused, and the later agents learn."""
    updater, data = spoilt(case, 0, False)
    agents = updater.loss.agents
    before = [[p.detach().clone() for p in agent.parameters()] for agent in agents]
    metrics = updater(data)
    for i in (1, 2):
        assert metrics[f"agents_{i}", "factor_mean"].isfinite()
        assert all(p.isfinite().all() for p in agents[i].parameters())
        assert not all(map(torch.equal, before[i], agents[i].parameters()))


def test_one_hot_actions_that_say_yes_or_no():
    """One-hot actions as an environment draws them are refused; cast as named, they train."""
    net = MultiAgentMLP(5, 3, 3, centralized=False, share_params=False, num_cells=[8])
    actor = ProbabilisticActor(
        TensorDictModule(net, [("agents", "observation")], [("agents", "logits")]),
        [("agents", "logits")],
        [("agents", "action")],
        distribution_class=OneHotCategorical,
        return_log_prob=True,
    )
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        batch = actor(make_observations())
    batch["advantage"] = torch.randn(*batch.shape, 1)
    updater = SequentialUpdater(HAPPOLoss(actor, None, entropy_coeff=0.0), num_epochs=1)
    batch["agents", "action"] = batch["agents", "action"].bool()
    with pytest.raises(ValueError, match=r"is of torch\.bool, .* write it as torch\.int64"):
        updater(batch)
    batch["agents", "action"] = batch["agents", "action"].to(torch.int64)
    assert updater(batch)["agents_0", "kl"] > 0
