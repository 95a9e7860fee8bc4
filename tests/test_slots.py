"""The parts of an update, each replaced by one written against its public contract alone."""

from __future__ import annotations

import copy

import pytest
import torch
from newer import tensors
from team import N_AGENTS, make_actor, make_batch, make_critic, same_state, state_of
from tensordict import TensorDict

from torchrl_happo import HAPPOLoss, HATRPOLoss, SequentialUpdater
from torchrl_happo.objectives.critic import Critic, critic_keys
from torchrl_happo.steps import FirstOrder, Problem, Step
from torchrl_happo.update.correction import RatioFactor
from torchrl_happo.update.order import Order

NAMES = [f"agents_{i}" for i in range(N_AGENTS)]


class SignProposal:
    """A move of one length along the signs of the gradient."""

    gain = divergence = None

    def __init__(self, problem, data, size):
        self.problem, self.data, self.size = problem, data, size

    def apply(self, max_kl=None):
        parameters = dict(self.problem.named_parameters())
        gradients = torch.autograd.grad(
            self.problem.loss(self.data), list(parameters.values()), allow_unused=True
        )
        with torch.no_grad():
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(self.size * gradient.sign())
        norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
        return TensorDict({"grad_norm": norm, "moves": torch.tensor(1.0)})


class SignStep:
    """A step that counts its batches."""

    def __init__(self, problem: Problem, size: float = 1e-3):
        self.problem, self.size, self.batches = problem, size, 0

    def parameters(self):
        return [parameter for _, parameter in self.problem.named_parameters()]

    def propose(self, data):
        return SignProposal(self.problem, data, self.size)

    def follow(self):
        pass

    def end_batch(self):
        self.batches += 1

    def state_dict(self):
        return {"batches": self.batches}

    def load_state_dict(self, state):
        self.batches = state["batches"]


def make_updater(**kwargs):
    """An updater of a small team."""
    loss = HAPPOLoss(make_actor(), make_critic(), entropy_coeff=0.0)
    return SequentialUpdater(loss, **{"num_epochs": 1, **kwargs})


def test_a_step_of_ones_own():
    """It moves every agent and the critic, its report arrives, and its state comes back."""
    updater = make_updater(step=SignStep, critic_step=SignStep)
    assert all(isinstance(step, Step) for step in updater.steps.values())
    actor = updater.loss.actor_network
    before = state_of(actor)
    metrics = updater(make_batch(actor))
    assert all(metrics[name, "moves"] == 1 for name in [*NAMES, "critic"])
    for key, value in tensors(actor).items():
        moved = (value - before[key]).abs()
        assert moved.max() <= 1e-3 + 1e-6
    state = copy.deepcopy(updater.state_dict())
    other = make_updater(step=SignStep, critic_step=SignStep)
    other.load_state_dict(state)
    assert other.steps[NAMES[0]].batches == 1


def test_a_step_of_ones_own_is_rolled_back():
    """An error after its move puts parameters and its state back, by the contract alone."""
    updater = make_updater(step=SignStep, order="fixed")
    actor = updater.loss.actor_network
    before = state_of(actor)

    def fails(data):
        raise RuntimeError("in the middle")

    updater.steps[NAMES[2]].propose = fails
    with pytest.raises(RuntimeError, match="in the middle"):
        updater(make_batch(actor))
    assert same_state(before, state_of(actor))
    assert updater.steps[NAMES[0]].batches == 0


def test_what_is_no_step_is_refused():
    """With the name of the agent and what the factory returned."""
    with pytest.raises(TypeError, match=r"returned 3 for 'agents_0'; it must return a Step"):
        make_updater(step=lambda problem: 3)


class LargestFactorFirst:
    """An order that looks at the batch and at the correction before each turn."""

    def __init__(self):
        self.seen = []

    def next_agents(self, remaining, batch, correction):
        self.seen.append((len(remaining), correction.log_factor.abs().max().item()))
        return [remaining[-1]]


def test_an_order_of_ones_own_is_asked_before_each_turn():
    """It sees the factor grow, and the positions follow its answers."""
    order = LargestFactorFirst()
    assert isinstance(order, Order)
    updater = make_updater(order=order)
    metrics = updater(make_batch(updater.loss.actor_network))
    assert [left for left, _ in order.seen] == [3, 2, 1]
    assert order.seen[0][1] == 0 < order.seen[1][1]
    assert [metrics[name, "position"].item() for name in NAMES] == [2, 1, 0]


class AllAtOnce:
    """One turn of all agents."""

    def next_agents(self, remaining, batch, correction):
        return remaining


def test_agents_that_move_together_see_no_factor_of_each_other():
    """One turn of all: no agent's data is corrected, as in MAPPO with unshared networks."""
    updater = make_updater(order=AllAtOnce())
    metrics = updater(make_batch(updater.loss.actor_network))
    assert all(metrics[name, "factor_max"] == 1 for name in NAMES)
    assert all(metrics[name, "position"] == 0 for name in NAMES)


@pytest.mark.parametrize(
    "answer",
    [[], None, ["agents_9"], ["agents_0", "agents_0"], "agents_0"],
    ids=["nobody", "nothing", "a stranger", "one twice", "a word"],
)
def test_an_order_that_breaks_its_contract_is_refused(answer):
    """With its class and the answer. Nothing has moved."""
    order = AllAtOnce()
    order.next_agents = lambda remaining, batch, correction: answer
    updater = make_updater(order=order)
    before = state_of(updater.loss.actor_network)
    with pytest.raises(ValueError, match=r"AllAtOnce.next_agents returned .* it must return one"):
        updater(make_batch(updater.loss.actor_network))
    assert same_state(before, state_of(updater.loss.actor_network))


class HalfFactor(RatioFactor):
    """A correction by the square root of the factor."""

    def entries(self, agent):
        return {key: value.sqrt() for key, value in super().entries(agent).items()}


def test_a_correction_of_ones_own():
    """The surrogate before an agent's step is the mean of the advantage it was given."""
    updater = make_updater(correction=HalfFactor, order="fixed")
    whole = make_updater(order="fixed")
    whole.load_state_dict(updater.state_dict())
    batch = make_batch(updater.loss.actor_network)
    half, full = updater(batch), whole(batch)
    first, last = NAMES[0], NAMES[-1]
    assert half[first, "surrogate_before"] == full[first, "surrogate_before"]
    assert half[last, "surrogate_before"] != full[last, "surrogate_before"]


class TwoCritics(HAPPOLoss):
    """A loss with a critic of the cost beside that of the reward."""

    def __init__(self, actor, critic, cost_critic):
        super().__init__(actor, critic, entropy_coeff=0.0)
        self.cost_critic = cost_critic

    @property
    def critics(self):
        keys = critic_keys(
            self.cost_critic,
            value=("agents", "state_value"),
            reward="cost",
            advantage="cost_advantage",
            value_target="cost_target",
        )
        return {**super().critics, "cost": Critic(self.cost_critic, keys)}


def test_a_second_critic_is_an_entry():
    """It is fitted to the returns of its own signal, under its own name."""
    actor, critic, cost = make_actor(), make_critic(), make_critic()
    updater = SequentialUpdater(TwoCritics(actor, critic, cost), num_epochs=2)
    batch = make_batch(actor)
    batch["next", "cost"] = torch.rand(*batch.shape, 1)
    before = state_of(cost)
    metrics = updater(batch)
    assert {"critic", "cost"} <= set(metrics.keys())
    assert metrics["cost", "grad_norm"] > 0
    assert not same_state(before, state_of(cost))
    with pytest.raises(KeyError, match=r"no entry .*next.*cost"):
        updater(batch.exclude(("next", "cost")))


def test_settings_of_first_order_steps_as_an_object():
    """The short form and the object make the same update, bit for bit."""
    short, long = make_updater(num_epochs=2), make_updater(step=FirstOrder(num_epochs=2))
    long.load_state_dict(short.state_dict())
    batch = make_batch(short.loss.actor_network)
    one, two = short(batch), long(batch)
    for name in NAMES:
        assert (one[name] == two[name]).all()


def test_proposals_say_what_they_expect():
    """A trust region knows gain and divergence before it moves, a first-order step does not."""
    loss = HATRPOLoss(make_actor(), make_critic())
    updater = SequentialUpdater(loss, num_epochs=1)
    proposals = []
    for name in NAMES:
        propose = updater.steps[name].propose
        updater.steps[name].propose = lambda data, p=propose: (
            proposals.append(p(data)) or (proposals[-1])
        )
    updater(make_batch(loss.actor_network))
    assert all(proposal.gain > 0 for proposal in proposals)
    assert all(proposal.divergence > 0 for proposal in proposals)
