"""What the table of wrong calls in ``test_bad_input.py`` is made of."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from newer import tensors
from recipe_helpers import tiny_config
from team import N_AGENTS, make_actor, make_batch, make_critic
from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule, TensorDictSequential
from torch import nn
from torch.distributions import Categorical
from torchrl.modules import IndependentNormal, MultiAgentMLP, ProbabilisticActor, TruncatedNormal

from torchrl_happo import ActorList, HAPPOLoss, HATRPOLoss, SequentialUpdater
from torchrl_happo.envs import MatrixGame
from torchrl_happo.recipe import checkpoint, training
from torchrl_happo.recipe.checkpoint import CheckpointError
from torchrl_happo.recipe.config import ConfigError

NAN, INF = float("nan"), float("inf")
STEPS = (4, 6)


def made(network, default):
    """A network, or what a factory of one makes."""
    network = default if network is None else network
    return network if isinstance(network, nn.Module) else network()


class Team:
    """Networks, loss, an updater that has been used once, and a batch."""

    def __init__(self, actor=None, critic=None, loss=HAPPOLoss, n_agents=N_AGENTS, **kwargs):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.actor = made(actor, make_actor)
            self.critic = made(critic, make_critic)
            self.batch = make_batch(self.actor, n_agents=n_agents)
        self.loss = loss(self.actor, self.critic)
        settings = {"num_epochs": 1, "minibatch_size": 7, **kwargs}
        self.updater = SequentialUpdater(self.loss, **settings)

    def used(self):
        """The same team after an update, with momentum in its optimisers."""
        self.updater(self.batch)
        return self

    def state(self):
        """Everything that a refused call must leave alone."""
        networks = [tensors(self.loss), tensors(self.actor), tensors(self.critic)]
        return copy.deepcopy((self.updater.state_dict(), networks, torch.get_rng_state()))


@cache
def team() -> Team:
    """The team of all rows that leave it alone, as they should."""
    return Team().used()


@dataclass(frozen=True)
class Wrong:
    """A wrong call: ``call(given())`` must raise ``error`` with ``words`` in its sentence."""

    name: str
    call: Callable[[Any], Any]
    error: type[Exception] | tuple[type[Exception], ...]
    words: str
    given: Callable[[], Any] = lambda: None

    def __str__(self):
        return self.name


def built(rows):
    """Wrong arguments of a constructor or a function."""
    return [
        Wrong(name, lambda _, call=call: call(), error, words) for name, call, error, words in rows
    ]


def called(rows):
    """Wrong batches for the shared team; ``change`` edits a copy or returns another batch."""

    def call(change, team):
        batch = team.batch.clone()
        other = change(batch)
        team.updater(batch if other is None else other)

    return [
        Wrong(name, partial(call, change), error, words, team)
        for name, change, error, words in rows
    ]


def trained(rows):
    """Teams of their own that cannot be trained with the batch they come with."""
    return [
        Wrong(name, lambda team: team.updater(team.batch), error, words, given)
        for name, given, error, words in rows
    ]


def loaded(rows):
    """Wrong states for the shared team; ``change`` edits a copy or returns another state."""

    def call(change, team):
        state = copy.deepcopy(team.updater.state_dict())
        other = change(state)
        team.updater.load_state_dict(state if other is None else other)

    return [
        Wrong(name, partial(call, change), error, words, team)
        for name, change, error, words in rows
    ]


class Run:
    """A finished run of the recipe in a folder of its own."""

    def __init__(self):
        self.place = tempfile.TemporaryDirectory()
        self.folder = Path(self.place.name) / "run"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "write_report", lambda config, folder: None)
            training.run(tiny_config(), self.folder)
        self.content = checkpoint.read(self.folder)

    def state(self):
        """Every file of the run."""
        return {str(path): path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}


@cache
def run() -> Run:
    """The run of all rows about resuming, which they leave alone."""
    return Run()


def resumed(rows):
    """Runs that cannot be resumed, from a checkpoint that ``change`` edits or with overrides."""

    def call(change, overrides, run):
        source = run.folder
        if change is not None:
            source = Path(run.place.name) / "changed.pt"
            content = copy.deepcopy(run.content)
            change(content)
            torch.save(content, source)
            if change is len:
                source.write_bytes(source.read_bytes()[:-100])
            checkpoint.read_config(checkpoint.read(source))
        config = tiny_config("total_frames=96", f"resume={source}", *overrides)
        training.run(config, Path(run.place.name) / "new")

    errors = (CheckpointError, ConfigError)
    return [
        Wrong(name, partial(call, change, overrides), errors, words, run)
        for name, change, overrides, words in rows
    ]


def same(one, other):
    """Whether two nested states are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        alike = one.shape == other.shape and one.dtype == other.dtype
        return alike and (one.is_meta or torch.equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# -- what the rows are made of ---------------------------------------------------------------------


def loss(actor=None, critic=None, kind=HAPPOLoss, **kwargs):
    return kind(
        make_actor() if actor is None else actor,
        make_critic() if critic is None else critic,
        **kwargs,
    )


hatrpo = partial(loss, kind=HATRPOLoss)


def setting(key, change, *others):
    """Replaces an entry of a batch, and others, by a function of it."""

    def apply(batch):
        for each in (key, *others):
            batch[each] = change(batch[each])

    return apply


def spoil(key, value=NAN):
    """Puts one bad number into an entry of a batch."""

    def change(entry):
        entry = entry.clone(memory_format=torch.contiguous_format)
        entry.view(-1)[5] = value
        return entry

    return setting(key, change)


def adding(**entries):
    """Writes entries into a batch; an advantage and a target, if none is named."""

    def apply(batch):
        own = {"advantage": ramp(*STEPS, 1), "value_target": ramp(*STEPS, N_AGENTS, 1)}
        for key, value in {**own, **entries}.items():
            batch[key] = value

    return apply


def ramp(*shape):
    """Numbers from -1 to 1."""
    return torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)


def spoiled(*shape):
    """Numbers, one of them NaN."""
    value = ramp(*shape)
    value.view(-1)[3] = NAN
    return value


def without(*keys):
    return lambda batch: batch.exclude(*keys)


def changed(base, change):
    """A team to which something is done after it was built."""

    def given():
        team = base()
        change(team)
        return team

    return given


def categorical(net, **kwargs):
    """An actor from a network of logits."""
    keys = [("agents", "logits")]
    return ProbabilisticActor(
        TensorDictModule(net, in_keys=[("agents", "observation")], out_keys=keys),
        in_keys=keys,
        out_keys=[("agents", "action")],
        distribution_class=Categorical,
        **{"return_log_prob": True, **kwargs},
    )


def stack(**kwargs):
    settings = {"n_agent_inputs": 5, "n_agent_outputs": 3, "n_agents": N_AGENTS}
    defaults = {"centralized": False, "share_params": False, "num_cells": [8]}
    return MultiAgentMLP(**{**settings, **defaults, **kwargs})


def at_root():
    """An actor of several agents whose keys name no group."""
    return ProbabilisticActor(
        TensorDictModule(stack(), in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        out_keys=["action"],
        distribution_class=Categorical,
        return_log_prob=True,
    )


def over_one_trunk():
    """A list of actors whose networks begin with the same layer."""
    trunk = nn.Linear(5, 4)
    return ActorList([categorical(nn.Sequential(trunk, nn.Linear(4, 3))) for _ in range(3)])


class HeadFirst(nn.Module):
    """A network that registers its layers in another order than it calls them."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 1)
        self.hidden = nn.Linear(5, 16)

    def forward(self, observation):
        return self.head(self.hidden(observation))


def head_first():
    """A critic whose hidden layer is the last to be registered."""
    return critic_of(HeadFirst())


def flat_actor():
    """An actor without an agent dimension."""
    return categorical(nn.Linear(5, 3))


def deviating():
    """A stack of means with one standard deviation for all agents."""
    scale = AddStateIndependentNormalScale(2)
    keys = [("agents", "loc"), ("agents", "scale")]
    return ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(stack(n_agent_outputs=2), scale),
            in_keys=[("agents", "observation")],
            out_keys=keys,
        ),
        in_keys=keys,
        out_keys=[("agents", "action")],
        distribution_class=IndependentNormal,
        return_log_prob=True,
    )


class Truncated(TruncatedNormal):
    """A truncated normal that takes the halves of a tensor, too."""

    def __init__(self, loc, scale):
        super().__init__(loc.contiguous(), scale.contiguous())


def critic_of(net, in_key=("agents", "observation"), out_key="state_value"):
    return TensorDictModule(net, in_keys=[in_key], out_keys=[out_key])


def two_values():
    """A critic that writes two numbers where one is wanted."""
    return critic_of(nn.Sequential(nn.Flatten(-2), nn.Linear(15, 2)))


def two_keys():
    """A critic that writes two entries, neither of them the state value."""
    return TensorDictSequential(
        critic_of(nn.Linear(5, 1), out_key="first"), critic_of(nn.Linear(5, 1), out_key="second")
    )


def with_actor_inside():
    """An actor, and a critic that contains it."""
    actor, critic = make_actor(), make_critic()
    critic.module.encoder = actor
    return actor, critic


def elsewhere(_):
    """A factory of optimisers that ignores its argument."""
    return torch.optim.Adam(nn.Linear(2, 2).parameters())


def game(**kwargs):
    return MatrixGame(torch.eye(2), num_envs=4, **kwargs)


def play(action):
    env = game()
    return env.step(env.reset().set(("agents", "action"), action))


def paid(reward):
    """A team whose agents are paid each, and whose loss reads that."""

    def change(team):
        team.loss.set_keys(reward=("agents", "reward"))
        team.batch["next", "agents", "reward"] = reward

    return changed(Team, change)
