"""Arguments of losses: those of TorchRL that a loss has not are refused, and the others act."""

from __future__ import annotations

import inspect
import re
from functools import partial

import pytest
import torch
from team import N_AGENTS, make_actor, make_batch, make_critic
from test_lagrangian import costly
from torchrl.collectors import Collector
from torchrl.objectives import A2CLoss, ClipPPOLoss, KLPENPPOLoss, PPOLoss
from wrong_calls import flat_actor

import torchrl_happo
from torchrl_happo import (
    A2POLoss,
    ActorList,
    CoPPOLoss,
    HAA2CLoss,
    HAPPOLagrangianLoss,
    HAPPOLoss,
    HATRPOLoss,
    MACPOLoss,
    MATLoss,
    SequentialUpdater,
    TPPOLoss,
    make_transformer,
)
from torchrl_happo.envs import MatrixGame, climbing_payoff
from torchrl_happo.update.batch import TeamBatch


def plain(kind, **kwargs):
    """A loss of a small team, and a batch of its own."""
    loss = kind(make_actor(), make_critic(), **kwargs)
    return loss, make_batch(loss.actor_network)


def bounded(kind, **kwargs):
    """A loss with a cost."""
    costs = {"cost_critic": make_critic(), "cost_limit": 1.0}
    loss, batch = plain(kind, **{**costs, **kwargs})
    return loss, costly(batch)


def transformer(kind, **kwargs):
    """A loss of a transformer of two agents."""
    env = MatrixGame(climbing_payoff(), num_envs=8)
    actor, critic = make_transformer(env, size=8, prefix_values=kind is TPPOLoss)
    batch = next(iter(Collector(env, actor, frames_per_batch=32, total_frames=32)))
    return kind(actor, critic, **kwargs), batch


LOSSES = {
    **dict.fromkeys((HAPPOLoss, HATRPOLoss, HAA2CLoss, A2POLoss, CoPPOLoss), plain),
    MACPOLoss: bounded,
    HAPPOLagrangianLoss: partial(bounded, multiplier="fixed", initial_multiplier=0.0),
    **dict.fromkeys((MATLoss, TPPOLoss), transformer),
}
EACH = pytest.mark.parametrize("kind", LOSSES, ids=lambda kind: kind.__name__)

#: Every argument of TorchRL's losses of this family, and two that their users write.
THEIRS = {
    name
    for loss in (PPOLoss, ClipPPOLoss, KLPENPPOLoss, A2CLoss)
    for name, parameter in inspect.signature(loss.__init__).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
} | {"lmbda", "critic_coef", "entropy_coef"}
TRUST_REGION = {"max_kl", "kl_split", "damping", "cg_iterations", "accept_ratio", "line_search"}
CLIPPING = {"clip_epsilon", "entropy_bonus", "entropy_coeff", "samples_mc_entropy"}
SHARED = {
    *("critic_coeff", "loss_critic_type", "clip_value", "normalize_advantage", "reduction"),
    *("normalize_advantage_exclude_dims", "log_explained_variance", "device"),
}


def foreign(kind):
    """The arguments of others that a loss has not."""
    has_region = issubclass(kind, HATRPOLoss)
    own = SHARED | (TRUST_REGION if has_region else CLIPPING)
    return sorted((THEIRS | TRUST_REGION | CLIPPING) - own)


#: Values of arguments that sentences name as cures.
VALUES = {
    "actor_network": make_actor,
    "critic_network": make_critic,
    "critic_coeff": lambda: 0.5,
    "entropy_coeff": lambda: 0.02,
    "clip_epsilon": lambda: 0.3,
    "max_kl": lambda: 0.02,
}


def mend(kind, cure):
    """Do what a sentence says, of a loss of some kind."""
    build = LOSSES[kind]
    if found := re.match(r"call loss\.(\w+)\((.*)\)", cure):
        values = {"gamma": 0.9, "lmbda": 0.8}
        names = re.findall(r"(\w+)=", found[2])
        loss, _ = build(kind)
        getattr(loss, found[1])(**{n: values.get(n, ("agents", "state_value")) for n in names})
    elif found := re.match(r"(?:pass|write) (?:the networks? as )?(\w+)", cure):
        name = found[1]
        if name.endswith("network"):
            HAPPOLoss(**{"actor_network": make_actor(), name: VALUES[name]()})
        else:
            build(kind, **{name: VALUES[name]()})
    elif found := re.match(r"take (\w+)", cure):
        other = getattr(torchrl_happo, found[1])
        LOSSES[other](other)
    else:
        assert cure.startswith("leave it out"), cure
        build(kind)


@EACH
def test_arguments_that_a_loss_has_not_are_refused_with_a_cure(kind):
    """Before anything is built; the cure that the sentence names works."""
    cures = set()
    names = foreign(kind)
    assert {"gamma", "functional", "beta", "delay_actor"} <= set(names)
    for name in names:
        with pytest.raises(TypeError) as caught:
            kind(None, None, **BARE.get(kind, {}), **{name: None})
        found = re.fullmatch(
            rf"{kind.__name__} has no argument {name!r}; (.+)\.", str(caught.value)
        )
        assert found, caught.value
        cures.add(found[1])
    assert "did you mean" not in " ".join(cures)
    for cure in cures:
        mend(kind, cure)


#: What a loss cannot do without.
BARE = {key: {"cost_critic": None, "cost_limit": 0.0} for key in (MACPOLoss, HAPPOLagrangianLoss)}


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        (HAPPOLoss, "clip_eps", "did you mean 'clip_epsilon'[?]"),
        (HATRPOLoss, "maximum_kl", "did you mean 'max_kl'[?]"),
        (A2POLoss, "clip_growht", "did you mean 'clip_growth'[?]"),
        (CoPPOLoss, "critic_coefficient", "did you mean 'critic_coeff'[?]"),
        (MATLoss, "ratios", "did you mean 'ratio'[?]"),
        (HAPPOLoss, "pigs", "leave it out[.]"),
    ],
)
def test_misspelt_arguments(kind, name, words):
    """The near ones are named, those of the class itself as well."""
    with pytest.raises(TypeError, match=f"{kind.__name__} has no argument '{name}'; {words}$"):
        kind(make_actor(), make_critic(), **{name: 1})


CLIPPED = [kind for kind in LOSSES if not issubclass(kind, (HATRPOLoss, HAA2CLoss))]


@pytest.mark.parametrize("kind", CLIPPED, ids=lambda kind: kind.__name__)
def test_a_clipping_range_by_name_acts_in_every_loss_that_clips(kind):
    """All alike, it is the number, to the bit; a narrow one holds a policy back."""
    moved = []
    for clip_epsilon in (0.2, {"agents": 0.2}, {"agents": 1e-6}):
        torch.manual_seed(0)
        loss, batch = LOSSES[kind](kind, clip_epsilon=clip_epsilon, entropy_coeff=0.0)
        updater = SequentialUpdater(
            loss, optimizer=partial(torch.optim.SGD, lr=0.5), num_epochs=3, minibatch_size=7
        )
        updater(batch)
        moved.append([p.detach().clone() for p in loss.actor_network.parameters()])
    assert all(map(torch.equal, moved[0], moved[1]))
    assert not all(map(torch.equal, moved[0], moved[2]))


@pytest.mark.parametrize("kind", [CoPPOLoss, MATLoss], ids=lambda kind: kind.__name__)
def test_a_list_of_actors_is_no_block(kind):
    """The sentence does not blame an argument that nobody passed."""
    actor = ActorList([flat_actor() for _ in range(3)])
    for given in (actor, {"agents": actor}):
        with pytest.raises(ValueError, match=f"{kind.__name__} moves.*one Prob.*take HAPPOLoss"):
            kind(given, make_critic())
    HAPPOLoss(actor, make_critic())  # the cures
    kind(make_actor(), make_critic())


@EACH
@pytest.mark.parametrize("normalizes", [None, True, False])
def test_normalize_advantage_acts_in_every_loss(normalizes, kind):
    """The first agent's surrogate begins at the mean of its advantage: 0, or the one given."""
    torch.manual_seed(0)
    loss, batch = LOSSES[kind](kind, normalize_advantage=normalizes)
    batch["advantage"] = 5 + torch.arange(batch.numel()).reshape(*batch.shape, 1).float()
    values = loss.critic_network(batch.clone())[loss.tensor_keys.value]
    batch["value_target"] = torch.zeros_like(values)
    metrics = SequentialUpdater(loss, num_epochs=1, order="fixed")(batch)
    wanted = batch["advantage"].mean().item() if normalizes is False else 0.0
    got = metrics[loss.agents[0].name, "surrogate_before"].item()
    assert got == pytest.approx(wanted, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "blocks", "masked"),
    [
        (HAPPOLoss, (), False),
        (HAPPOLoss, (), True),
        (HAPPOLoss, ["agents"], False),
        (HATRPOLoss, ["agents"], True),
    ],
)
def test_advantages_of_agents_may_be_standardised_each_for_itself(kind, blocks, masked):
    """As if each agent had come alone; by default they are standardised together."""
    means = {}
    for dims in ((), (-2,)):
        torch.manual_seed(0)
        loss, batch = plain(kind, normalize_advantage_exclude_dims=dims, blocks=blocks)
        scales = torch.tensor([100.0, 10.0, 1.0]).unsqueeze(-1)
        batch["advantage"] = scales * (1 + torch.randn(*batch.shape, N_AGENTS, 1))
        batch["value_target"] = torch.zeros(*batch.shape, N_AGENTS, 1)
        if masked:
            batch["agents", "active"] = torch.rand(*batch.shape, N_AGENTS) < 0.6
        data = TeamBatch(loss.team, loss.critics, batch, each_for_itself=bool(dims))
        own = [data.advantage(agent).unsqueeze(-1).flatten(2) for agent in loss.agents]
        own = torch.cat(own, -1)
        active = batch.get(("agents", "active"), torch.ones_like(own, dtype=torch.bool))
        means[dims] = [own[..., i][active[..., i]].mean().item() for i in range(N_AGENTS)]
        metrics = SequentialUpdater(loss, num_epochs=1, order="fixed")(batch)
        first = metrics[loss.agents[0].name, "surrogate_before"].item()
        wanted = own[active].mean().item() if blocks else means[dims][0]
        assert first == pytest.approx(wanted, abs=1e-4)
    assert means[-2,] == pytest.approx([0.0] * N_AGENTS, abs=1e-4)
    assert max(map(abs, means[()])) > 0.2


@pytest.mark.parametrize("dims", [(0,), (-2, -1), (-3,)])
def test_dimensions_of_steps_cannot_be_left_out_in_an_update(dims):
    """Forward takes them, as TorchRL does; the updater says what it takes."""
    loss, batch = plain(HAPPOLoss, normalize_advantage=True, normalize_advantage_exclude_dims=dims)
    assert loss(batch)["loss_objective"].isfinite()
    with pytest.raises(ValueError, match=r"exclude_dims=.*leave it out, or pass \(-2,\)"):
        SequentialUpdater(loss)
    for cure in ((), (-2,)):
        loss.normalize_advantage_exclude_dims = cure
        SequentialUpdater(loss, num_epochs=1)(batch)
