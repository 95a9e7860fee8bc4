"""Anything a user may legitimately combine: no exception, finite parameters, metrics in range.

A scenario is a team (one group or several, stacks, lists and blocks of networks, discrete and
continuous, with what stands around a network and what agents see), a batch (its shape, inactive
agents, gaps, saturated actions, rewards of any size), the mode of torch that an update is called
in, and the hyperparameters of a loss. By hand, ``TORCHRL_HAPPO_EXAMPLES=20000`` tries more of
them, others on every run.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from effort import effort
from hypothesis import given
from hypothesis import strategies as st
from scenarios import Scenario, a2po, critics, datasets, haa2c, happo, hatrpo, teams, updaters

from torchrl_happo import A2POLoss, CoPPOLoss, HAA2CLoss, HAPPOLoss, HATRPOLoss

#: Metrics that may overflow where nothing bounds the ratio.
OF_RATIOS = ("surrogate", "ratio_mean", "ratio_max", "kl", "factor_mean", "factor_max")


def check(scenario, metrics):
    """Every claim that holds for any scenario."""
    for name, parameter in scenario.loss.named_parameters():
        assert parameter.isfinite().all(), name
    for key, value in metrics.items(include_nested=True, leaves_only=True):
        assert value.shape == (), key
        may_overflow = isinstance(scenario.loss, HAA2CLoss) and key[-1] in OF_RATIOS
        assert value.isfinite() or may_overflow, (key, value)
    agents = [metrics[agent.name] for agent in scenario.loss.agents]
    assert sorted(a["position"].item() for a in agents) == list(range(len(agents)))
    # Rounding to 8 bits of precision: a divergence of a policy from itself is not quite 0.
    slack = 0.05 if scenario.data.mode == "autocast" else 0.0
    for agent in agents:
        assert 0 < agent["factor_ess"] <= 1 + 1e-4
        assert 0 <= agent["factor_mean"] <= agent["factor_max"] * (1 + 1e-5)
        # Where rows are padded, zeros stand for an agent that acts nowhere.
        if agent.get("epochs", 1) > 0 and "kl" in agent.keys():
            check_agent(scenario.loss, agent, slack)
    assert metrics["critic", "explained_variance"] <= 1 + 1e-5
    if "loss" in metrics["critic"].keys():  # there was a value that counts
        assert metrics["critic", "loss"] >= 0


def check_agent(loss, agent, slack):
    """What an agent with at least one valid step reports."""
    assert agent["kl"] >= -1e-5 - slack
    assert 0 <= agent["ratio_min"] <= agent["ratio_max"]
    assert agent["grad_norm"] >= 0
    if "epochs" in agent.keys():
        assert 0 <= agent.get("clip_fraction", 0.0) <= 1
        assert 1 <= agent["epochs"] <= 3
    else:
        assert agent["line_search_success"] in (0, 1)
        assert 0 <= agent["step_fraction"] <= 1
        largest = max(loss.radius(each.name) for each in loss.agents)
        assert agent["kl"] <= largest * 1.01 + 1e-6 + slack


def assert_equal(one, other):
    """Two batches are the same, NaN included."""
    for key in one.keys(True, True):
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.no_cover  # which takes twice as long
@pytest.mark.parametrize(
    ("loss_class", "loss_kwargs"),
    [
        (HAPPOLoss, happo),
        (HATRPOLoss, hatrpo),
        (HAA2CLoss, haa2c),
        (A2POLoss, a2po),
        (CoPPOLoss, a2po),
    ],
    ids=["HAPPO", "HATRPO", "HAA2C", "A2PO", "CoPPO"],
)
def test_fuzz(loss_class, loss_kwargs):
    """Two updates on fresh batches of any scenario; the batch is left as it was."""

    @effort(90 if loss_class in (HAPPOLoss, HATRPOLoss) else 40)
    @given(
        st.integers(0, 2**31),
        teams(),
        datasets,
        loss_kwargs,
        critics,
        updaters,
        st.sampled_from([None, 0.01]),
        st.booleans(),
        st.sampled_from([None, None, None, "gru", "lstm"]),
        st.booleans(),
    )
    def holds(seed, groups, data, own, critic, updater, target_kl, per_agent_critic, memory, pads):
        torch.manual_seed(seed)
        scenario = Scenario(
            loss_class,
            [replace(groups[0], listed=False, deep=False)] if loss_class is CoPPOLoss else groups,
            data,
            {**own, **critic},
            {**updater, "target_kl": target_kl if loss_class is not HATRPOLoss else None},
            per_agent_critic=per_agent_critic,
            critic_memory=memory,
        )
        scenario.updater._has_graphs = pads  # rows are padded, as on an accelerator
        for _ in range(2):
            batch = scenario.batch()
            before = batch.clone()
            check(scenario, scenario.update(batch))
            assert set(batch.keys(True, True)) == set(before.keys(True, True))
            assert_equal(batch, before)
            scenario.updater.load_state_dict(scenario.updater.state_dict())

    holds()
