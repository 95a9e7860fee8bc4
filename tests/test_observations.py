"""Every kind of observation, action and mask that a builder reads: what it computes, and trains."""

from __future__ import annotations

import copy

import pytest
import torch
from newer import tensors
from tensordict import TensorDict
from test_networks import SpecEnv, team
from torch import nn
from torch.distributions import Categorical as CategoricalDistribution
from torch.distributions import kl_divergence as kl_of_torch
from torchrl.collectors import Collector
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    Unbounded,
)
from torchrl.envs import (
    ActionDiscretizer,
    Compose,
    DoubleToFloat,
    FlattenObservation,
    StepCounter,
    TransformedEnv,
    VmasEnv,
)
from torchrl.modules import MaskedCategorical

from torchrl_happo import (
    HAPPOLoss,
    HATRPOLoss,
    SequentialUpdater,
    TeamReward,
    make_actor,
    make_critic,
    memory_transforms,
)
from torchrl_happo.networks.discrete import MultiCategorical as MultiCategoricalDistribution
from torchrl_happo.networks.specs import read_groups
from torchrl_happo.policy.distributions import entropy, kl_divergence
from torchrl_happo.policy.fisher import fisher_product
from torchrl_happo.team.split import split_team

N = 2  # agents


def vector(size=4, **kwargs):
    return Unbounded((N, size), **kwargs)


def board(**entries):
    """A group whose observation is a dict of entries."""
    return Composite(entries, shape=(N,))


class Allowing(SpecEnv):
    """Random observations, of whose masks the first choice of every component is available."""

    firsts = (0,)

    def _reset(self, tensordict):
        data = super()._reset(tensordict)
        for key in data.keys(True, True):
            if key[-1] == "action_mask":
                data[key][..., list(self.firsts)] = 1
        return data

    def _step(self, tensordict):
        return super()._step(tensordict).update(self._reset(None))


def agents(action, observation=None, firsts=(0,), **extra):
    """A team of two in four copies."""
    env = Allowing(
        Composite(
            agents=Composite(
                observation=vector() if observation is None else observation, **extra, shape=(N,)
            )
        ),
        Composite(agents=Composite(action=action, shape=(N,))),
        (4,),
    )
    env.firsts = firsts
    return env


def lone(action, **entries):
    """A single agent without an agent dimension."""
    return Allowing(
        Composite(agents=Composite(observation=Composite(**entries))),
        Composite(agents=Composite(action=action)),
        (4,),
    )


IMAGE = Bounded(0, 255, (N, 3, 9, 7), dtype=torch.uint8)
CHOICE = Categorical(3, shape=(N,))
PAIR = MultiCategorical([2, 3]).expand(N, 2)

#: Environments by name, and the arguments of the builders.
KINDS = {
    "multi-discrete": (agents(PAIR), {}),
    "several categoricals": (agents(Categorical(3, shape=(N, 2))), {}),
    "multi-discrete, masked": (
        agents(PAIR, action_mask=Binary(5, (N, 5), dtype=torch.bool), firsts=(0, 2)),
        {},
    ),
    "mask of integers": (agents(CHOICE, action_mask=Categorical(2, shape=(N, 3))), {}),
    "one-hot, mask of bytes": (
        agents(OneHot(3, shape=(N, 3)), action_mask=Binary(3, (N, 3), dtype=torch.int8)),
        {},
    ),
    "multi-discrete, mask of integers": (
        agents(PAIR, action_mask=Binary(5, (N, 5), dtype=torch.int64), firsts=(0, 2)),
        {},
    ),
    "nested key": (
        agents(CHOICE, board(observation=vector(), rest=vector(3))),
        {"observation_key": ("observation", "observation")},
    ),
    "mask beside a nested observation": (
        agents(
            CHOICE, board(observation=vector(), action_mask=Binary(3, (N, 3), dtype=torch.bool))
        ),
        {},
    ),
    "number of a category": (agents(CHOICE, Categorical(5, shape=(N,))), {}),
    "several categories": (agents(CHOICE, MultiCategorical([2, 4]).expand(N, 2)), {}),
    "whole numbers": (agents(CHOICE, Bounded(-3, 9, (N, 4), dtype=torch.int64)), {}),
    "booleans": (agents(CHOICE, Binary(4, (N, 4), dtype=torch.bool)), {}),
    "image of bytes": (agents(CHOICE, IMAGE), {}),
    "image of floats": (agents(Bounded(-1.0, 1.0, (N, 2)), Unbounded((N, 1, 4, 4))), {}),
    "dict of both": (agents(PAIR, board(image=IMAGE, speed=vector(2), kind=CHOICE)), {}),
    "list of entries": (
        agents(CHOICE, board(image=IMAGE, speed=vector(2), unseen=vector(3))),
        {"observation_key": [("observation", "speed"), ("observation", "image")]},
    ),
    "lone agent": (
        lone(
            MultiCategorical([2, 3]),
            image=Bounded(0, 255, (3, 9, 7), dtype=torch.uint8),
            speed=Unbounded((2,)),
            kind=Categorical(4),
        ),
        {},
    ),
}


def paid(env, *transforms):
    """The environment, with episodes of four steps and a random reward of the team."""
    return TransformedEnv(env, Compose(StepCounter(4), *transforms))


def update(loss_class, env, actor, critic):
    """Train for one batch; return the loss and the agents' parameters before."""
    batch = next(iter(Collector(env, actor, frames_per_batch=32, total_frames=32)))
    batch["next", "reward"] = torch.randn(*batch.shape, 1)
    loss = loss_class(actor, critic)
    before = [copy.deepcopy(tensors(agent.actor)) for agent in loss.agents]
    settings = {"num_epochs": 2} if loss_class is HAPPOLoss else {}
    metrics = SequentialUpdater(loss, **settings)(batch)
    return loss, before, metrics


@pytest.mark.parametrize("loss_class", [HAPPOLoss, HATRPOLoss])
@pytest.mark.parametrize("kind", list(KINDS))
def test_actor_and_critic_train(kind, loss_class):
    """One update moves every agent, and every number of it is finite."""
    env, kwargs = KINDS[kind]
    env = paid(env)
    actor = make_actor(env, num_cells=(8,), **kwargs)
    critic = make_critic(env, num_cells=(8,), **kwargs)
    loss, before, metrics = update(loss_class, env, actor, critic)
    assert all(value.isfinite().all() for value in metrics.values(True, True))
    for agent, state in zip(loss.agents, before, strict=True):
        now = tensors(agent.actor)
        assert any((now[key] != state[key]).any() for key in state if torch.is_tensor(state[key]))


@pytest.mark.parametrize("kind", list(KINDS))
def test_each_agent_is_its_row_of_the_joint_actor(kind):
    """Stored log-probabilities are those of the slices that are trained."""
    env, kwargs = KINDS[kind]
    actor = make_actor(env, num_cells=(8,), **kwargs)
    with torch.no_grad():
        batch = env.rollout(3, actor)
    for index, agent in enumerate(split_team(actor)):
        view = agent.view(batch, [*agent.actor.in_keys, ("agents", "action")])
        log_prob = agent.actor.get_dist(view).log_prob(view["agents", "action"])
        stored = batch["agents", "action_log_prob"]
        torch.testing.assert_close(log_prob, stored if kind == "lone agent" else stored[..., index])


@pytest.mark.parametrize("input", ["agent_specific", "own", "observations"])
@pytest.mark.parametrize("kind", ["dict of both", "lone agent", "several categories"])
def test_every_critic_reads_them(kind, input):
    """Values for the team or for each agent, with memory or without, depend on each entry."""
    env, kwargs = KINDS[kind]
    env = paid(env)
    critic = make_critic(env, input=input, num_cells=(8,), **kwargs)
    data = env.reset()
    n_agents = 1 if kind == "lone agent" else N
    shape = (4, 1) if input == "observations" else (4, n_agents, 1)
    value = critic(data.clone())["state_value"]
    assert value.shape == shape
    for key in critic.in_keys:
        other = data.clone()
        other[key] = (other[key] + 1) % 2
        assert (critic(other)["state_value"] != value).all()
    loss_class = HAPPOLoss
    memory = make_critic(env, input=input, num_cells=(8,), recurrent="gru", hidden_size=5, **kwargs)
    env = env.append_transform(memory_transforms(make_actor(env, recurrent="gru"))[0])
    _, _, metrics = update(loss_class, env, make_actor(env, num_cells=(8,), **kwargs), memory)
    assert metrics["critic", "loss"].isfinite()


@pytest.mark.parametrize("num_cells", [(), (6,)])
@pytest.mark.parametrize("kind", ["dict of both", "lone agent", "mask of integers"])
def test_actors_with_memory_read_them(kind, num_cells):
    """Encoders lie before the hidden layers, or before the memory itself."""
    env, kwargs = KINDS[kind]
    actor = make_actor(env, num_cells=num_cells, recurrent="gru", hidden_size=5, **kwargs)
    env = paid(env, *memory_transforms(actor))
    _, _, metrics = update(HATRPOLoss, env, actor, make_critic(env, num_cells=(8,), **kwargs))
    assert all(value.isfinite().all() for value in metrics.values(True, True))


def test_discretized_actions_of_a_simulator():
    """The policies of a continuous VMAS task train on 5 choices for each of its dimensions."""
    discretize = ActionDiscretizer(num_intervals=5, action_key=("agents", "action"))
    env = TransformedEnv(VmasEnv("balance", num_envs=4), Compose(discretize, TeamReward()))
    actor = make_actor(env, num_cells=(8,))
    dist = actor.get_dist(env.reset())
    assert type(dist) is MultiCategoricalDistribution
    assert dist.base_dist.probs.shape == (4, 3, 2, 5)
    _, _, metrics = update(HAPPOLoss, env, actor, make_critic(env))
    assert metrics["agents_0", "kl"] > 0


def test_a_multi_categorical_is_a_product():
    """Log-probs, entropies, divergences and Fisher products are sums over the components."""
    logits = [torch.randn(6, n, dtype=torch.float64) for n in (2, 4, 3)]
    others = [torch.randn(6, n, dtype=torch.float64) for n in (2, 4, 3)]
    one, other = (
        MultiCategoricalDistribution(torch.cat(parts, -1), nvec=(2, 4, 3))
        for parts in (logits, others)
    )
    ones = [CategoricalDistribution(logits=part) for part in logits]
    rest = [CategoricalDistribution(logits=part) for part in others]
    action = torch.stack([dist.sample() for dist in ones], -1)
    log_prob = sum(dist.log_prob(action[:, k]) for k, dist in enumerate(ones))
    torch.testing.assert_close(one.log_prob(action), log_prob)
    torch.testing.assert_close(entropy(one), sum(dist.entropy() for dist in ones))
    torch.testing.assert_close(one.entropy(), sum(dist.entropy() for dist in ones))
    divergence = sum(kl_of_torch(p, q) for p, q in zip(ones, rest, strict=True))
    torch.testing.assert_close(kl_divergence(one, other), divergence)
    tangent = torch.randn(6, 3, 4, dtype=torch.float64)
    (product,) = fisher_product(one, [tangent])
    for k, dist in enumerate(ones):
        n = dist.logits.shape[-1]
        (expected,) = fisher_product(dist, [tangent[:, k, :n]])
        torch.testing.assert_close(product[:, k, :n], expected)
        assert (product[:, k, n:] == 0).all()


def test_gradients_of_padded_and_forbidden_choices_are_zero():
    """Choices of probability zero leave no NaN in the gradient of divergence and entropy."""
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1, 0, 1, 1, 0])
    old = MultiCategoricalDistribution(torch.randn(6, 5).double(), nvec=(2, 3), mask=mask)
    new = MultiCategoricalDistribution(logits, nvec=(2, 3), mask=mask)
    (kl_divergence(old, new) + entropy(new)).sum().backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, [1, 4]] == 0).all()
    assert (logits.grad[:, [2, 3]] != 0).all()
    assert (new.sample((50,))[..., 0] == 0).all()
    assert (new.mode[..., 1] != 2).all()


def test_masks_of_numbers_forbid():
    """No action whose entry of the mask is zero is ever drawn."""
    for kind in ("mask of integers", "one-hot, mask of bytes", "multi-discrete, mask of integers"):
        env, _ = KINDS[kind]
        actor = make_actor(env)
        batch = env.rollout(20, actor)
        dist = actor.get_dist(batch)
        base = dist.base_dist if kind.startswith("multi") else dist
        probs = base.probs
        if kind.startswith("multi"):
            probs = torch.cat([probs[..., 0, :2], probs[..., 1, :]], -1)
        mask = batch["agents", "action_mask"].bool()
        assert not mask.all()
        assert torch.equal(probs > 0, mask)


def test_a_mask_in_a_dict_of_observations_masks_and_is_not_observed():
    """The entries beside it are the observation, and it forbids actions."""
    env, _ = KINDS["mask beside a nested observation"]
    actor = make_actor(env)
    assert actor.module[0].in_keys == [("agents", "observation", "observation")]
    assert type(actor.get_dist(env.reset())) is MaskedCategorical
    assert make_critic(env).in_keys == [("agents", "observation", "observation")]


def test_encodings():
    """Bytes are divided by 255, categories become one-hot vectors, all else is cast."""
    env, _ = KINDS["dict of both"]
    actor = make_actor(env, num_cells=(8,))
    (encoder,) = actor.module[0].module.encoders
    image = torch.randint(256, (5, N, 3, 9, 7), dtype=torch.uint8)
    speed, category = torch.randn(5, N, 2), torch.randint(3, (5, N))
    entries = {"image": image, "speed": speed, "kind": category}
    order = [entry.key[-1] for entry in encoder.entries]
    vectors = encoder(*(entries[name] for name in order))
    index = str(order.index("image"))
    expected = {
        "image": encoder.convolutions[index](image.float() / 255),
        "speed": speed,
        "kind": nn.functional.one_hot(category, 3).float(),
    }
    torch.testing.assert_close(vectors, torch.cat([expected[name] for name in order], -1))
    env, _ = KINDS["several categories"]
    (encoder,) = make_actor(env).module[0].module.encoders
    pairs = torch.tensor([[0, 3], [1, 0]])
    assert encoder(pairs).tolist() == [[1, 0, 0, 0, 0, 1], [0, 1, 1, 0, 0, 0]]
    env, _ = KINDS["booleans"]
    (encoder,) = make_actor(env).module[0].module.encoders
    assert encoder(torch.tensor([[True, False, True, True]])).tolist() == [[1, 0, 1, 1]]


def test_convolutions_of_each_agent_are_its_own_or_shared():
    """Only agents that share parameters share the convolutions; weights are orthogonal."""
    env, _ = KINDS["image of bytes"]
    for share_params in (False, True):
        actor = make_actor(env, share_params=share_params)
        (net,) = actor.module[0].module.encoders[0].convolutions.values()
        weight = next(each for each in net.parameters() if each.ndim >= 4)
        stack = weight if weight.ndim == 5 else weight.unsqueeze(0)
        assert len(stack) == (1 if share_params else N)
        for filters in stack.flatten(2):
            gram = (
                filters.T @ filters if filters.shape[0] > filters.shape[1] else filters @ filters.T
            )
            assert (gram - torch.eye(len(gram)) * (5 / 3) ** 2).abs().max() < 1e-4


def test_a_plain_vector_needs_no_encoder():
    """The network of a vector is TorchRL's own, and its group says its key and size."""
    env = agents(CHOICE)
    assert type(make_actor(env).module[0].module).__name__ == "MultiAgentMLP"
    (group,) = read_groups(env, "observation")
    assert (group.observation, group.n_inputs) == (("agents", "observation"), 4)
    (group,) = read_groups(KINDS["dict of both"][0], "observation")
    with pytest.raises(ValueError, match=r"'agents' observe .*'image'.*one vector"):
        _ = group.observation


def test_a_state_of_categories_or_an_image():
    """The global state is encoded as an observation is."""
    for state in (Categorical(4, shape=(1,)), Unbounded((3, 5, 5)), Unbounded((2, 3))):
        env = SpecEnv(
            Composite(state=state, agents=Composite(observation=vector(), shape=(N,))),
            Composite(agents=Composite(action=CHOICE, shape=(N,))),
            (5,),
        )
        for input, shape in (("state", (5, 1)), ("agent_specific", (5, N, 1))):
            critic = make_critic(env, input=input, num_cells=(8,))
            assert critic(env.reset())["state_value"].shape == shape


FLATTEN = FlattenObservation(-2, -1, in_keys=[("agents", "observation")])
MATRIX = team(Unbounded((3, 2)), Unbounded((3, 4, 4)))
DOUBLE = team(Unbounded((3, 2)), Unbounded((3, 4), dtype=torch.float64))
NESTED = agents(CHOICE, board(observation=vector(), rest=vector(3)))
MASKED = agents(CHOICE, action_mask=Binary(5, (N, 5), dtype=torch.bool))


@pytest.mark.parametrize(
    ("call", "error", "message", "mended"),
    [
        (
            lambda: make_actor(MATRIX),
            ValueError,
            r"'observation'\) has shape \(4, 4\).*\[C, H, W\].*FlattenObservation",
            lambda: make_actor(TransformedEnv(MATRIX, FLATTEN)),
        ),
        (
            lambda: make_critic(DOUBLE),
            ValueError,
            "'observation'.*float64.*DoubleToFloat",
            lambda: make_critic(TransformedEnv(DOUBLE, DoubleToFloat())),
        ),
        (
            lambda: make_actor(NESTED, observation_key="obs"),
            KeyError,
            r"\('agents', 'obs'\); choose among .*\('observation', 'rest'\)",
            lambda: make_actor(NESTED, observation_key=("observation", "rest")),
        ),
        (
            lambda: make_actor(NESTED, observation_key=[]),
            TypeError,
            "observation_key must be the name",
            lambda: make_actor(NESTED, observation_key=[("observation", "rest")]),
        ),
        (
            lambda: make_actor(MASKED),
            ValueError,
            r"The mask \('agents', 'action_mask'\) has 5 .*3 choices.*'action'",
            lambda: make_actor(MASKED, mask_key=None),
        ),
        (
            lambda: make_actor(
                agents(torch.stack([MultiCategorical([2, 3]), MultiCategorical([3, 2])]))
            ),
            ValueError,
            "unlike action spaces under .*ONE_GROUP_PER_AGENT",
            lambda: make_actor(agents(PAIR)),
        ),
        (
            lambda: make_actor(agents(MultiOneHot([2, 3]).expand(N, 5))),
            ValueError,
            "'action'.*MultiOneHot.*multi-categorical",
            lambda: make_actor(agents(PAIR)),
        ),
    ],
    ids=["matrix", "double", "key", "keys", "mask", "unlike", "multi-one-hot"],
)
def test_refusals_name_the_entry_and_a_cure_that_works(call, error, message, mended):
    """What no network can read is refused about the right entry; the mended call builds."""
    with pytest.raises(error, match=message):
        call()
    mended()


def test_nothing_else_is_written():
    """An actor adds parameters, action and log-probability to the data, and nothing more."""
    env, kwargs = KINDS["dict of both"]
    data = env.reset()
    before = set(data.keys(True, True))
    actor = make_actor(env, **kwargs)
    written = set(actor(data).keys(True, True)) - before
    assert written == {("agents", name) for name in ("logits", "action", "action_log_prob")}
    assert isinstance(data, TensorDict)
