"""The slice that is trained is the policy that acted, whatever the joint actor is made of."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from newer import tensors
from team import make_observations, state_of
from tensordict.nn import CompositeDistribution, TensorDictModule, set_composite_lp_aggregate
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import IndependentNormal, MultiAgentMLP, ProbabilisticActor

from torchrl_happo import HAPPOLoss, HATRPOLoss, SequentialUpdater

N, OBS, ACT = 3, 5, 3
BOTH = pytest.mark.parametrize("loss_class", [HAPPOLoss, HATRPOLoss])


def stack(kind=MultiAgentMLP, n_out=ACT):
    return kind(OBS, n_out, N, centralized=False, share_params=False, num_cells=8, depth=1)


def discrete(net):
    keys = [("agents", "logits")]
    return ProbabilisticActor(
        TensorDictModule(net, in_keys=[("agents", "observation")], out_keys=keys),
        in_keys=keys,
        out_keys=[("agents", "action")],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )


class Bounded(MultiAgentMLP):
    """A stack whose forward does more."""

    def forward(self, *inputs):
        return 2 * torch.tanh(super().forward(*inputs))


class Cool(nn.Module):
    """A temperature outside the stack."""

    temperature = 1.0

    def forward(self, logits):
        return logits / self.temperature


class Container(nn.Module):
    """A temperature around the stack."""

    temperature = 1.0

    def __init__(self):
        super().__init__()
        self.net = stack()

    def forward(self, observation):
        return self.net(observation) / self.temperature


class Identified(nn.Module):
    """Adds to each agent's logits what depends on its number."""

    def forward(self, logits):
        return logits + torch.arange(N * ACT).reshape(N, ACT) / 3


class Statistics(nn.Module):
    """Scales each agent's observations by a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor([[0.5], [1.0], [2.0]]))

    def forward(self, observation):
        return observation * self.scale


class Deviating(nn.Module):
    """Rows of parameters beside the stack."""

    def __init__(self):
        super().__init__()
        self.net = stack(n_out=2)
        self.log_std = nn.Parameter(torch.linspace(-1, 0.5, 2 * N).reshape(N, 2))

    def forward(self, observation):
        loc = self.net(observation)
        return loc, self.log_std.exp().expand_as(loc)


def with_rows():
    keys = [("agents", "loc"), ("agents", "scale")]
    return ProbabilisticActor(
        TensorDictModule(Deviating(), in_keys=[("agents", "observation")], out_keys=keys),
        in_keys=keys,
        out_keys=[("agents", "action")],
        distribution_class=IndependentNormal,
        return_log_prob=True,
    )


def hook(find):
    """Halves what a module returns, by a forward hook."""

    def change(actor):
        module = next(m for m in actor.modules() if find(m))
        module.register_forward_hook(lambda module, inputs, output: output / 2)

    return change


def backward_hook(actor):
    """Halves the gradient that reaches the stack."""
    stack = next(m for m in actor.modules() if is_stack(m))
    stack.register_full_backward_pre_hook(lambda module, gradients: (gradients[0] / 2,))


def warm(kind):
    def change(actor):
        next(m for m in actor.modules() if isinstance(m, kind)).temperature = 0.3

    return change


def is_stack(module):
    return isinstance(module, MultiAgentMLP)


def nothing(actor):
    """Change nothing later."""


#: From a factory of the joint actor, and what is changed after the loss was built.
ACTORS = {
    "plain": (lambda: discrete(stack()), nothing),
    "subclass": (lambda: discrete(stack(Bounded)), nothing),
    "hook on the stack": (lambda: discrete(stack()), hook(is_stack)),
    "hook on a head": (
        lambda: discrete(nn.Sequential(stack(), nn.Tanh())),
        hook(lambda m: type(m) is nn.Tanh),
    ),
    "backward hook": (lambda: discrete(stack()), backward_hook),
    "temperature beside": (lambda: discrete(nn.Sequential(stack(), Cool())), warm(Cool)),
    "temperature around": (lambda: discrete(Container()), warm(Container)),
    "numbers of agents": (lambda: discrete(nn.Sequential(stack(), Identified())), nothing),
    "statistics": (lambda: discrete(nn.Sequential(Statistics(), stack())), nothing),
    "rows of deviations": (with_rows, nothing),
    "dropout asleep": (lambda: discrete(nn.Sequential(stack(), nn.Dropout(0.5))).eval(), nothing),
}


def collect(actor):
    data = make_observations(8, 10)
    data["advantage"] = torch.randn(8, 10, 1)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        return actor(data)


def joint_gradient(actor, data, agent):
    """Gradient of minus the mean of the agent's ratio times the advantage, by the joint actor."""
    advantage = data["advantage"].squeeze(-1)
    advantage = (advantage - advantage.mean()) / advantage.std(unbiased=False)
    log_prob = actor.get_dist(data.clone()).log_prob(data["agents", "action"])
    ratio = (log_prob - data["agents", "action_log_prob"])[..., agent].exp()
    parameters = [p for p in actor.parameters() if p.requires_grad]
    return parameters, torch.autograd.grad(-(ratio * advantage).mean(), parameters)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("case", ACTORS)
@BOTH
def test_fresh_data_has_ratio_one_and_the_gradient_is_the_joint_actors(case, loss_class):
    """At a rate of 0 the loss is 0; otherwise the step is the gradient through the joint actor."""
    torch.manual_seed(0)
    build, change = ACTORS[case]
    actor = build()
    settings = {"entropy_coeff": 0.0} if loss_class is HAPPOLoss else {"max_kl": 1e-9}
    loss = loss_class(actor, **settings)
    updater = SequentialUpdater(
        loss, optimizer=partial(torch.optim.SGD, lr=0.0), num_epochs=1, order="fixed"
    )
    change(actor)
    data = collect(actor)
    if loss_class is HATRPOLoss and change is backward_hook:
        with pytest.raises(ValueError, match=r"have a hook on a gradient.*first-order loss"):
            updater(data)
        return
    metrics = updater(data)["agents_0"]
    assert metrics["surrogate_before"].item() == pytest.approx(0, abs=1e-5)
    if loss_class is HATRPOLoss:
        assert metrics["ratio_mean"].item() == pytest.approx(1, abs=1e-3)
        joint = copy.deepcopy(actor)  # what the trust region has moved
        dist = joint.get_dist(data.clone())
        log_ratio = dist.log_prob(data["agents", "action"]) - data["agents", "action_log_prob"]
        assert log_ratio[..., 0].exp().mean().item() == pytest.approx(
            metrics["ratio_mean"].item(), abs=1e-5
        )
        return
    assert metrics["ratio_mean"].item() == pytest.approx(1, abs=1e-5)
    assert metrics["loss"].item() == pytest.approx(0, abs=1e-5)
    parameters, gradients = joint_gradient(actor, data, 0)
    before = [p.detach().clone() for p in parameters]
    for group in updater.steps["agents_0"].optimizer.param_groups:
        group["lr"] = 0.1
    updater(data)
    for old, new, gradient in zip(before, parameters, gradients, strict=True):
        torch.testing.assert_close(new.detach(), old - 0.1 * gradient, rtol=1e-4, atol=1e-6)


class Two(nn.Module):
    """Parameters of two heads."""

    def __init__(self):
        super().__init__()
        self.net = stack(n_out=5)

    def forward(self, observation):
        loc, scale, logits = self.net(observation).split([1, 1, 3], -1)
        return loc, scale.exp(), logits


def heads_in_a_tensordict():
    """An actor whose distribution takes all its parameters in one entry, a tensordict."""
    keys = [
        ("agents", "params", *key) for key in (("go", "loc"), ("go", "scale"), ("say", "logits"))
    ]
    return ProbabilisticActor(
        TensorDictModule(Two(), in_keys=[("agents", "observation")], out_keys=keys),
        in_keys=[("agents", "params")],
        distribution_class=CompositeDistribution,
        distribution_kwargs={
            "distribution_map": {
                "go": torch.distributions.Normal,
                "say": torch.distributions.Categorical,
            },
            "name_map": {name: ("agents", "action", name) for name in ("go", "say")},
        },
        return_log_prob=True,
    )


@BOTH
def test_heads_whose_parameters_lie_in_a_tensordict(loss_class):
    """They are compared with the joint actor's head by head, and trained."""
    torch.manual_seed(0)
    with set_composite_lp_aggregate(False):
        actor = heads_in_a_tensordict()
        loss, data = loss_class(actor), collect(actor)
        metrics = SequentialUpdater(loss, num_epochs=2, order="fixed")(data)
    assert metrics["agents_0", "surrogate_before"].item() == pytest.approx(0, abs=1e-5)
    assert all(metrics[agent.name, "kl"] > 0 for agent in loss.agents)


@pytest.mark.parametrize("build", [lambda net: net, lambda net: nn.Sequential(net, Cool())])
@BOTH
def test_a_subclass_for_a_group_of_one(build, loss_class):
    """It has no companions whose policies its parameters could move."""
    torch.manual_seed(0)
    net = Bounded(OBS, ACT, 1, centralized=False, share_params=False, num_cells=8, depth=1)
    actor = discrete(build(net))
    data = make_observations(8, 10, 1)
    data["advantage"] = torch.randn(8, 10, 1)
    with torch.no_grad():
        data = actor(data)
    metrics = SequentialUpdater(loss_class(actor), num_epochs=2)(data)
    assert metrics["agents", "surrogate_before"].item() == pytest.approx(0, abs=1e-5)
    assert metrics["agents", "kl"] > 0


def test_a_hook_on_the_gradient_of_a_stack():
    """No row would call it. On the parameters of an agent, as the sentence says, it acts."""
    moved = []
    for hooked in (False, True):
        torch.manual_seed(0)
        actor = discrete(stack())
        loss = HAPPOLoss(actor, entropy_coeff=0.0)
        updater = SequentialUpdater(
            loss, optimizer=partial(torch.optim.SGD, lr=0.1), num_epochs=1, order="fixed"
        )
        data, before = collect(actor), [p.clone() for p in loss.agents[0].parameters()]
        if hooked:
            handles = [p.register_hook(lambda grad: grad / 2) for p in actor.parameters()]
            with pytest.raises(ValueError, match=r"a hook on its gradient.*each of loss\.agents"):
                updater(data)
            for handle in handles:
                handle.remove()
            for p in loss.agents[0].parameters():
                p.register_hook(lambda grad: grad / 2)
        updater(data)
        own = loss.agents[0].parameters()
        moved.append([(p - q).detach() for p, q in zip(own, before, strict=True)])
    torch.testing.assert_close(moved[1], [step / 2 for step in moved[0]], rtol=1e-3, atol=1e-7)


def test_a_trust_region_refuses_hooks_on_gradients():
    """Of an agent's parameters, however they are held; without them it takes its step."""
    actor = discrete(stack())
    loss = HATRPOLoss(actor)
    updater, data = SequentialUpdater(loss), collect(actor)
    handle = loss.agents[1].parameters()[0].register_hook(lambda grad: grad / 2)
    with pytest.raises(ValueError, match=r"'agents_1' have a hook.*remove it, or take a first-ord"):
        updater(data)
    handle.remove()
    assert updater(data)["agents_1", "kl"] > 0


class Talking(nn.Module):
    """Each agent sees the mean of all, without a parameter."""

    def forward(self, observation):
        return observation + observation.mean(-2, keepdim=True)


@BOTH
def test_communication_is_refused_by_name_and_trained_as_a_block(loss_class):
    """The sentence names the module; the cure that it names works."""
    torch.manual_seed(0)
    actor = discrete(nn.Sequential(Talking(), stack()))
    data = collect(actor)
    loss = loss_class(actor)
    before = state_of(loss)
    with pytest.raises(ValueError, match=r"observations of other.*Talking.*blocks=\['agents'\]"):
        SequentialUpdater(loss, num_epochs=1)(data)
    assert all(torch.equal(value, before[name]) for name, value in tensors(loss).items())
    metrics = SequentialUpdater(loss_class(actor, blocks=["agents"]), num_epochs=2)(data)
    assert metrics["agents", "kl"] > 0


@BOTH
def test_dropout_awake_is_refused_and_asleep_is_trained(loss_class):
    """The cure of the sentence, actor.eval(), works."""
    actor = discrete(nn.Sequential(stack(), nn.Dropout(0.5)))
    updater = SequentialUpdater(loss_class(actor), num_epochs=1)
    with pytest.raises(ValueError, match=r"Dropout.*training mode.*actor\.eval\(\)"):
        updater(collect(actor))
    actor.eval()
    updater(collect(actor))
    actor.train()
    with pytest.raises(ValueError, match="training mode"):
        updater(collect(actor))


@pytest.mark.parametrize("case", ["plain", "rows of deviations"])
@pytest.mark.parametrize("whole", [False, True], ids=["agent_loss", "forward"])
@BOTH
def test_a_loop_of_ones_own_moves_that_agent(case, whole, loss_class):
    """An optimiser over the agent's parameters moves its rows, and no others."""
    torch.manual_seed(0)
    actor = ACTORS[case][0]()
    loss, data = loss_class(actor), collect(actor)
    agent = loss.agents[1]
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    parameters = list(actor.parameters())
    for _ in range(2):
        before = [p.detach().clone() for p in parameters]
        for p in parameters:
            p.grad = None
        optimizer.zero_grad()
        if whole:
            objective = loss(data.set("factor", torch.ones(8, 10, 1)))["loss_objective"]
        else:
            objective = loss.agent_loss(agent, loss.agent_data(agent, data))
        objective.backward()
        rows = [p.grad.clone() for p in agent.parameters()]
        if whole:
            for row, p in zip(rows, parameters, strict=True):
                torch.testing.assert_close(row, p.grad[1])
        optimizer.step()
        for old, p, row in zip(before, parameters, rows, strict=True):
            torch.testing.assert_close(p.detach()[1], old[1] - 0.1 * row)
            assert row.abs().max() > 0
            assert torch.equal(p.detach()[::2], old[::2])


REPLACED = {
    "a module beside the stack": lambda net: net.__setitem__(1, nn.Tanh()),
    "another stack": lambda net: net.__setitem__(0, stack()),
    "a module behind": lambda net: net.append(nn.LayerNorm(ACT)),
    "one fewer": lambda net: net.pop(1),
}


@pytest.mark.parametrize("case", REPLACED)
def test_modules_that_are_replaced_later_are_refused(case):
    """Optimisers hold the parameters of the old ones. The cure of the sentence works."""
    torch.manual_seed(0)
    net = nn.Sequential(stack(), Cool())
    actor = discrete(net)
    updater = SequentialUpdater(HAPPOLoss(actor), num_epochs=1)
    updater(collect(actor))
    REPLACED[case](net)
    data, before = collect(actor), state_of(updater.loss)
    with pytest.raises(
        ValueError, match=r"has other modules than .*build the loss and its updater"
    ):
        updater(data)
    after = state_of(updater.loss)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    if case == "a module behind":  # not a stack, and so of all agents
        net[2].requires_grad_(False)
    anew = SequentialUpdater(
        HAPPOLoss(actor), optimizer=partial(torch.optim.Adam, lr=0.0), num_epochs=1
    )
    metrics = anew(data)
    for name in ("agents_0", "agents_1", "agents_2"):
        assert metrics[name, "ratio_max"].item() == pytest.approx(1, abs=1e-5)
        assert metrics[name, "grad_norm"] > 0
