"""The actions of a team whose groups have unlike distributions, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torch.distributions import Distribution

__all__ = ["SideBySide"]


class SideBySide(Distribution):
    """Distributions of several groups of agents, one agent after the other.

    Where a :class:`~tensordict.nn.CompositeDistribution` multiplies the parts of one agent's
    action, this one keeps the agents apart: log-probabilities are ``[*B, n_agents]`` for all agents
    of the team, in the order of the groups.

    Args:
        parts (mapping of NestedKey to Distribution): by the key of the group's action, a
            distribution of batch shape ``[*B, n]``, or ``[*B]`` for a group without an agent
            dimension.
        batch_dims (int): number of dimensions of ``B``.

    Example:
        >>> from torch.distributions import Categorical
        >>> parts = {
        ...     "a": Categorical(logits=torch.zeros(4, 1, 2)),
        ...     "b": Categorical(logits=torch.zeros(4, 3)),
        ... }
        >>> dist = SideBySide(parts, 1)
        >>> dist.log_prob(torch.zeros(4, 1), torch.zeros(4)).exp()[0]
        tensor([0.5000, 0.3333])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, parts: Mapping[NestedKey, Distribution], batch_dims: int) -> None:
        self.parts = dict(parts)
        self.batch_dims = batch_dims
        shapes = [part.batch_shape for part in self.parts.values()]
        agents = sum(s[batch_dims] if len(s) > batch_dims else 1 for s in shapes)
        batch_shape = torch.Size([*shapes[0][:batch_dims], agents])
        super().__init__(batch_shape=batch_shape, validate_args=False)

    def log_prob(self, *actions: Tensor | TensorDictBase) -> Tensor:
        """Return the log-probability of each agent's action, ``[*B, n_agents]``.

        Args:
            *actions (Tensor or TensorDictBase): of each group, or one tensordict with all.
        """
        first = actions[0]
        if isinstance(first, TensorDictBase):
            actions = tuple(first.get(key) for key in self.parts)
        pairs = zip(self.parts.values(), actions, strict=True)
        return self.joined([part.log_prob(action) for part, action in pairs])

    def each(self, function: Callable[..., Tensor], *others: Any) -> Tensor:
        """Join what a function returns of each group's distribution, a number of each agent.

        Args:
            function (callable): of a distribution, and of the group's part of each other argument.
            *others (SideBySide or TensorDictBase): further arguments.
        """
        return self.joined(
            [function(part, *(_part(other, key) for other in others)) for key, part in self]
        )

    def __iter__(self) -> Any:
        return iter(self.parts.items())

    def joined(self, values: list[Tensor]) -> Tensor:
        """Concatenate numbers of the agents of each group, dimensions of actions summed."""
        rows = []
        for value in values:
            row = value if value.ndim > self.batch_dims else value.unsqueeze(-1)
            surplus = row.ndim - self.batch_dims - 1
            rows.append(row.flatten(-surplus).sum(-1) if surplus else row)
        return torch.cat(rows, -1)


def _part(value: Any, key: NestedKey) -> Any:
    return value.parts[key] if isinstance(value, SideBySide) else value.get(key)
