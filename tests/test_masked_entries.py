"""What a mask leaves out has no influence: change everything there, and nothing moves, bit for bit.

Neither parameters nor optimisers, statistics of values, divergences, factors or any other metric.
A new kind of team is one line.
"""

from __future__ import annotations

import copy
from functools import cache, partial

import pytest
import team
import torch
from newer import PopArtValueNorm, tensors
from team import team_batch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torchrl.collectors import Collector
from torchrl.envs import Compose, InitTracker, StepCounter, TransformedEnv, VmasEnv
from torchrl.modules import IndependentNormal, ProbabilisticActor

from torchrl_happo import (
    HAPPOLoss,
    HATRPOLoss,
    SequentialUpdater,
    TeamReward,
    joint_policy,
    make_actor,
    make_critic,
    memory_transforms,
)

ENVS, STEPS, EPISODE = 4, 10, 5
GROUPS = {"adversary": 3, "agent": 1}
LOSSES = [partial(HAPPOLoss, entropy_coeff=0.01), HATRPOLoss]
TEAMS = {
    "feed-forward": {},
    "values for each agent": {"input": "agent_specific"},
    "own values": {"input": "own"},
    "discrete": {"continuous_actions": False},
    "memory": {"memory": "gru"},
    "memory of the critic": {"critic_memory": "lstm"},
    "memory of each": {"memory": "lstm", "critic_memory": "gru", "input": "own"},
    "block": {"share_params": True},
}


@cache  # to make and to roll out the environments takes longer than an update
def built(loss_index, team_name):
    """Return what :func:`made` returns for a loss and a team, and the random state after it."""
    return made(LOSSES[loss_index], **TEAMS[team_name]), torch.get_rng_state()


def build(loss_class, team="feed-forward"):
    """An updater for a team, and one batch of theirs, as made for this test alone."""
    (updater, batch), state = built(LOSSES.index(loss_class), team)
    torch.set_rng_state(state)
    return copy.deepcopy(updater), batch.clone()


def made(
    loss_class,
    *,
    input="observations",
    memory=None,
    critic_memory=None,
    share_params=False,
    continuous_actions=True,
):
    """An updater for predators and prey as one team, and one batch of theirs."""
    torch.manual_seed(0)
    env = VmasEnv(
        "simple_tag", num_envs=ENVS, seed=0, max_steps=None, continuous_actions=continuous_actions
    )
    actors = make_actor(
        env, num_cells=(8,), recurrent=memory, hidden_size=4, share_params=share_params
    )
    critic = make_critic(env, input=input, num_cells=(8,), recurrent=critic_memory, hidden_size=4)
    transforms = memory_transforms(joint_policy(actors)) or [InitTracker()]
    env = TransformedEnv(env, Compose(StepCounter(EPISODE), TeamReward("mean"), *transforms))
    loss = loss_class(
        actors,
        critic,
        value_norm=PopArtValueNorm(shape=1),
        popart=True,
        clip_value=0.2,
        blocks=list(actors) if share_params else (),
    )
    updater = SequentialUpdater(loss, num_epochs=2, minibatch_size=11, max_grad_norm=0.5)
    collector = Collector(env, joint_policy(actors), frames_per_batch=ENVS * STEPS)
    return updater, next(iter(collector))


def deaths(batch):
    """When the agents are there: each is born and dies at some step of its episode, or later."""
    step = batch["step_count"]
    for group, n_agents in GROUPS.items():
        born = torch.randint(0, 2, (ENVS, 1, n_agents))
        dies = torch.randint(2, EPISODE + 2, (ENVS, 1, n_agents))
        batch[group, "active"] = (step >= born) & (step < dies)
        batch["next", group, "active"] = (step + 1 >= born) & (step + 1 < dies)
    return batch


def at_random(data, masked, keep=("active",)):
    """Other numbers, of the same type, wherever ``masked`` says so."""

    def change(name, value):
        if name in keep:
            return value
        gap = masked.reshape(*masked.shape, *(1,) * (value.ndim - masked.ndim))
        if value.dtype == torch.bool:
            other = torch.rand(value.shape) > 0.5
        elif not value.is_floating_point():
            other = torch.randint_like(value, 0, 3)
        else:
            other = 0.5 * torch.rand_like(value)  # within the bounds of the actions
            if name == "scale":
                other += 0.1
        return torch.where(gap, other, value)

    return TensorDict({name: change(name, value) for name, value in data.items()}, data.batch_size)


def with_other_dead(batch):
    """The same batch with everything changed that agents say or hear while they are not active."""
    other = batch.clone()
    for group in GROUPS:
        for place in ((group,), ("next", group)):
            other[place] = at_random(batch[place], ~batch[(*place, "active")])
    return other


def update(updater, batch):
    """What an update leaves: the whole state, and the metrics."""
    torch.manual_seed(1)  # of entropies without a closed form
    metrics = updater(batch)
    assert all(value.isfinite() for value in metrics.values(True, True))
    return updater.state_dict(), metrics.to_dict()


def assert_same(one, other):
    """Equal bit for bit."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("loss_class", LOSSES, ids=["happo", "hatrpo"])
@pytest.mark.parametrize("team", list(TEAMS))
def test_agents_that_are_not_there(team, loss_class):
    """Observations, actions, log-probs and next observations of those dead or not yet born.

    With memory of its own an agent remembers what it saw before it was born; so here it is born
    with the episode.
    """
    updater, batch = build(loss_class, team)
    batch = deaths(batch)
    if TEAMS[team].get("memory") is not None:
        for group in GROUPS:
            born = batch["step_count"] < 2
            batch[group, "active"] |= born
            batch["next", group, "active"] |= born
    twin = copy.deepcopy(updater)
    other = with_other_dead(batch)
    assert (batch != other).any()
    assert_same(update(updater, batch), update(twin, other))


@pytest.mark.parametrize("loss_class", LOSSES, ids=["happo", "hatrpo"])
@pytest.mark.parametrize("team", list(TEAMS))
@pytest.mark.parametrize("mask", [("collector", "mask"), "shifted_valid"], ids=str)
def test_steps_that_are_padding(mask, team, loss_class):
    """Everything behind the last step of a trajectory, done or cut: rewards, flags, the critic's.

    ``shifted_valid`` comes from TorchRL's estimators, so here an advantage comes with it.
    """
    updater, batch = build(loss_class, team)
    counts = torch.arange(STEPS).expand(ENVS, -1) < torch.tensor([[5], [7], [10], [3]])
    batch = batch.exclude("collector")
    if mask == "shifted_valid":
        data = team_batch(updater.loss, batch)
        for key in ("advantage", "value_target", "state_value"):
            batch[key] = data.critic_batches["critic"][key]
    twin = copy.deepcopy(updater)
    other = at_random(batch.exclude(*GROUPS, "next"), ~counts, keep=("is_init",))
    for group in GROUPS:
        other[group] = at_random(batch[group], ~counts)
    other["next"] = at_random(batch["next"].exclude(*GROUPS), ~counts)
    for group in GROUPS:
        other["next", group] = at_random(batch["next", group], ~counts)
    for data in (batch, other):
        data[mask] = counts
    assert (batch != other).any()
    assert_same(update(updater, batch), update(twin, other))


@pytest.mark.parametrize("loss_class", LOSSES, ids=["happo", "hatrpo"])
@pytest.mark.parametrize("blocks", [(), ("agents",)], ids=["agents", "block"])
@pytest.mark.parametrize("own", [False, True], ids=["joint advantage", "own advantages"])
@pytest.mark.parametrize("inactive", [False, True], ids=["all active", "some inactive"])
def test_a_mask_is_as_good_as_leaving_out(inactive, own, blocks, loss_class):
    """Where some steps do not count, the update is that of a batch of the others alone.

    Gradient descent sees the scale of a loss, on which Adam would not depend.
    """
    actor = team.make_actor(distribution=IndependentNormal).double()
    critic, batch = team.make_critic().double(), team.make_batch(actor)
    n_agents, counts = team.N_AGENTS, torch.rand(batch.shape) < 0.6
    shape = (*batch.shape, n_agents, 1) if own else (*batch.shape, 1)
    batch["advantage"] = torch.randn(shape).double() + 1
    for key in ("value_target", ("agents", "state_value")):
        batch[key] = torch.randn(*batch.shape, n_agents, 1).double()
    if inactive:
        batch["agents", "active"] = torch.rand(*batch.shape, n_agents) < 0.7
    masked = batch.clone()
    masked["collector", "mask"] = counts
    ends = []
    for data in (masked, batch[counts]):
        loss = loss_class(*copy.deepcopy((actor, critic)), blocks=blocks)
        updater = SequentialUpdater(
            loss, optimizer=partial(torch.optim.SGD, lr=0.1), order="fixed", num_epochs=2
        )
        metrics = updater(data).flatten_keys(".")
        # The factor is one at steps that do not count, which its own metrics are over, too.
        of_the_factor = [key for key in metrics.keys() if ".factor_" in key]
        ends.append((metrics.exclude(*of_the_factor).to_dict(), tensors(loss)))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


def test_padding_behind_a_cut_trajectory():
    """A trajectory that the end of the batch cuts has the advantages it has without padding."""
    updater, batch = build(LOSSES[0])
    whole = team_batch(updater.loss, batch[:, :7]).critic_batches["critic"]
    counts = torch.arange(STEPS).expand(ENVS, -1) < 7
    assert not batch["next", "done"][:, 6].any()
    batch["collector", "mask"] = counts
    padded = team_batch(updater.loss, batch).critic_batches["critic"][:, :7]
    for key in ("advantage", "value_target", "state_value"):
        torch.testing.assert_close(padded[key], whole[key])


@pytest.mark.parametrize("loss_class", LOSSES, ids=["happo", "hatrpo"])
@pytest.mark.parametrize("team", list(TEAMS))
def test_no_minibatch_is_without_a_valid_entry(team, loss_class):
    """Items in which nothing counts are not drawn: neither momentum nor NaN comes of them.

    Two steps count, in two episodes of one row: whatever else there is would fill minibatches of
    its own. Chunks are of five steps.
    """
    updater, batch = build(loss_class, team)
    counts = torch.zeros(ENVS, STEPS, dtype=torch.bool)
    counts[0, 1] = counts[0, 7] = True
    batch["collector", "mask"] = counts
    updater.sequence_length = 5 if "memory" in team else None
    move, drawn = updater._move, []

    def spy(name, data, transaction, *radius):
        drawn.append(len(data))
        return move(name, data, transaction, *radius)

    updater._move = spy
    update(updater, batch)
    assert drawn == [2] * (len(updater.loss.agents) + 1)


def test_nothing_counts():
    """A batch of padding changes no parameter, no optimiser and no statistic."""
    updater, batch = build(LOSSES[0])
    update(updater, batch)
    before = copy.deepcopy(updater.state_dict())
    batch["collector", "mask"] = torch.zeros(ENVS, STEPS, dtype=torch.bool)
    updater(batch)
    for part in ("loss", "steps"):
        assert_same(updater.state_dict()[part], before[part])


def with_own_rewards(there, there_next, change):
    """A team in which agent 0 is ``there`` at some steps, and what one agent is paid at one."""
    actor, critic = team.make_actor(), team.make_critic()
    loss = HAPPOLoss(actor, critic)
    loss.set_keys(reward=("agents", "reward"))
    batch = team.make_batch(actor)
    shape, n_agents = batch.shape, team.N_AGENTS
    for place, mask in (((), there), (("next",), there_next)):
        active = torch.ones(*shape, n_agents, dtype=torch.bool)
        active[..., 0] = torch.tensor(mask)
        batch[(*place, "agents", "active")] = active
    reward = batch["next", "reward"].unsqueeze(-2).expand(*shape, n_agents, 1).clone()
    reward[:, 2, 0] = change(reward[:, 2, 0])
    batch["next", "agents", "reward"] = reward
    return SequentialUpdater(loss, num_epochs=1), batch.exclude(("next", "reward"))


BORN = [False, False, False, True, True, True], [False, False, True, True, True, True]
DIES = [True, True, True, False, False, False], [True, True, False, False, False, False]


@pytest.mark.parametrize("change", [lambda r: r - 10, lambda r: r * torch.nan], ids=["less", "nan"])
def test_a_reward_belongs_to_the_step_of_the_action(change):
    """What an agent is paid at its last step counts, though it is dead when it is paid.

    What is written for one that comes in at the next step does not.
    """
    updater, batch = with_own_rewards(*BORN, change)
    assert updater(batch)["critic", "loss"].isfinite()
    updater, batch = with_own_rewards(*DIES, change)
    with pytest.raises(ValueError, match=r"rewards .* differ|NaN or infinite"):
        updater(batch)


@pytest.mark.parametrize("loss_class", LOSSES, ids=["happo", "hatrpo"])
@pytest.mark.parametrize("masks", ["block", "chunks"])
def test_a_ratio_that_overflows_where_nobody_acts(masks, loss_class):
    """Behind a mask a ratio may be infinite, and the gradient is what it would be without it."""
    actor = team.make_actor(distribution=IndependentNormal)
    critic, batch = team.make_critic(), team.make_batch(actor)
    active = torch.rand(*batch.shape, team.N_AGENTS) < 0.6
    batch["agents", "active"] = active
    ends = []
    for change in (0.0, -200.0):
        own = copy.deepcopy((actor, critic))
        loss = loss_class(*own, blocks=["agents"] if masks == "block" else ())
        updater = SequentialUpdater(
            loss, num_epochs=1, sequence_length=3 if masks == "chunks" else None
        )
        data = batch.clone()
        log_prob = data["agents", "action_log_prob"]
        data["agents", "action_log_prob"] = torch.where(active, log_prob, log_prob + change)
        ends.append(update(updater, data))
    assert_same(*ends)


def lone_agent(group):
    """A team of one, in a group or without one, and a critic of the team; it acts at times."""
    torch.manual_seed(0)
    place = () if group is None else (group,)
    size = () if group is None else (1,)
    observation = (*place, "observation")
    net = torch.nn.Linear(5, 4)
    keys = [(*place, name) for name in ("loc", "scale")]
    actor = ProbabilisticActor(
        TensorDictModule(
            torch.nn.Sequential(net, NormalParamExtractor()), in_keys=[observation], out_keys=keys
        ),
        in_keys=keys,
        out_keys=[(*place, "action")],
        distribution_class=IndependentNormal,
        return_log_prob=True,
    )
    value = torch.nn.Linear(5, 1)
    value = value if group is None else torch.nn.Sequential(torch.nn.Flatten(-2), value)
    critic = TensorDictModule(value, in_keys=[observation], out_keys=["state_value"])
    batch = team.make_observations(n_agents=1).exclude("agents", ("next", "agents"))
    batch[observation] = torch.randn(*batch.shape, *size, 5)
    batch[("next", *observation)] = torch.randn(*batch.shape, *size, 5)
    with torch.no_grad():
        batch = actor(batch)
    active = torch.rand(*batch.shape, 1) < 0.6
    batch[(*place, "active")] = active
    return HAPPOLoss(actor, critic), batch, active, observation


@pytest.mark.parametrize("group", ["agents", None])
def test_a_team_of_one(group):
    """Its value counts where its agent acts: in the loss, in its weight and in the statistics."""
    loss, batch, active, observation = lone_agent(group)
    data = team_batch(loss, batch)
    returns = data.batch["value_target"][active]
    assert torch.equal(data.valid_returns("critic"), returns.unsqueeze(-1))
    view = data.critic_data("critic")
    assert loss.critics["critic"].weight(view) == len(returns) == len(view)
    values = loss.critic_network(data.critic_batches["critic"].copy())["state_value"][active]
    wanted = torch.nn.functional.smooth_l1_loss(values, returns)
    torch.testing.assert_close(loss.critics["critic"].objective(view), wanted)
    gap = ~active if group is None else ~active.unsqueeze(-1)
    batch[observation] = batch[observation].masked_fill(gap, torch.nan)
    metrics = SequentialUpdater(loss, num_epochs=1)(batch)
    assert all(value.isfinite() for value in metrics.values(True, True))
