"""Every layout x action space x mask x memory x algorithm: a new row is one line.

What holds in all of them: before an update each agent's ratio is one, the log-probability is the
joint one over the action's dimensions and heads, an update moves every agent, stays finite and
reports what it did, and the second agent's factor is the product of the first one's ratios over
those dimensions and heads, evaluated as its loss does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from newer import tensors
from team import perturb
from tensordict import TensorDict
from tensordict.nn import (
    AddStateIndependentNormalScale,
    CompositeDistribution,
    NormalParamExtractor,
    TensorDictModule,
    TensorDictSequential,
    set_composite_lp_aggregate,
)
from torch import distributions as d
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import (
    IndependentNormal,
    MaskedCategorical,
    MultiAgentMLP,
    OneHotCategorical,
    ProbabilisticActor,
    TanhNormal,
    set_recurrent_mode,
)

from torchrl_happo import ActorList, HAPPOLoss, HATRPOLoss, SequentialUpdater, joint_policy
from torchrl_happo.networks.recurrent import CELLS
from torchrl_happo.policy.memory import state_specs
from torchrl_happo.team.agent import OLD_LOG_PROB
from torchrl_happo.team.masks import Masks
from torchrl_happo.team.split import split_actor

OBS_DIM, N_AGENTS, BATCH = 4, 2, torch.Size([6, 5])


class Beta(d.Independent):
    """A beta distribution for each dimension of an action in (0, 1)."""

    def __init__(self, alpha, beta):
        super().__init__(d.Beta(alpha, beta), 1)


class Split(nn.Module):
    """Cuts the last dimension into positive halves or heads."""

    def __init__(self, sizes, activation=None):
        super().__init__()
        self.sizes, self.activation = sizes, activation

    def forward(self, x):
        x = x if self.activation is None else self.activation(x) + 1.0
        return x.split(self.sizes, -1)


class Rows(nn.Module):
    """Logits of several choices of equal size."""

    def forward(self, x):
        return x.unflatten(-1, (3, 2))


@dataclass
class Space:
    """An action space: network outputs, what follows the network, and the distribution."""

    num_outputs: int
    after: Callable[[], nn.Module]
    parameters: list
    distribution: Callable
    kwargs: dict | None = None
    masked: bool = False


COMPOSITE = {
    "distribution_map": {"move": IndependentNormal, "talk": d.Categorical},
}
SPACES = {
    "tanh_normal": Space(4, NormalParamExtractor, ["loc", "scale"], TanhNormal),
    "normal": Space(4, NormalParamExtractor, ["loc", "scale"], IndependentNormal),
    "bare_normal": Space(4, NormalParamExtractor, ["loc", "scale"], d.Normal),
    "state_independent_std": Space(2, None, ["loc", "scale"], IndependentNormal),
    "beta": Space(4, partial(Split, [2, 2], nn.functional.softplus), ["alpha", "beta"], Beta),
    "categorical": Space(3, nn.Identity, ["logits"], d.Categorical),
    "one_hot": Space(3, nn.Identity, ["logits"], OneHotCategorical),
    "masked": Space(3, nn.Identity, ["logits"], MaskedCategorical, masked=True),
    "multi_discrete": Space(6, Rows, ["logits"], d.Categorical),
}
LAYOUTS = ["stack", "list", "groups", "groups_of_one"]
#: Memories, and the layouts that can have them: a stack of networks is feed-forward.
MEMORIES = {None: LAYOUTS, "gru": ["list", "groups"], "lstm": ["list", "groups"]}
LOSSES = [HAPPOLoss, HATRPOLoss]
SIX = {"pair": 2, "alone": None, "three": 3}


def make_memory(group: str, memory: str, hidden: int):
    """A recurrent layer over the observations of an agent."""
    module, states = CELLS[memory]
    return module(
        input_size=OBS_DIM,
        hidden_size=hidden,
        in_keys=[(group, "observation"), *((group, state) for state in states)],
        out_keys=[(group, "features"), *(("next", group, state) for state in states)],
    )


def make_actor(
    space: Space, group: str, n_agents: int | None, hidden: int = 16, memory: str | None = None
):
    """An actor for one group: a stack if it has an agent dimension, else a plain network."""
    layers, features = [], (group, "observation")
    if memory is not None:
        layers, features = [make_memory(group, memory, hidden)], (group, "features")
    if n_agents is None:
        net = nn.Sequential(
            nn.Linear(OBS_DIM if memory is None else hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, space.num_outputs),
        )
    else:
        net = MultiAgentMLP(
            n_agent_inputs=OBS_DIM,
            n_agent_outputs=space.num_outputs,
            n_agents=n_agents,
            centralized=False,
            share_params=False,
            depth=1,
            num_cells=hidden,
        )
    if space.after is None:
        shape = (2,) if n_agents is None else (n_agents, 2)
        after = AddStateIndependentNormalScale(shape)
    else:
        after = space.after()
    keys = [(group, name) for name in space.parameters]
    in_keys = dict(zip(space.parameters, keys, strict=True))
    if space.masked:
        in_keys["mask"] = (group, "action_mask")
    layers.append(TensorDictModule(nn.Sequential(net, after), in_keys=[features], out_keys=keys))
    return ProbabilisticActor(
        TensorDictSequential(*layers),
        in_keys=in_keys,
        out_keys=[(group, "action")],
        distribution_class=space.distribution,
        distribution_kwargs=space.kwargs,
        return_log_prob=True,
    )


def make_team(layout: str, space: Space, memory: str | None = None):
    """The actors of a team and the groups of its tensordict with their agent dimensions."""
    if layout == "stack":
        return make_actor(space, "agents", N_AGENTS), {"agents": (N_AGENTS,)}
    if layout == "list":
        hidden = [8 + index if memory is None else 8 for index in range(N_AGENTS)]
        actors = [make_actor(space, "agents", None, size, memory) for size in hidden]
        return ActorList(actors), {"agents": (N_AGENTS,)}
    names = ["speaker", "listener"]
    if layout == "groups":
        actors = {name: make_actor(space, name, None, memory=memory) for name in names}
        return actors, dict.fromkeys(names, ())
    return {name: make_actor(space, name, 1) for name in names}, dict.fromkeys(names, (1,))


def make_batch(actors, groups, masked: bool, inactive: bool):
    """A batch that the team has acted on."""
    init = torch.rand(*BATCH, 1) < 0.3
    init[:, 0] = True
    batch = TensorDict({"advantage": torch.randn(*BATCH, 1), "is_init": init}, BATCH)
    for group, agent_dim in groups.items():
        shape = (*BATCH, *agent_dim)
        batch[group] = TensorDict({"observation": torch.randn(*shape, OBS_DIM)}, shape)
        if masked:
            mask = torch.rand(*shape, 3) > 0.4
            mask[..., 0] = True
            batch[group, "action_mask"] = mask
        if inactive:
            batch[group, "active"] = torch.rand(shape) > 0.3
    states = state_specs(nn.ModuleList(actors.values() if isinstance(actors, dict) else [actors]))
    for key, spec in states.items():
        batch[key] = spec.zero((*BATCH, *groups[key[0]]))
    random = set_exploration_type(ExplorationType.RANDOM)
    with torch.no_grad(), random, set_recurrent_mode(True):
        return joint_policy(actors)(batch).exclude("next")


@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize("inactive", [False, True], ids=["all_active", "some_inactive"])
@pytest.mark.parametrize("space", list(SPACES))
@pytest.mark.parametrize(
    ("memory", "layout"),
    [(memory, layout) for memory, layouts in MEMORIES.items() for layout in layouts],
)
def test_update(memory, layout, space, inactive, loss_class):
    """An update of every kind of team."""
    space = SPACES[space]
    actors, groups = make_team(layout, space, memory)
    batch = make_batch(actors, groups, space.masked, inactive)
    check_update(loss_class(actors, None), batch)


@torch.no_grad()
@set_recurrent_mode(True)
def joint_log_prob(loss, agent, batch):
    """Log-probability of an agent's actions at each step, summed over dimensions and heads."""
    data = agent.view(batch, agent.update_keys)
    dist = agent.policy.distribution(agent.policy.parameters(data))
    keys = agent.policy.action_keys
    log_prob = dist.log_prob(data[keys[0]] if len(keys) == 1 else data.select(*keys))
    if not isinstance(log_prob, torch.Tensor):  # of several heads
        log_prob = sum(log_prob.values(True, True))
    return log_prob.reshape(*BATCH, -1).sum(-1)


def check_update(loss, batch):
    """What holds for every team."""
    for agent in loss.agents:
        data = agent.view(batch, agent.update_keys)
        with torch.no_grad(), set_recurrent_mode(True):
            log_prob = agent.log_prob(agent.policy.parameters(data), data)
        assert log_prob.shape == batch.shape or log_prob.shape == (*batch.shape, 1)
        torch.testing.assert_close(log_prob, agent.stored_log_prob(data), rtol=1e-3, atol=1e-3)
    updater = SequentialUpdater(
        loss,
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        num_epochs=2,
        minibatch_size=11,
        order="fixed",
    )
    first, second, *_ = loss.agents
    log_prob = joint_log_prob(loss, first, batch)
    before = copy.deepcopy(tensors(loss.actor_network))
    metrics = updater(batch)
    for key, value in tensors(loss.actor_network).items():
        assert value.isfinite().all()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and "param" in key:
            assert not torch.equal(value, before[key])
    factor = (joint_log_prob(loss, first, batch) - log_prob).exp()
    active = Masks(loss.team, batch).active
    if active is not None:
        factor = torch.where(active[..., 0], factor, 1.0)
        factor = factor[active[..., second.position].any(-1)]
    for name, value in (("factor_mean", factor.mean()), ("factor_max", factor.max())):
        torch.testing.assert_close(metrics[second.name, name], value, rtol=1e-4, atol=1e-5)
    for agent in loss.agents:
        report = metrics[agent.name]
        assert all(value.isfinite() for value in report.values())
        assert report["kl"] > 0
        assert report["surrogate"] > report["surrogate_before"]
    return metrics


@pytest.mark.parametrize("loss_class", LOSSES)
def test_one_agent_continuous_the_other_discrete(loss_class):
    """A mover with a continuous action and a talker with a discrete one, without padding."""
    actors = {
        "mover": make_actor(SPACES["tanh_normal"], "mover", None),
        "talker": make_actor(SPACES["categorical"], "talker", None),
    }
    batch = make_batch(actors, {"mover": (), "talker": ()}, False, False)
    check_update(loss_class(actors, None), batch)


@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize("layout", ["list", "groups"])
def test_composite_actions(loss_class, layout):
    """Move and communicate: the ratio is that of the product of both heads."""
    with set_composite_lp_aggregate(False):
        if layout == "groups":
            actors = {"a": make_composite_actor("a"), "b": make_composite_actor("b")}
            groups = {"a": (), "b": ()}
        else:
            actors = ActorList([make_composite_actor("agents") for _ in range(2)])
            groups = {"agents": (2,)}
        batch = make_batch(actors, groups, False, False)
        loss = loss_class(actors, None)
        agent = loss.agents[0]
        data = agent.view(batch, agent.update_keys)
        prefix = agent.group
        separate = (
            data[prefix, "move_log_prob"] + data[prefix, "talk_log_prob"]
            if (prefix, "move_log_prob") in data.keys(True)
            else agent.stored_log_prob(data)
        )
        torch.testing.assert_close(agent.stored_log_prob(data), separate)
        if loss_class is HAPPOLoss and layout == "groups":
            heads = [
                actor.get_dist(batch).entropy().values(True, True) for actor in actors.values()
            ]
            expected = sum(entropy.mean() for actor in heads for entropy in actor) / len(actors)
            torch.testing.assert_close(loss(batch)["entropy"], expected)
        check_update(loss, batch)


class Heads(nn.Module):
    """Mean and scale of the movement, logits of the message."""

    def forward(self, x):
        loc, scale, logits = x.split([2, 2, 3], -1)
        return loc, nn.functional.softplus(scale) + 0.1, logits


def make_composite_actor(group: str):
    """The actor of an agent that moves and talks."""
    net = nn.Sequential(nn.Linear(OBS_DIM, 16), nn.Tanh(), nn.Linear(16, 7))
    heads = [
        (group, "params", "move", "loc"),
        (group, "params", "move", "scale"),
        (group, "params", "talk", "logits"),
    ]
    return ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(net, Heads()), in_keys=[(group, "observation")], out_keys=heads
        ),
        in_keys=[(group, "params")],
        out_keys=[(group, "move"), (group, "talk")],
        distribution_class=CompositeDistribution,
        distribution_kwargs={
            **COMPOSITE,
            "name_map": {"move": (group, "move"), "talk": (group, "talk")},
        },
        return_log_prob=True,
    )


@pytest.mark.parametrize("loss_class", LOSSES)
def test_a_block_beside_single_agents(loss_class):
    """Two agents that share parameters move as one block, the third on its own.

    The factor after the block is the product of both members' ratios.
    """
    shared = MultiAgentMLP(
        n_agent_inputs=OBS_DIM,
        n_agent_outputs=3,
        n_agents=2,
        centralized=False,
        share_params=True,
        depth=1,
        num_cells=8,
    )
    twins = ProbabilisticActor(
        TensorDictModule(
            shared, in_keys=[("twins", "observation")], out_keys=[("twins", "logits")]
        ),
        in_keys=[("twins", "logits")],
        out_keys=[("twins", "action")],
        distribution_class=d.Categorical,
        return_log_prob=True,
    )
    actors = {"twins": twins, "single": make_actor(SPACES["categorical"], "single", None)}
    batch = make_batch(actors, {"twins": (2,), "single": ()}, False, True)
    loss = loss_class(actors, None, blocks=["twins"])
    assert [(agent.name, agent.num_members) for agent in loss.agents] == [
        ("twins", 2),
        ("single", 1),
    ]
    with torch.no_grad():
        before = twins.get_dist(batch.copy()).log_prob(batch["twins", "action"])
    updater = SequentialUpdater(loss, num_epochs=2, order=["twins", "single"])
    metrics = updater(batch)
    with torch.no_grad():
        after = twins.get_dist(batch.copy()).log_prob(batch["twins", "action"])
    log_ratio = torch.where(batch["twins", "active"], after - before, 0.0)
    factor = log_ratio.sum(-1).exp()[batch["single", "active"]]
    torch.testing.assert_close(metrics["single", "factor_mean"], factor.mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(metrics["single", "factor_max"], factor.max(), rtol=1e-4, atol=0)
    # The other way round: a block acts where one of its members does.
    before = joint_log_prob(loss, loss.agents[1], batch).detach()
    metrics = SequentialUpdater(loss, num_epochs=2, order=["single", "twins"])(batch)
    after = joint_log_prob(loss, loss.agents[1], batch).detach()
    factor = torch.where(batch["single", "active"], after - before, 0.0).exp()
    factor = factor[batch["twins", "active"].any(-1)]
    torch.testing.assert_close(metrics["twins", "factor_mean"], factor.mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss_class", LOSSES)
def test_all_inactive_agent_is_left_alone(loss_class):
    """An agent that never acts in the batch keeps its policy; the others are updated."""
    actors, groups = make_team("stack", SPACES["categorical"])
    batch = make_batch(actors, groups, False, True)
    batch["agents", "active"][..., 1] = False
    before = copy.deepcopy(tensors(actors))
    loss = loss_class(actors, None)
    old = joint_log_prob(loss, loss.agents[0], batch).detach()
    metrics = SequentialUpdater(loss, num_epochs=2, order="fixed")(batch)
    for key, value in tensors(actors).items():
        assert torch.equal(value[1], before[key][1])
        assert not torch.equal(value[0], before[key][0])
    ratio = (joint_log_prob(loss, loss.agents[0], batch).detach() - old).exp()
    factor = torch.where(batch["agents", "active"][..., 0], ratio, 1.0)
    report = metrics[loss.agents[1].name]  # with no steps of its own, it is about all of them
    torch.testing.assert_close(report["factor_mean"], factor.mean(), rtol=1e-4, atol=0)
    assert report.keys() == {"factor_mean", "factor_max", "factor_ess", "position"}


@pytest.mark.parametrize("loss_class", LOSSES)
def test_a_mask_of_one_group_alone(loss_class):
    """Whose group says nothing of it is active; numbers that are not zero say so, too."""
    actors, groups = make_team("groups_of_one", SPACES["normal"])
    batch = make_batch(actors, groups, False, True)
    batch["listener", "active"][:] = True
    other = batch.clone()
    del other["listener", "active"]
    other["speaker", "active"] = other["speaker", "active"].to(torch.uint8)
    ends = []
    for data in (batch, other):
        networks = copy.deepcopy(actors)
        metrics = SequentialUpdater(loss_class(networks, None), num_epochs=2)(data)
        moved = [p for actor in networks.values() for p in actor.parameters()]
        ends.append([*moved, *metrics.values(True, True), loss_class(networks, None)(data)])
    for one, same in zip(*ends, strict=True):
        assert (one == same).all()


@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize("inactive", [False, True], ids=["all_active", "some_inactive"])
def test_chunks_of_those_who_have_no_memory(inactive, loss_class):
    """Without minibatches nothing depends on how many steps an item has; blocks included."""
    actors = {name: make_actor(SPACES["normal"], name, size) for name, size in SIX.items()}
    groups = {name: () if size is None else (size,) for name, size in SIX.items()}
    batch = make_batch(actors, groups, False, inactive)
    ends = []
    for chunk in (None, 5):
        networks = copy.deepcopy(actors)
        updater = SequentialUpdater(
            loss_class(networks, None, blocks=["pair", "three"]),
            order=["alone", "three", "pair"],
            num_epochs=2,
            sequence_length=chunk,
        )
        metrics = updater(batch)
        ends.append([*nn.ModuleDict(networks).parameters(), *metrics.values(True, True)])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_divergence_sums_over_the_dimensions_of_an_action():
    """Whether the distribution counts them as its own or as samples."""
    divergences = []
    for space in ("normal", "bare_normal"):
        torch.manual_seed(0)
        actor = make_actor(SPACES[space], "agents", N_AGENTS)
        batch = make_batch(actor, {"agents": (N_AGENTS,)}, False, False)
        perturb(actor)
        divergences.append(HATRPOLoss(actor, None)(batch)["kl"])
    assert divergences[0] > 0
    torch.testing.assert_close(*divergences)


def test_the_keys_of_several_groups():
    """The loss reads the action and the log-probability of each."""
    actors, _ = make_team("groups", SPACES["normal"])
    loss = HAPPOLoss(actors, None)
    for name in actors:
        assert (name, "action") in loss.tensor_keys.action
        assert (name, "action_log_prob") in loss.tensor_keys.sample_log_prob
        assert {(name, "observation"), (name, "action")} <= set(loss.in_keys)


def test_entropy_of_groups_of_unlike_sizes():
    """The loss of the whole team has the entropy of each agent, with an agent dimension or none."""
    sizes = {"pair": 2, "single": 1, "alone": None, "three": 3}
    actors = {name: make_actor(SPACES["normal"], name, size) for name, size in sizes.items()}
    groups = {name: () if size is None else (size,) for name, size in sizes.items()}
    batch = make_batch(actors, groups, False, False)
    loss = HAPPOLoss(actors, None, entropy_coeff=1.0, reduction="none")
    entropies = [actor.get_dist(batch).entropy().reshape(*BATCH, -1) for actor in actors.values()]
    torch.testing.assert_close(-loss(batch)["loss_entropy"], torch.cat(entropies, -1))


@pytest.mark.parametrize("name", ["{}_log_prob", "{}_entropy"])
def test_each_head_has_a_weight_of_its_own(name):
    """In the loss of the team and of each agent, whichever of TorchRL's two names a head is given.

    With the same number everywhere the update is the one with that number, bit for bit.
    """
    pair, composite = make_actor(SPACES["normal"], "pair", 2), make_composite_actor("both")
    actors = {"pair": pair, "both": composite}
    batch = make_batch(actors, {"pair": (2,), "both": ()}, False, False)
    keys = [("pair", name.format("action")), *(("both", name.format(k)) for k in ("move", "talk"))]
    loss = HAPPOLoss(actors, None, entropy_coeff=dict(zip(keys, (1, 2, 3), strict=True)))
    heads = composite.get_dist(batch).dists
    expected = torch.cat(
        [
            pair.get_dist(batch).entropy(),
            (2 * heads["both", "move"].entropy() + 3 * heads["both", "talk"].entropy())[..., None],
        ],
        -1,
    )
    torch.testing.assert_close(-loss(batch)["loss_entropy"], expected.mean())
    for agent, entropy in zip(loss.agents, expected.unbind(-1), strict=True):
        data = agent.view(batch, agent.update_keys)
        data.set(OLD_LOG_PROB, agent.stored_log_prob(data))
        data.set("advantage", torch.zeros(BATCH))
        torch.testing.assert_close(-loss.agent_loss(agent, data), entropy.mean())
    ends = []
    for coeff in (0.5, dict.fromkeys(keys, 0.5)):
        team = copy.deepcopy(actors)
        SequentialUpdater(HAPPOLoss(team, None, entropy_coeff=coeff), num_epochs=2)(batch)
        ends.append([p for actor in team.values() for p in actor.parameters()])
    torch.testing.assert_close(*ends, rtol=0, atol=0)


@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize("own", ["nothing", "advantage", "factor"])
@pytest.mark.parametrize(
    ("sizes", "inactive"),
    [({"alone": None}, False), ({"alone": None}, True), (SIX, False), (SIX, True)],
    ids=["one", "one_some_inactive", "six", "six_some_inactive"],
)
def test_forward_knows_no_dimensions_of_the_batch(sizes, inactive, own, loss_class):
    """The same terms whether the batch is flat or of three dimensions, and their mean counts them.

    Advantage and factor are the team's, or one of the two is each agent's own.
    """
    actors = {name: make_actor(SPACES["normal"], name, size) for name, size in sizes.items()}
    groups = {name: () if size is None else (size,) for name, size in sizes.items()}
    batch = make_batch(actors, groups, False, inactive)
    n_agents = sum(size or 1 for size in sizes.values())
    if own == "advantage":
        batch["advantage"] = torch.randn(*BATCH, n_agents, 1)
    shape = (*BATCH, n_agents, 1) if own == "factor" else (*BATCH, 1)
    batch["factor"] = torch.rand(shape)
    counts = torch.ones(BATCH.numel() * n_agents, dtype=torch.bool)
    if inactive:
        masks = [batch[name, "active"].reshape(*BATCH, -1) for name in sizes]
        counts = torch.cat(masks, -1).flatten()
    for actor in actors.values():
        perturb(actor)
    bonus = {"entropy_coeff": 0.01} if loss_class is HAPPOLoss else {}
    terms, means = (
        [
            loss_class(actors, None, reduction=reduction, **bonus)(batch.reshape(shape))
            for shape in (BATCH, [BATCH.numel()], [5, 2, 3])
        ]
        for reduction in ("none", "mean")
    )
    names = ["loss_objective", "loss_entropy" if bonus else "kl"]
    for name in names:
        expected = terms[0][name].flatten()
        assert expected.shape == counts.shape
        assert not expected[~counts].any()
        for each in terms:
            torch.testing.assert_close(each[name].flatten(), expected)
        for each in means:
            torch.testing.assert_close(each[name], expected.sum() / counts.sum())


@set_composite_lp_aggregate(False)
def test_a_head_with_bounds_of_its_own_for_each_agent():
    """An agent that is cut from a stack has its own row of them, whatever the batch's sizes.

    Among agents with the same bounds the code is shared, which compiles it once.
    """
    n_agents, group = 4, "agents"
    net = MultiAgentMLP(
        n_agent_inputs=OBS_DIM,
        n_agent_outputs=7,
        n_agents=n_agents,
        centralized=False,
        share_params=False,
        depth=1,
        num_cells=8,
    )
    high = torch.tensor([1.0, 2.0, 2.0, 3.0]).unsqueeze(-1).expand(-1, 2)
    heads = [(group, "params", *key) for key in (("move", "loc"), ("move", "scale"))]
    actor = ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(net, Heads()),
            in_keys=[(group, "observation")],
            out_keys=[*heads, (group, "params", "talk", "logits")],
        ),
        in_keys=[(group, "params")],
        out_keys=[(group, "move"), (group, "talk")],
        distribution_class=CompositeDistribution,
        distribution_kwargs={
            **COMPOSITE,
            "distribution_map": {"move": TanhNormal, "talk": d.Categorical},
            "name_map": {"move": (group, "move"), "talk": (group, "talk")},
            "extra_kwargs": {"move": {"low": -high, "high": high}},
        },
        return_log_prob=True,
    )
    batch = TensorDict(
        {group: {"observation": torch.randn(3, n_agents, n_agents, OBS_DIM)}}, [3, n_agents]
    )
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        batch = actor(batch)
    agents = split_actor(actor)
    for agent in agents:
        keys = [(group, "observation"), (group, "move"), (group, "talk")]
        data = agent.view(batch, [*keys, *agent.policy.log_prob_keys])
        log_prob = agent.log_prob(agent.policy.parameters(data), data)
        torch.testing.assert_close(log_prob, agent.stored_log_prob(data), rtol=1e-4, atol=1e-4)
    assert [agent.template is agents[1].actor for agent in agents] == [False, True, True, False]
