"""Teams of unlike agents on real environments: who they are, how they act, that all of them learn.

A new environment is one line of ``TEAMS``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from newer import tensors
from team import same_state
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.collectors import Collector
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import (
    Compose,
    EnvBase,
    MarlGroupMapType,
    PettingZooWrapper,
    StepCounter,
    TransformedEnv,
    VmasEnv,
)
from torchrl.envs.libs.mujoco_playground import KNOWN_MARL_MAPPINGS
from torchrl.modules import OneHotCategorical, ProbabilisticActor, TanhNormal

from torchrl_happo import (
    ActorList,
    HAPPOLoss,
    HATRPOLoss,
    SequentialUpdater,
    TeamReward,
    joint_policy,
    make_actor,
    make_critic,
    memory_transforms,
)
from torchrl_happo.envs import BatchedPettingZooEnv

pytest.importorskip("mpe2")
from mpe2 import simple_speaker_listener_v4

LOSSES = [HAPPOLoss, HATRPOLoss]
STEPS = 8


class PlaygroundStub(EnvBase):
    """The specs of ``MujocoPlaygroundEnv(agent_mapping=...)``, whose groups are single agents.

    Observations and actions of unlike sizes without an agent dimension, the team's reward paid to
    each agent under its own key, ``done`` and ``terminated`` at the root.
    """

    def __init__(self, mapping, num_envs=3):
        super().__init__(batch_size=[num_envs])
        agents = KNOWN_MARL_MAPPINGS[mapping].agents
        spaces = {
            "observation_spec": ("observation", lambda a: Unbounded((len(a.observation_indices),))),
            "action_spec": ("action", lambda a: Bounded(-1.0, 1.0, (len(a.action_indices),))),
            "reward_spec": ("reward", lambda a: Unbounded((1,))),
        }
        for name, (leaf, space) in spaces.items():
            specs = {agent.name: Composite({leaf: space(agent)}) for agent in agents}
            setattr(self, name, Composite(specs).expand(num_envs))

    def _reset(self, tensordict):
        return self.observation_spec.rand().update(self.full_done_spec.zero())

    def _step(self, tensordict):
        effort = sum(agent["action"].square().sum(-1, True) for agent in self._own(tensordict))
        step = self.observation_spec.rand().update(self.full_done_spec.zero())
        return step.update({name: {"reward": -effort} for name in self.reward_spec.keys()})

    def _own(self, tensordict):
        return [tensordict[name] for name in self.action_spec.keys()]

    def _set_seed(self, seed):
        pass


@dataclass
class Team:
    """An environment, and the groups that learn in it as one team.

    ``agents`` maps the names of the agents to the distribution of their actions and the size of
    its sample space: dimensions of a continuous action, or choices.
    """

    env: Callable[[], EnvBase]
    agents: dict[str, tuple[type, int]]
    groups: list[str] = field(default_factory=list)


def vmas(scenario, **kwargs):
    """Three copies of a scenario of VMAS."""
    return VmasEnv(scenario, num_envs=3, seed=0, max_steps=None, **kwargs)


def mpe2(*, batched, continuous):
    """The speaker and the listener of mpe2, one copy by TorchRL's wrapper or three of them."""
    make = simple_speaker_listener_v4.parallel_env
    if batched:
        return BatchedPettingZooEnv(make, num_envs=3, seed=0, continuous_actions=continuous)
    return PettingZooWrapper(make(continuous_actions=continuous), categorical_actions=True)


DISCRETE = {"continuous_actions": False}
ONE_HOT = {**DISCRETE, "categorical_actions": False}
PREDATORS = {f"adversary_{index}": (TanhNormal, 2) for index in range(3)}
TEAMS = {
    "vmas-speaker-listener": Team(
        partial(vmas, "simple_speaker_listener"),
        {"speaker": (TanhNormal, 5), "listener": (TanhNormal, 2)},
    ),
    "vmas-speaker-listener-discrete": Team(
        partial(vmas, "simple_speaker_listener", **DISCRETE),
        {"speaker": (Categorical, 27), "listener": (Categorical, 9)},
    ),
    "vmas-speaker-listener-one-hot": Team(
        partial(vmas, "simple_speaker_listener", **ONE_HOT),
        {"speaker": (OneHotCategorical, 27), "listener": (OneHotCategorical, 9)},
    ),
    "vmas-world-comm": Team(
        partial(vmas, "simple_world_comm"),
        {"lead_adversary": (TanhNormal, 6), **PREDATORS},
        ["lead_adversary", "adversary"],
    ),
    "vmas-world-comm-discrete": Team(
        partial(vmas, "simple_world_comm", **DISCRETE),
        {"lead_adversary": (Categorical, 36), **dict.fromkeys(PREDATORS, (Categorical, 9))},
        ["lead_adversary", "adversary"],
    ),
    "vmas-kinematic-bicycle": Team(
        partial(vmas, "kinematic_bicycle"),
        {"bicycle": (TanhNormal, 2), "holo_rot": (TanhNormal, 3)},
    ),
    "vmas-tag": Team(partial(vmas, "simple_tag"), PREDATORS, ["adversary"]),
    "vmas-tag-group-per-agent": Team(
        partial(vmas, "simple_tag", group_map=MarlGroupMapType.ONE_GROUP_PER_AGENT),
        PREDATORS,
        list(PREDATORS),
    ),
    "mpe2-speaker-listener": Team(
        partial(mpe2, batched=False, continuous=True),
        {"speaker": (TanhNormal, 3), "listener": (TanhNormal, 5)},
    ),
    "mpe2-speaker-listener-discrete": Team(
        partial(mpe2, batched=False, continuous=False),
        {"speaker": (Categorical, 3), "listener": (Categorical, 5)},
    ),
    "mpe2-speaker-listener-batched": Team(
        partial(mpe2, batched=True, continuous=True),
        {"speaker": (TanhNormal, 3), "listener": (TanhNormal, 5)},
    ),
    "playground-hopper": Team(
        partial(PlaygroundStub, "hopper_3x1"),
        {f"agent_{index}": (TanhNormal, 1) for index in range(3)},
    ),
    "playground-humanoid": Team(
        partial(PlaygroundStub, "humanoid_9|8"),
        {"agent_0": (TanhNormal, 9), "agent_1": (TanhNormal, 8)},
    ),
}


def with_reward(env, groups):
    """The environment with the team's reward at the root, and episodes that end in a batch."""
    reward = TeamReward("mean", in_keys=[(group, "reward") for group in groups])
    return TransformedEnv(env, Compose(StepCounter(STEPS // 2), reward))


def same_space(agent, data, kind, size):
    """Whether an agent's actions are drawn from the right kind of distribution, of that size."""
    parameters = agent.policy.parameters(data)
    sizes = {value.shape[-1] for value in parameters.values()}
    return type(agent.policy.distribution(parameters)) is kind and sizes == {size}


@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize("name", list(TEAMS))
def test_two_updates(name, loss_class):
    """The right agents act in their own spaces, all of them move, and everything stays finite.

    Whoever is in the environment but not in the team stays as it is.
    """
    team = TEAMS[name]
    env = team.env()
    groups = team.groups or list(env.full_action_spec.keys())
    actors = make_actor(env, num_cells=(8,))
    loss = loss_class(
        {group: actors[group] for group in groups},
        make_critic(env, groups=groups, num_cells=(8,)),
    )
    assert {agent.name for agent in loss.agents} == set(team.agents)
    env = with_reward(env, groups)
    updater = SequentialUpdater(
        loss, optimizer=partial(torch.optim.Adam, lr=1e-2), num_epochs=2, minibatch_size=5
    )
    before = copy.deepcopy({group: tensors(actor) for group, actor in actors.items()})
    before_agents = {a.name: [p.detach().clone() for p in a.parameters()] for a in loss.agents}
    frames = STEPS * env.batch_size.numel()
    policy = joint_policy(actors)
    for batch in Collector(env, policy, frames_per_batch=frames, total_frames=2 * frames):
        metrics = updater(batch)
        for agent in loss.agents:
            data = agent.view(batch, agent.update_keys)
            assert same_space(agent, data, *team.agents[agent.name])
    assert updater.num_updates == 2
    assert all(value.isfinite() for value in metrics.values(True, True))
    for agent in loss.agents:
        for parameter, old in zip(agent.parameters(), before_agents[agent.name], strict=True):
            assert parameter.isfinite().all()
            assert not torch.equal(parameter, old)
    for group in set(actors) - set(groups):
        assert same_state(tensors(actors[group]), before[group])


@pytest.mark.parametrize("loss_class", LOSSES)
def test_networks_of_unlike_kinds(loss_class):
    """A speaker with memory and a listener with a larger network and none learn side by side."""
    env = vmas("simple_speaker_listener")
    actors = {
        "speaker": make_actor(env, "speaker", num_cells=(8,), recurrent="gru", hidden_size=4),
        "listener": make_actor(env, "listener", num_cells=(16, 8), activation_class=nn.ReLU),
    }
    loss = loss_class(actors, make_critic(env, num_cells=(8,)))
    env = with_reward(env, list(actors))
    for transform in memory_transforms(actors):
        env = env.append_transform(transform)
    updater = SequentialUpdater(loss, num_epochs=2, minibatch_size=6, sequence_length=4)
    before = copy.deepcopy(tensors(loss.actor_network))
    policy, frames = joint_policy(actors), 3 * STEPS
    for batch in Collector(env, policy, frames_per_batch=frames, total_frames=2 * frames):
        metrics = updater(batch)
    assert all(value.isfinite() for value in metrics.values(True, True))
    for key, value in tensors(loss.actor_network).items():
        assert value.shape == () or not torch.equal(value, before[key]), key


SCENARIOS = {
    "simple_tag": (["adversary"], ["agent"]),
    "simple_adversary": (["adversary"], ["agent"]),
    "simple_world_comm": (["lead_adversary", "adversary"], ["agent"]),
}


class TwoTeams:
    """Two teams in one environment, each with its own reward, critic, loss and updater."""

    def __init__(self, scenario, loss_classes=(HAPPOLoss, HATRPOLoss)):
        torch.manual_seed(0)
        env = vmas(scenario)
        actors = make_actor(env, num_cells=(8,))
        self.updaters, rewards = [], []
        sides = zip(("predators", "prey"), SCENARIOS[scenario], loss_classes, strict=True)
        for side, groups, loss_class in sides:
            keys = [(group, "reward") for group in groups]
            rewards.append(TeamReward("mean", in_keys=keys, out_key=(side, "reward")))
            critic = make_critic(env, num_cells=(8,))  # sees everyone
            loss = loss_class({group: actors[group] for group in groups}, critic)
            loss.set_keys(reward=(side, "reward"))
            self.updaters.append(SequentialUpdater(loss, num_epochs=2, minibatch_size=9))
        self.env = TransformedEnv(env, Compose(StepCounter(STEPS // 2), *rewards))
        self.policy = joint_policy(actors)

    def collector(self):
        """Two batches of both teams at play."""
        frames = 3 * STEPS
        return Collector(self.env, self.policy, frames_per_batch=frames, total_frames=2 * frames)


@pytest.mark.parametrize("scenario", list(SCENARIOS))
def test_two_teams_in_one_loop(scenario):
    """An update of one team leaves the other's networks and optimisers, and the batch, alone."""
    game = TwoTeams(scenario)
    for batch in game.collector():
        kept = batch.clone()
        for updater, other in (game.updaters, game.updaters[::-1]):
            own = copy.deepcopy(updater.state_dict()["loss"])
            before = copy.deepcopy(other.state_dict())
            metrics = updater(batch)
            assert {agent.name for agent in updater.loss.agents} == set(metrics.keys()) - {"critic"}
            assert all(value.isfinite() for value in metrics.values(True, True))
            torch.testing.assert_close(other.state_dict(), before, rtol=0, atol=0)
            after = updater.state_dict()["loss"]
            assert all(
                not torch.equal(value, own[key]) for key, value in after.items() if "weight" in key
            )
        assert (batch == kept).all()


@pytest.mark.parametrize("loss_classes", [LOSSES, LOSSES[::-1]])
def test_a_team_learns_as_if_alone(loss_classes):
    """From the same batches, each updater ends bit for bit where it ends without the other."""
    batches = list(TwoTeams("simple_tag").collector())
    ends = []
    for present in ([0, 1], [1, 0], [0], [1]):
        game = TwoTeams("simple_tag", loss_classes)
        for batch in batches:
            for position in present:
                torch.manual_seed(position)
                game.updaters[position](batch)
        ends.append([game.updaters[position].state_dict() for position in (0, 1)])
    for position, alone in ((0, ends[2]), (1, ends[3])):
        for together in ends[:2]:
            torch.testing.assert_close(together[position], alone[position], rtol=0, atol=0)


def actor_of_row(n_inputs, n_outputs=2):
    """A continuous policy that reads one agent of a group."""
    keys = [("agents", "loc"), ("agents", "scale")]
    net = nn.Sequential(
        nn.Linear(n_inputs, 8), nn.Tanh(), nn.Linear(8, 2 * n_outputs), NormalParamExtractor()
    )
    return ProbabilisticActor(
        TensorDictModule(net, in_keys=[("agents", "observation")], out_keys=keys),
        in_keys=keys,
        out_keys=[("agents", "action")],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )


def lazily_stacked(scenario):
    """All agents of a scenario in one group, though they observe vectors of unlike sizes."""
    env = vmas(scenario, group_map=MarlGroupMapType.ALL_IN_ONE_GROUP)
    rows = env.reset()["agents"].unbind(-1)
    actors = ActorList([actor_of_row(row["observation"].shape[-1]) for row in rows])
    return TransformedEnv(env, Compose(StepCounter(STEPS // 2), TeamReward("mean"))), actors


@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize("scenario", ["simple_tag", "simple_adversary"])
def test_unlike_observations_in_one_group(scenario, loss_class):
    """A list of actors acts and learns on a lazy stack, with advantages of one's own."""
    env, actors = lazily_stacked(scenario)
    updater = SequentialUpdater(loss_class(actors, None), num_epochs=2, minibatch_size=7)
    before = copy.deepcopy(tensors(actors))
    frames = 3 * STEPS
    for batch in Collector(env, actors, frames_per_batch=frames, total_frames=2 * frames):
        batch["advantage"] = torch.randn(3, STEPS, 1)
        metrics = updater(batch)
    assert len(updater.loss.agents) == len(env.group_map["agents"])
    assert all(value.isfinite() for value in metrics.values(True, True))
    assert all(not torch.equal(value, before[key]) for key, value in tensors(actors).items())


def test_a_critic_cannot_read_unlike_observations_of_one_group():
    """The builders, and an update with a critic of one's own, say which group map to choose."""
    env, actors = lazily_stacked("simple_tag")
    for build in (make_actor, make_critic):
        with pytest.raises(ValueError, match=r"group_map=MarlGroupMapType\.ONE_GROUP_PER_AGENT"):
            build(env)
    critic = TensorDictModule(nn.Linear(16, 1), [("agents", "observation")], ["state_value"])
    updater = SequentialUpdater(HAPPOLoss(actors, critic))
    before = copy.deepcopy(updater.state_dict())
    with pytest.raises(ValueError, match=r"\[3, 8, 16\] and \[3, 8, 14\]; .*ONE_GROUP_PER_AGENT"):
        updater(env.rollout(STEPS, actors, break_when_any_done=False))
    torch.testing.assert_close(updater.state_dict(), before, rtol=0, atol=0)


def test_the_stub_keeps_its_specs():
    """Groups without an agent dimension, of unlike sizes, as the mapping of the real one says."""
    env = PlaygroundStub("humanoid_9|8")
    step: TensorDict = env.rollout(1)
    sizes = [step[name, "observation"].shape for name in ("agent_0", "agent_1")]
    indices = [agent.observation_indices for agent in KNOWN_MARL_MAPPINGS["humanoid_9|8"].agents]
    assert sizes == [(3, 1, len(own)) for own in indices]
