"""How a team acts by a transformer: agent after agent, each in view of the actions before."""

from __future__ import annotations

from typing import Any, cast

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    dispatch,
)
from tensordict.nn.probabilistic import interaction_type
from tensordict.utils import unravel_key
from torch import Tensor

from torchrl_happo.networks.transformer.attention import Cache
from torchrl_happo.networks.transformer.heads import distribution_of
from torchrl_happo.networks.transformer.model import MultiAgentTransformer
from torchrl_happo.versions import draw

__all__ = ["TransformerActor"]


class TransformerActor(ProbabilisticTensorDictSequential):
    """The policy of a team whose agents choose one after the other.

    Called on a tensordict, it *acts*: it decodes the agents in order, whatever actions are there.
    :meth:`get_dist` *scores*: it returns the distributions of all agents at once, each given the
    stored actions of the agents before it, as every loss of TorchRL needs them. The two agree up
    to rounding.

    Args:
        network (TensorDictModule): wraps a :class:`MultiAgentTransformer`.
        head (ProbabilisticTensorDictModule): the distribution of the actions.

    Attributes:
        use_cache (bool): whether keys and values of the agents before are kept while acting.
            Without them every agent decodes all those before it anew. Defaults to ``True``.
    """

    def __init__(self, network: TensorDictModule, head: ProbabilisticTensorDictModule) -> None:
        super().__init__(network, head)
        self.use_cache = True
        # To act it needs no actions; to score, a batch has them.
        chosen = {part.head.group.action for part in self.transformer.team}
        read: list[NestedKey] = list(cast(Any, self).in_keys)
        self.in_keys = [key for key in read if unravel_key(key) not in chosen]

    @property
    def transformer(self) -> MultiAgentTransformer:
        """The network, which the critic shares."""
        return cast(MultiAgentTransformer, self[0].module)

    @property
    def num_agents(self) -> int:
        """Number of agents of the team, which move as one block."""
        return self.transformer.n_agents

    @dispatch(auto_batch_size=False)
    def forward(
        self, tensordict: TensorDictBase, tensordict_out: TensorDictBase | None = None, **_: Any
    ) -> TensorDictBase:
        """Choose the actions of all agents.

        Args:
            tensordict (TensorDictBase): observations, and masks where the actions have any.
            tensordict_out (TensorDictBase, optional): where to write. Defaults to ``None``: into
                ``tensordict``.

        Returns:
            the tensordict with actions, log-probabilities and parameters of the distributions.

        Raises:
            ValueError: if a mask leaves an agent no action, or a team has another size.
        """
        net, output = self.transformer, tensordict if tensordict_out is None else tensordict_out
        rows, dims = self._choose(tensordict), tensordict.batch_dims
        for part, agents in zip(net.team, net.positions, strict=True):
            columns = zip(*rows[agents], strict=True)
            for key, column in zip((part.head.group.action, *part.head.keys), columns, strict=True):
                has_agents = part.head.group.n_agents is not None
                output.set(key, torch.stack(column, dims) if has_agents else column[0])
            if part.head.mask is not None and output is not tensordict:
                output.set(part.head.mask, tensordict.get(part.head.mask))
        return cast(TensorDictBase, self[-1](output, _requires_sample=False))

    def _choose(self, tensordict: TensorDictBase) -> list[tuple[Tensor, ...]]:
        """Return action and parameters of each agent, the agents in the order of the groups."""
        net = self.transformer
        inputs = [tensordict.get(key) for part in net.team for key in part.head.group.in_keys]
        vectors = net.read(*inputs)
        places = [(g, m) for g, part in enumerate(net.team) for m in range(part.n_agents)]
        if net.decentralized:
            everyone = [net.parametrize(g, vector) for g, vector in enumerate(vectors)]
            alone = [tuple(value[..., m, :] for value in everyone[g]) for g, m in places]
            return [
                (self._draw(tensordict, *place, own), *own)
                for place, own in zip(places, alone, strict=True)
            ]
        encoded = net.encode(vectors)
        rows: list[tuple[Tensor, ...]] = [()] * len(places)
        cache: list[Cache] = []
        tokens: list[Tensor] = []
        for turn, agent in enumerate(net.choosing):
            if self.use_cache:
                last = tokens[-1] if tokens else None
                features, cache = net.decode_next(encoded[..., agent, :], last, cache)
            else:
                before = encoded[..., list(net.choosing[: turn + 1]), :]
                past = torch.stack(tokens, -2) if tokens else encoded[..., :0, :]
                features = net.decode_prefix(before, past)[..., -1, :]
            group, member = places[agent]
            parameters = net.parametrize(group, features)
            action = self._draw(tensordict, group, member, parameters)
            tokens.append(net.token(group, action, agent))
            rows[agent] = (action, *parameters)
        return rows

    def _draw(
        self, tensordict: TensorDictBase, group: int, member: int, parameters: tuple[Tensor, ...]
    ) -> Tensor:
        """Return the action of one agent."""
        head, mask = self.transformer.team[group].head, None
        if head.mask is not None:
            mask = tensordict.get(head.mask)
            mask = mask if head.group.n_agents is None else mask[..., member, :]
            _check_mask(head.mask, mask, member)
        dist = distribution_of(head, parameters, mask, member)
        return draw(self[-1], dist, interaction_type())


def _check_mask(key: NestedKey, mask: Tensor, member: int) -> None:
    """Raise if a mask forbids every action; on an accelerator the look would wait for it."""
    if mask.is_cuda or torch.compiler.is_compiling():
        return
    if not bool((mask != 0).any(-1).all()):
        raise ValueError(
            f"The mask {key!r} of shape {list(mask.shape)} forbids every action of agent {member} "
            "somewhere; leave each agent at least one, such as an action that does nothing."
        )
