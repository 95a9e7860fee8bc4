"""HAA2C, and one trust region for the whole team: what their equations promise."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import pytest
import torch
from exact import games
from hypothesis import given, settings
from hypothesis import strategies as st
from newer import load_tensors, tensors
from recipe_helpers import table, tiny_config
from team import N_AGENTS, make_actor, make_batch, make_critic, perturb, same_state, state_of
from torchrl.modules import IndependentNormal
from torchrl.objectives import ValueEstimators

from torchrl_happo import A2POLoss, CoPPOLoss, HAA2CLoss, HAPPOLoss, HATRPOLoss, SequentialUpdater
from torchrl_happo.recipe import training
from torchrl_happo.steps import FirstOrder
from torchrl_happo.update.batch import TeamBatch
from torchrl_happo.update.budget import weighted_shares
from torchrl_happo.update.correction import RatioFactor
from torchrl_happo.update.reestimation import Reestimated, reestimate

NAMES = [f"agents_{i}" for i in range(N_AGENTS)]
KEYS = {"value": ("agents", "state_value"), "action": ("agents", "action")}


def updated(loss_class, batch, state, *, order="fixed", **kwargs):
    """The actor of a team after an update, and its metrics."""
    actor = make_actor()
    critic = make_critic()
    loss = loss_class(actor, critic, **{"entropy_coeff": 0.0, **kwargs})
    load_tensors(actor, state[0])
    load_tensors(critic, state[1])
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
    for key, value in tensors(ours).items():
        torch.testing.assert_close(value, tensors(wide)[key], rtol=1e-6, atol=1e-7)
    assert not same_state(tensors(ours), tensors(narrow))


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


@pytest.mark.parametrize(
    "words",
    [
        ("algorithm=a2po",),
        ("algorithm=a2po", "algorithm.trace=code", "algorithm.order=random"),
        ("algorithm=coppo",),
        ("algorithm=haa2c",),
        ("algorithm=hatrpo", "algorithm.kl_split=weighted"),
        ("algorithm=hatrpo", "algorithm.kl_split=greedy"),
    ],
    ids=" ".join,
)
def test_the_recipe_trains_them(tmp_path, words):
    """By their name, for some iterations."""
    config = tiny_config("task=vmas/wheel", *words)
    rows = table(training.run(config, tmp_path / "run") / "metrics.csv")
    assert len(rows) == 3


SPLITS = ["weighted", "greedy"]


def hatrpo(actor=None, critic=None, **kwargs):
    """An updater of a team with one divergence for all."""
    actor = make_actor() if actor is None else actor
    loss = HATRPOLoss(actor, make_critic() if critic is None else critic, **kwargs)
    return SequentialUpdater(loss, num_epochs=1)


def test_weighted_shares():
    """In proportion to q, of which a gain is the square root; nobody's gain is no share."""
    gains = [math.sqrt(2 * 0.05 * q) for q in (4.0, 1.0)]
    assert [0.05 * share for share in weighted_shares(gains)] == pytest.approx([0.04, 0.01])
    assert weighted_shares([0.3, 0.3, 0.3]) == pytest.approx([1 / 3] * 3)
    assert weighted_shares([2.0, 0.0, -1.0]) == [1.0, 0.0, 0.0]
    assert weighted_shares([0.0, 0.0]) == [0.0, 0.0]


@pytest.mark.parametrize("kl_split", SPLITS)
@pytest.mark.parametrize("max_kl", [1e-3, 0.03, 0.3])
def test_the_team_never_spends_more_than_its_budget(kl_split, max_kl):
    """By the measured divergences, batch after batch, and the team moves."""
    updater = hatrpo(max_kl=max_kl, kl_split=kl_split, damping=1e-3)
    batch = make_batch(updater.loss.actor_network)
    for _ in range(4):
        metrics = updater(batch)
        spent = sum(metrics[name, "kl"].item() for name in NAMES)
        assert 0 < spent <= max_kl
        assert updater.budget.left == pytest.approx(max_kl - spent)
        batch = make_batch(updater.loss.actor_network)


def test_weighted_with_frozen_factors_is_one_step_of_the_stacked_parameters():
    """The natural gradient of all agents together, of radius max_kl, with a Fisher of blocks."""
    actor = make_actor(distribution=IndependentNormal, depth=0).double()
    critic = make_critic().double()
    batch, delta = make_batch(actor), 1e-6
    loss = HATRPOLoss(
        actor,
        critic,
        max_kl=delta,
        kl_split="weighted",
        damping=0.0,
        cg_iterations=200,
        cg_tolerance=1e-24,
        max_backtracks=1,
        accept_ratio=0.0,
    )
    before = [[p.detach().clone() for p in agent.parameters()] for agent in loss.agents]
    # All move at once: no factor, and the budget is divided once.
    updater = SequentialUpdater(loss, num_epochs=1, order=AllAtOnce())
    data = TeamBatch(loss.team, loss.critics, batch)
    gradients, directions = [], []
    for agent in loss.agents:
        passes = updater._passes[agent.name]
        own = passes.ready(data, RatioFactor(data), read_values=True)
        direction = updater.steps[agent.name].propose(passes.step_data(own)).direction
        gradients.append(direction.target)
        directions.append(direction.x)
    g, x = torch.cat(gradients), torch.cat(directions)
    wanted = (2 * delta / g.dot(x)).sqrt() * x
    metrics = updater(batch)
    moved = torch.cat(
        [
            (new - old).flatten()
            for agent, olds in zip(loss.agents, before, strict=True)
            for new, old in zip(agent.parameters(), olds, strict=True)
        ]
    )
    for name, part, step in zip(NAMES, moved.chunk(3), wanted.chunk(3), strict=True):
        if metrics[name, "line_search_success"]:
            torch.testing.assert_close(part, step, rtol=1e-6, atol=1e-9)
    assert any(metrics[name, "line_search_success"] for name in NAMES)


class AllAtOnce:
    """One turn of all agents."""

    def next_agents(self, remaining, batch, correction):
        return remaining


@pytest.mark.parametrize("kl_split", SPLITS)
def test_an_agent_without_a_gradient_gets_nothing(kl_split):
    """Its parameters stay bit for bit, nothing is NaN, and the others have its share."""
    actor = make_actor()
    updater = hatrpo(actor, max_kl=0.03, kl_split=kl_split)
    batch = make_batch(actor)
    agent = updater.loss.agents[1]
    step = updater.steps[agent.name]
    surrogate = step.surrogate
    step.surrogate = lambda dist, data: surrogate(dist, data) * 0
    before = [p.detach().clone() for p in agent.parameters()]
    metrics = updater(batch)
    assert all(map(torch.equal, before, agent.parameters()))
    assert metrics[agent.name, "kl"] == 0
    assert metrics[agent.name, "line_search_success"] == 0
    assert all(value.isfinite() for value in metrics.values(True, True))
    others = [name for name in NAMES if name != agent.name]
    assert sum(metrics[name, "kl"] for name in others) > 0.005


def test_greedy_takes_the_largest_gain_per_divergence_first():
    """As a look at all proposals says before the first turn; the first one has it all."""
    updater = hatrpo(max_kl=0.03, kl_split="greedy", damping=1e-3)
    batch = make_batch(updater.loss.actor_network)
    # Agent 2's advantage is ten times as large.
    loss = updater.loss
    advantage = torch.randn(4, 6, N_AGENTS, 1)
    advantage[..., 2, :] *= 10
    batch["advantage"], batch["value_target"] = advantage, torch.randn(4, 6, N_AGENTS, 1)
    data = TeamBatch(loss.team, loss.critics, batch)
    updater.budget.begin()
    updater.budget.look(loss.agents, data, RatioFactor(data))
    scores = updater.budget.scores
    assert max(scores, key=scores.get) == NAMES[2]
    metrics = updater(batch)
    assert metrics[NAMES[2], "position"] == 0
    assert 0.01 < metrics[NAMES[2], "kl"] <= 0.03


@pytest.mark.parametrize("kl_split", SPLITS)
def test_a_look_leaves_no_trace(kl_split):
    """Rows of the Fisher matrix are drawn once a batch, with or without a look at the gains."""
    alone = hatrpo(max_kl=0.03, fisher_fraction=0.5)
    shared = hatrpo(max_kl=0.03, fisher_fraction=0.5, kl_split=kl_split)
    shared.load_state_dict(alone.state_dict())
    batch = make_batch(alone.loss.actor_network)
    alone(batch)
    shared(batch)
    for name in NAMES:
        one, other = (updater.steps[name].state_dict() for updater in (alone, shared))
        assert torch.equal(one["generator"], other["generator"])


@pytest.mark.parametrize("kl_split", SPLITS)
def test_what_does_not_go_with_a_team_budget_is_refused(kl_split):
    """A bound for each agent, an order of greedy's, and steps that promise nothing."""
    with pytest.raises(ValueError, match="divides one max_kl among the agents; pass a number"):
        HATRPOLoss(make_actor(), None, kl_split=kl_split, max_kl={"agents": 0.01})
    loss = HATRPOLoss(make_actor(), make_critic(), kl_split=kl_split)
    with pytest.raises(AttributeError):
        loss.kl_split = "equal"
    updater = SequentialUpdater(loss, step=FirstOrder())
    before = state_of(loss.actor_network)
    with pytest.raises(ValueError, match="compares the gains of the agents"):
        updater(make_batch(loss.actor_network))
    assert same_state(before, state_of(loss.actor_network))
    if kl_split == "greedy":
        with pytest.raises(ValueError, match="order='fixed' would not act"):
            SequentialUpdater(loss, order="fixed")


def test_coppo_is_its_equation():
    """The loss of the group and its gradient, from the ratios of the members by hand."""
    actor = make_actor(distribution=IndependentNormal).double()
    batch = make_batch(actor)
    batch["advantage"] = torch.randn(4, 6, 1, dtype=torch.float64)
    batch["agents", "active"] = torch.rand(4, 6, N_AGENTS) < 0.7
    perturb(actor, 0.2)
    loss = CoPPOLoss(actor, None, entropy_coeff=0.0)
    (unit,) = loss.agents
    assert unit.name == "agents"
    log_prob = actor.get_dist(batch).log_prob(batch["agents", "action"])
    valid = batch["agents", "active"]
    ratio = torch.where(valid, (log_prob - batch["agents", "action_log_prob"]).exp(), 1.0)
    terms = []
    for i in range(N_AGENTS):
        others = torch.stack([ratio[..., j] for j in range(N_AGENTS) if j != i]).prod(0).detach()
        both = ratio[..., i] * others.clamp(0.9, 1.1)
        advantage = batch["advantage"][..., 0]
        terms.append(torch.minimum(both * advantage, both.clamp(0.8, 1.2) * advantage))
    wanted = -torch.stack(terms, -1)[valid].mean()
    for got in (loss.agent_loss(unit, loss.agent_data(unit, batch)), loss(batch)["loss_objective"]):
        torch.testing.assert_close(got, wanted)
        gradients = [
            torch.autograd.grad(value, list(actor.parameters()), retain_graph=True)
            for value in (got, wanted)
        ]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)
    assert not torch.allclose(wanted, HAPPOLoss(actor, None)(batch)["loss_objective"])


def test_coppo_of_one_agent_is_ppo():
    """To the rounding of double precision, through an update; no number is that of the start."""
    alone = make_actor(1).double(), make_critic(1).double()
    batch, states = make_batch(alone[0], n_agents=1), [state_of(network) for network in alone]
    ends = []
    for loss_class in (CoPPOLoss, HAPPOLoss):
        for network, state in zip(alone, states, strict=True):
            load_tensors(network, state)
        loss = loss_class(*alone, entropy_coeff=0.0)
        SequentialUpdater(loss, num_epochs=3, minibatch_size=8)(batch)
        ends.append(state_of(alone[0]))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)
    assert all((value != states[0][key]).all() for key, value in ends[0].items())


def test_coppo_refuses_several_groups():
    """Whose ratios would not be in view of each other."""
    actors = {name: make_actor(group=name) for name in ("red", "blue")}
    with pytest.raises(ValueError, match=r"groups \['red', 'blue'\]; put all agents into one"):
        CoPPOLoss(actors, None)
    with pytest.raises(TypeError, match="blocks would not act"):
        CoPPOLoss(make_actor(), None, blocks=["agents"])


def a2po(**kwargs):
    """A loss of A2PO, a batch that knows its advantage, and the correction of the first turn."""
    actor, critic = make_actor().double(), make_critic().double()
    loss = A2POLoss(actor, critic, entropy_coeff=0.0, **kwargs)
    loss.set_keys(value=("agents", "state_value"))
    loss.make_value_estimator(ValueEstimators.GAE, gamma=0.875, lmbda=0.75)
    batch = make_batch(actor)
    data = TeamBatch(loss.team, loss.critics, batch, standardize_advantage=False)
    return loss, data, Reestimated(data, loss=loss)


@pytest.mark.parametrize("c_thresh", [1.0, 1.25, math.inf])
@pytest.mark.parametrize("trace", ["paper", "code"])
def test_a2po_estimates_the_advantage_again(trace, c_thresh):
    """GAE for the first agent; for the second the sum over its traces, from its definition."""
    loss, data, correction = a2po(trace=trace, c_thresh=c_thresh)
    first, second, _ = loss.agents
    gae = data.batch["advantage"][..., 0]
    own = gae if gae.ndim == 2 else gae[..., 0]
    torch.testing.assert_close(correction.advantage(first), own, rtol=1e-12, atol=1e-12)
    log_ratio = 0.5 * torch.randn(24, dtype=torch.float64)
    correction.include(first, log_ratio)
    rho = log_ratio.exp().reshape(4, 6)
    c = (0.75 if trace == "paper" else 0.5625) * rho.clamp(max=c_thresh)
    ends = data.batch["next", "done"][..., 0]
    gae = gae if gae.ndim == 2 else gae[..., 1]
    wanted = torch.zeros_like(gae)
    for env in range(4):
        for t in range(6):
            weight = 1.0
            for s in range(t, 6):
                if s > t:
                    weight = weight * 0.875 * c[env, s]
                last = s == 5 or bool(ends[env, s])
                delta = gae[env, s] - (0.0 if last else 0.875 * 0.75 * gae[env, s + 1])
                wanted[env, t] += weight * delta
                if last:
                    break
    torch.testing.assert_close(correction.advantage(second), wanted, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(wanted, gae)


@settings(max_examples=25)
@given(
    played=games(min_agents=2, max_agents=2, max_states=2, max_actions=2, gamma=st.just(0.8)),
    seed=st.integers(0, 2**32),
)
def test_the_advantage_estimated_again_is_exact(played, seed):
    """With whole ratios and lambda 1, on average over every course that a game can take.

    Three steps of a random game, the first agent's policy replaced by another one, and any values:
    given the first state and action, the mean of the estimate is the value of that action under
    the new policies, by backward induction, less the critic's value.
    """
    game, old = played
    generator = torch.Generator().manual_seed(seed)
    new = [game.random_policies(generator=generator)[0], old[1]]
    horizon, gamma = 3, game.gamma
    values = torch.randn(game.n_states, generator=generator, dtype=torch.float64)

    before, after = (game.joint_policy(policies).flatten(1) for policies in (old, new))
    reward, moves = game.reward.flatten(1), game.transition.flatten(1, -2)
    action_value = torch.zeros_like(reward)
    for _ in range(horizon):
        action_value = reward + gamma * moves @ (after * action_value).sum(1)

    # Every course of states and actions, and its probability given the first state and action.
    steps = [range(game.n_states), range(reward.shape[1])] * horizon
    states, actions = torch.tensor(list(product(*steps))).unflatten(1, (horizon, 2)).unbind(-1)
    moved = moves[states[:, :-1], actions[:, :-1], states[:, 1:]]
    probability = (moved * before[states, actions][:, 1:]).prod(1)

    value = values[states]
    next_value = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    delta = reward[states, actions] + gamma * next_value - value
    gae = delta.clone()
    for t in reversed(range(horizon - 1)):
        gae[:, t] += gamma * gae[:, t + 1]
    done = torch.arange(horizon).expand_as(states) == horizon - 1
    ratio = (after / before)[states, actions]
    advantage = reestimate(gae, ratio, done, gamma=gamma, lmbda=1.0)[:, 0]

    mean = torch.zeros_like(reward).index_put(
        (states[:, 0], actions[:, 0]), probability * advantage, accumulate=True
    )
    torch.testing.assert_close(mean, action_value - values[:, None], rtol=1e-10, atol=1e-10)


def test_a2po_with_ratios_of_one_is_happo():
    """The same loss for every agent, with the same advantage, if the threshold does not grow."""
    loss, data, correction = a2po(clip_growth=0.0)
    twin = HAPPOLoss(loss.actor_network, None, entropy_coeff=0.0)
    samples = [data.agent_data(agent, correction.entries(agent)) for agent in loss.agents]
    for agent, own in zip(loss.agents, samples, strict=True):
        own["old_log_prob"] = agent.stored_log_prob(own)
    perturb(loss.actor_network, 0.2)
    for agent, own in zip(loss.agents, samples, strict=True):
        torch.testing.assert_close(loss.agent_loss(agent, own), twin.agent_loss(agent, own))


def test_a2po_clips_the_factor_and_by_position():
    """The loss is its equation, with ratios beyond every threshold."""
    loss, data, correction = a2po()
    assert [loss.clip_scale(place) for place in range(3)] == pytest.approx([2 / 3, 5 / 6, 1])
    first, second, _ = loss.agents
    correction.include(first, torch.randn(24, dtype=torch.float64))
    own = data.agent_data(second, correction.entries(second))
    own["old_log_prob"] = second.stored_log_prob(own) + 0.5 * torch.randn(24).double()
    ratio = (second.log_prob(second.policy.parameters(own), own) - own["old_log_prob"]).exp()
    both = ratio * own["factor"].clamp(0.9, 1.1)
    eps, advantage = 0.2 * 5 / 6, own["advantage"]
    wanted = torch.minimum(both * advantage, both.clamp(1 - eps, 1 + eps) * advantage).mean()
    torch.testing.assert_close(loss.agent_loss(second, own), -wanted)


def test_the_semi_greedy_order():
    """The best first, as its definition says, and an update goes through all agents."""
    loss, data, _ = a2po()
    updater = SequentialUpdater(loss, order="semi_greedy", num_epochs=1)
    scores = updater._turns.order.scores(loss.agents, data)
    ratio = data.batch["advantage"].squeeze(-1) / data.batch["agents", "state_value"].squeeze(-1)
    assert scores == pytest.approx(ratio.abs().mean((0, 1)).tolist())
    metrics = updater(data.source)
    assert sorted(metrics[name, "position"].item() for name in NAMES) == [0, 1, 2]
    assert metrics[NAMES[scores.index(max(scores))], "position"] == 0


def test_a2po_refuses_what_it_cannot_estimate():
    """No critic, a growth out of range, another word."""
    loss = A2POLoss(make_actor(), None, entropy_coeff=0.0)
    batch = make_batch(loss.actor_network)
    batch["advantage"] = torch.randn(4, 6, 1)
    with pytest.raises(ValueError, match="needs its gamma and lmbda; pass a critic"):
        SequentialUpdater(loss)(batch)
    with pytest.raises(ValueError, match="clip_growth must be between"):
        A2POLoss(make_actor(), None, clip_growth=2.0)
    with pytest.raises(ValueError, match=r"c_thresh must be at least 1, got 0\.5"):
        A2POLoss(make_actor(), None, c_thresh=0.5)
    with pytest.raises(ValueError, match='trace must be "paper" or "code"'):
        A2POLoss(make_actor(), None, trace="both")


@pytest.mark.parametrize("settings", [{}, {"sequence_length": 3}], ids=["steps", "chunks"])
@pytest.mark.parametrize(
    ("loss_class", "kwargs"),
    [
        (A2POLoss, {}),
        (A2POLoss, {"blocks": ["agents"]}),
        (CoPPOLoss, {}),
        (HAA2CLoss, {"blocks": ["agents"]}),
        (HATRPOLoss, {"kl_split": "weighted"}),
        (HATRPOLoss, {"kl_split": "greedy"}),
    ],
)
def test_masks_blocks_and_chunks(loss_class, kwargs, settings):
    """An agent that acts nowhere stays as it is, the others move, and nothing is NaN."""
    actor = make_actor()
    batch = make_batch(actor)
    batch["agents", "active"] = torch.rand(4, 6, N_AGENTS) < 0.5
    batch["agents", "active"][0, 0] = True
    batch["agents", "active"][..., 1] = False
    before = state_of(actor)
    loss = loss_class(actor, make_critic(), **kwargs)
    metrics = SequentialUpdater(loss, num_epochs=2, minibatch_size=8, **settings)(batch)
    assert all(value.isfinite().all() for value in metrics.values(True, True))
    moved = [
        (value - before[key]).abs().flatten(1).amax(1)
        for key, value in tensors(actor).items()
        if value.ndim > 1 and len(value) == N_AGENTS
    ]
    assert [bool(torch.stack(moved)[:, i].any()) for i in range(N_AGENTS)] == [True, False, True]
