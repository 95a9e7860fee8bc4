"""Strategies for teams, batches and hyperparameters that a user may legitimately combine."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from hypothesis import strategies as st
from newer import PopArtValueNorm, RunningValueNorm
from scenario_groups import Cast, teams
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ReplayBuffer,
    SamplerWithoutReplacement,
)
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP, MultiAgentMLP

from torchrl_happo import CoPPOLoss, HAPPOLoss, HATRPOLoss, SequentialUpdater
from torchrl_happo.networks.recurrent import add_memory

__all__ = [
    "Scenario",
    "a2po",
    "critics",
    "datasets",
    "haa2c",
    "happo",
    "hatrpo",
    "teams",
    "updaters",
]

#: How an update is called: as it is, or within another mode of torch.
MODES = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
}


def two_groups(parameters):
    """An optimiser whose parameters lie in groups of their own."""
    parameters = list(parameters)
    first, rest = parameters[:1], parameters[1:]
    groups = [{"params": first}, *([{"params": rest, "lr": 0.0}] if rest else [])]
    return torch.optim.SGD(groups, lr=0.01)


def make_buffer(kind, batch_size):
    """A replay buffer that draws the minibatches."""
    storage = LazyTensorStorage(1000)
    if kind == "on disk":
        storage = LazyMemmapStorage(1000, scratch_dir=tempfile.mkdtemp())
    prefetch = {"prefetch": 2} if kind == "prefetch" else {}
    sampler = SamplerWithoutReplacement()
    return ReplayBuffer(storage=storage, sampler=sampler, batch_size=batch_size, **prefetch)


class Reader(nn.Module):
    """An MLP over the observations of all groups, of any type and shape."""

    def __init__(self, event_dims, n_in, n_out):
        super().__init__()
        self.event_dims = event_dims
        self.cast = Cast()
        self.mlp = MLP(in_features=n_in, out_features=n_out, num_cells=[8])

    def forward(self, *inputs):
        events = zip(inputs, self.event_dims, strict=True)
        return self.mlp(torch.cat([self.cast(x).flatten(-dims) for x, dims in events], -1))


@dataclass(frozen=True)
class Data:
    """How batches are made."""

    shape: tuple[int, ...]
    reward_scale: float
    observation_scale: float
    active: float | None
    counted: float | None
    advantage: str
    saturated: bool
    dtype: torch.dtype
    chunks: bool
    mask_name: str = "active"
    loose: bool = False
    mode: str = "plain"
    traj_ids: bool = False
    nan_ends: bool = False


datasets = st.builds(
    Data,
    st.one_of(
        st.tuples(st.integers(1, 12)),
        st.tuples(st.integers(1, 4), st.integers(1, 8)),
        st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4)),
    ),
    reward_scale=st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
    observation_scale=st.sampled_from([0.0, 1.0, 30.0]),
    active=st.sampled_from([None, None, 0.0, 0.3, 0.9, 1.0]),
    counted=st.sampled_from([None, None, None, 0.0, 0.5, 1.0]),
    advantage=st.sampled_from(["estimated", "team", "agent"]),
    saturated=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    chunks=st.booleans(),
    mask_name=st.sampled_from(["active", "active", "mask"]),  # ours, and TorchRL's of dead agents
    traj_ids=st.booleans(),
    nan_ends=st.booleans(),
    loose=st.integers(0, 4).map(lambda i: i == 0),  # groups without an agent dimension
    mode=st.sampled_from(["plain"] * 4 + [*MODES]),
)

critics = st.fixed_dictionaries(
    {
        "loss_critic_type": st.sampled_from(["l1", "l2", "smooth_l1"]),
        "critic_coeff": st.sampled_from([None, 0.5]),
        "clip_value": st.sampled_from([None, 0.2]),
        "value_norm": st.sampled_from([None, None, RunningValueNorm, PopArtValueNorm]),
    }
)
happo = st.fixed_dictionaries(
    {
        "clip_epsilon": st.sampled_from([0.01, 0.2, 0.99, (0.1, 0.3)]),
        "entropy_coeff": st.sampled_from([0.0, 0.01, 1.0]),
    }
)
haa2c = st.fixed_dictionaries({"entropy_coeff": st.sampled_from([0.0, 0.01])})
a2po = st.fixed_dictionaries(
    {
        "clip_epsilon": st.sampled_from([0.01, 0.2, (0.1, 0.3)]),
        "entropy_coeff": st.sampled_from([0.0, 0.01]),
    }
)
hatrpo = st.fixed_dictionaries(
    {
        "max_kl": st.sampled_from([1e-4, 0.01, 1.0]),
        "kl_split": st.sampled_from([None, "equal", "weighted", "greedy"]),
        "damping": st.sampled_from([0.0, 0.1, 1.0]),
        "cg_iterations": st.integers(1, 10),
        "max_backtracks": st.integers(1, 10),
        "accept_ratio": st.sampled_from([0.0, 0.5]),
        "fisher_fraction": st.sampled_from([0.3, 1.0]),
        "line_search": st.sampled_from(["sequential", "batched"]),
    }
)
updaters = st.fixed_dictionaries(
    {
        "num_epochs": st.integers(1, 3),
        "critic_epochs": st.one_of(st.none(), st.integers(1, 3)),
        "minibatch_size": st.one_of(st.none(), st.integers(1, 40)),
        "max_grad_norm": st.sampled_from([None, 0.1, 10.0]),
        "order": st.sampled_from(["random", "fixed", "semi_greedy"]),
        "by_agent": st.booleans(),
        "standardize_advantage": st.booleans(),
        "check_finite": st.sampled_from([None, True, False]),
        "replay_buffer": st.sampled_from([None] * 12 + ["in memory", "prefetch", "on disk"]),
        "seed": st.integers(0, 3),
        "optimizer": st.sampled_from(
            [
                partial(torch.optim.Adam, lr=1e-3),
                partial(torch.optim.AdamW, lr=0.05),
                partial(torch.optim.SGD, lr=0.01, momentum=0.9),
                partial(torch.optim.Adam, lr=torch.tensor(1e-3)),
                partial(torch.optim.Adafactor, lr=0.01),
                partial(torch.optim.RMSprop, lr=1e-3),
                partial(torch.optim.NAdam, lr=1e-3),
                partial(torch.optim.ASGD, lr=1e-3),
                two_groups,
            ]
        ),
        "scheduler": st.sampled_from(
            [None, partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)]
        ),
    }
)


class Scenario:
    """A team, its loss and updater, and the batches they learn from.

    Args:
        loss_class (type): HAPPOLoss or HATRPOLoss.
        groups (list of Group): the team.
        data (Data): how batches are made.
        loss_kwargs (dict): of the loss. ``value_norm`` is a class.
        updater_kwargs (dict): of the updater. ``replay_buffer`` says whether there is one.
        per_agent_critic (bool): whether the critic of a single group has a value for each agent.
        critic_memory (str, optional): kind of the critic's memory, in place of values for each.
    """

    def __init__(
        self,
        loss_class,
        groups,
        data,
        loss_kwargs,
        updater_kwargs,
        *,
        per_agent_critic,
        critic_memory=None,
    ):
        loss_kwargs, updater_kwargs = dict(loss_kwargs), dict(updater_kwargs)
        if loss_kwargs["value_norm"] is not None:
            loss_kwargs["value_norm"] = loss_kwargs["value_norm"](shape=1)
        if data.chunks:
            updater_kwargs["sequence_length"] = data.shape[-1]
        if kind := updater_kwargs.pop("replay_buffer"):
            size = updater_kwargs.pop("minibatch_size") or 4
            updater_kwargs["replay_buffer"] = make_buffer(kind, size)
        if loss_kwargs.get("kl_split") == "greedy":
            updater_kwargs["order"] = "random"  # the budget's own
        self.groups, self.data = groups, data
        actors = [group.actor(saturated=data.saturated).to(data.dtype) for group in groups]
        self.actor = TensorDictSequential(*actors)
        self.alone = len(groups) == 1
        per_agent = per_agent_critic and self.alone and groups[0].n_agents is not None
        per_agent = per_agent and critic_memory is None and groups[0].sight == "floats"
        self.value_shape = [groups[0].n_agents, 1] if per_agent else [1]
        self.critic = self._critic(per_agent, critic_memory).to(data.dtype)
        by_agent = updater_kwargs.pop("by_agent", False)
        named = [group.name for group in groups if group.name is not None]
        if by_agent and named:  # settings of each group
            if issubclass(loss_class, HAPPOLoss) and "clip_epsilon" in loss_kwargs:
                loss_kwargs["clip_epsilon"] = dict.fromkeys(named, loss_kwargs["clip_epsilon"])
            if loss_class is HATRPOLoss and loss_kwargs["kl_split"] in (None, "equal"):
                loss_kwargs["max_kl"] = dict.fromkeys(named, loss_kwargs["max_kl"])
        if loss_class is not CoPPOLoss:
            loss_kwargs["blocks"] = [group.name for group in groups if self._is_block(group)]
        self.loss = loss_class(
            actors[0] if self.alone else dict(zip([g.name for g in groups], actors, strict=True)),
            self.critic,
            **loss_kwargs,
        )
        self._freeze_agents()
        if by_agent:  # settings of each agent
            names = [agent.name for agent in self.loss.agents]
            epochs = updater_kwargs["num_epochs"]
            updater_kwargs["num_epochs"] = dict.fromkeys(names, epochs) | {names[0]: 1}
        self.updater = SequentialUpdater(self.loss, **updater_kwargs)

    @staticmethod
    def _is_block(group):
        return group.block and group.name is not None

    def _freeze_agents(self):
        """Freeze the first agent of each group that asks for it."""
        asking = {group.name for group in self.groups if group.freezes_an_agent}
        for name in asking:
            agents = [agent for agent in self.loss.agents if agent.group_name == name]
            if len(agents) > 1:
                agents[0].actor.requires_grad_(False)

    def update(self, batch):
        """Update with a batch, in the mode of the scenario."""
        mode = self.data.mode
        with MODES["plain" if mode == "autocast" and self.data.dtype.itemsize > 4 else mode]():
            return self.updater(batch)

    def _critic(self, per_agent, memory):
        keys = [group.key("observation") for group in self.groups]
        if per_agent:
            net = MultiAgentMLP(
                self.groups[0].obs_dim,
                1,
                self.groups[0].n_agents,
                centralized=True,
                share_params=True,
                num_cells=[8],
            )
            return TensorDictModule(net, keys, [self.groups[0].key("state_value")])
        dims = [len(g.seen_shape) + (g.n_agents is not None) for g in self.groups]
        n_in = sum(torch.Size(g.seen_shape).numel() * (g.n_agents or 1) for g in self.groups)
        net = Reader(dims, n_in, 1 if memory is None else 8)
        if memory is None:
            return TensorDictModule(net, keys, ["state_value"])
        return add_memory(
            net,
            nn.Linear(4, 1),
            in_keys=keys,
            n_features=8,
            cell=memory,
            hidden_size=4,
            activation_class=nn.Tanh,
            out_key="state_value",
            device=None,
        )

    def batch(self):
        """What a collector would return, with actions of the present policies."""
        data, shape = self.data, self.data.shape
        batch = TensorDict({"next": self._observe()}, shape).update(self._observe())
        done = torch.rand(*shape, 1) < 0.2
        batch["is_init"] = torch.rand(*shape, 1) < 0.2
        batch["next"].update(
            {
                "reward": data.reward_scale * torch.randn(*shape, 1),
                "done": done,
                "terminated": done & (torch.rand(*shape, 1) < 0.5),
            }
        )
        batch = batch.apply(lambda x: x.to(data.dtype) if x.is_floating_point() else x)
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            batch = self.actor(batch)
        for group in self.groups:
            if data.active is not None:
                active = torch.rand(*group.shape(shape)) < data.active
                batch[group.key(data.mask_name)] = active
        if data.traj_ids:  # trajectories follow each other without a done
            batch["collector", "traj_ids"] = (torch.rand(*shape) < 0.3).cumsum(-1)
        if data.nan_ends:  # what an environment may write where an episode has terminated
            over = batch["next", "terminated"]
            for group in self.groups:
                seen = batch["next"][group.key("observation")]
                ends = over.reshape(*shape, *(1,) * (seen.ndim - len(shape))).expand_as(seen)
                if seen.is_floating_point():
                    seen[ends] = float("nan")
        if data.counted is not None:  # as of trajectories of unlike lengths
            batch["collector", "mask"] = torch.rand(*shape) < data.counted
        if data.advantage != "estimated":
            n_agents = sum(group.n_agents or 1 for group in self.groups)
            members = [n_agents, 1] if data.advantage == "agent" else [1]
            batch["advantage"] = data.reward_scale * torch.randn(*shape, *members).to(data.dtype)
            batch["value_target"] = torch.randn(*shape, *self.value_shape).to(data.dtype)
            with torch.no_grad():
                self.critic(batch)
        return batch

    def _observe(self):
        observation = TensorDict({}, self.data.shape)
        for group in self.groups:
            entries = group.observe(self.data.shape, self.data.observation_scale)
            if group.name is None:
                observation.update(entries)
            else:
                # A list of actors stacks its rows along the agent dimension of the group.
                loose = self.data.loose and not group.is_listed
                size = self.data.shape if loose else group.shape(self.data.shape)
                observation[group.path] = TensorDict(entries, size)
        return observation
