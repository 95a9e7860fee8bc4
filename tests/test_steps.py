"""Steps by their contract: settings by name, every optimiser, minibatches, mixed precision."""

from __future__ import annotations

import copy
import io
from functools import partial

import pytest
import torch
from team import N_AGENTS, make_actor, make_batch, make_critic
from tensordict import TensorDict
from torch import nn
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ReplayBuffer,
    SamplerWithoutReplacement,
)
from torchrl.modules import IndependentNormal
from wrong_calls import same

from torchrl_happo import HAPPOLoss, HATRPOLoss, SequentialUpdater
from torchrl_happo.steps import FirstOrder, Problem, ReplayBufferMinibatches, Step, TrustRegion
from torchrl_happo.transaction import Transaction, clone_state

NAMES = [f"agents_{i}" for i in range(N_AGENTS)]
ADAM = torch.optim.Adam


def regression(name="agent", *, width=3, **kwargs):
    """A problem of least squares with a matrix and a vector, and its data."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, 1, bias=False))

    def loss(data):
        return (net(data["x"]) - data["y"]).square().mean()

    data = TensorDict({"x": torch.randn(8, width), "y": torch.randn(8, 1)}, [8])
    return Problem(name, loss=loss, named_parameters=net.named_parameters, **kwargs), data


# -- settings ------------------------------------------------------------------------------------


def test_steps_keep_the_contract():
    """Six methods, and no more of them public than the contract names and the proposal needs."""
    problem, data = regression(
        distribution=lambda values, data: torch.distributions.Normal(values["0.bias"], 1.0),
        surrogate=lambda dist, data: dist.mean.mean(),
        sample_shape=lambda data: torch.Size([4]),
    )
    for factory in (FirstOrder(num_epochs=1), TrustRegion()):
        step = factory(problem)
        assert isinstance(step, Step)
        before = [p.detach().clone() for p in step.parameters()]
        proposal = step.propose(data)
        assert all(map(torch.equal, before, step.parameters()))
        assert (proposal.gain is None) == (proposal.divergence is None)
        assert "grad_norm" in proposal.apply()
        assert not all(map(torch.equal, before, step.parameters()))
        step.follow()
        step.end_batch()


def test_settings_by_name_of_agent_and_of_group():
    """An agent's own value goes before its group's; a critic without one has the default."""
    updater = SequentialUpdater(
        HAPPOLoss(make_actor(), make_critic()),
        optimizer={"agents": partial(ADAM, lr=1e-3), NAMES[1]: partial(torch.optim.SGD, lr=0.1)},
        num_epochs={"agents": 2, NAMES[0]: 3, "critic": 4},
        minibatch_size={"agents": 6, NAMES[2]: None},
        max_grad_norm={"agents": 0.5},
        scheduler={"agents": partial(torch.optim.lr_scheduler.StepLR, step_size=1)},
        target_kl={"agents": 0.1, NAMES[0]: None},
    )
    steps = updater.steps
    kinds = [type(step.optimizer) for step in steps.values()]
    assert kinds == [ADAM, torch.optim.SGD, ADAM, ADAM]
    assert [s.optimizer.param_groups[0]["lr"] for s in steps.values()] == [1e-3, 0.1, 1e-3, 3e-4]
    assert [s.num_epochs for s in steps.values()] == [3, 2, 2, 4]
    assert [s.minibatches.size for s in steps.values()] == [6, 6, None, None]
    assert [s.max_grad_norm for s in steps.values()] == [0.5, 0.5, 0.5, float("inf")]
    assert [s.target_kl for s in steps.values()] == [None, 0.1, 0.1, None]
    assert steps["critic"].scheduler is None
    metrics = updater(make_batch(updater.loss.actor_network))
    assert [metrics[name, "epochs"] for name in (NAMES[0], "critic")] == [3, 4]


def test_radii_by_name():
    """A mapping gives each agent the bound of its own."""
    problem, _ = regression("agents_1", group="agents", names=("agents_1", "agents"))
    assert TrustRegion(max_kl={"agents": 0.3, "agents_1": 0.2}).radius(problem) == 0.2
    assert TrustRegion(max_kl=lambda name: {"agents_1": 0.7}[name]).radius(problem) == 0.7
    with pytest.raises(ValueError, match=r"max_kl has values for \['others'\]"):
        TrustRegion(max_kl={"others": 0.3}).radius(problem)
    with pytest.raises(ValueError, match=r"max_kl must be positive and finite, got -1\.0"):
        TrustRegion(max_kl={"agents": -1.0})


def test_a_proposal_may_be_given_another_radius():
    """Epochs stop at it, and a trust region keeps to it; what was promised scales with it."""
    actor = make_actor(distribution=IndependentNormal).double()
    loss = HATRPOLoss(actor, None, max_kl=0.01)
    batch = make_batch(actor)
    batch["advantage"] = torch.randn(*batch.shape, 1, dtype=torch.double)
    updater = SequentialUpdater(loss, num_epochs=1)
    step, seen = updater.steps[NAMES[0]], []
    propose = step.propose
    step.propose = lambda data: seen.append(data) or propose(data)
    updater(batch)
    own, *others = [propose(seen[0]) for _ in range(3)]
    q = own.direction.curvature
    torch.testing.assert_close(own.gain, (2 * 0.01 * q).sqrt(), rtol=1e-2, atol=0)
    torch.testing.assert_close(own.divergence, own.direction.divergence(0.01))
    before = clone_state(list(step.parameters()))
    for proposal, max_kl in zip(others, (1e-6, 1e-4), strict=True):
        kl = proposal.apply(max_kl)["step_kl"]
        torch.testing.assert_close(kl, proposal.direction.divergence(max_kl), rtol=0.05, atol=0)
        assert max_kl / 2 < kl < max_kl
        for parameter, value in zip(step.parameters(), before, strict=True):
            parameter.data.copy_(value)
    divergences = iter([0.1, 0.3, 0.5])
    problem, data = regression(divergence=lambda data: torch.tensor(next(divergences)))
    step = FirstOrder(num_epochs=3, target_kl=0.05)(problem)
    assert step.propose(data).apply(0.2)["epochs"] == 2


# -- optimisers ----------------------------------------------------------------------------------

SHARED_RATE = torch.tensor(1e-3)
OPTIMIZERS = {
    **{
        name: partial(getattr(torch.optim, name), lr=1e-2)
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type)
        and issubclass(kind, torch.optim.Optimizer)
        and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")
    },
    "a tensor of a rate": partial(ADAM, lr=SHARED_RATE),
    "momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "amsgrad": partial(ADAM, lr=1e-2, amsgrad=True, fused=False),
}


def muon(parameters):
    """Of matrices alone."""
    return torch.optim.Muon([p for p in parameters if p.requires_grad], lr=1e-2)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "Muon"])
def test_every_optimiser_of_torch_trains_resumes_and_is_rolled_back(name):
    """Bit for bit, from a file; a state of other networks is refused."""
    factory = FirstOrder(OPTIMIZERS.get(name, muon), num_epochs=2)

    def make(width=3):
        problem, data = regression(width=width)
        if name == "Muon":
            for _, p in problem.named_parameters():
                p.requires_grad_(p.ndim == 2)
        return factory(problem), data

    (first, data), (second, _) = make(), make()
    before = clone_state(list(first.parameters()))
    first.propose(data).apply()
    assert not any(map(torch.equal, before, first.parameters()))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for theirs, ours in zip(second.parameters(), first.parameters(), strict=True):
            theirs.copy_(ours)
    for step in (first, second):
        step.propose(data).apply()
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    state, values = copy.deepcopy(first.state_dict()), clone_state(list(first.parameters()))
    transaction = Transaction()
    with transaction:
        transaction.remember(first)
        first.propose(data).apply()
    transaction.rollback()
    assert same(first.state_dict(), state)
    assert all(map(torch.equal, first.parameters(), values))
    if any(v.ndim for per in state["optimizer"]["state"].values() for v in tensors(per)):
        with pytest.raises(ValueError, match="build the same networks"):
            make(width=5)[0].load_state_dict(state)


def tensors(values):
    """The tensors among the values of a mapping."""
    return [value for value in values.values() if isinstance(value, torch.Tensor)]


def test_a_learning_rate_that_is_a_tensor_belongs_to_one_agent():
    """After three batches of a schedule it has been multiplied three times, and not the user's."""
    rate = torch.tensor(1e-3)
    updater = SequentialUpdater(
        HAPPOLoss(make_actor(), make_critic()),
        optimizer=partial(ADAM, lr=rate),
        scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
        num_epochs=1,
    )
    batch = make_batch(updater.loss.actor_network)
    for _ in range(3):
        updater(batch)
    rates = [step.optimizer.param_groups[0]["lr"] for step in updater.steps.values()]
    assert [r.item() for r in rates] == pytest.approx([1e-3 / 8] * 4)
    assert rate.item() == pytest.approx(1e-3)


# -- rollback ------------------------------------------------------------------------------------


class Nested(torch.optim.SGD):
    """Keeps moments in lists within dicts, and moves them in place."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                own = self.state[p].setdefault("history", {"last": [torch.zeros_like(p)]})
                own["last"][0].add_(p.grad)
        return super().step(closure)


def test_rollback_of_nested_states_statistics_and_generators():
    """However deep a tensor lies; the latest change first, where one is remembered twice."""
    problem, data = regression()
    step = FirstOrder(
        partial(Nested, lr=0.1),
        num_epochs=2,
        scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
    )(problem)
    step.propose(data).apply()
    state = clone_state([step.state_dict(), list(step.parameters())])
    statistics, generator = torch.ones(3), torch.Generator().manual_seed(1)
    number = torch.rand(1, generator=copy.deepcopy(generator))

    def body(transaction):
        transaction.remember_values([statistics])
        statistics.mul_(2)
        take_back = transaction.remember(step)
        step.propose(data).apply()
        take_back()
        assert same([step.state_dict(), list(step.parameters())], state)
        transaction.remember_values([statistics])
        statistics.mul_(float("nan"))
        step.propose(data).apply()
        transaction.remember_once(step)
        step.end_batch()
        torch.rand(2, generator=generator)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Transaction([generator]) as transaction:
        body(transaction)
    assert same([step.state_dict(), list(step.parameters())], state)
    assert statistics.tolist() == [1, 1, 1]
    assert torch.equal(torch.rand(1, generator=generator), number)
    with Transaction([generator]) as transaction:
        transaction.remember(step)
        step.end_batch()
    assert step.optimizer.param_groups[0]["lr"] == 0.05


# -- minibatches ---------------------------------------------------------------------------------

BUFFERS = {
    "prefetch": lambda _: ReplayBuffer(storage=LazyTensorStorage(40), batch_size=8, prefetch=3),
    "on disk": lambda folder: ReplayBuffer(
        storage=LazyMemmapStorage(40, scratch_dir=folder), batch_size=8
    ),
    "without replacement": lambda _: ReplayBuffer(
        storage=LazyTensorStorage(40), sampler=SamplerWithoutReplacement(), batch_size=8
    ),
}


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("kind", BUFFERS)
def test_minibatches_of_a_buffer_are_of_the_present_batch(kind, used, tmp_path):
    """Whatever it holds, draws ahead, or stores elsewhere; what it holds stays there."""
    buffer = BUFFERS[kind](tmp_path)
    if used:
        buffer.extend(TensorDict({"x": torch.full((30,), -1)}, [30]))
        buffer.sample()
    first, second = ReplayBufferMinibatches(buffer), ReplayBufferMinibatches(buffer)
    for number in range(20):
        for offset, minibatches in ((0, first), (100, second)):
            data = TensorDict({"x": torch.full((24,), number + offset)}, [24])
            drawn = torch.cat([minibatch["x"] for minibatch in minibatches(data)])
            assert len(drawn) == 24
            assert (drawn == number + offset).all()
    assert len(buffer) == (30 if used else 0)


# -- mixed precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("loss_class", [HAPPOLoss, HATRPOLoss])
def test_under_autocast_the_weights_of_now_are_seen(loss_class):
    """As without the cache of casts; and so does a caller's own pass behind the update."""
    torch.manual_seed(0)
    actor, critic = make_actor(distribution=IndependentNormal), make_critic()
    batch = make_batch(actor)
    outcomes = []
    for cached in (False, True):
        networks = copy.deepcopy((actor, critic))
        loss = loss_class(*networks)
        updater = SequentialUpdater(loss, num_epochs=3, optimizer=partial(ADAM, lr=1e-2))
        layer = nn.Linear(4, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cached):
            layer(torch.ones(4))
            metrics = updater(batch)
            layer.weight.data.zero_()
            assert torch.is_autocast_cache_enabled() == cached
            torch.testing.assert_close(
                layer(torch.zeros(4)).float(), layer.bias, rtol=0.1, atol=0.1
            )
            seen = loss.actor_network.get_dist(batch.copy()).mean
        outcomes.append([*(metrics[name, "kl"].item() for name in NAMES), seen.sum().item()])
    assert all(kl > 0 for kl in outcomes[0][:-1])
    assert outcomes[0] == outcomes[1]
