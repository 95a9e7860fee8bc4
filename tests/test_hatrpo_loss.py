"""HATRPOLoss: the unclipped surrogate and the exact divergence of a team; steps that are safe."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from newer import needs, tensors
from team import (
    N_AGENTS,
    make_actor,
    make_batch,
    make_critic,
    perturb,
    same_state,
    state_of,
)
from torchrl.modules import IndependentNormal, TanhNormal
from torchrl.objectives import PPOLoss, ValueEstimators

from torchrl_happo import HATRPOLoss, SequentialUpdater
from torchrl_happo.steps import TrustRegion

NAMES = [f"agents_{i}" for i in range(N_AGENTS)]
KEYS = {"value": ("agents", "state_value"), "action": ("agents", "action")}
DISTRIBUTIONS = [IndependentNormal, TanhNormal, torch.distributions.Categorical]


def make_updater(actor=None, **kwargs):
    """An updater whose agents take trust-region steps."""
    actor = make_actor() if actor is None else actor
    return SequentialUpdater(HATRPOLoss(actor, make_critic(), **kwargs), num_epochs=1)


@needs("ValueEstimators.MAGAE", "0.13")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_forward_equals_ppo_without_clipping(distribution):
    """loss_objective and loss_critic are those of TorchRL's PPOLoss on the same networks."""
    actor, critic = make_actor(distribution=distribution).double(), make_critic().double()
    batch = make_batch(actor)
    perturb(actor)
    ours = HATRPOLoss(actor, critic)
    theirs = PPOLoss(actor, critic, entropy_bonus=False)
    for loss in (ours, theirs):
        loss.set_keys(**KEYS)
    theirs.make_value_estimator(ValueEstimators.MAGAE)
    got, wanted = ours(batch.copy()), theirs(batch.copy())
    for key in wanted.keys():
        torch.testing.assert_close(got[key], wanted[key], rtol=1e-13, atol=1e-13, msg=key)


@needs("ValueEstimators.MAGAE", "0.13")
@pytest.mark.parametrize(
    "kwargs",
    [
        {"clip_value": 0.2},
        {"loss_critic_type": "l2"},
        {"critic_coeff": 0.5},
        {"normalize_advantage": True, "normalize_advantage_exclude_dims": (-2,)},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"log_explained_variance": False},
    ],
    ids=str,
)
def test_forward_equals_ppo_with_its_options(kwargs):
    """Value clipping, critic type and weight, standardisation, reduction: as TorchRL."""
    actor, critic = make_actor(distribution=IndependentNormal).double(), make_critic().double()
    batch = make_batch(actor)
    ours = HATRPOLoss(actor, critic, **kwargs)
    theirs = PPOLoss(actor, critic, entropy_bonus=False, **kwargs)
    for loss in (ours, theirs):
        loss.set_keys(**KEYS)
        loss.make_value_estimator(ValueEstimators.MAGAE)
        with torch.no_grad():
            loss.value_estimator(batch)
    perturb(actor)
    perturb(critic, scale=0.5)
    got, wanted = ours(batch.copy()), theirs(batch.copy())
    assert wanted.keys() <= got.keys() <= {*wanted.keys(), "kl"}
    for key in wanted.keys():
        torch.testing.assert_close(got[key], wanted[key], rtol=1e-13, atol=1e-13, msg=key)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_forward_gives_the_exact_divergence(distribution):
    """It is the mean of torch's own divergence of the old policy's distribution from the new."""
    actor = make_actor(distribution=distribution).double()
    batch = make_batch(actor)
    with torch.no_grad():
        old = actor.get_dist(batch.copy())
        perturb(actor)
        new = actor.get_dist(batch.copy())
    if distribution is TanhNormal:
        old, new = old.base_dist, new.base_dist
    expected = torch.distributions.kl_divergence(old, new).mean()
    loss = HATRPOLoss(actor, make_critic().double())
    loss.set_keys(**KEYS)
    kl = loss(batch)["kl"]
    torch.testing.assert_close(kl, expected, rtol=1e-12, atol=0)
    unreduced = HATRPOLoss(actor, make_critic().double(), reduction="none")
    unreduced.set_keys(**KEYS)
    each = unreduced(batch.copy())
    assert each["kl"].shape == each["loss_objective"].shape
    torch.testing.assert_close(each["kl"].mean(), expected, rtol=1e-12, atol=0)
    kl.backward()  # a penalty of one's own can be built from it
    assert all(p.grad is not None for p in actor.parameters())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_metrics(distribution):
    """Every number the issue of a step depends on is reported, and they fit each other."""
    actor = make_actor(distribution=distribution)
    updater = make_updater(actor, max_kl=0.01)
    metrics = updater(make_batch(actor))
    for name in NAMES:
        agent = metrics[name]
        assert agent["line_search_success"] == 1
        assert 0 < agent["step_fraction"] <= 1
        assert 0 < agent["kl"] < 0.01
        torch.testing.assert_close(agent["kl"], agent["step_kl"], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(
            agent["surrogate"] - agent["surrogate_before"],
            agent["improvement"],
            rtol=1e-2,
            atol=1e-4,
        )
        assert agent["improvement"] > 0.5 * agent["expected_improvement"]
        assert agent["cg_residual"] < 1
        assert agent["grad_norm"] > 0


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_both_line_searches_take_the_same_step(distribution):
    """All candidates at once, or one after the other until the first is good."""
    actor = make_actor(distribution=distribution).double()
    batch = make_batch(actor)
    batch["advantage"] = torch.randn(*batch.shape, 1, dtype=torch.double)
    states = []
    for line_search in ("sequential", "batched"):
        twin = copy.deepcopy(actor)
        loss = HATRPOLoss(twin, None, max_kl=0.05, line_search=line_search)
        updater = SequentialUpdater(loss)
        assert updater.steps[NAMES[0]].settings.line_search == line_search
        updater(batch)
        states.append(state_of(twin))
        assert all(p.requires_grad for p in twin.parameters())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-10, atol=1e-12)


def radii(loss):
    """The bound that each agent's step keeps to."""
    steps = SequentialUpdater(loss).steps
    return {name: steps[name].settings.radius(steps[name].problem) for name in NAMES[: len(steps)]}


def test_a_schedule_of_the_radius_acts():
    """Set between two updates, it bounds the next one, of each agent by its share."""
    loss = HATRPOLoss(make_actor(), make_critic(), max_kl=0.01, kl_split="equal")
    updater = SequentialUpdater(loss, num_epochs=1)
    batch = make_batch(loss.actor_network)
    for max_kl in (0.01, 1e-4, 0.02):
        loss.max_kl = max_kl
        metrics = updater(batch)
        for name in NAMES:
            assert max_kl / 30 < metrics[name, "kl"] < max_kl / 3
    with pytest.raises(ValueError, match=r"max_kl must be positive.*got 0\.0"):
        loss.max_kl = 0.0
    with pytest.raises(AttributeError, match=r"only max_kl follows.*build the loss with damping"):
        loss.damping = 0.2


def test_kl_split():
    """One budget for the team: equal shares, or a callable's."""
    whole = HATRPOLoss(make_actor(), None, max_kl=0.03)
    equal = HATRPOLoss(make_actor(), None, max_kl=0.03, kl_split="equal")
    own = HATRPOLoss(make_actor(), None, max_kl=0.03, kl_split=lambda agents: [0.5, 0.3, 0.2])
    bounds = [list(radii(loss).values()) for loss in (whole, equal, own)]
    assert bounds[0] == [0.03] * 3
    assert bounds[1] == pytest.approx([0.01] * 3)
    assert bounds[2] == pytest.approx([0.015, 0.009, 0.006])
    with pytest.raises(ValueError, match="must return 3 positive shares that sum to 1"):
        HATRPOLoss(make_actor(), None, kl_split=lambda agents: [1.0])
    with pytest.raises(ValueError, match="kl_split must be"):
        HATRPOLoss(make_actor(), None, kl_split="largest")


@pytest.mark.parametrize("chosen", ["batched", "sequential", None])
def test_the_settings_of_the_step_are_the_losses(chosen):
    """Each of them, under its name; but shared networks are not tried all at once."""
    settings = {
        "max_kl": 0.02,
        "damping": 0.3,
        "cg_iterations": 4,
        "cg_tolerance": 1e-3,
        "backtrack_factor": 0.6,
        "max_backtracks": 3,
        "accept_ratio": 0.2,
        "fisher_fraction": 0.5,
    }
    settings["line_search"] = chosen
    loss = HATRPOLoss(make_actor(), None, **settings)
    assert list(radii(loss).values()) == [0.02] * 3
    own = TrustRegion(**settings)
    steps = SequentialUpdater(loss).steps.values()
    assert [replace(step.settings, max_kl=0.02) for step in steps] == [own] * 3
    block = HATRPOLoss(make_actor(share_params=True), None, blocks=["agents"], **settings)
    (step,) = SequentialUpdater(block).steps.values()
    assert replace(step.settings, max_kl=0.02) == replace(own, line_search="sequential")


def test_a_share_of_the_samples_in_the_fisher_matrix():
    """Each agent draws its own; the step is repeatable from the state, and obeys the bound."""
    actor = make_actor()
    batch = make_batch(actor, num_envs=20)
    updater = make_updater(actor, fisher_fraction=0.2)
    twin = copy.deepcopy(updater)
    one, two = updater(batch), twin(batch)
    assert (one == two).all()
    assert all(one[name, "kl"] < 0.01 for name in NAMES)
    draws = [updater.state_dict()["steps"][name]["generator"] for name in NAMES]
    assert not torch.equal(draws[0], draws[1])  # no two agents look at the same samples
    twin.load_state_dict(updater.state_dict())
    assert (updater(batch) == twin(batch)).all()


@pytest.mark.parametrize("fault", ["zero", "nan", "rejected"])
def test_never_breaks(fault, caplog):
    """No gradient, a NaN, a bound that no step can meet: bit-identical, ratio 1, and it is said."""
    actor = make_actor(distribution=IndependentNormal)
    kwargs = {"max_kl": 1e3, "max_backtracks": 1} if fault == "rejected" else {}
    updater = make_updater(actor, **kwargs)
    batch = make_batch(actor)
    batch["advantage"] = torch.zeros(*batch.shape, 1)
    if fault != "zero":
        batch["advantage"] = torch.randn(*batch.shape, 1)
    batch["value_target"] = torch.zeros(*batch.shape, N_AGENTS, 1)
    if fault == "nan":
        step = updater.steps[NAMES[1]]
        surrogate = step.surrogate
        step.surrogate = lambda dist, data: surrogate(dist, data) * float("nan")
    before = state_of(actor)
    metrics = updater(batch)
    for row, name in enumerate(NAMES):
        if fault == "nan" and row != 1:
            assert metrics[name, "line_search_success"] == 1
            continue
        assert metrics[name, "line_search_success"] == 0
        assert metrics[name, "step_fraction"] == 0
        assert metrics[name, "ratio_max"] == metrics[name, "ratio_min"] == 1
        for key, value in tensors(actor).items():
            assert torch.equal(value[row], before[key][row])


def test_frozen_parameters_stay():
    """Parameters that do not require a gradient are held fixed; the others are trained."""
    actor = make_actor()
    frozen = next(p for n, p in actor.named_parameters() if n.endswith("0.weight"))
    frozen.requires_grad_(False)
    updater = make_updater(actor)
    before = state_of(actor)
    updater(make_batch(actor))
    for key, value in tensors(actor).items():
        assert torch.equal(value, before[key]) == key.endswith("0.weight")


def test_optimiser_settings_are_the_critics():
    """Epochs and optimiser concern the critic only; agents have no optimiser state."""
    updater = make_updater()
    updater(make_batch(updater.loss.actor_network))
    state = updater.state_dict()["steps"]
    assert all(state[name] == {} for name in NAMES)
    assert state["critic"]["optimizer"]["state"]


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_state_survives_bit_for_bit(share):
    """Saved, loaded into a new updater, the trust region goes on with the same numbers.

    The draws of the Fisher matrix's samples too.
    """
    batches = [make_batch(make_actor()) for _ in range(3)]
    updater = make_updater(fisher_fraction=share)
    updater(batches[0])
    resumed = make_updater(fisher_fraction=share)
    resumed.load_state_dict(copy.deepcopy(updater.state_dict()))
    for batch in batches[1:]:
        assert (updater(batch) == resumed(batch)).all()
    assert same_state(tensors(updater.loss), tensors(resumed.loss))


def test_forward_without_the_old_distribution():
    """A batch that does not say what the old policy was has a surrogate, and no divergence."""
    actor = make_actor().double()
    batch = make_batch(actor)
    batch["advantage"] = torch.randn(*batch.shape, 1, dtype=torch.double)
    loss = HATRPOLoss(actor, None)
    expected = loss(batch)
    output = loss(batch.exclude(("agents", "loc"), ("agents", "scale")))
    assert set(expected.keys()) - set(output.keys()) == {"kl"}
    torch.testing.assert_close(output["loss_objective"], expected["loss_objective"])


@pytest.mark.parametrize("blocks", [(), ("agents",)])
def test_a_mask_that_hides_nothing_changes_nothing(blocks):
    """A block's divergence is a mean over its members, whether somebody may be inactive or not."""
    actor = make_actor().double()
    batch = make_batch(actor)
    ends = []
    for masked in (False, True):
        networks = copy.deepcopy(actor), make_critic().double()
        data = batch.clone()
        if masked:
            data["agents", "active"] = torch.ones(*batch.shape, N_AGENTS, dtype=torch.bool)
        torch.manual_seed(0)
        for parameter in networks[1].parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        updater = SequentialUpdater(HATRPOLoss(*networks, max_kl=0.02, blocks=blocks))
        metrics = updater(data)
        ends.append([*networks[0].parameters(), *metrics.values(True, True)])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
