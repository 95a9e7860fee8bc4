"""The scripts that a TorchRL user writes run as they stand."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.collectors import Collector, MultiCollector
from torchrl.envs import Compose, RewardSum, StepCounter, TransformedEnv, VmasEnv
from torchrl.modules import MultiAgentMLP, ProbabilisticActor, TanhNormal
from torchrl.objectives import ValueEstimators

from torchrl_happo import (
    HAPPOLoss,
    HATRPOLoss,
    SequentialUpdater,
    TeamReward,
    joint_policy,
    make_actor,
    make_critic,
)

pytest.importorskip("vmas")


README = Path(__file__).parents[1] / "README.md"


#: What makes the scripts of the README short enough for a test.
SHORT = {
    "frames_per_batch=6000, total_frames=600_000": "frames_per_batch=120, total_frames=240",
    "num_envs=60": "num_envs=6",
    "StepCounter(100)": "StepCounter(10)",
    "minibatch_size=1500": "minibatch_size=50",
    "num_epochs=10": "num_epochs=2",
}


def shortened(script):
    """The script with few frames; each replacement that is made must be needed."""
    for long, short in SHORT.items():
        script = script.replace(long, short)
    return script


def blocks(language):
    """The code blocks of the README in a language."""
    return re.findall(rf"```{language}\n(.*?)\n```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("script", blocks("python"))
def test_each_script_of_the_readme(script):
    """It runs as it stands, with fewer frames."""
    short = shortened(script)
    assert short.count("120") == script.count("6000") > 0
    names: dict = {}
    exec(short, names)
    assert {*names["metrics"].keys()} == {*(f"agents_{index}" for index in range(4)), "critic"}


def test_the_change_of_the_readme():
    """The code after it runs, but for the networks, whose lines are cut short there."""
    (diff,) = blocks("diff")
    after = [line[1:] for line in diff.splitlines() if line[:1] in "+ " and "(...)" not in line]
    assert sum(line.startswith("-") for line in diff.splitlines()) == 5
    base_env = VmasEnv("navigation", num_envs=6, max_steps=10)
    names = {**globals(), "base_env": base_env}
    names["actor"], names["critic"] = make_networks(base_env)
    exec(shortened("\n".join(after)), names)
    assert names["metrics"]["agents_0/kl"] > 0
    assert names["batch"]["next", "agents", "episode_reward"].isfinite().all()


def make_env(scenario="navigation", num_envs=6):
    """A VMAS environment with the team's one reward at the root."""
    return TransformedEnv(
        VmasEnv(scenario, num_envs=num_envs, max_steps=None, continuous_actions=True, seed=0),
        Compose(StepCounter(10), TeamReward("mean"), RewardSum()),
    )


def make_networks(env):
    """The objects that MAPPOLoss takes: a stack of actors and a centralised critic."""
    n_agents = len(env.group_map["agents"])
    obs_dim = env.observation_spec["agents", "observation"].shape[-1]
    space = env.full_action_spec_unbatched["agents", "action"].space
    act_dim = space.low.shape[-1]
    mlp = partial(MultiAgentMLP, n_agents=n_agents, depth=2, num_cells=32, activation_class=nn.Tanh)
    net = nn.Sequential(
        mlp(
            n_agent_inputs=obs_dim,
            n_agent_outputs=2 * act_dim,
            centralized=False,
            share_params=False,
        ),
        NormalParamExtractor(),
    )
    actor = ProbabilisticActor(
        TensorDictModule(
            net,
            in_keys=[("agents", "observation")],
            out_keys=[("agents", "loc"), ("agents", "scale")],
        ),
        in_keys=[("agents", "loc"), ("agents", "scale")],
        out_keys=[("agents", "action")],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": space.low, "high": space.high},
        return_log_prob=True,
    )
    critic = TensorDictModule(
        mlp(n_agent_inputs=obs_dim, n_agent_outputs=1, centralized=True, share_params=True),
        in_keys=[("agents", "observation")],
        out_keys=[("agents", "state_value")],
    )
    return actor, critic


def train(collector, updater, actor):
    """The training loop; returns the metrics of the last batch."""
    before = [p.clone() for p in actor.parameters()]
    for batch in collector:
        metrics = updater(batch)
    assert all(not torch.equal(a, b) for a, b in zip(before, actor.parameters(), strict=True))
    for value in metrics.values(include_nested=True, leaves_only=True):
        assert value.isfinite()
    return metrics


@pytest.mark.parametrize("loss_class", [HAPPOLoss, HATRPOLoss])
def test_mappo_script_becomes_happo_or_hatrpo(loss_class):
    """Changing the class and the loop of a MAPPO script is all it takes."""
    env = make_env()
    actor, critic = make_networks(env)
    kwargs = {"clip_epsilon": 0.2, "entropy_coeff": 0.0} if loss_class is HAPPOLoss else {}
    loss = loss_class(actor, critic, **kwargs)
    loss.set_keys(value=("agents", "state_value"), action=("agents", "action"))
    loss.make_value_estimator(ValueEstimators.GAE, gamma=0.99, lmbda=0.95)
    updater = SequentialUpdater(
        loss,
        optimizer=partial(torch.optim.Adam, lr=3e-4),
        num_epochs=2,
        minibatch_size=50,
        max_grad_norm=1.0,
        order="random",
    )
    collector = Collector(env, actor, frames_per_batch=120, total_frames=240)
    metrics = train(collector, updater, actor)
    assert {"agents_0", "agents_1", "agents_2", "agents_3", "critic"} == set(metrics.keys())


@pytest.mark.parametrize("loss_class", [HAPPOLoss, HATRPOLoss])
def test_unlike_agents_need_no_padding(loss_class):
    """A speaker and a listener, with unlike observations and actions, one entry each."""
    env = make_env("simple_speaker_listener")
    actors = make_actor(env)
    assert set(actors) == {"speaker", "listener"}
    loss = loss_class(
        {"speaker": actors["speaker"], "listener": actors["listener"]}, make_critic(env)
    )
    updater = SequentialUpdater(loss, num_epochs=2, minibatch_size=50)
    policy = joint_policy(actors)
    collector = Collector(env, policy, frames_per_batch=120, total_frames=240)
    metrics = train(collector, updater, policy)
    assert {"speaker", "listener", "critic"} == set(metrics.keys())


def test_the_loss_alone_in_a_loop_of_ones_own():
    """HAPPOLoss is a LossModule: forward, backward, step."""
    env = make_env()
    actor, critic = make_networks(env)
    loss = HAPPOLoss(actor, critic, entropy_coeff=0.0)
    loss.set_keys(value=("agents", "state_value"), action=("agents", "action"))
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4)
    for batch in Collector(env, actor, frames_per_batch=120, total_frames=240):
        with torch.no_grad():
            loss.value_estimator(batch)
        losses = loss(batch.reshape(-1))
        (losses["loss_objective"] + losses["loss_critic"]).backward()
        assert all(p.grad is not None for p in loss.parameters())
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_workers")
def test_weights_reach_collectors_in_other_processes():
    """Two worker processes act with the trained policy once its weights have been sent."""
    env = make_env(num_envs=3)
    actor, critic = make_networks(env)
    loss = HAPPOLoss(actor, critic, entropy_coeff=0.0)
    updater = SequentialUpdater(
        loss, optimizer=partial(torch.optim.Adam, lr=1e-2), num_epochs=2, minibatch_size=None
    )
    collector = MultiCollector(
        [partial(make_env, num_envs=3)] * 2,
        actor,
        sync=True,
        frames_per_batch=120,
        total_frames=360,
        cat_results=0,
    )
    try:
        for batch in collector:
            with torch.no_grad():
                dist = actor.get_dist(batch.select(*actor.in_keys))
            for key, value in {"loc": dist.loc, "scale": dist.scale}.items():
                torch.testing.assert_close(batch["agents", key], value)
            updater(batch)
            collector.update_policy_weights_()
    finally:
        collector.shutdown()
