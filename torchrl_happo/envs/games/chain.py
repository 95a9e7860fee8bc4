r"""A game in which the agents choose one after the other, solved exactly.

A step of a :class:`~torchrl_happo.envs.TabularGame` becomes :math:`n` sub-steps, whose states are
the prefixes :math:`x_k = (s, a^{1:k})`. Only the last sub-step is paid and discounted. Any optimum
of this game of one agent is an optimum of the team (Ye et al., 2022,
https://arxiv.org/abs/2207.11143).
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchrl_happo.envs.games.tabular import TabularGame

__all__ = ["optimal_actions", "optimal_prefix_values", "prefix_values_after"]


def prefix_values_after(game: TabularGame, value: Tensor) -> list[Tensor]:
    r"""Return the values of all prefixes by backward induction over the agents of one step.

    .. math::
        V(s, a^{1:n}) = r + \gamma \sum_{s'} P(s' | s, a) V(s'), \qquad
        V(s, a^{1:k}) = \max_{a^{k+1}} V(s, a^{1:k+1})

    Args:
        game (TabularGame): the game.
        value (Tensor): of the states of the next step, ``[*G, S]``.

    Returns:
        tensors ``[*G, S]``, ``[*G, S, k_1]``, ..., ``[*G, S, k_1, ..., k_n]``.
    """
    states = value.shape[game.batch_dims :]
    ahead = value.reshape(*value.shape[: game.batch_dims], *[1] * (game.n_agents + 1), *states)
    values = [game.reward + game.gamma * (game.transition * ahead).sum(-1)]
    for _ in range(game.n_agents):
        values.append(values[-1].amax(-1))
    return values[::-1]


def optimal_prefix_values(game: TabularGame, tolerance: float = 1e-12) -> list[Tensor]:
    """Return the best values of all prefixes, by value iteration over the chain of choices.

    Args:
        game (TabularGame): the game.
        tolerance (float): largest change of a value in the last sweep. Defaults to ``1e-12``.

    Returns:
        tensors as of :func:`prefix_values_after`.

    Example:
        >>> from torchrl_happo.envs import TabularGame, climbing_payoff
        >>> values = optimal_prefix_values(TabularGame.one_step(climbing_payoff()))
        >>> values[0].tolist(), values[1].tolist()
        ([11.0], [[11.0, 7.0, 5.0]])
    """
    value = torch.zeros_like(game.initial)
    while True:
        values = prefix_values_after(game, value)
        change = (values[0] - value).abs().max()
        value = values[0]
        if change <= tolerance:
            return prefix_values_after(game, value)


def optimal_actions(values: list[Tensor]) -> list[Tensor]:
    """Return the action of each agent that chooses best, given the choices before its own.

    Args:
        values (list of Tensor): of a single game, as of :func:`optimal_prefix_values`.

    Returns:
        for each agent its action in every state, ``[S]``.
    """
    state = torch.arange(len(values[0]))
    actions: list[Tensor] = []
    for value in values[1:]:
        actions.append(value[(state, *actions)].argmax(-1))
    return actions
