r"""Advantages of a chain of sub-steps, in which the agents choose one after the other.

A step of a team of :math:`n` agents is taken as :math:`n` steps of one: the state of sub-step
:math:`k` is :math:`x_k = (s, a^{1:k})`, only the last one is paid and discounted,

.. math::
    \delta_k = V(x_{k+1}) - V(x_k), \quad k < n - 1, \qquad
    \delta_{n-1} = r + \gamma V(x'_0) - V(x_{n-1}),

and the advantages are those of GAE over the chain of all sub-steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives.value import GAE
from torchrl.objectives.value.functional import generalized_advantage_estimate

__all__ = ["PrefixGAE", "chain_advantage"]


def chain_advantage(
    value: Tensor,
    next_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor,
    *,
    gamma: float | Tensor,
    lmbda: float | Tensor,
) -> tuple[Tensor, Tensor]:
    r"""Return advantages and returns of every agent's choice, given the choices before it.

    Args:
        value (Tensor): of the prefixes, ``[*B, T, n_agents, 1]``.
        next_value (Tensor): of the next step's empty prefix, ``[*B, T, 1]``.
        reward (Tensor): the team's, ``[*B, T, 1]``.
        done (Tensor): whether a trajectory ends behind a step, ``[*B, T, 1]``.
        terminated (Tensor): whether an episode does, ``[*B, T, 1]``.

    Keyword Args:
        gamma (float or Tensor): discount of a step, at its last sub-step.
        lmbda (float or Tensor): decay of GAE over a step; over a sub-step its ``n``-th root.

    Returns:
        two tensors of the shape of ``value``.

    Example:
        >>> value = torch.tensor([1.0, 3.0]).reshape(1, 2, 1)  # one step of two agents
        >>> zero, end = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
        >>> advantage, _ = chain_advantage(
        ...     value, zero, torch.full((1, 1), 7.0), end, end, gamma=0.9, lmbda=0.0
        ... )
        >>> advantage.flatten()
        tensor([2., 4.])
    """
    n_agents = value.shape[-2]
    gamma = torch.as_tensor(gamma, dtype=value.dtype, device=value.device)
    lmbda = torch.as_tensor(lmbda, dtype=value.dtype, device=value.device)
    ahead = next_value * ~terminated
    later = torch.cat([value[..., 1:, :], (reward + gamma * ahead).unsqueeze(-2)], -2)
    delta = (later - value).squeeze(-1)
    # Inside a step: sums over the choices from an agent's own on.
    decay = lmbda ** (1 / n_agents)
    place = torch.arange(n_agents, device=value.device)
    distance = place.unsqueeze(-1) - place
    inside = delta @ torch.where(distance >= 0, decay ** distance.clamp_min(0), 0.0)
    # From step to step: the sums of the first agents, discounted.
    none = torch.zeros_like(next_value)
    first, _ = generalized_advantage_estimate(
        gamma, lmbda, none, none, inside[..., :1], done, terminated=done
    )
    behind = gamma * ~done * torch.cat([first[..., 1:, :], none[..., :1, :]], -2)
    advantage = (inside + decay ** (n_agents - place) * behind).unsqueeze(-1)
    return advantage, advantage + value


class PrefixGAE(GAE):
    """GAE of a critic whose values are those of prefixes (see :func:`chain_advantage`).

    Keyword Args:
        actions (sequence of NestedKey): the actions that the critic reads. At the next step none
            is known yet: only the value of the empty prefix is taken there.
        order (sequence of int): the positions of the agents in the order in which they choose.
        **kwargs: as for :class:`~torchrl.objectives.value.GAE`.
    """

    def __init__(
        self, *, actions: Sequence[NestedKey], order: Sequence[int], **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.actions = list(actions)
        self.chain = list(order)

    def forward(self, tensordict: TensorDictBase, *_: Any, **__: Any) -> TensorDictBase:
        """Write values, advantages and returns of each agent, ``[*B, T, n_agents, 1]``."""
        keys, network = self.tensor_keys, cast(Any, self.value_network)
        after, ahead = tensordict.get("next"), TensorDict({}, tensordict.batch_size)
        for key in network.in_keys:
            if key in self.actions:  # an empty prefix reads none, whatever stands there
                ahead.set(key, torch.zeros_like(tensordict.get(key)))
                continue
            later = after.get(key)
            # Collectors may leave out what follows the end of a trajectory (compact_obs).
            ahead.set(key, torch.where(later.isnan(), tensordict.get(key), later))
        with torch.no_grad():
            value = network(tensordict.select(*network.in_keys).copy()).get(keys.value)
            next_value = network(ahead).get(keys.value)[..., self.chain[0], :]
        entries = (after.get(key) for key in (keys.reward, keys.done, keys.terminated))
        of_team = [_of_team(entry, value) for entry in entries]
        chained = value[..., self.chain, :]
        results = chain_advantage(chained, next_value, *of_team, gamma=self.gamma, lmbda=self.lmbda)
        back = sorted(range(len(self.chain)), key=self.chain.__getitem__)
        tensordict.set(keys.value, value)
        for key, result in zip((keys.advantage, keys.value_target), results, strict=True):
            tensordict.set(key, result[..., back, :])
        return tensordict


def _of_team(entry: Tensor, value: Tensor) -> Tensor:
    """Return the team's reward, or end: that of its agents, who are paid the same."""
    if entry.ndim < value.ndim:
        return entry
    return entry.all(-2) if entry.dtype == torch.bool else entry.select(-2, 0)
