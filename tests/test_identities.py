"""Identities of whole updates: what may not matter does not, and special cases are known methods.

The losses' own identities, number by number, are in ``test_happo_loss.py`` and
``test_hatrpo_loss.py``; that HATRPO with one agent is TRPO is in ``test_trpo.py``.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from effort import effort
from hypothesis import given
from hypothesis import strategies as st
from newer import MAPPOLoss
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP, MultiAgentMLP, ProbabilisticActor, TanhNormal
from torchrl.objectives import ClipPPOLoss

from torchrl_happo import (
    ActorList,
    HAPPOLagrangianLoss,
    HAPPOLoss,
    HATRPOLoss,
    SequentialUpdater,
)
from torchrl_happo.update.correction import RatioFactor

OBS, ACT, AGENTS, BATCH = 3, 2, 3, (4, 6)
LAYOUTS = ["stack", "list", "groups", "groups of one", "blocks of one"]
LOSSES = pytest.mark.parametrize("loss_class", [HAPPOLoss, HATRPOLoss])
ADAM = partial(torch.optim.Adam, lr=1e-2)


def networks():
    """One network for each agent."""
    return [MLP(OBS, 2 * ACT, num_cells=[8]).double() for _ in range(AGENTS)]


def stacked(nets):
    """The same networks as rows of one."""
    n_agents = len(nets)
    stack = MultiAgentMLP(
        OBS, 2 * ACT, n_agents, centralized=False, share_params=False, num_cells=[8]
    ).double()
    with torch.no_grad():
        for name in nets[0].state_dict():
            rows = [net.state_dict()[name] for net in nets]
            stack.params[tuple(name.split("."))].copy_(torch.stack(rows))
    return stack


def actor_of(net, group="agents"):
    keys = [(group, "loc"), (group, "scale")]
    return ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(net, NormalParamExtractor()),
            in_keys=[(group, "observation")],
            out_keys=keys,
        ),
        in_keys=keys,
        out_keys=[(group, "action")],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )


def team_of(layout, nets, members):
    """The actors of some agents, in this arrangement, with copies of their networks."""
    own = [copy.deepcopy(nets[i]) for i in members]
    if layout == "stack":
        return actor_of(stacked(own))
    if layout == "list":
        return ActorList([actor_of(net) for net in own])
    own = own if layout == "groups" else [stacked([net]) for net in own]
    return {f"agent {i}": actor_of(net, f"agent {i}") for i, net in zip(members, own, strict=True)}


def experience(nets, *, masked):
    """What the team has seen and done, agents in their natural order."""
    observation = torch.randn(*BATCH, AGENTS, OBS, dtype=torch.double)
    data = TensorDict({"agents": TensorDict({"observation": observation}, [*BATCH, AGENTS])}, BATCH)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        data = actor_of(stacked(nets))(data)
    if masked:
        data["agents", "active"] = torch.rand(*BATCH, AGENTS) < 0.7
    return data.set("advantage", torch.randn(*BATCH, 1, dtype=torch.double))


def batch_of(layout, members, data):
    """The same experience in the layout of the team."""
    batch = data.select("advantage")
    if layout in ("stack", "list"):
        return batch.set("agents", data["agents"][..., members])
    for i in members:
        own = data["agents"][..., i] if layout == "groups" else data["agents"][..., [i]]
        batch.set(f"agent {i}", own)
    return batch


def updated(layout, members, order, loss_class, nets, data):
    """Two updates of a team; each agent's weights and the last report on it, by its number."""
    actors = team_of(layout, nets, members)
    settings = {"entropy_coeff": 0.0} if loss_class is HAPPOLoss else {}
    blocks = list(actors) if layout == "blocks of one" else []
    loss = loss_class(actors, None, blocks=blocks, **settings)
    line = [members.index(i) for i in order]
    updater = SequentialUpdater(loss, optimizer=ADAM, num_epochs=2, minibatch_size=7, order=line)
    for _ in range(2):
        metrics = updater(batch_of(layout, members, data))
    return {
        i: (torch.cat([p.flatten() for p in agent.parameters()]), metrics[agent.name])
        for i, agent in zip(members, loss.agents, strict=True)
    }


def assert_same(one, other):
    for i, (weights, metrics) in one.items():
        torch.testing.assert_close(other[i][0], weights, rtol=1e-9, atol=1e-11)
        for name, value in metrics.items():
            torch.testing.assert_close(other[i][1][name], value, rtol=1e-6, atol=1e-9, msg=name)


permutations = st.permutations(range(AGENTS))


@LOSSES
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@effort(4)
@given(permutations, st.booleans(), st.integers(0, 2**31))
def test_one_group_of_n_agents_is_n_groups_of_one(layout, loss_class, order, masked, seed):
    """A stack, a list, n groups with and without an agent dimension, n blocks: the same update."""
    torch.manual_seed(seed)
    nets, members = networks(), list(range(AGENTS))
    data = experience(nets, masked=masked)
    expected = updated("stack", members, order, loss_class, nets, data)
    assert_same(expected, updated(layout, members, order, loss_class, nets, data))


@LOSSES
@pytest.mark.parametrize("layout", LAYOUTS)
@effort(4)
@given(permutations, permutations, st.booleans(), st.integers(0, 2**31))
def test_permuting_agents_and_order_changes_nothing(
    layout, loss_class, members, order, masked, seed
):
    """Agents have no rank: in another arrangement, updated in the same order, they do the same."""
    torch.manual_seed(seed)
    nets = networks()
    data = experience(nets, masked=masked)
    expected = updated(layout, list(range(AGENTS)), order, loss_class, nets, data)
    assert_same(expected, updated(layout, members, order, loss_class, nets, data))


def test_the_order_does_matter():
    """Updated in another order the agents end elsewhere, so the tests above can fail."""
    nets, members = networks(), list(range(AGENTS))
    data = experience(nets, masked=False)
    one, other = (
        updated("stack", members, order, HAPPOLoss, nets, data) for order in ([0, 1, 2], [2, 1, 0])
    )
    assert all(not torch.allclose(one[i][0], other[i][0], rtol=1e-4) for i in members)


def epochs_of(loss, actor, data, *, scale):
    """Plain epochs on the whole batch: one loss, one Adam for all."""
    optimizer = ADAM(actor.parameters())
    for _ in range(3):
        losses = loss(data)
        optimizer.zero_grad()
        (scale * (losses["loss_objective"] + losses["loss_entropy"])).backward()
        optimizer.step()


def test_one_agent_is_ppo():
    """With one agent an update is some epochs of Adam on TorchRL's ClipPPOLoss."""
    nets = networks()
    actor, twin = (actor_of(stacked(nets[:1])) for _ in range(2))
    data = experience(nets, masked=False)
    data["agents"] = data["agents"][..., :1]
    loss = HAPPOLoss(actor, None, entropy_coeff=0.01)
    updater = SequentialUpdater(loss, optimizer=ADAM, num_epochs=3, standardize_advantage=False)
    torch.manual_seed(1)  # of the entropy's estimate
    updater(data)
    theirs = ClipPPOLoss(twin, None, entropy_coeff=0.01, functional=False)
    theirs.set_keys(action=("agents", "action"), sample_log_prob=("agents", "action_log_prob"))
    torch.manual_seed(1)
    data["advantage"] = data["advantage"].unsqueeze(-2)
    epochs_of(theirs, twin, data, scale=1.0)
    for ours, expected in zip(actor.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_one_agent_with_a_cost_is_ppo_lagrangian():
    """With one agent an update is epochs of ClipPPOLoss on the advantage less the cost's price.

    The price is softplus of a number that Adam has moved up the dual, by the excess of the cost.
    """
    nets = networks()
    actor, twin = (actor_of(stacked(nets[:1])) for _ in range(2))
    data = experience(nets, masked=False)
    data["agents"] = data["agents"][..., :1]
    cost = torch.rand(*BATCH, 1).double()
    targets = dict.fromkeys(("value_target", "cost_value_target"), cost.unsqueeze(-2))
    data.update({"cost_advantage": cost - cost.mean(), **targets})
    done = torch.ones(*BATCH, 1, dtype=torch.bool)
    data["next"] = {"cost": cost, "reward": cost, "episode_cost": cost, "done": done}
    critics = [
        TensorDictModule(
            MultiAgentMLP(OBS, 1, 1, centralized=True, share_params=True).double(),
            in_keys=[("agents", "observation")],
            out_keys=[("agents", "state_value")],
        )
        for _ in range(2)
    ]
    loss = HAPPOLagrangianLoss(actor, *critics, cost_limit=0.2, entropy_coeff=0.0)
    SequentialUpdater(loss, optimizer=ADAM, num_epochs=3, standardize_advantage=False)(data.clone())
    xi = torch.tensor(0.5).double().expm1().log().requires_grad_()
    dual = torch.optim.Adam([xi], lr=0.05, maximize=True)
    (nn.functional.softplus(xi) * (cost.mean() - 0.2)).backward()
    dual.step()
    price = nn.functional.softplus(xi).detach()
    data["advantage"] = (data["advantage"] - price * data["cost_advantage"]).unsqueeze(-2)
    theirs = ClipPPOLoss(twin, None, entropy_coeff=0.0, functional=False)
    theirs.set_keys(action=("agents", "action"), sample_log_prob=("agents", "action_log_prob"))
    epochs_of(theirs, twin, data, scale=1.0)
    for ours, expected in zip(actor.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-9)


def test_one_block_is_mappo():
    """With one block an update is some epochs of Adam on MAPPOLoss of the shared network."""
    net = MultiAgentMLP(OBS, 2 * ACT, AGENTS, centralized=False, share_params=True, num_cells=[8])
    actor = actor_of(net.double())
    twin = copy.deepcopy(actor)
    data = experience(networks(), masked=False)
    loss = HAPPOLoss(actor, None, entropy_coeff=0.01, blocks=["agents"])
    updater = SequentialUpdater(loss, optimizer=ADAM, num_epochs=3, standardize_advantage=False)
    torch.manual_seed(1)  # of the entropy's estimate
    updater(data)
    torch.manual_seed(1)
    theirs = MAPPOLoss(twin, None, entropy_coeff=0.01, normalize_advantage=False, functional=False)
    theirs.set_keys(action=("agents", "action"), sample_log_prob=("agents", "action_log_prob"))
    advantage = data["advantage"].unsqueeze(-2).expand(*BATCH, AGENTS, 1)
    epochs_of(theirs, twin, data.set("advantage", advantage), scale=1.0)
    for ours, expected in zip(actor.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_without_the_factor_the_update_is_a_simultaneous_one(monkeypatch):
    """With factor 1 all the way, an update is some epochs of Adam on MAPPOLoss, unshared.

    Adam moves each number by its own gradients, so that one optimiser for all rows of the stack
    does what one for each agent does.
    """
    monkeypatch.setattr(RatioFactor, "include", lambda *args: None)
    nets = networks()
    actor, twin = (actor_of(stacked(nets)) for _ in range(2))
    data = experience(nets, masked=False)
    loss = HAPPOLoss(actor, None, entropy_coeff=0.0)
    updater = SequentialUpdater(loss, optimizer=ADAM, num_epochs=3, standardize_advantage=False)
    updater(data)
    theirs = MAPPOLoss(twin, None, entropy_coeff=0.0, normalize_advantage=False, functional=False)
    theirs.set_keys(action=("agents", "action"), sample_log_prob=("agents", "action_log_prob"))
    advantage = data["advantage"].unsqueeze(-2).expand(*BATCH, AGENTS, 1)
    epochs_of(theirs, twin, data.set("advantage", advantage), scale=AGENTS)
    for ours, expected in zip(actor.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
