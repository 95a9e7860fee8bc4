"""Lines of public multi-agent PPO scripts work as they stand, or say what to drop."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from team import N_AGENTS, OBS_DIM, make_actor, make_batch, make_critic
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Bounded, Composite
from torchrl.envs import Compose, InitTracker, RewardSum, Transform, TransformedEnv, VmasEnv
from torchrl.envs.utils import check_env_specs
from torchrl.modules import GRUModule, ProbabilisticActor, TanhNormal
from torchrl.objectives import ValueEstimators

from torchrl_happo import (
    ActorList,
    HAPPOLoss,
    HATRPOLoss,
    SequentialUpdater,
    TeamReward,
    memory_transforms,
)

GROUP = "agents"


class PerAgentDones(Transform):
    """A collector's postprocessing that gives every agent the environment's ends."""

    def __init__(self, reward_key):
        super().__init__()
        self.reward_key = reward_key

    def forward(self, tensordict):
        for name in ("done", "terminated"):
            ends = tensordict["next", name].unsqueeze(-1)
            shape = tensordict["next", *self.reward_key].shape
            tensordict["next", GROUP, name] = ends.expand(shape)
        return tensordict


def make_env():
    """A VMAS environment with a transform that sums the rewards of each agent."""
    pytest.importorskip("vmas")
    env = VmasEnv("dispersion", num_envs=4, max_steps=5, seed=0, share_reward=False)
    return TransformedEnv(
        env, RewardSum(in_keys=[env.reward_key], out_keys=[(GROUP, "episode_reward")])
    )


def set_all_keys(loss, reward=(GROUP, "reward")):
    """The keys as scripts for agents with rewards and dones of their own name them."""
    loss.set_keys(
        reward=reward,
        action=(GROUP, "action"),
        value=(GROUP, "state_value"),
        done=(GROUP, "done"),
        terminated=(GROUP, "terminated"),
    )
    loss.make_value_estimator(ValueEstimators.GAE, gamma=0.9, lmbda=0.8)
    return loss


LOSSES = {
    "happo": partial(HAPPOLoss, clip_epsilon=0.2, entropy_coeff=0.0, normalize_advantage=False),
    "hatrpo": partial(HATRPOLoss, max_kl=0.01),
}


@pytest.mark.parametrize(
    ("name", "estimates"), [("happo", True), ("happo", False), ("hatrpo", False)]
)
def test_a_script_for_agents_with_rewards_of_their_own(name, estimates):
    """All the lines of a MAPPO script but the epochs, and whether or not it calls GAE itself."""
    torch.manual_seed(0)
    env = make_env()
    env.append_transform(TeamReward("mean", in_place=True))
    sizes = {
        "n_agents": env.n_agents,
        "obs_dim": env.observation_spec[GROUP, "observation"].shape[-1],
    }
    actor = make_actor(**sizes, act_dim=env.full_action_spec[env.action_key].shape[-1])
    loss = set_all_keys(LOSSES[name](actor, make_critic(**sizes)), env.reward_key)
    assert loss.value_estimator.gamma == pytest.approx(0.9)
    updater = SequentialUpdater(loss, num_epochs=2, minibatch_size=10, max_grad_norm=1.0)
    collector = Collector(
        env, actor, frames_per_batch=40, total_frames=80, postproc=PerAgentDones(env.reward_key)
    )
    logged = []
    for batch in collector:
        if estimates:
            with torch.no_grad():
                loss.value_estimator(
                    batch,
                    params=loss.critic_network_params,
                    target_params=loss.target_critic_network_params,
                )
        logged.append(updater(batch).flatten_keys("/"))
        collector.update_policy_weights_()
        finished = batch["next", GROUP, "done"]
        assert batch["next", GROUP, "episode_reward"][finished].mean().isfinite()
    metrics = {key: value.mean().item() for key, value in torch.stack(logged).items()}
    assert metrics["agents_0/kl"] > 0
    assert "critic/explained_variance" in metrics


def updated(batch, *, critic, reward="reward", done="done", loss_class=HAPPOLoss):
    """The parameters after one update of a team with this batch."""
    torch.manual_seed(1)
    actor = make_actor()
    loss = loss_class(actor, critic(), critic_coeff=1.0)
    loss.set_keys(reward=reward, done=done, terminated=_beside(done, "terminated"))
    updater = SequentialUpdater(loss, num_epochs=2)
    updater(batch)
    return [parameter.detach().clone() for parameter in loss.parameters()]


def _beside(key, name):
    return (*key[:-1], name) if isinstance(key, tuple) else name


def paid_alike(batch):
    """The batch of a team whose agents all have the team's reward under their own key."""
    batch = batch.clone()
    reward = batch["next"].pop("reward")
    batch["next", GROUP, "reward"] = reward.unsqueeze(-2).expand(*batch.shape, N_AGENTS, 1)
    return batch


def team_critic():
    """A critic with one value for the team."""
    net = nn.Sequential(nn.Flatten(-2), nn.Linear(OBS_DIM * N_AGENTS, 1))
    return TensorDictModule(net, in_keys=[(GROUP, "observation")], out_keys=["state_value"])


@pytest.fixture
def batch():
    """A batch of a team whose reward and ends are at the root."""
    torch.manual_seed(0)
    return make_batch(make_actor())


def alike(one, other):
    """Whether two lists of parameters are the same, bit for bit."""
    return all(map(torch.equal, one, other))


def test_the_ends_of_the_root_are_those_of_every_agent(batch):
    """``done=("agents", "done")`` without such entries: the update is that with them."""
    given = batch.clone()
    for name in ("done", "terminated"):
        ends = batch["next", name].unsqueeze(-2)
        given["next", GROUP, name] = ends.expand(*batch.shape, N_AGENTS, 1)
    keys = {"critic": make_critic, "done": (GROUP, "done")}
    found = updated(batch, **keys)
    assert (GROUP, "done") not in batch["next"].keys(True)
    assert alike(found, updated(given, **keys))
    never = batch.clone()
    never["next", "done"] = never["next", "terminated"] = torch.zeros_like(batch["next", "done"])
    assert not alike(found, updated(never, **keys))


@pytest.mark.parametrize("critic", [make_critic, team_critic])
def test_a_team_paid_alike_is_a_team_with_one_reward(batch, critic):
    """The reward under each agent's key, the same for all, updates as the one at the root."""
    root = updated(batch, critic=critic)
    assert alike(root, updated(paid_alike(batch), critic=critic, reward=(GROUP, "reward")))


def test_the_shared_reward_is_that_of_agents_that_act(batch):
    """With a critic of the team, what agents that do not act are paid does not matter."""
    active = torch.rand(*batch.shape, N_AGENTS) < 0.6
    active[1, 2] = False
    batch[GROUP, "active"] = active
    paid = paid_alike(batch)
    own = paid["next", GROUP, "reward"]
    paid["next", GROUP, "reward"] = torch.where(active.unsqueeze(-1), own, torch.full_like(own, 9))
    batch["next", "reward"][~active.any(-1)] = 0.0
    keys = {"critic": team_critic, "reward": (GROUP, "reward")}
    assert alike(updated(batch, critic=team_critic), updated(paid, **keys))


def test_rewards_that_differ_name_two_cures_that_work(batch):
    """One drops ``reward=`` from set_keys, the other keeps it."""
    batch["next", GROUP, "reward"] = torch.randn(*batch.shape, N_AGENTS, 1)
    with pytest.raises(ValueError, match=r"leave set_keys\(reward=...\) out, or keep it and "):
        updated(batch, critic=make_critic, reward=(GROUP, "reward"))
    own = [(GROUP, "reward")]
    root = updated(TeamReward("mean", in_keys=own)(batch.clone()), critic=make_critic)
    in_place = TeamReward("mean", in_keys=own, in_place=True)(batch.clone())
    assert alike(root, updated(in_place, critic=make_critic, reward=(GROUP, "reward")))


@pytest.mark.parametrize(("done", "cure"), [("done", "call"), ((GROUP, "done"), r"leave .* out\.")])
def test_ends_that_are_nowhere(batch, done, cure):
    """The sentence says whether to name a key or to drop the name."""
    del batch["next", "done"]
    with pytest.raises(KeyError, match=f"no entry .*'done'.*{cure}"):
        updated(batch, critic=make_critic, done=done)


def test_hidden_states_whose_name_begins_with_an_underscore():
    """TorchRL's collectors drop them; with another name the same script trains."""

    def train(name):
        env = make_env()
        obs_dim = env.observation_spec[GROUP, "observation"].shape[-1]
        actor = ActorList([one(obs_dim, name) for _ in range(env.n_agents)])
        env.append_transform(Compose(*memory_transforms(actor), TeamReward("mean")))
        loss = HAPPOLoss(actor, make_critic(env.n_agents, obs_dim=obs_dim))
        updater = SequentialUpdater(loss, num_epochs=1)
        for data in Collector(env, actor, frames_per_batch=20, total_frames=20):
            return updater(data)

    def one(obs_dim, name):
        head = nn.Sequential(nn.Linear(8, 4), NormalParamExtractor())
        memory = GRUModule(
            obs_dim,
            8,
            in_keys=[(GROUP, "observation"), (GROUP, name), "is_init"],
            out_keys=[(GROUP, "features"), ("next", GROUP, name)],
        )
        params = [(GROUP, "loc"), (GROUP, "scale")]
        return ProbabilisticActor(
            TensorDictSequential(
                memory, TensorDictModule(head, in_keys=[(GROUP, "features")], out_keys=params)
            ),
            in_keys=params,
            out_keys=[(GROUP, "action")],
            distribution_class=TanhNormal,
            return_log_prob=True,
        )

    with pytest.raises(KeyError, match=r"'_h'.*begin with '_': rename it"):
        train("_h")
    assert "critic" in train("h").keys()


@pytest.mark.parametrize(
    ("scenario", "reduction"),
    [("dispersion", "mean"), ("simple_speaker_listener", "mean"), ("simple_tag", "sum")],
)
def test_in_place_the_rewards_keep_their_keys_and_shapes(scenario, reduction):
    """All agents are paid the reduction of what they were paid, and there are no other keys."""
    pytest.importorskip("vmas")

    def rewards(*transforms):
        env = TransformedEnv(VmasEnv(scenario, num_envs=2, seed=0), Compose(*transforms))
        torch.manual_seed(0)
        rollout = env.rollout(3)
        return env, {key: rollout["next", *key] for key in env.reward_keys}

    env, own = rewards(InitTracker())
    teams, paid = rewards(TeamReward(reduction, in_place=True))
    assert teams.reward_keys == env.reward_keys
    check_env_specs(teams)
    rows = [value.unsqueeze(-2) if value.ndim == 3 else value for value in own.values()]
    total = getattr(torch.cat(rows, -2), reduction)(-2)
    for key, value in paid.items():
        assert value.shape == own[key].shape
        wanted = total.unsqueeze(-2) if value.ndim == 4 else total
        torch.testing.assert_close(value, wanted.expand_as(value))


def test_in_place_a_sum_may_leave_the_bounds_of_one_reward():
    """The spec of what was bounded for one agent has no bounds for the sum of all."""
    transform = TeamReward("sum", in_keys=[(GROUP, "reward")], in_place=True)
    spec = Composite({GROUP: Composite({"reward": Bounded(-1, 1, (2, 3, 1))}, shape=(2, 3))})
    spec.shape = (2,)
    made = transform.transform_reward_spec(copy.deepcopy(spec))
    assert made[GROUP, "reward"].shape == (2, 3, 1)
    step = TensorDict({GROUP: TensorDict({"reward": torch.ones(2, 3, 1)}, [2, 3])}, [2])
    assert made.is_in(transform(step))
    assert not spec.is_in(step)
