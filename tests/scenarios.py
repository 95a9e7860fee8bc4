"""Strategies for teams, batches and hyperparameters that a user may legitimately combine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from hypothesis import strategies as st
from newer import PopArtValueNorm, RunningValueNorm
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torch.distributions import Categorical
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import (
    MLP,
    IndependentNormal,
    MaskedCategorical,
    MultiAgentMLP,
    OneHotCategorical,
    ProbabilisticActor,
    TanhNormal,
)

from torchrl_happo import ActorList, SequentialUpdater
from torchrl_happo.networks.actors import CentralizedMLP
from torchrl_happo.networks.recurrent import add_memory

DISTRIBUTIONS = {
    "tanh": TanhNormal,
    "normal": IndependentNormal,
    "categorical": Categorical,
    "masked": MaskedCategorical,
    "one-hot": OneHotCategorical,
}


@dataclass(frozen=True)
class Group:
    """One group of the team.

    ``name=None`` puts its keys at the root, ``block`` makes its agents one unit with one network,
    and ``listed`` gives each an actor object of its own where a stack of networks is usual.
    """

    name: str | None
    kind: str
    n_agents: int | None
    obs_dim: int
    size: int
    block: bool
    listed: bool

    def key(self, leaf):
        return leaf if self.name is None else (self.name, leaf)

    @property
    def continuous(self):
        return self.kind in ("tanh", "normal")

    @property
    def n_choices(self):
        return self.size + 1

    def shape(self, batch):
        return [*batch] if self.n_agents is None else [*batch, self.n_agents]

    def actor(self, *, saturated):
        if self.listed and self.n_agents is not None and not self.block:
            member = replace(self, n_agents=None)
            return ActorList([member.actor(saturated=saturated) for _ in range(self.n_agents)])
        n_outputs = 2 * self.size if self.continuous else self.n_choices
        mlp = {"num_cells": [8], "activation_class": nn.Tanh}
        if self.n_agents is None:
            net = MLP(in_features=self.obs_dim, out_features=n_outputs, **mlp)
        else:
            net = MultiAgentMLP(
                self.obs_dim,
                n_outputs,
                self.n_agents,
                centralized=False,
                share_params=self.block,
                **mlp,
            )
        if self.continuous:
            if saturated:  # at the bounds, if there are any
                with torch.no_grad():
                    list(net.parameters())[-1][..., : self.size] += 8.0
            net = nn.Sequential(net, NormalParamExtractor())
        names = ["loc", "scale"] if self.continuous else ["logits"]
        keys = {name: self.key(name) for name in names}
        masks = {"mask": self.key("action_mask")} if self.kind == "masked" else {}
        return ProbabilisticActor(
            TensorDictModule(net, in_keys=[self.key("observation")], out_keys=list(keys.values())),
            in_keys={**keys, **masks},
            out_keys=[self.key("action")],
            distribution_class=DISTRIBUTIONS[self.kind],
            return_log_prob=True,
        )

    def observe(self, batch, scale):
        shape = self.shape(batch)
        entries = {"observation": scale * torch.randn(*shape, self.obs_dim)}
        if self.kind == "masked":
            mask = torch.rand(*shape, self.n_choices) < 0.5
            mask[..., 0] |= ~mask.any(-1)
            entries["action_mask"] = mask
        return entries


@st.composite
def teams(draw):
    """One to three groups, or a single agent at the root."""
    sizes = {"obs_dim": st.integers(1, 4), "size": st.integers(1, 3)}
    kinds = st.sampled_from(list(DISTRIBUTIONS))
    if draw(st.integers(0, 5)) == 0:
        build = partial(Group, None, n_agents=None, block=False, listed=False)
        return [draw(st.builds(build, kind=kinds, **sizes))]
    names = ["agents", "speakers", "listeners"][: draw(st.integers(1, 3))]
    return [
        draw(
            st.builds(
                Group,
                st.just(name),
                kinds,
                st.one_of(st.none(), st.integers(1, 3)),
                block=st.integers(0, 3).map(lambda i: i == 0),
                listed=st.integers(0, 3).map(lambda i: i == 0),
                **sizes,
            )
        )
        for name in names
    ]


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
        "replay_buffer": st.integers(0, 4).map(lambda i: i == 0),
        "seed": st.integers(0, 3),
        "optimizer": st.sampled_from(
            [
                partial(torch.optim.Adam, lr=1e-3),
                partial(torch.optim.AdamW, lr=0.05),
                partial(torch.optim.SGD, lr=0.01, momentum=0.9),
                partial(torch.optim.Adam, lr=torch.tensor(1e-3)),
                partial(torch.optim.Adafactor, lr=0.01),
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
        if updater_kwargs["replay_buffer"]:
            size = updater_kwargs.pop("minibatch_size") or 4
            updater_kwargs["replay_buffer"] = ReplayBuffer(
                storage=LazyTensorStorage(1000),
                sampler=SamplerWithoutReplacement(),
                batch_size=size,
            )
        else:
            del updater_kwargs["replay_buffer"]
        if loss_kwargs.get("kl_split") == "greedy":
            updater_kwargs["order"] = "random"  # the budget's own
        self.groups, self.data = groups, data
        actors = [group.actor(saturated=data.saturated).to(data.dtype) for group in groups]
        self.actor = TensorDictSequential(*actors)
        self.alone = len(groups) == 1
        per_agent = per_agent_critic and self.alone and groups[0].n_agents is not None
        per_agent = per_agent and critic_memory is None
        self.value_shape = [groups[0].n_agents, 1] if per_agent else [1]
        self.critic = self._critic(per_agent, critic_memory).to(data.dtype)
        self.loss = loss_class(
            actors[0] if self.alone else dict(zip([g.name for g in groups], actors, strict=True)),
            self.critic,
            blocks=[group.name for group in groups if self._is_block(group)],
            **loss_kwargs,
        )
        if updater_kwargs.pop("by_agent", False):  # settings of each agent
            names = [agent.name for agent in self.loss.agents]
            epochs = updater_kwargs["num_epochs"]
            updater_kwargs["num_epochs"] = dict.fromkeys(names, epochs) | {names[0]: 1}
        self.updater = SequentialUpdater(self.loss, **updater_kwargs)

    @staticmethod
    def _is_block(group):
        return group.block and group.name is not None

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
        net = CentralizedMLP(
            [1 if group.n_agents is None else 2 for group in self.groups],
            in_features=sum(group.obs_dim * (group.n_agents or 1) for group in self.groups),
            out_features=1 if memory is None else 8,
            num_cells=[8],
        )
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
                seen[ends] = float("nan")
        if data.counted is not None:  # as of trajectories of unlike lengths
            batch["collector", "mask"] = torch.rand(*shape) < data.counted
        if data.advantage != "estimated":
            members = [self.loss.num_agents, 1] if data.advantage == "agent" else [1]
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
                observation[group.name] = TensorDict(entries, group.shape(self.data.shape))
        return observation
