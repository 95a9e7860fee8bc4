"""The sequential update: order, isolation, factor, state, and refusal without a trace."""

from __future__ import annotations

import copy
import io
import math
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from newer import tensors
from team import (
    N_AGENTS,
    SPOILED_GRADIENTS,
    make_actor,
    make_batch,
    make_critic,
    perturb,
    same_state,
    state_of,
)
from tensordict import TensorDict, lazy_stack
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torch.distributions import AffineTransform
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.modules import IndependentNormal, ProbabilisticActor, TanhNormal
from wrong_calls import same

from torchrl_happo import HAPPOLoss, HATRPOLoss, SequentialUpdater
from torchrl_happo.distributed import Learners
from torchrl_happo.policy.distributions import entropy
from torchrl_happo.steps import FirstOrder, Problem
from torchrl_happo.steps.minibatches import (
    ReplayBufferMinibatches,
    ShuffledMinibatches,
    draw_rows,
)
from torchrl_happo.update.correction import RatioFactor

ADAM = partial(torch.optim.Adam, lr=1e-2)
NAMES = [f"agents_{i}" for i in range(N_AGENTS)]


def make_updater(actor=None, critic=None, *, loss_kwargs=None, **kwargs):
    """An updater of a small team, with the default keys."""
    actor = make_actor() if actor is None else actor
    critic = make_critic() if critic is None else critic
    loss = HAPPOLoss(actor, critic, **{"entropy_coeff": 0.0, **(loss_kwargs or {})})
    return SequentialUpdater(
        loss, **{"optimizer": ADAM, "num_epochs": 2, "minibatch_size": 7, **kwargs}
    )


def optimizer_states(updater):
    """A copy of every optimiser's state, by the agent's name."""
    return {name: copy.deepcopy(step.state_dict()) for name, step in updater.steps.items()}


def flat(state):
    """The tensors of an optimiser's state in one list."""
    return [t for entry in state["optimizer"]["state"].values() for t in entry.values()]


def test_the_actor_that_was_passed_is_trained():
    """The stack that a collector rolls out moves with the slices that are trained."""
    actor, critic = make_actor(), make_critic()
    updater = make_updater(actor, critic)
    before, critic_before = state_of(actor), state_of(critic)
    updater(make_batch(actor))
    for name, value in tensors(actor).items():
        for row in range(N_AGENTS):
            assert not torch.equal(value[row], before[name][row])
    assert not same_state(critic_before, state_of(critic))


def test_an_agent_with_no_gradient_does_not_drift():
    """Momentum of earlier updates does not move an agent whose turn is skipped."""
    actor = make_actor()
    updater = make_updater(actor)
    batch = make_batch(actor)
    updater(batch)
    before = state_of(actor)
    batch["agents", "active"] = torch.ones(*batch.shape, N_AGENTS, dtype=torch.bool)
    batch["agents", "active"][..., 1] = False
    updater(batch)
    for key, value in tensors(actor).items():
        assert torch.equal(value[1], before[key][1])
        assert not torch.equal(value[0], before[key][0])


@pytest.mark.parametrize("distribution", [IndependentNormal, TanhNormal])
def test_factor_is_the_exact_product_of_ratios(distribution, monkeypatch):
    """After agent i the factor is exp of the sum of the exact log-ratios of all agents so far."""
    actor = make_actor(distribution=distribution).double()
    updater = make_updater(actor, make_critic().double(), order="fixed")
    batch = make_batch(actor)
    include = RatioFactor.include
    log_ratios = []

    def log_prob(i):
        agent = updater.loss.agents[i]
        data = agent.view(batch, agent.update_keys)
        with torch.no_grad():
            return agent.actor.get_dist(data).log_prob(batch["agents", "action"][..., i, :])

    before = [log_prob(i) for i in range(N_AGENTS)]

    def checked(team, agent, log_ratio):
        include(team, agent, log_ratio)
        log_ratios.append(log_prob(agent.index) - before[agent.index])
        expected = torch.stack(log_ratios).sum(0).flatten()
        torch.testing.assert_close(team.log_factor, expected, rtol=1e-12, atol=1e-12)

    monkeypatch.setattr(RatioFactor, "include", checked)
    updater(batch)
    assert len(log_ratios) == N_AGENTS


def test_inactive_agents_contribute_ratio_one(monkeypatch):
    """Where an agent is dead the factor does not change, whatever its policy does there."""
    actor = make_actor()
    updater = make_updater(actor)
    batch = make_batch(actor)
    active = torch.rand(*batch.shape, N_AGENTS) > 0.4
    batch["agents", "active"] = active
    include = RatioFactor.include

    def checked(team, agent, log_ratio):
        before = team.log_factor.clone()
        include(team, agent, log_ratio)
        changed = team.log_factor != before
        assert torch.equal(changed, active[..., agent.index].flatten())

    monkeypatch.setattr(RatioFactor, "include", checked)
    updater(batch)


def test_masked_entries_have_no_influence():
    """Anything may stand where agents are inactive: nothing moves, bit for bit."""
    actor, critic = make_actor(), make_critic()
    updater = make_updater(actor, critic)
    twin = copy.deepcopy(updater)
    batch = make_batch(actor)
    batch["advantage"] = torch.randn(*batch.shape, 1)
    batch["value_target"] = torch.randn(*batch.shape, N_AGENTS, 1)
    active = torch.rand(*batch.shape, N_AGENTS) > 0.4
    batch["agents", "active"] = active
    other = batch.clone()
    for key in ["action", "action_log_prob", "loc", "scale"]:
        value = other["agents", key]
        dead = ~active if value.ndim == active.ndim else ~active.unsqueeze(-1)
        other["agents", key] = torch.where(dead, torch.rand_like(value), value)
    one, two = updater(batch), twin(other)
    assert same_state(tensors(updater.loss.actor_network), tensors(twin.loss.actor_network))
    for name in NAMES:
        assert (one[name] == two[name]).all()


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("fixed", [0, 1, 2]),
        ([2, 0, 1], [2, 0, 1]),
        (np.array([2, 0, 1]), [2, 0, 1]),
        (torch.tensor([2, 0, 1]), [2, 0, 1]),
        (["agents_1", "agents_2", "agents_0"], [1, 2, 0]),
        (lambda batch: [1, 0, 2], [1, 0, 2]),
    ],
)
def test_order(order, expected):
    """Fixed, explicit and user-made orders are followed; metrics say who came when."""
    updater = make_updater(order=order)
    metrics = updater(make_batch(updater.loss.actor_network))
    line = sorted(range(N_AGENTS), key=lambda i: metrics[NAMES[i], "position"].item())
    assert line == expected


def line_up(updater):
    """The agents of one update in their order, without an update."""
    batch, line = SimpleNamespace(team=updater.loss.team), []
    while len(line) < N_AGENTS:
        remaining = [agent for agent in updater.loss.agents if agent.name not in line]
        line += [agent.name for agent in updater._turns.next(remaining, batch, None)]
    return tuple(line)


def test_random_order_is_seeded_and_changes():
    """The random order comes from the updater's own generator and visits all permutations."""
    lines = []
    for _ in range(2):
        updater = make_updater(seed=3)
        torch.manual_seed(len(lines))
        lines.append([line_up(updater) for _ in range(60)])
    assert lines[0] == lines[1]
    assert len(set(lines[0])) == 6


@pytest.mark.parametrize(("size", "minibatches"), [(None, 4), (12, 2)])
def test_number_of_epochs_and_of_steps(size, minibatches):
    """As many epochs as asked for, and minibatches, of the agents and of the critic."""
    updater = make_updater(num_epochs=3, critic_epochs=2, critic_minibatch_size=size)
    steps = dict.fromkeys(updater.steps, 0)
    for name, step in updater.steps.items():

        def counted(*_, name=name):
            steps[name] += 1

        step.optimizer.register_step_post_hook(counted)
    metrics = updater(make_batch(updater.loss.actor_network))
    assert steps == {**dict.fromkeys(NAMES, 3 * 4), "critic": 2 * minibatches}
    assert [metrics[name, "epochs"].item() for name in steps] == [3, 3, 3, 2]


def test_parameters_that_the_loss_does_not_use_stay():
    """A network may hold more than its output depends on."""
    critic = make_critic()
    critic.module.spare = torch.nn.Linear(2, 2)
    updater = make_updater(critic=critic)
    before = state_of(critic.module.spare)
    updater(make_batch(updater.loss.actor_network))
    assert same_state(before, state_of(critic.module.spare))


def test_every_sample_is_used_each_epoch():
    """A remainder makes a smaller last minibatch; no sample is dropped."""
    updater = make_updater(minibatch_size=7, num_epochs=1)
    batch = make_batch(updater.loss.actor_network)
    seen = []
    step = updater.steps[NAMES[0]]
    objective = step.objective

    def spy(data):
        seen.append(data["agents", "observation"][..., 0])
        return objective(data)

    step.objective = spy
    updater(batch)
    expected = batch["agents", "observation"][..., 0, 0].flatten().sort().values
    assert torch.equal(torch.cat(seen).sort().values, expected)
    assert [len(x) for x in seen] == [7, 7, 7, 3]


def test_replay_buffer_of_the_users_own():
    """Minibatches can come from a replay buffer with a sampler of the user's choice."""
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(100), sampler=SamplerWithoutReplacement(), batch_size=8
    )
    actor = make_actor()
    updater = make_updater(actor, replay_buffer=buffer)
    before = state_of(actor)
    updater(make_batch(actor))
    assert not same_state(before, state_of(actor))


def test_minibatches_of_agents_of_unlike_sizes():
    """What cannot be one tensor is cut like everything else, without loss."""
    rows = [TensorDict({"x": torch.randn(9, size)}, [9]) for size in (2, 3)]
    data = TensorDict({"number": torch.arange(9), "agents": lazy_stack(rows, 1)}, [9])
    minibatches = list(ShuffledMinibatches(4, torch.Generator())(data))
    assert [len(minibatch) for minibatch in minibatches] == [4, 4, 1]
    for minibatch in minibatches:
        for agent, row in enumerate(rows):
            expected = row["x"][minibatch["number"]]
            assert torch.equal(minibatch["agents"][:, agent]["x"], expected)
    (half, _) = ShuffledMinibatches(10, torch.Generator())(data["agents"])
    assert half.shape == (5, 2)


class OfTwo(Learners):
    """A learner whose companion has the same numbers, and one minibatch more."""

    alone = False

    def __init__(self):
        super().__init__()
        self.weights = []

    def mean(self, means, weight):
        """The mean over both, which is this learner's; its weight is noted."""
        self.weights.append(weight)
        return list(means)

    def most(self, number):
        """The other one's."""
        return number + 1


def test_a_learner_that_has_run_out_counts_for_nothing():
    """Its minibatches count by their entries, the one that it computes once more by 0."""
    learners, number = OfTwo(), torch.nn.Parameter(torch.zeros(()))
    problem = Problem(
        "agent",
        loss=lambda data: (data["x"] - number).square().mean(),
        named_parameters=lambda: [("number", number)],
        learners=learners,
    )
    factory = FirstOrder(partial(torch.optim.SGD, lr=0.1), num_epochs=2, minibatch_size=4)
    factory(problem).propose(TensorDict({"x": torch.randn(6)}, [6])).apply()
    assert learners.weights == [4, 2, 0] * 2


def test_a_share_of_the_rows_is_at_least_one():
    """However small it is; and those with a valid sample come first."""
    valid = torch.zeros(10, 2, dtype=torch.bool)
    valid[7, 1] = True
    assert draw_rows(10, valid, 0.01, torch.Generator()).tolist() == [7]
    assert len(draw_rows(10, None, 0.3, torch.Generator())) == 3


def test_a_replay_buffer_holds_one_batch_at_a_time():
    """Each epoch draws from the data it is given, and of earlier data nothing is left."""
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(100), sampler=SamplerWithoutReplacement(), batch_size=8
    )
    minibatches = ReplayBufferMinibatches(buffer)
    for first in (0, 24, 48):
        numbers = torch.arange(first, first + 24)
        drawn = list(minibatches(TensorDict({"x": numbers}, [24])))
        assert len(drawn) == minibatches.count(numbers) == 3
        assert torch.equal(torch.cat(drawn)["x"].sort().values, numbers)


def test_scheduler_steps_once_per_batch():
    """Each optimiser has its own schedule, which moves with the batches."""
    updater = make_updater(
        scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    )
    batch = make_batch(updater.loss.actor_network)
    for _ in range(2):
        updater(batch)
    rates = {step.optimizer.param_groups[0]["lr"] for step in updater.steps.values()}
    assert rates == {1e-2 / 4}


def test_an_agent_that_does_not_act_follows_its_schedule(recwarn):
    """Nor does the schedule wait for an agent whose step was taken back."""
    updater = make_updater(
        scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    )
    batch = make_batch(updater.loss.actor_network)
    batch["agents", "active"] = torch.ones(*batch.shape, N_AGENTS, dtype=torch.bool)
    batch["agents", "active"][..., 2] = False
    objective = updater.steps[NAMES[0]].objective
    updater.steps[NAMES[0]].objective = lambda data: objective(data) * float("nan")
    updater(batch)
    rates = {name: step.optimizer.param_groups[0]["lr"] for name, step in updater.steps.items()}
    assert rates == dict.fromkeys([*NAMES, "critic"], 1e-2 / 2)
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]


def test_a_schedule_that_fails_leaves_no_trace():
    """Those that have made their step before it take it back, also of an agent that did not act."""
    updater = make_updater(
        scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    )
    batch = make_batch(updater.loss.actor_network)
    batch["agents", "active"] = torch.ones(*batch.shape, N_AGENTS, dtype=torch.bool)
    batch["agents", "active"][..., 0] = False
    before = copy.deepcopy(updater.state_dict())

    def fails():
        raise RuntimeError("no rate for this step")

    schedule = updater.steps[NAMES[1]].scheduler
    schedule.step = fails
    with pytest.raises(RuntimeError, match="no rate"):
        updater(batch)
    del schedule.step
    assert same(updater.state_dict(), before)


@pytest.mark.parametrize("loss_class", [HAPPOLoss, HATRPOLoss])
def test_a_critic_without_weight_stays(loss_class):
    """It gives its values all the same; nobody needs a gradient from it."""
    actor, critic = make_actor(), make_critic().requires_grad_(False)
    loss = loss_class(actor, critic, critic_coeff=0)
    before, critic_before = state_of(actor), state_of(critic)
    metrics = SequentialUpdater(loss, num_epochs=1)(make_batch(actor))
    assert set(metrics.keys()) == set(NAMES)
    assert same_state(critic_before, state_of(critic))
    assert not same_state(before, state_of(actor))


@pytest.mark.parametrize("loss_class", [HAPPOLoss, HATRPOLoss])
def test_what_is_frozen_later_stays(loss_class):
    """The rows of a frozen stack are frozen; the others move, and so does it when it thaws."""
    actor = make_actor()
    updater = SequentialUpdater(loss_class(actor, make_critic()), num_epochs=1)
    batch = make_batch(actor)
    updater(batch)
    stack = next(actor.parameters())
    for is_frozen in (True, False):
        stack.requires_grad_(not is_frozen)
        before = state_of(actor)
        updater(batch)
        moved = [name for name, value in tensors(actor).items() if (value != before[name]).any()]
        first, *others = before
        assert moved == (others if is_frozen else [first, *others])


def test_what_thaws_is_trained_and_what_freezes_keeps_its_momentum():
    """With Adam: the count of steps of a frozen parameter waits, one that thaws starts anew."""
    actor = make_actor()
    first, second, *_ = actor.parameters()
    first.requires_grad_(False)
    updater = SequentialUpdater(HAPPOLoss(actor, make_critic(), entropy_coeff=0.0), num_epochs=1)
    batch = make_batch(actor)
    updater(batch)
    first.requires_grad_(True)
    second.requires_grad_(False)
    updater(batch)
    updater(batch)
    own = list(updater.loss.agents[0].named_parameters())
    state = updater.steps[NAMES[0]].optimizer.state
    assert [state[p]["step"].item() for _, p in own[:3]] == [2, 1, 3]
    networks = copy.deepcopy((actor, updater.loss.critic_network))
    twin = SequentialUpdater(HAPPOLoss(*networks, entropy_coeff=0.0), num_epochs=1)
    twin.load_state_dict(updater.state_dict())
    assert (updater(batch) == twin(batch)).all()


def thawing(parameters):
    """A factory that leaves out what is frozen when it is called."""
    return torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.1)


def test_what_an_optimiser_left_out_is_added_when_it_thaws():
    """With the settings of its first group."""
    actor = make_actor()
    stack = next(actor.parameters()).requires_grad_(False)
    updater = SequentialUpdater(HAPPOLoss(actor, make_critic()), num_epochs=1, optimizer=thawing)
    batch = make_batch(actor)
    updater(batch)
    stack.requires_grad_(True)
    before = stack.detach().clone()
    updater(batch)
    assert all((row != old).any() for row, old in zip(stack, before, strict=True))


def test_gradient_norm_is_clipped():
    """With plain gradient descent a step is no longer than the learning rate times the bound."""
    actor = make_actor(distribution=IndependentNormal)
    updater = make_updater(
        actor,
        optimizer=partial(torch.optim.SGD, lr=1.0),
        num_epochs=1,
        minibatch_size=None,
        max_grad_norm=0.01,
    )
    before = state_of(actor)
    metrics = updater(make_batch(actor))
    for row, name in enumerate(NAMES):
        moved = torch.cat([(v[row] - before[k][row]).flatten() for k, v in tensors(actor).items()])
        assert metrics[name, "grad_norm"] > 0.01
        torch.testing.assert_close(moved.norm(), torch.tensor(0.01), rtol=1e-3, atol=0)


def test_early_stop_at_a_target_kl():
    r"""An agent stops after the epoch in which :math:`E[r - 1 - \log r]` has gone too far."""
    actor = make_actor(distribution=IndependentNormal).double()
    batch = make_batch(actor)
    batch["advantage"] = torch.randn(*batch.shape, 1).double()
    batch["agents", "active"] = torch.rand(*batch.shape, N_AGENTS) < 0.7
    valid = batch["agents", "active"][..., 0]

    def updated(actor, **settings):
        loss = HAPPOLoss(actor, None, entropy_coeff=0.0)
        return SequentialUpdater(loss, optimizer=ADAM, order="fixed", **settings)(batch)

    divergences = []
    for epochs in range(1, 8):
        twin = copy.deepcopy(actor)
        updated(twin, num_epochs=epochs)
        with torch.no_grad():
            log_prob = twin.get_dist(batch).log_prob(batch["agents", "action"])[..., 0]
        log_ratio = (log_prob - batch["agents", "action_log_prob"][..., 0])[valid]
        divergences.append((log_ratio.exp() - 1 - log_ratio).mean())
    for epochs in (1, 4, 6):  # too far after one more of them
        target = (divergences[epochs - 1] + divergences[epochs]) / 2
        metrics = updated(copy.deepcopy(actor), num_epochs=20, target_kl=target.item())
        assert metrics[NAMES[0], "epochs"] == epochs + 1


def test_metrics():
    """Scalars for each agent and the critic, finite and in range; the first factor is 1."""
    updater = make_updater(order="fixed")
    metrics = updater(make_batch(updater.loss.actor_network))
    assert set(metrics.keys()) == {*NAMES, "critic"}
    for value in metrics.values(include_nested=True, leaves_only=True):
        assert value.shape == ()
        assert value.isfinite()
        assert not value.requires_grad
    first = metrics[NAMES[0]]
    assert first["factor_mean"] == first["factor_max"] == 1
    torch.testing.assert_close(first["factor_ess"], torch.tensor(1.0))
    for name in NAMES:
        agent = metrics[name]
        assert 0 <= agent["clip_fraction"] <= 1
        assert 0 < agent["factor_ess"] <= 1 + 1e-6
        assert agent["kl"] > 0
        assert agent["ratio_min"] <= agent["ratio_mean"] <= agent["ratio_max"]
        assert agent["surrogate"] > agent["surrogate_before"]


def test_metrics_are_what_their_names_say():
    """Of each agent, from the policies before and after the update and plain definitions."""
    actor = make_actor(distribution=IndependentNormal).double()
    batch = make_batch(actor)
    batch["advantage"] = torch.randn(*batch.shape, 1).double()
    batch["agents", "active"] = torch.rand(*batch.shape, N_AGENTS) < 0.7
    before = copy.deepcopy(actor)
    loss = HAPPOLoss(actor, None, entropy_coeff=0.0)
    updater = SequentialUpdater(
        loss, optimizer=ADAM, num_epochs=3, order=[1, 2, 0], standardize_advantage=False
    )
    metrics = updater(batch)
    with torch.no_grad():
        old, new = before.get_dist(batch), actor.get_dist(batch)
        log_ratios = new.log_prob(batch["agents", "action"]) - old.log_prob(
            batch["agents", "action"]
        )
        kl = torch.distributions.kl_divergence(old, new)
        entropies = new.entropy()
    factor = torch.ones(batch.shape).double()
    for position, agent in enumerate([1, 2, 0]):
        valid = batch["agents", "active"][..., agent]
        ratio = log_ratios[..., agent].exp()
        gain = factor * batch["advantage"].squeeze(-1)
        expected = {
            "position": position,
            "ratio_mean": ratio[valid].mean(),
            "ratio_max": ratio[valid].max(),
            "ratio_min": ratio[valid].min(),
            "clip_fraction": ((ratio < 0.8) | (ratio > 1.2))[valid].double().mean(),
            "kl": kl[..., agent][valid].mean(),
            "entropy": entropies[..., agent][valid].mean(),
            "surrogate_before": gain[valid].mean(),
            "surrogate": (ratio * gain)[valid].mean(),
            "factor_mean": factor[valid].mean(),
            "factor_max": factor[valid].max(),
            "factor_ess": factor[valid].mean() ** 2 / factor[valid].square().mean(),
        }
        for name, value in expected.items():
            assert metrics[NAMES[agent], name].item() == pytest.approx(float(value)), name
        factor = torch.where(valid, factor * ratio, factor)


def test_advantage_is_estimated_unless_it_is_there():
    """A batch with its own advantage and target is used as it is, and left as it is."""
    actor, critic = make_actor(), make_critic()
    updater = make_updater(actor, critic)
    twin = copy.deepcopy(updater)
    batch = make_batch(actor)
    keys = set(batch.keys(True, True))
    metrics = updater(batch)
    assert set(batch.keys(True, True)) == keys
    with torch.no_grad():
        twin.loss.value_estimator(batch)
    assert (twin(batch) == metrics).all()


def test_state_survives_a_file_bit_for_bit():
    """Save, build everything anew, load, go on: the same numbers as without the break."""
    batches = [make_batch(make_actor()) for _ in range(4)]
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.9)
    actor = make_actor()
    updater = make_updater(actor, scheduler=scheduler)
    for batch in batches[:2]:
        updater(batch)
    file = io.BytesIO()
    torch.save(updater.state_dict(), file)
    expected = [updater(batch) for batch in batches[2:]]
    file.seek(0)
    resumed = make_updater(make_actor(), scheduler=scheduler, seed=99)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert (resumed.num_updates, updater.num_updates) == (2, 4)
    for batch, metrics in zip(batches[2:], expected, strict=True):
        assert (resumed(batch) == metrics).all()
    assert same(updater.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("coefficient", [0.5, torch.tensor(0.5)])
def test_a_bonus_that_a_schedule_began_survives(coefficient):
    """In the state it is the coefficient alone, which the loss was built without."""
    updater, resumed = (make_updater(make_actor(distribution=IndependentNormal)) for _ in range(2))
    updater.loss.entropy_coeff = coefficient
    batch = make_batch(updater.loss.actor_network)
    updater(batch)
    resumed.load_state_dict(updater.state_dict())
    assert (updater(batch) == resumed(batch)).all()
    assert same(updater.state_dict(), resumed.state_dict())


def test_a_bonus_that_is_refused_stays_away():
    """Whatever its coefficient becomes."""
    loss = HAPPOLoss(make_actor(), None, entropy_bonus=False)
    loss.entropy_coeff = 0.5
    assert not loss.entropy_bonus


def test_a_moved_team_loads_its_state_as_it_is():
    """In double precision, to which the networks were moved after the optimisers were built."""
    updater, moved = make_updater(), make_updater()
    for each in (updater, moved):
        each.loss.to(torch.float64)
    updater(make_batch(updater.loss.actor_network))
    moved.load_state_dict(updater.state_dict())
    assert same(updater.state_dict(), moved.state_dict())


@pytest.mark.parametrize("move", ["dtype", "load", "assign", "deepcopy", "share_memory"])
def test_the_tie_between_stack_and_slices_survives(move):
    """After a move, reload or copy, training still moves the actor that is rolled out."""
    actor, critic = make_actor(), make_critic()
    updater = make_updater(actor, critic)
    updater(make_batch(actor))
    if move == "dtype":
        updater.loss.to(torch.float64)
    elif move == "load":
        other = make_actor()
        actor.load_state_dict(other.state_dict())
        assert same_state(tensors(actor), tensors(other))
    elif move == "assign":
        actor.load_state_dict(make_actor().state_dict(), assign=True)
        critic.load_state_dict(make_critic().state_dict(), assign=True)
    elif move == "deepcopy":
        old = updater
        before_old = state_of(old.loss)
        updater = copy.deepcopy(updater)
        actor, critic = updater.loss.actor_network, updater.loss.critic_network
    else:
        actor.share_memory()
    before, critic_before = state_of(actor), state_of(critic)
    updater(make_batch(actor))
    for key, value in tensors(actor).items():
        assert not torch.equal(value, before[key])
    assert not same_state(critic_before, state_of(critic))
    if move == "deepcopy":
        assert same_state(before_old, state_of(old.loss))


def test_deepcopied_updater_gives_the_same_numbers():
    """A copy is independent of the original and does what it would have done."""
    updater = make_updater()
    batch = make_batch(updater.loss.actor_network)
    updater(batch)
    twin = copy.deepcopy(updater)
    assert (updater(batch) == twin(batch)).all()
    assert same_state(tensors(updater.loss), tensors(twin.loss))


def test_the_default_optimiser():
    """Adam at 3e-4, for each agent and for the critic, which may have one of its own."""
    updater = SequentialUpdater(HAPPOLoss(make_actor(), make_critic()))
    for step in updater.steps.values():
        assert type(step.optimizer) is torch.optim.Adam
        assert step.optimizer.param_groups[0]["lr"] == 3e-4
    loss = HAPPOLoss(make_actor(), make_critic())
    own = SequentialUpdater(loss, critic_optimizer=partial(torch.optim.SGD, lr=0.1))
    kinds = {name: type(step.optimizer) for name, step in own.steps.items()}
    assert kinds == {**dict.fromkeys(NAMES, torch.optim.Adam), "critic": torch.optim.SGD}


@pytest.mark.parametrize(
    ("kwargs", "fused"),
    [
        ({}, True),
        ({"foreach": False}, None),
        ({"fused": False}, False),
        ({"lr": torch.tensor(1e-2)}, None),
    ],
)
def test_adam_is_fused_unless_the_user_chose(kwargs, fused):
    """Torch's fused kernel is the fastest for small networks; a choice of the user's stands."""
    updater = make_updater(optimizer=partial(torch.optim.Adam, **{"lr": 1e-2, **kwargs}))
    for step in updater.steps.values():
        assert step.optimizer.param_groups[0]["fused"] is fused
    updater(make_batch(updater.loss.actor_network))


class Student(torch.distributions.Independent):
    """A policy of which no divergence is known."""

    def __init__(self, loc, scale):
        super().__init__(torch.distributions.StudentT(3.0, loc, scale), 1)


def test_a_divergence_that_is_not_known_is_estimated():
    r"""By :math:`r - 1 - \log r` at the stored actions."""
    actor = make_actor(distribution=Student).double()
    updater = make_updater(actor, make_critic().double())
    batch = make_batch(actor)
    before = actor.get_dist(batch).log_prob(batch["agents", "action"]).detach()
    metrics = updater(batch)
    log_ratio = actor.get_dist(batch).log_prob(batch["agents", "action"]) - before
    expected = (log_ratio.exp() - 1 - log_ratio).mean((0, 1))
    for name, kl in zip(NAMES, expected, strict=True):
        torch.testing.assert_close(metrics[name, "kl"], kl)


class Doubled(torch.distributions.TransformedDistribution):
    """Twice a normal action; torch knows no entropy of transformed distributions."""

    arg_constraints: ClassVar = {}

    def __init__(self, loc, scale):
        super().__init__(IndependentNormal(loc, scale), [AffineTransform(0.0, 2.0)])


def test_an_entropy_that_is_not_known_is_estimated():
    r"""By :math:`-r \log \pi` at the stored actions, near the truth within the sample's error."""
    actor = make_actor(distribution=Doubled).double()
    updater = make_updater(actor, make_critic().double(), minibatch_size=100)
    batch = make_batch(actor, num_envs=100, time=20)
    before = actor.get_dist(batch).log_prob(batch["agents", "action"]).detach()
    metrics = updater(batch)
    dist = actor.get_dist(batch)
    log_prob = dist.log_prob(batch["agents", "action"])
    expected = -((log_prob - before).exp() * log_prob).mean((0, 1))
    exact = (dist.base_dist.entropy() + 2 * math.log(2)).mean((0, 1))
    for name, estimate, truth in zip(NAMES, expected, exact, strict=True):
        torch.testing.assert_close(metrics[name, "entropy"], estimate)
        torch.testing.assert_close(estimate, truth, rtol=0.05, atol=0.05)


class Shift(torch.nn.Module):
    """A buffer that all agents share, such as the statistics of observations."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros(5))

    def forward(self, x):
        return x + self.shift


def test_buffers_of_the_joint_actor_are_those_of_the_agents():
    """Written in place or replaced, they are what the next update uses."""
    actor = make_actor()
    actor.module[0].module.insert(0, Shift())
    updater = make_updater(actor)
    batch = make_batch(actor)
    updater(batch)
    actor.module[0].module[0].shift = torch.ones(5)
    updater(batch)
    for agent in updater.loss.agents:
        (shift,) = (b for name, b in agent.actor.named_buffers() if name.endswith("shift"))
        assert torch.equal(shift, torch.ones(5))


def test_an_actor_that_cannot_read_the_batch_is_named():
    """With the shapes of what its group was to read, as items."""
    actor = make_actor()
    batch = make_batch(actor)
    batch["advantage"] = torch.randn(*batch.shape, 1)
    batch["agents", "observation"] = batch["agents", "observation"][..., :2]
    updater = SequentialUpdater(HAPPOLoss(actor, None), order="fixed")
    words = r"The actor of agent 'agents_0' cannot read the batch .*observation.* \[24, 3, 2\]"
    with pytest.raises(ValueError, match=words):
        updater(batch)


def test_the_first_batch_is_looked_at_in_any_case():
    """For what is not finite, also where nobody wants to wait for the device later."""
    updater = make_updater(check_finite=False)
    batch = make_batch(updater.loss.actor_network)
    batch["next", "reward"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        updater(batch)


def test_running_out_of_memory_is_said_as_such():
    """It is no fault of the batch, and whoever catches it must be able to."""
    updater = make_updater()
    batch = make_batch(updater.loss.actor_network)

    def fails(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    updater.loss.critic_network.register_forward_pre_hook(fails)
    before = state_of(updater.loss)
    with pytest.raises(torch.OutOfMemoryError):
        updater(batch)
    assert same_state(before, state_of(updater.loss))


@pytest.mark.parametrize("shared", [True, False])
def test_rewards_of_inactive_agents_do_not_count(shared):
    """The agents that act must be paid the same; what the others are paid does not matter."""
    updater = make_updater()
    updater.loss.set_keys(reward=("agents", "reward"))
    batch = make_batch(updater.loss.actor_network)
    active = torch.rand(*batch.shape, N_AGENTS) < 0.5
    paid = batch["next", "reward"].unsqueeze(-2).expand(*batch.shape, N_AGENTS, 1)
    own = active if shared else ~active
    batch["agents", "active"] = active
    batch["next", "agents", "reward"] = torch.where(own.unsqueeze(-1), paid, torch.rand_like(paid))
    if shared:
        updater(batch)
    else:
        with pytest.raises(ValueError, match="differ between the agents"):
            updater(batch)


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("where", ["agent", "critic"])
@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
def test_an_interrupted_update_leaves_no_trace(where, error):
    """An error in the middle of a step puts all back, the schedules of those done before, too."""
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
    updater = make_updater(num_epochs=3, scheduler=scheduler)
    batch = make_batch(updater.loss.actor_network)
    updater(batch)
    twin = copy.deepcopy(updater)
    before = copy.deepcopy(updater.state_dict())
    step = updater.steps["critic"] if where == "critic" else updater.steps[NAMES[1]]
    objective, calls = step.objective, []

    def fails(data):
        calls.append(data)
        if len(calls) == 5:
            raise error("in the middle")
        return objective(data)

    step.objective = fails
    with pytest.raises(error):
        updater(batch)
    assert same(updater.state_dict(), before)
    step.objective = objective
    assert (updater(batch) == twin(batch)).all()
    assert same(updater.state_dict(), twin.state_dict())


def test_an_interrupted_update_gives_back_the_draws_of_fisher_matrices():
    """HATRPO, of which each agent draws rows of its own: the next update is the same."""
    loss = HATRPOLoss(make_actor(), make_critic(), fisher_fraction=0.5)
    updater = SequentialUpdater(loss, num_epochs=1)
    batch = make_batch(loss.actor_network)
    before = copy.deepcopy(updater.state_dict())
    objective = updater.steps["critic"].objective

    def fails(data):
        raise Interrupted

    updater.steps["critic"].objective = fails
    with pytest.raises(Interrupted):
        updater(batch)
    updater.steps["critic"].objective = objective
    assert same(updater.state_dict(), before)


def test_gradients_are_there_for_the_length_of_a_step():
    """Also of one that does not end."""
    updater = make_updater()
    updater(make_batch(updater.loss.actor_network))
    own = [agent.parameters() for agent in updater.loss.agents]
    parameters = [*updater.loss.parameters(), *(p for each in own for p in each)]
    assert all(parameter.grad is None for parameter in parameters)

    def fails(*args, **kwargs):
        raise RuntimeError("in the middle")

    updater.steps[NAMES[1]].optimizer.step = fails
    with pytest.raises(RuntimeError, match="in the middle"):
        updater(make_batch(updater.loss.actor_network))
    assert all(parameter.grad is None for parameter in parameters)


@SPOILED_GRADIENTS
def test_a_non_finite_gradient_takes_the_agents_step_back(spoil, caplog):
    """In the third minibatch: that agent keeps its old policy, the others are updated."""
    updater = make_updater(order="fixed")
    batch = make_batch(updater.loss.actor_network)
    updater(batch)
    before = state_of(updater.loss.actor_network)
    optimizer_before = optimizer_states(updater)[NAMES[1]]
    step = updater.steps[NAMES[1]]
    objective, calls = step.objective, []

    def spoiled(data):
        calls.append(data)
        loss = objective(data)
        return spoil(loss, step.parameters()[0]) if len(calls) == 3 else loss

    step.objective = spoiled
    metrics = updater(batch)
    for key, value in tensors(updater.loss.actor_network).items():
        assert torch.equal(value[1], before[key][1])
        assert not torch.equal(value[2], before[key][2])
    after = optimizer_states(updater)[NAMES[1]]
    assert all(map(torch.equal, flat(optimizer_before), flat(after)))
    assert metrics[NAMES[1], "ratio_mean"] == 1
    assert metrics[NAMES[1], "kl"] == 0
    (record,) = caplog.records
    assert record.name == "torchrl_happo.update.updater"
    assert "agents_1 was not finite" in record.message


def test_the_explained_variance_is_what_its_name_says():
    """Of the returns that count, as the critic's values were before the fit."""
    updater = make_updater()
    batch = make_batch(updater.loss.actor_network)
    batch["advantage"] = torch.randn(*batch.shape, 1)
    value, target = torch.randn(2, *batch.shape, N_AGENTS, 1)
    batch["agents", "state_value"], batch["value_target"] = value, target
    active = torch.rand(*batch.shape, N_AGENTS) < 0.7
    batch["agents", "active"] = active
    residual = (target - value)[active].var(unbiased=False)
    expected = 1 - residual / target[active].var(unbiased=False)
    got = updater(batch)["critic", "explained_variance"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_critic_is_not_fitted_to_those_who_do_not_act():
    """Returns of inactive agents may say anything."""
    updater = make_updater()
    batch = make_batch(updater.loss.actor_network)
    batch["advantage"] = torch.randn(*batch.shape, 1)
    batch["value_target"] = torch.randn(*batch.shape, N_AGENTS, 1)
    active = torch.rand(*batch.shape, N_AGENTS) < 0.7
    batch["agents", "active"] = active
    twin, other = copy.deepcopy(updater), batch.clone()
    other["value_target"] = torch.where(active.unsqueeze(-1), batch["value_target"], 7.0)
    updater(batch)
    twin(other)
    assert same(updater.state_dict(), twin.state_dict())


def test_one_step_is_enough():
    """An agent that acts at a single step of a batch learns from it."""
    updater = make_updater(standardize_advantage=False)
    batch = make_batch(updater.loss.actor_network)
    batch["agents", "active"] = torch.ones(*batch.shape, N_AGENTS, dtype=torch.bool)
    batch["agents", "active"][..., 1] = False
    batch["agents", "active"][2, 3, 1] = True
    before = state_of(updater.loss.actor_network)
    updater(batch)
    for key, value in tensors(updater.loss.actor_network).items():
        assert not torch.equal(value[1], before[key][1])


@pytest.mark.parametrize("blocks", [(), ("agents",)])
def test_the_inactive_may_act_out_of_bounds(blocks):
    """What they are said to have done is neither refused nor learned from."""
    updater = make_updater(loss_kwargs={"blocks": blocks})
    batch = make_batch(updater.loss.actor_network)
    active = torch.rand(*batch.shape, N_AGENTS, 1) < 0.7
    batch["agents", "active"] = active
    twin, other = copy.deepcopy(updater), batch.clone()
    other["agents", "action"] = torch.where(active, batch["agents", "action"], 7.0)
    updater(batch)
    twin(other)
    assert same(updater.state_dict(), twin.state_dict())


def test_targets_without_values_explain_nothing():
    """What the critic thought of the states is not known, and NaN says so."""
    updater = make_updater()
    batch = make_batch(updater.loss.actor_network)
    batch["advantage"] = torch.randn(*batch.shape, 1)
    batch["value_target"] = torch.randn(*batch.shape, N_AGENTS, 1)
    assert updater(batch)["critic", "explained_variance"].isnan()


def test_critic_fits_the_returns():
    """The critic's loss falls on returns that do not move."""
    updater = make_updater()
    batch = make_batch(updater.loss.actor_network)
    batch["advantage"] = torch.randn(*batch.shape, 1)
    batch["value_target"] = batch["agents", "observation"][..., :1].sin() + 2.0
    first = updater(batch)["critic"]
    for _ in range(10):
        last = updater(batch)["critic"]
    assert last["loss"] < 0.5 * first["loss"]


def test_perturbed_networks_are_picked_up():
    """Parameters that someone else writes in place are the ones the next update starts from."""
    actor = make_actor()
    updater = make_updater(actor, num_epochs=1, optimizer=partial(torch.optim.SGD, lr=0.0))
    perturb(actor)
    before = state_of(actor)
    updater(make_batch(actor))
    assert same_state(before, state_of(actor))


def test_entropy_of_a_squashed_normal_is_estimated_well():
    """The metric agrees with quadrature within the error of the batch's sample."""
    actor = make_actor(distribution=TanhNormal)
    updater = make_updater(actor, num_epochs=3, minibatch_size=100)
    batch = make_batch(actor, num_envs=100, time=20)
    metrics = updater(batch)
    for agent in updater.loss.agents:
        data = agent.view(batch, agent.update_keys)
        with torch.no_grad():
            exact = entropy(agent.policy.distribution(agent.policy.parameters(data))).mean()
        torch.testing.assert_close(metrics[agent.name, "entropy"], exact, rtol=0.05, atol=0.05)


def test_stacked_networks_move_along_their_gradient():
    """Torch's fused Adam, the default, moves a block and stacked critics as its plain Adam does.

    Their gradients come out transposed, and the fused kernels go by memory.
    """
    states = []
    for kernel in ({}, {"foreach": False}):
        torch.manual_seed(0)
        actor, critic = make_actor().double(), make_critic(share_params=False).double()
        updater = make_updater(
            actor,
            critic,
            loss_kwargs={"blocks": ["agents"]},
            optimizer=partial(torch.optim.Adam, lr=1e-2, **kernel),
        )
        updater(make_batch(actor))
        states.append([*actor.parameters(), *critic.parameters()])
    for fused, plain in zip(*states, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("loss_class", [HAPPOLoss, HATRPOLoss])
def test_a_network_may_name_its_outputs(loss_class):
    """In a tuple, in a dict, in a dict under one key: the same policy and the same update."""

    class Named(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, observation):
            return dict(zip(("loc", "scale"), self.net(observation), strict=True))

    ends = []
    for wrapper, keys, prefix in (
        (nn.Sequential, ["loc", "scale"], ()),
        (Named, ["loc", "scale"], ()),
        (Named, ["parameters"], ("parameters",)),
    ):
        torch.manual_seed(0)
        net = wrapper(nn.Sequential(nn.Linear(5, 4), NormalParamExtractor()))
        actor = ProbabilisticActor(
            TensorDictModule(net, in_keys=["observation"], out_keys=keys),
            in_keys={name: (*prefix, name) for name in ("loc", "scale")},
            out_keys=["action"],
            distribution_class=IndependentNormal,
            return_log_prob=True,
        )
        batch = TensorDict({"observation": torch.randn(6, 5), "advantage": torch.randn(6, 1)}, [6])
        with torch.no_grad():
            actor(batch)
        SequentialUpdater(loss_class(actor, None), num_epochs=2)(batch)
        ends.append(list(actor.parameters()))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)
    torch.testing.assert_close(ends[2], ends[0], rtol=0, atol=0)


def test_an_optimiser_follows_its_network_to_another_device():
    """With all that a fused step needs there: the moments of Adam and its count of steps."""
    updater = make_updater()
    updater(make_batch(updater.loss.actor_network))
    updater.loss.critic_network.to("meta")
    step = updater.steps["critic"]
    step.follow()
    assert step.optimizer.state
    for state in step.optimizer.state.values():
        devices = {name: value.device.type for name, value in state.items()}
        assert devices == {"step": "meta", "exp_avg": "meta", "exp_avg_sq": "meta"}
