"""Groups of agents that the scenarios are made of: what they see, their networks, their actions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from hypothesis import strategies as st
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.modules import (
    MLP,
    IndependentNormal,
    MaskedCategorical,
    MultiAgentConvNet,
    MultiAgentMLP,
    OneHotCategorical,
    ProbabilisticActor,
    TanhNormal,
)
from torchrl.modules.models import ConvNet

from torchrl_happo import ActorList
from torchrl_happo.networks.discrete import IntMaskedCategorical, MultiCategorical

DISTRIBUTIONS = {
    "tanh": TanhNormal,
    "normal": IndependentNormal,
    "categorical": Categorical,
    "masked": MaskedCategorical,
    "masked by numbers": IntMaskedCategorical,
    "one-hot": OneHotCategorical,
    "multi": MultiCategorical,
    "multi, masked": MultiCategorical,
}
#: What agents see, and what stands around or in the place of the network of a stack or a block.
SIGHTS = ["floats", "floats", "floats", "whole numbers", "booleans", "image"]
AROUND_STACKS = [
    *["plain"] * 4,
    *("subclass", "hook", "temperature", "numbers", "frozen encoder", "frozen agent", "rows"),
]
BLOCKS = ["shared stack", "attention", "plain network", "list of networks"]
SIDE, CHANNELS = 4, 2  # of images, and of what is seen in them


class Cast(nn.Module):
    """Whole numbers and booleans as floats of the network's type; bytes of images up to 1."""

    def __init__(self):
        super().__init__()
        self.register_buffer("unit", torch.ones(()))

    def forward(self, seen):
        scale = 255 if seen.dtype == torch.uint8 else 1
        return seen.to(self.unit.dtype) / scale


class Bounded(MultiAgentMLP):
    """A stack whose forward does more."""

    def forward(self, *inputs):
        return 2 * torch.tanh(super().forward(*inputs))


class Cool(nn.Module):
    """A temperature outside the stack."""

    def forward(self, outputs):
        return outputs / 0.7


class Identified(nn.Module):
    """Adds to each agent's outputs what depends on its number."""

    def forward(self, outputs):
        return outputs + torch.arange(outputs.shape[-2]).unsqueeze(-1).to(outputs) / 3


class Attention(nn.Module):
    """A network of all agents that mixes them."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.encode, self.decode = nn.Linear(n_in, 8), nn.Linear(8, n_out)

    def forward(self, seen):
        seen = self.encode(seen)
        weights = (seen @ seen.transpose(-1, -2)).softmax(-1)
        return self.decode((seen + weights @ seen).tanh())


class Each(nn.Module):
    """A network of its own for each agent, in a list."""

    def __init__(self, n_in, n_out, n_agents):
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(n_in, 8), nn.Tanh(), nn.Linear(8, n_out))
            for _ in range(n_agents)
        )

    def forward(self, seen):
        return torch.stack([net(seen[..., i, :]) for i, net in enumerate(self.nets)], -2)


class Deviating(nn.Module):
    """Standard deviations in rows beside the stack, or beside one agent's network."""

    def __init__(self, net, *shape):
        super().__init__()
        self.net = net
        self.log_std = nn.Parameter(torch.zeros(*shape))

    def forward(self, seen):
        loc = self.net(seen)
        return loc, self.log_std.exp().expand_as(loc)


@dataclass(frozen=True)
class Group:
    """One group of the team.

    ``name=None`` puts its keys at the root, ``block`` makes its agents one unit with one network,
    and ``listed`` gives each an actor object of its own where a stack of networks is usual.
    ``around`` says what stands around a stack, ``mixes`` which network a block has, and ``deep``
    puts the group one level deeper.
    """

    name: str | None
    kind: str
    n_agents: int | None
    obs_dim: int
    size: int
    block: bool
    listed: bool
    sight: str = "floats"
    around: str = "plain"
    mixes: str = "shared stack"
    deep: bool = False

    @property
    def path(self):
        return () if self.name is None else ("team", self.name) if self.deep else (self.name,)

    def key(self, leaf):
        return (*self.path, leaf) if self.path else leaf

    @property
    def continuous(self):
        return self.kind in ("tanh", "normal")

    @property
    def nvec(self):
        return (2, self.size + 1)

    @property
    def n_choices(self):
        return sum(self.nvec) if self.kind.startswith("multi") else self.size + 1

    @property
    def seen_shape(self):
        """Shape of what one agent observes."""
        return (1, SIDE, SIDE) if self.sight == "image" else (self.obs_dim,)

    @property
    def n_features(self):
        """Size of what the hidden layers read."""
        return CHANNELS * (SIDE - 1) ** 2 if self.sight == "image" else self.obs_dim

    @property
    def is_listed(self):
        return self.listed and self.n_agents is not None and not self.block

    @property
    def is_stack(self):
        return self.n_agents is not None and not self.block and not self.listed

    @property
    def freezes_an_agent(self):
        return self.is_stack and self.around == "frozen agent" and self.n_agents > 1

    def shape(self, batch):
        return [*batch] if self.n_agents is None else [*batch, self.n_agents]

    def _encoder(self):
        """Return the modules in front of the hidden layers."""
        if self.sight == "floats":
            return []
        if self.sight != "image":
            return [Cast()]
        sizes = {"num_cells": [CHANNELS], "kernel_sizes": 2, "strides": 1}
        if self.n_agents is None:
            return [Cast(), ConvNet(in_features=1, **sizes)]
        return [
            Cast(),
            MultiAgentConvNet(
                self.n_agents,
                centralized=False,
                share_params=self.block,
                in_features=1,
                **sizes,
            ),
        ]

    def _net(self, n_outputs):
        mlp = {"num_cells": [8], "activation_class": nn.Tanh}
        n_in = self.n_features
        if self.n_agents is None:
            return [MLP(in_features=n_in, out_features=n_outputs, **mlp)]
        if self.block and self.mixes == "attention":
            return [Attention(n_in, n_outputs)]
        if self.block and self.mixes == "list of networks":
            return [Each(n_in, n_outputs, self.n_agents)]
        if self.block and self.mixes == "plain network":
            return [MLP(in_features=n_in, out_features=n_outputs, **mlp)]
        kind = Bounded if self.is_stack and self.around == "subclass" else MultiAgentMLP
        net = kind(
            n_in, n_outputs, self.n_agents, centralized=False, share_params=self.block, **mlp
        )
        if not self.is_stack:
            return [net]
        if self.around == "hook":
            net.register_forward_hook(lambda module, inputs, output: output / 2)
        before = [nn.Linear(n_in, n_in).requires_grad_(False)]
        after = {"temperature": [Cool()], "numbers": [Identified()]}
        before = before if self.around == "frozen encoder" else []
        return [*before, net, *after.get(self.around, [])]

    def actor(self, *, saturated):
        if self.is_listed:
            member = replace(self, n_agents=None)
            return ActorList([member.actor(saturated=saturated) for _ in range(self.n_agents)])
        has_rows = self.continuous and self.is_stack and self.around == "rows"
        n_outputs = self.n_choices
        if self.continuous:
            n_outputs = self.size if has_rows else 2 * self.size
        net = nn.Sequential(*self._encoder(), *self._net(n_outputs))
        if self.continuous:
            if saturated:  # at the bounds, if there are any
                with torch.no_grad():
                    list(net.parameters())[-1][..., : self.size] += 8.0
            net = (
                Deviating(net, self.n_agents, self.size)
                if has_rows
                else nn.Sequential(net, NormalParamExtractor())
            )
        names = ["loc", "scale"] if self.continuous else ["logits"]
        keys = {name: self.key(name) for name in names}
        masks = {"mask": self.key("action_mask")} if "masked" in self.kind else {}
        multi = {"nvec": self.nvec} if self.kind.startswith("multi") else {}
        return ProbabilisticActor(
            TensorDictModule(net, in_keys=[self.key("observation")], out_keys=list(keys.values())),
            in_keys={**keys, **masks},
            out_keys=[self.key("action")],
            distribution_class=DISTRIBUTIONS[self.kind],
            distribution_kwargs=multi,
            return_log_prob=True,
        )

    def observe(self, batch, scale):
        shape = self.shape(batch)
        if self.sight == "image":
            seen = torch.randint(256, (*shape, *self.seen_shape), dtype=torch.uint8)
        elif self.sight == "whole numbers":
            seen = torch.randint(-3, 4, (*shape, *self.seen_shape))
        elif self.sight == "booleans":
            seen = torch.rand(*shape, *self.seen_shape) < 0.5
        else:
            seen = scale * torch.randn(*shape, *self.seen_shape)
        entries = {"observation": seen}
        if "masked" in self.kind:
            mask = torch.rand(*shape, self.n_choices) < 0.5
            for part in mask.split(list(self.nvec), -1) if "multi" in self.kind else [mask]:
                part[..., 0] |= ~part.any(-1)
            entries["action_mask"] = mask.long() if self.kind == "masked by numbers" else mask
        return entries


@st.composite
def teams(draw):
    """One to three groups, or a single agent at the root."""
    sizes = {"obs_dim": st.integers(1, 4), "size": st.integers(1, 3)}
    kinds, sights = st.sampled_from(list(DISTRIBUTIONS)), st.sampled_from(SIGHTS)
    if draw(st.integers(0, 5)) == 0:
        build = partial(Group, None, n_agents=None, block=False, listed=False)
        return [draw(st.builds(build, kind=kinds, sight=sights, **sizes))]
    names = ["agents", "speakers", "listeners"][: draw(st.integers(1, 3))]
    deep = len(names) > 1 and draw(st.integers(0, 3)) == 0
    return [
        draw(
            st.builds(
                Group,
                st.just(name),
                kinds,
                st.one_of(st.none(), st.integers(1, 3)),
                block=st.integers(0, 3).map(lambda i: i == 0),
                listed=st.integers(0, 3).map(lambda i: i == 0),
                sight=sights,
                around=st.sampled_from(AROUND_STACKS),
                mixes=st.sampled_from(BLOCKS),
                deep=st.just(deep),
                **sizes,
            )
        )
        for name in names
    ]
