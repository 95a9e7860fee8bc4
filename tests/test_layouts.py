"""One agent is one agent, however its group is laid out."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from effort import effort
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.modules import MLP, MultiAgentMLP, ProbabilisticActor, TanhNormal

from torchrl_happo import HAPPOLoss, HATRPOLoss, SequentialUpdater

OBS, ACT, STEPS = 3, 2, 12
LAYOUTS = ["root", "flat group", "stack of one", "block of one", "network for a row"]


def make_actor(layout, weights):
    """The same policy in one of the layouts."""
    group = None if layout == "root" else "agents"
    if layout in ("stack of one", "block of one"):
        share = layout == "block of one"
        net = MultiAgentMLP(OBS, 2 * ACT, 1, centralized=False, share_params=share, num_cells=[8])
    else:
        net = MLP(in_features=OBS, out_features=2 * ACT, num_cells=[8])
    net.double()
    with torch.no_grad():
        for parameter, weight in zip(net.parameters(), weights, strict=True):
            parameter.copy_(weight.expand_as(parameter))
    keys = [(group, name) if group else name for name in ("loc", "scale", "observation", "action")]
    return ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(net, NormalParamExtractor()), in_keys=[keys[2]], out_keys=keys[:2]
        ),
        in_keys=keys[:2],
        out_keys=[keys[3]],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )


def make_batch(layout, observation, action, advantage, active):
    """The same batch in one of the layouts."""
    entries = {"observation": observation, "action": action}
    if active is not None:
        entries["active"] = active.unsqueeze(-1)
    if layout == "root":
        own = TensorDict(entries, [STEPS])
    elif layout == "flat group":
        own = TensorDict({"agents": TensorDict(entries, [STEPS])}, [STEPS])
    else:
        entries = {name: value.unsqueeze(1) for name, value in entries.items()}
        if active is not None:
            entries["active"] = entries["active"].squeeze(-1)
        own = TensorDict({"agents": TensorDict(entries, [STEPS, 1])}, [STEPS])
    return own.set("advantage", advantage.unsqueeze(-1))


def updated_weights(layout, loss_class, weights, data, masked):
    """The policy's weights after two updates, and what the last one reported."""
    actor = make_actor(layout, weights)
    blocks = ["agents"] if layout == "block of one" else []
    loss = loss_class(actor, None, blocks=blocks)
    updater = SequentialUpdater(loss, num_epochs=2, minibatch_size=5)
    observation, action, advantage, active = data
    for _ in range(2):
        batch = make_batch(layout, observation, action, advantage, active if masked else None)
        with torch.no_grad():
            log_prob = actor.get_dist(batch).log_prob(
                batch["action"] if layout == "root" else batch["agents", "action"]
            )
        key = "action_log_prob" if layout == "root" else ("agents", "action_log_prob")
        batch[key] = log_prob
        metrics = updater(batch)
    return torch.cat([p.flatten() for p in actor.parameters()]), metrics[loss.agents[0].name]


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("loss_class", [partial(HAPPOLoss, entropy_coeff=0.0), HATRPOLoss])
@effort(4)
@given(st.integers(0, 2**31), st.booleans())
def test_layout_changes_nothing(layout, loss_class, seed, masked):
    """At the root, in a group without an agent dimension, in a group of one: the same update."""
    torch.manual_seed(seed)
    weights = [p.detach() for p in MLP(OBS, 2 * ACT, num_cells=[8]).double().parameters()]
    observation = torch.randn(STEPS, OBS, dtype=torch.double)
    action = torch.rand(STEPS, ACT, dtype=torch.double) * 1.8 - 0.9
    advantage = torch.randn(STEPS, dtype=torch.double)
    data = (observation, action, advantage, torch.rand(STEPS) < 0.7)
    expected, reference = updated_weights(LAYOUTS[0], loss_class, weights, data, masked)
    actual, metrics = updated_weights(layout, loss_class, weights, data, masked)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    for name, value in reference.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_an_agent_at_the_root_has_a_critic():
    """In a tensordict without groups both learn."""
    actor = make_actor("root", [torch.randn(()) for _ in range(4)])
    critic = TensorDictModule(nn.Linear(OBS, 1).double(), ["observation"], ["state_value"])
    numbers = torch.randn(2, STEPS, 1).double()
    batch = TensorDict({"advantage": numbers[0], "value_target": numbers[1]}, [STEPS])
    batch["observation"] = torch.randn(STEPS, OBS).double()
    with torch.no_grad():
        actor(batch)
    networks = nn.ModuleList([actor, critic])
    before = [parameter.clone() for parameter in networks.parameters()]
    SequentialUpdater(HAPPOLoss(actor, critic), num_epochs=1)(batch)
    for old, new in zip(before, networks.parameters(), strict=True):
        assert not torch.equal(old, new)
