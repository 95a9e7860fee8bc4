"""The multi-agent transformer as a function of tensors: encode, value, decode."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchrl_happo.networks.architecture import Architecture
from torchrl_happo.networks.observations import ObservationEncoder
from torchrl_happo.networks.transformer.attention import Cache, DecoderBlock, EncoderBlock
from torchrl_happo.networks.transformer.parts import Size, TeamPart

__all__ = ["MultiAgentTransformer"]


class MultiAgentTransformer(nn.Module):
    """Encoder over the observations of a team, decoder over its actions (Wen et al., 2022).

    The encoder lets every agent attend to all others, and gives each a value. The decoder is
    causal: the policy of an agent depends on all observations and on the actions of the agents
    before it. Groups of unlike agents have projections of their own for observations, actions and
    distributions; nothing is padded.

    Args:
        team (sequence of TeamPart): the groups, whose agents are counted through.
        size (Size): of the tokens and blocks.

    Keyword Args:
        agent_embedding (bool): whether agents are told apart by a learned vector each. Without
            one the encoder treats them alike, but for what they observe. Defaults to ``True``.
        decentralized (bool): whether the policies are MLPs on the own observation in place of the
            decoder (MAT-Dec). Defaults to ``False``.
        share_params (bool): whether the MLPs of a group are one. Defaults to ``False``.
        prefix_values (bool): whether the values are those of the actions before an agent's, by the
            decoder. Defaults to ``False``: by the encoder.
        order (sequence of int, optional): positions of the agents in the order in which they
            choose. Defaults to ``None``: as the groups name them.
        output_gain (float): gain of the last layers of the policies. Defaults to ``0.01``.
        device (torch.device or str, optional): device of the parameters. Defaults to torch's.

    Attributes:
        choosing (tuple of int): the positions of the agents in the order in which they choose.

    Raises:
        ValueError: if a group has another number of agents than it was built for.
    """

    def __init__(
        self,
        team: Sequence[TeamPart],
        size: Size,
        *,
        agent_embedding: bool = True,
        decentralized: bool = False,
        share_params: bool = False,
        prefix_values: bool = False,
        order: Sequence[int] | None = None,
        output_gain: float = 0.01,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.team = tuple(team)
        self.n_agents = sum(part.n_agents for part in team)
        self.prefix_values = prefix_values
        self.decentralized = decentralized
        self.encoders: Any
        self.order: Tensor
        self.choosing = tuple(range(self.n_agents) if order is None else order)
        self.register_buffer("order", torch.tensor(self.choosing, device=device))
        features = size.features
        convolutions = Architecture((features,), nn.GELU, layer_norm=True, device=device)
        linear, norm = (lambda n_in, n_out: nn.Linear(n_in, n_out, device=device)), _norm(device)
        entries = [part.head.group.entries for part in team]
        self.encoders = nn.ModuleList(ObservationEncoder(e, convolutions) for e in entries)
        self.observations = nn.ModuleList(
            nn.Sequential(norm(e.n_features), linear(e.n_features, features), nn.GELU())
            for e in self.encoders
        )
        self.observation_norm = norm(features)
        self.encoder = nn.Sequential(
            *(EncoderBlock(features, size.heads, device) for _ in range(size.blocks))
        )
        self.values = nn.Sequential(
            linear(features, features), nn.GELU(), norm(features), linear(features, 1)
        )
        agents = (self.n_agents, features)
        self.who_sees = _embedding(agents, device) if agent_embedding else None
        self.who_acts = None
        self.decoder = nn.ModuleList()
        policies: list[nn.Module]
        if decentralized:
            mlp = Architecture((features, features), nn.GELU, layer_norm=True, device=device)
            policies = [
                mlp.mlp(e.n_features, p.head.n_outputs, p.n_agents, share_params=share_params)
                for p, e in zip(team, self.encoders, strict=True)
            ]
        else:
            self.decoder.extend(
                DecoderBlock(features, size.heads, device) for _ in range(size.blocks)
            )
            self.who_acts = _embedding(agents, device) if agent_embedding else None
            self.readers: Any = nn.ModuleList(
                ObservationEncoder([part.action], convolutions) for part in team
            )
            self.actions = nn.ModuleList(
                nn.Sequential(linear(reader.n_features, features), nn.GELU())
                for reader in self.readers
            )
            self.action_norm = norm(features)
            self.start = nn.Parameter(torch.zeros(features, device=device))
            policies = [
                nn.Sequential(
                    *(linear(features, features), nn.GELU(), norm(features)),
                    linear(features, part.head.n_outputs),
                )
                for part in team
            ]
        _initialize(self)
        for policy in policies:
            convolutions.initialize(policy, output_gain)
        convolutions.initialize(self.values, output_gain)
        self.policies = nn.ModuleList(
            part.head.parametrize(policy, (), device)
            for part, policy in zip(team, policies, strict=True)
        )

    # -- encoder -------------------------------------------------------------------------------

    def read(self, *observations: Tensor) -> list[Tensor]:
        """Return what the agents of each group observe as vectors, ``[*B, n, features]`` each.

        Args:
            *observations (Tensor): the entries of each group, ``[*B, n, *shape]``, or
                ``[*B, *shape]`` for a group without an agent dimension. What follows is not read.
        """
        remaining, vectors = list(observations), []
        for part, encoder in zip(self.team, self.encoders, strict=True):
            own = [remaining.pop(0) for _ in encoder.entries]
            vector = encoder(*own).to(self.values[0].weight.dtype)
            vectors.append(self._with_agents(part, vector, part.head.group.in_keys[0]))
        return vectors

    def encode(self, vectors: Sequence[Tensor]) -> Tensor:
        """Return the encoded observations of all agents, ``[*B, n_agents, features]``."""
        pairs = zip(self.observations, vectors, strict=True)
        tokens = torch.cat([project(vector) for project, vector in pairs], -2)
        if self.who_sees is not None:
            tokens = tokens + self.who_sees
        return cast(Tensor, self.encoder(self.observation_norm(tokens)))

    def value(self, encoded: Tensor) -> Tensor:
        """Return the value of each agent, ``[*B, n_agents, 1]``, from its features."""
        return cast(Tensor, self.values(encoded))

    # -- decoder -------------------------------------------------------------------------------

    def token(self, group: int, action: Tensor, agents: slice | int) -> Tensor:
        """Return the actions of agents of one group as tokens.

        Args:
            group (int): the group.
            action (Tensor): ``[*B, n, *shape]`` for a slice of agents, ``[*B, *shape]`` for one.
            agents (slice or int): their positions in the team.
        """
        token = self.actions[group](self.readers[group](action).to(self.start.dtype))
        return token if self.who_acts is None else token + self.who_acts[agents]

    def decode(self, encoded: Tensor, actions: Sequence[Tensor]) -> Tensor:
        """Return the features of all agents' policies, given the actions of those before each.

        Args:
            encoded (Tensor): :meth:`encode`.
            actions (sequence of Tensor): of each group.

        Returns:
            ``[*B, n_agents, features]``, the agents in the order of the groups.
        """
        tokens = []
        for index, (part, agents, action) in enumerate(
            zip(self.team, self.positions, actions, strict=True)
        ):
            has_agents = part.head.group.n_agents is not None
            own = action if has_agents else action.unsqueeze(encoded.ndim - 2)
            tokens.append(self.token(index, own, agents))
            if tokens[-1].shape[:-1] != (*encoded.shape[:-2], part.n_agents):
                raise _other_size(part.head.group.action, tokens[-1].shape[-2], part.n_agents)
        joint = torch.cat(tokens, -2)
        if self.is_sorted:
            return self.decode_prefix(encoded, joint[..., :-1, :])
        decoded = self.decode_prefix(encoded[..., self.order, :], joint[..., self.order[:-1], :])
        return decoded[..., self.order.argsort(), :]

    def decode_prefix(self, encoded: Tensor, tokens: Tensor) -> Tensor:
        """Decode the first agents in the order, all at once.

        Args:
            encoded (Tensor): of ``k`` agents, in the order in which they choose.
            tokens (Tensor): the actions of the first ``k - 1`` of them.
        """
        start = self.start.expand(*encoded.shape[:-2], 1, -1)
        tokens = self.action_norm(torch.cat([start, tokens], -2))
        for block in self.decoder:
            tokens, _ = block(tokens, encoded)
        return tokens

    def decode_next(
        self, encoded: Tensor, token: Tensor | None, cache: list[Cache]
    ) -> tuple[Tensor, list[Cache]]:
        """Decode the next agent in the order, by the keys and values of those before.

        Args:
            encoded (Tensor): of this agent, ``[*B, features]``.
            token (Tensor, optional): the action of the agent before. ``None``: there is none.
            cache (list): of each block; empty for the first agent.

        Returns:
            the agent's features ``[*B, features]``, and the cache for the next.
        """
        token = self.start.expand_as(encoded) if token is None else token
        tokens, caches = self.action_norm(token).unsqueeze(-2), []
        for index, block in enumerate(self.decoder):
            past = cache[index] if cache else None
            tokens, present = block(tokens, encoded.unsqueeze(-2), past=past)
            caches.append(present)
        return tokens.squeeze(-2), caches

    def parametrize(self, group: int, features: Tensor) -> tuple[Tensor, ...]:
        """Return the parameters of the distribution of a group's agents, from their features."""
        outputs = self.policies[group](features)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    # -- the whole ----------------------------------------------------------------------------

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the parameters of all groups' distributions, given the actions taken.

        Args:
            *inputs (Tensor): the observations of :meth:`read`, then the actions of each group,
                which decentralised policies do not read.
        """
        vectors = self.read(*inputs)
        features = vectors if self.decentralized else self._decoded(vectors, inputs)
        parameters: list[Tensor] = []
        for index, part in enumerate(self.team):
            own = self.parametrize(index, features[index])
            has_agents = part.head.group.n_agents is not None
            parameters += own if has_agents else [value.squeeze(-2) for value in own]
        return tuple(parameters)

    def _decoded(self, vectors: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        decoded = self.decode(self.encode(vectors), inputs[-len(self.team) :])
        return [decoded[..., agents, :] for agents in self.positions]

    @property
    def positions(self) -> Iterator[slice]:
        """The positions of each group's agents in the team."""
        start = 0
        for part in self.team:
            yield slice(start, start + part.n_agents)
            start += part.n_agents

    @property
    def is_sorted(self) -> bool:
        """Whether the agents choose in the order of the groups."""
        return self.choosing == tuple(range(self.n_agents))

    def _with_agents(self, part: TeamPart, vector: Tensor, key: Any) -> Tensor:
        """Give a group without an agent dimension one; refuse a group of another size."""
        if part.head.group.n_agents is None:
            return vector.unsqueeze(-2)
        if vector.ndim < 2 or vector.shape[-2] != part.n_agents:
            raise _other_size(key, vector.shape[-2] if vector.ndim > 1 else 1, part.n_agents)
        return vector

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        given = state_dict.get(f"{prefix}order")
        if given is not None and tuple(given.tolist()) != self.choosing:
            raise ValueError(
                f"The state is of agents that choose in the order {given.tolist()}, but these "
                f"choose in the order {list(self.choosing)}; build the transformer with "
                f"order={given.tolist()}."
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _other_size(key: Any, got: int, wanted: int) -> ValueError:
    return ValueError(
        f"The entry {key!r} is of {got} agents, but the transformer was built for {wanted}; build "
        "it of an environment whose teams are as large, and mark agents that are missing for a "
        "while in an entry 'active'."
    )


def _norm(device: torch.device | str | None) -> Any:
    return lambda size: nn.LayerNorm(size, device=device)


def _embedding(shape: tuple[int, int], device: torch.device | str | None) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, device=device) / math.sqrt(shape[-1]))


@torch.no_grad()
def _initialize(net: nn.Module) -> None:
    """Write orthogonal weights, large before a GELU and small elsewhere, and zero biases."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight, 0.01)
            nn.init.zeros_(module.bias)
    for module in net.modules():
        if isinstance(module, nn.Sequential):
            for linear, behind in zip(module, list(module)[1:], strict=False):
                if isinstance(linear, nn.Linear) and isinstance(behind, nn.GELU):
                    nn.init.orthogonal_(linear.weight, math.sqrt(2))
