"""The payoffs of cooperative matrix games, and their check."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from torchrl_happo.arguments import kind_of

__all__ = [
    "check_payoff",
    "climbing_payoff",
    "penalty_payoff",
    "permutation_payoff",
    "xor_payoff",
]


def xor_payoff(n_agents: int = 2) -> Tensor:
    r"""The XOR game: one half of the team must play 0 and the other half 1.

    The payoff is 1 if the first half plays 0 and the second 1, or the other way round, and 0
    otherwise. Individual policies reach :math:`J^* = 1`; agents that share one policy, which plays
    1 with probability :math:`p`, reach :math:`2 (p (1 - p))^{n/2}` and so at best

    .. math:: \frac{J^*_\text{share}}{J^*} = \frac{2}{2^n}

    (Kuba et al., 2022, https://arxiv.org/abs/2109.11251, proposition 1).

    Args:
        n_agents (int): number of agents, even. Defaults to ``2``.

    Returns:
        the payoff, ``n_agents`` dimensions of size 2.

    Raises:
        ValueError: if ``n_agents`` is not even and positive.

    Example:
        >>> xor_payoff()
        tensor([[0., 1.],
                [1., 0.]])
    """
    if n_agents < 2 or n_agents % 2:
        raise ValueError(f"n_agents must be even, one half against the other, got {n_agents}.")
    payoff = torch.zeros([2] * n_agents)
    half = n_agents // 2
    payoff[(0,) * half + (1,) * half] = 1.0
    payoff[(1,) * half + (0,) * half] = 1.0
    return payoff


def permutation_payoff(n_agents: int = 3) -> Tensor:
    r"""The permutation game: no two of the agents may choose the same of their actions.

    There are as many actions as agents. The payoff is 1 if all of them are different, 0 otherwise.
    Individual policies reach 1; agents that share one policy at best :math:`n! / n^n` (Fu et al.,
    2022, https://arxiv.org/abs/2206.07505).

    Args:
        n_agents (int): number of agents and of actions. Defaults to ``3``.

    Returns:
        the payoff, ``n_agents`` dimensions of size ``n_agents``.

    Raises:
        ValueError: if ``n_agents`` is not positive.

    Example:
        >>> permutation_payoff(3).sum()
        tensor(6.)
    """
    if n_agents < 1:
        raise ValueError(f"n_agents must be at least 1, got {n_agents}.")
    payoff = torch.zeros([n_agents] * n_agents)
    for joint_action in permutations(range(n_agents)):
        payoff[joint_action] = 1.0
    return payoff


def climbing_payoff() -> Tensor:
    """The climbing game of Claus and Boutilier (1998): losses surround the optimum.

    The best joint action pays 11, but an agent that goes there alone loses 30. The safe one
    pays 5.

    Returns:
        the payoff of two agents with three actions each.

    Example:
        >>> climbing_payoff()
        tensor([[ 11., -30.,   0.],
                [-30.,   7.,   6.],
                [  0.,   0.,   5.]])
    """
    return torch.tensor([[11.0, -30.0, 0.0], [-30.0, 7.0, 6.0], [0.0, 0.0, 5.0]])


def penalty_payoff(penalty: float = -100.0) -> Tensor:
    """The penalty game of Claus and Boutilier (1998): two optima, and a loss for mixing them up.

    Args:
        penalty (float): the payoff if one agent aims at one optimum and one at the other, at most
            0. Defaults to ``-100``.

    Returns:
        the payoff of two agents with three actions each: 10 at either optimum, 2 if both agents
        play safe.

    Raises:
        ValueError: if the penalty is positive.

    Example:
        >>> penalty_payoff()
        tensor([[  10.,    0., -100.],
                [   0.,    2.,    0.],
                [-100.,    0.,   10.]])
    """
    if penalty > 0:
        raise ValueError(f"penalty must be at most 0, got {penalty}.")
    return torch.tensor([[10.0, 0.0, penalty], [0.0, 2.0, 0.0], [penalty, 0.0, 10.0]])


def check_payoff(payoff: Any) -> None:
    """Refuse payoffs that are no finite tensor with one dimension per agent, all of one size."""
    if not isinstance(payoff, Tensor):
        raise TypeError(
            f"The payoff must be a tensor with one dimension per agent, got {kind_of(payoff)}."
        )
    if payoff.ndim < 1 or len(set(payoff.shape)) != 1 or payoff.numel() == 0:
        raise ValueError(
            f"The payoff has shape {list(payoff.shape)}; it needs one dimension per agent, all "
            "of the same size, the number of actions."
        )
    if not bool(torch.isfinite(payoff).all()):
        raise ValueError("The payoff holds NaN or infinite numbers; all payoffs must be finite.")
