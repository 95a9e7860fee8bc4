"""Who is an agent, and what agents share: frozen parts, blocks, groups, settings of each."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from newer import tensors
from team import make_actor, make_batch, make_critic, make_observations
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MultiAgentMLP, ProbabilisticActor

from torchrl_happo import ActorList, HAPPOLoss, HATRPOLoss, SequentialUpdater

BOTH = pytest.mark.parametrize("loss_class", [HAPPOLoss, HATRPOLoss])
SGD = partial(torch.optim.SGD, lr=0.1)


def actor_of(net, group="agents", further=()):
    group = group if isinstance(group, tuple) else (group,)
    keys = [(*group, "logits")]
    return ProbabilisticActor(
        TensorDictModule(net, in_keys=[(*group, "observation"), *further], out_keys=keys),
        in_keys=keys,
        out_keys=[(*group, "action")],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )


def heads(n_in=8):
    return MultiAgentMLP(n_in, 3, 3, centralized=False, share_params=False, num_cells=[8])


def collected(actor, **kwargs):
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        return actor(make_observations(**kwargs))


def teams_over(encoder):
    """Joint actor and critic that look through one encoder."""
    return {
        "stack": lambda: (actor_of(nn.Sequential(encoder, heads())), make_critic()),
        "list": lambda: (
            ActorList([actor_of(nn.Sequential(encoder, nn.Linear(8, 3))) for _ in range(3)]),
            make_critic(),
        ),
        "actor and critic": lambda: (
            ActorList([actor_of(nn.Sequential(encoder, nn.Linear(8, 3))) for _ in range(3)]),
            TensorDictModule(
                nn.Sequential(encoder, nn.Flatten(-2), nn.Linear(24, 1)),
                in_keys=[("agents", "observation")],
                out_keys=["state_value"],
            ),
        ),
    }


@pytest.mark.parametrize("kind", teams_over(None))
@BOTH
def test_a_frozen_encoder_is_shared_until_it_is_unfrozen(kind, loss_class):
    """The heads are trained, the encoder stays; unfrozen, it is refused and nothing moves."""
    torch.manual_seed(0)
    encoder = nn.Linear(5, 8).requires_grad_(False)
    actor, critic = teams_over(encoder)[kind]()
    loss = loss_class(actor, critic)
    updater, batch = SequentialUpdater(loss, num_epochs=1, optimizer=SGD), collected(actor)
    weights, before = encoder.weight.clone(), copy.deepcopy(tensors(loss))
    updater(batch)
    assert torch.equal(encoder.weight, weights)
    for agent in loss.agents:
        assert agent.parameters()
    after = copy.deepcopy(tensors(loss))
    assert any(not torch.equal(before[name], after[name]) for name in after)
    encoder.requires_grad_(True)
    state = copy.deepcopy(updater.state_dict()["steps"])
    with pytest.raises(ValueError, match=r"share the parameter|no longer frozen"):
        updater(batch)
    assert all(torch.equal(value, after[name]) for name, value in tensors(loss).items())
    assert str(updater.state_dict()["steps"]) == str(state)
    encoder.requires_grad_(False)  # the cure
    updater(batch)


def listed():
    return ActorList([actor_of(nn.Linear(5, 3)) for _ in range(3)])


@pytest.mark.parametrize("build", [lambda: make_actor(depth=1), listed], ids=["stack", "list"])
@BOTH
def test_a_frozen_agent_stays_and_the_others_move(build, loss_class):
    """Its ratio is 1, so that the factor of the agents after it is as without it."""
    torch.manual_seed(0)
    actor = build()
    loss = loss_class(actor, make_critic())
    loss.agents[1].actor.requires_grad_(False)
    updater = SequentialUpdater(loss, num_epochs=2, optimizer=SGD, order="fixed")
    before = [[p.detach().clone() for p in agent.parameters()] for agent in loss.agents]
    batch = make_batch(actor)
    metrics = updater(batch)
    same = [
        all(map(torch.equal, own, agent.parameters()))
        for own, agent in zip(before, loss.agents, strict=True)
    ]
    assert same == [False, True, False]
    assert metrics["agents_1", "ratio_mean"] == 1
    assert torch.equal(metrics["agents_2", "factor_mean"], metrics["agents_1", "factor_mean"])
    assert metrics["agents_1", "factor_mean"] != 1
    loss.agents[1].actor.requires_grad_(True)
    updater(batch)
    assert not all(map(torch.equal, before[1], loss.agents[1].parameters()))


def test_a_team_of_frozen_agents_alone_is_refused():
    """Somebody must be trained."""
    actor = make_actor().requires_grad_(False)
    with pytest.raises(ValueError, match="nor has that of any other agent; unfreeze"):
        SequentialUpdater(HAPPOLoss(actor, make_critic()))


class Attention(nn.Module):
    """A network of all agents that mixes them."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, observation):
        seen = self.encode(observation)
        weights = (seen @ seen.transpose(-1, -2)).softmax(-1)
        return self.decode(seen + weights @ seen)


BLOCKS = {
    "attention": Attention,
    "plain network": lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)),
    "shared stack": lambda: MultiAgentMLP(
        5, 3, 3, centralized=False, share_params=True, num_cells=[8]
    ),
}


@pytest.mark.parametrize("kind", BLOCKS)
@BOTH
def test_blocks_of_any_network(kind, loss_class):
    """All members move by one step, and the ratio at the start is that of the joint actor: 1."""
    torch.manual_seed(0)
    actor = actor_of(BLOCKS[kind]())
    loss = loss_class(actor, make_critic(), blocks=["agents"])
    updater, batch = SequentialUpdater(loss, num_epochs=1, optimizer=SGD), collected(actor)
    before = [p.detach().clone() for p in actor.parameters()]
    metrics = updater(batch)
    assert set(metrics.keys()) == {"agents", "critic"}
    assert metrics["agents", "kl"] > 0
    assert metrics["agents", "factor_mean"] == 1
    assert not any(map(torch.equal, before, actor.parameters()))
    assert loss.num_agents in (1, 3)


def of_side(kind, group):
    """The actors of three agents."""
    if kind == "stack":
        return actor_of(heads(5), group)
    return ActorList([actor_of(nn.Linear(5, 3), group) for _ in range(3)])


@pytest.mark.parametrize("kind", ["stack", "list"])
@BOTH
def test_groups_two_levels_deep(kind, loss_class):
    """Keys of any depth: the numbers equal a team's whose groups lie at the root."""
    outcomes = []
    for deep in (False, True):
        torch.manual_seed(0)
        groups = [("team", side) if deep else (side,) for side in ("left", "right")]
        actors = {
            side: of_side(kind, group)
            for side, group in zip(("left", "right"), groups, strict=True)
        }
        data = TensorDict({"advantage": torch.randn(40, 1)}, [40])
        for group in groups:
            data[group] = TensorDict({"observation": torch.randn(40, 3, 5)}, [40, 3])
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            for actor in actors.values():
                data = actor(data)
        settings = {"entropy_coeff": 0.0} if loss_class is HAPPOLoss else {}
        loss = loss_class(actors, **settings)
        metrics = SequentialUpdater(loss, num_epochs=2, optimizer=SGD, order="fixed")(data)
        assert [agent.name for agent in loss.agents] == [
            f"{side}_{i}" for side in ("left", "right") for i in range(3)
        ]
        outcomes.append({name: metrics[name, "kl"].item() for name in metrics.keys()})
    assert outcomes[0] == outcomes[1]
    assert min(outcomes[0].values()) > 0


# -- settings of one agent -------------------------------------------------------------------------


def updated(loss, **settings):
    """Return what an update with a batch of its own makes of a loss."""
    torch.manual_seed(1)
    updater = SequentialUpdater(loss, **{"num_epochs": 3, "optimizer": SGD, **settings})
    metrics = updater(make_batch(loss.actor_network))
    return metrics, tensors(loss)


def fresh(loss_class=HAPPOLoss, **kwargs):
    torch.manual_seed(0)
    return loss_class(make_actor(), make_critic(), **kwargs)


def test_settings_by_agent():
    """Optimiser, epochs, minibatches and radius of one agent leave the others' alone."""
    still = partial(torch.optim.SGD, lr=0.0)
    metrics, _ = updated(
        fresh(),
        optimizer={"agents": SGD, "agents_1": still},
        num_epochs={"agents": 3, "agents_2": 1},
        minibatch_size={"agents": 8, "agents_0": None},
        critic_optimizer=SGD,
        critic_epochs=2,
        critic_minibatch_size=8,
    )
    assert [metrics[f"agents_{i}", "epochs"].item() for i in range(3)] == [3, 3, 1]
    assert metrics["agents_1", "kl"].item() == pytest.approx(0, abs=1e-6)
    assert metrics["agents_2", "kl"] > 1e-6
    metrics, _ = updated(fresh(HATRPOLoss, max_kl={"agents": 1e-3, "agents_1": 1e-6}))
    assert metrics["agents_1", "kl"] <= 1e-6 < metrics["agents_0", "kl"] <= 1e-3


@pytest.mark.parametrize(
    "values",
    [
        {"agents": 0.1},
        {"agents_0": 0.1, "agents_1": 0.1, "agents_2": 0.1},
        {"agents": 0.5, "agents_0": 0.1, "agents_1": (0.1, 0.1), "agents_2": 0.1},
    ],
)
def test_clipping_ranges_that_are_all_equal_are_one(values):
    """Bit for bit, in the updater and in forward."""
    results = []
    for clip_epsilon in (0.1, values):
        loss = fresh(clip_epsilon=clip_epsilon)
        metrics, state = updated(loss)
        batch = make_batch(loss.actor_network)
        state = {name: v for name, v in state.items() if "clip" not in name}
        results.append((metrics, state, loss(batch.clone())))
    (one, state, whole), (other, others, same) = results
    assert all(torch.equal(value, others[name]) for name, value in state.items())
    assert (one == other).all()
    assert (whole == same).all()


def test_a_clipping_range_of_ones_own():
    """Agent 1 is clipped at once, the others as before; forward clips each by its own."""
    loss = fresh(clip_epsilon={"agents": 0.2, "agents_1": 1e-6}, entropy_coeff=0.0)
    metrics, _ = updated(loss, num_epochs=5, order="fixed")
    plain, _ = updated(fresh(clip_epsilon=0.2, entropy_coeff=0.0), num_epochs=5, order="fixed")
    assert torch.equal(metrics["agents_0", "kl"], plain["agents_0", "kl"])
    assert metrics["agents_1", "kl"] < plain["agents_1", "kl"]
    assert metrics["agents_1", "clip_fraction"] > 0.9 > plain["agents_1", "clip_fraction"]
    batch = make_batch(make_actor())  # of another policy, so that ratios differ from 1
    batch["advantage"], batch["value_target"] = torch.randn(4, 6, 1), torch.zeros(4, 6, 3, 1)
    parts = [loss.agent_loss(a, loss.agent_data(a, batch)) for a in loss.agents]
    torch.testing.assert_close(loss(batch.clone())["loss_objective"], sum(parts) / 3)


def test_a_clipping_range_of_one_agent_may_be_set_anew():
    """As a schedule does; and it is part of the state."""
    loss = fresh(clip_epsilon={"agents": 0.2})
    loss.clip_epsilon = {"agents": 0.3, "agents_2": (0.1, 0.4)}
    assert loss.clip_epsilon_low.tolist() == pytest.approx([0.3, 0.3, 0.1])
    assert loss.clip_epsilon_high.tolist() == pytest.approx([0.3, 0.3, 0.4])
    other = fresh(clip_epsilon={"agents": 0.2})
    other.load_state_dict(loss.state_dict())
    assert other.clip_epsilon_high.tolist() == pytest.approx([0.3, 0.3, 0.4])
    loss.clip_epsilon = 0.15
    assert loss.clip_epsilon_low.tolist() == pytest.approx([0.15] * 3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"agents_0": 0.1}, "clip_epsilon has values for .*name each agent, or its group"),
        ({"agents": 0.1, "agents_7": 0.1}, "clip_epsilon has values for .*'agents_7'"),
        ({"agents": 1.5}, "between 0 and 1, got 1.5"),
    ],
)
def test_clipping_ranges_of_nobody_are_refused(values, words):
    """When the loss is built, and when they are set anew."""
    with pytest.raises(ValueError, match=words):
        fresh(clip_epsilon=values)
    loss = fresh(clip_epsilon={"agents": 0.2})
    with pytest.raises(ValueError, match=words):
        loss.clip_epsilon = values
    assert loss.clip_epsilon_low.tolist() == pytest.approx([0.2] * 3)
    with pytest.raises(ValueError, match="was not built for clip_epsilon"):
        fresh().clip_epsilon = {"agents": 0.1}
    with pytest.raises(ValueError, match="which is a mapping; give the critic a number"):
        fresh(clip_epsilon={"agents": 0.1}, clip_value=True)


def grid(nested, keys):
    """Two agents who share a network, in a batch whose group has the agents in its size or not."""
    actor = actor_of(Reading(7, 3), further=keys)
    size = [4, 5, 2] if nested else [4, 5]
    agents = TensorDict({"observation": torch.randn(4, 5, 2, 7)}, size)
    begins = torch.zeros(4, 5, 1, dtype=torch.bool)
    batch = TensorDict({"agents": agents, "is_init": begins}, [4, 5])
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        batch = actor(batch)
    batch["advantage"] = torch.randn(4, 5, 1)
    return actor, batch


class Reading(nn.Linear):
    """A layer that is told where episodes begin."""

    def forward(self, seen, begins=None):
        return super().forward(seen)


@pytest.mark.parametrize("keys", [[], ["is_init"]])
@pytest.mark.parametrize("nested", [True, False])
def test_a_network_that_agents_share_is_no_single_agent(nested, keys):
    """Without blocks it is refused, whether or not the group's batch size has the agents."""
    actor, batch = grid(nested, keys)
    updater = SequentialUpdater(HAPPOLoss(actor, None, entropy_coeff=0.0), num_epochs=1)
    with pytest.raises(ValueError, match=r"'agents' has 2 agents, but its actor is one network"):
        updater(batch)


def test_a_single_agent_may_have_an_action_of_many_dimensions():
    """Its log-probabilities have a dimension that its observation has not."""
    net = nn.Sequential(nn.Linear(7, 6), nn.Unflatten(-1, (2, 3)))
    actor = actor_of(net, group="robot")
    batch = TensorDict({"robot": TensorDict({"observation": torch.randn(4, 5, 7)}, [4, 5])}, [4, 5])
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        batch = actor(batch)
    assert batch["robot", "action_log_prob"].shape == (4, 5, 2)
    batch["advantage"] = torch.randn(4, 5, 1)
    metrics = SequentialUpdater(HAPPOLoss(actor, None, entropy_coeff=0.0), num_epochs=1)(batch)
    assert metrics["robot", "kl"] > 0


def test_values_of_agents_whose_next_step_has_nothing():
    """A critic that reads the state alone writes into a group that the next step lacks."""
    torch.manual_seed(0)
    actor = make_actor()
    state = nn.Sequential(nn.Linear(4, 3), nn.Unflatten(-1, (3, 1)))
    critic = TensorDictModule(state, in_keys=["state"], out_keys=[("agents", "state_value")])
    batch = make_batch(actor)
    for place in (batch, batch["next"]):
        place["state"] = torch.randn(*batch.shape, 4)
    results = []
    for bare in (False, True):
        loss = HAPPOLoss(copy.deepcopy(actor), copy.deepcopy(critic), entropy_coeff=0.0)
        loss.set_keys(value=("agents", "state_value"))
        own = batch.clone()
        if bare:
            del own["next", "agents"]
        torch.manual_seed(0)
        results.append(SequentialUpdater(loss, num_epochs=1)(own).to_dict())
    torch.testing.assert_close(results[0], results[1])
