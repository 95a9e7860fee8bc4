r"""One-step cooperative games: no state, a shared payoff, everything known exactly.

They isolate what makes a team hard to train. No agent sees the others' actions, so that what is
best for one depends on what the others are about to do:

====================================  =============================================================
game                                  what it shows
====================================  =============================================================
:func:`xor_payoff`                    the best policy that all agents share may be exponentially
                                      worse than the best individual ones
:func:`permutation_payoff`            agents that are alike must act unlike
:func:`climbing_payoff`,              a joint optimum among punished neighbours: each agent alone is
:func:`penalty_payoff`                better off to stay at a safe, worse one
:class:`DifferentialGame` with        agents that improve at the same time make the team worse
:math:`r = a^1 a^2`
====================================  =============================================================
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from itertools import permutations
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from torchrl_happo.arguments import check_counts, kind_of

__all__ = [
    "DifferentialGame",
    "MatrixGame",
    "climbing_payoff",
    "penalty_payoff",
    "permutation_payoff",
    "xor_payoff",
]


class _OneStepGame(EnvBase):
    """What one-step games share: every agent acts once, all receive the same reward.

    Args:
        n_agents (int): number of agents.
        action_spec (TensorSpec): spec of the group's action.
        num_envs (int): games played at once.
        identity (bool): whether the observation says who an agent is.
        device (torch.device, optional): device of the data.
    """

    def __init__(
        self,
        n_agents: int,
        action_spec: Callable[[tuple[int, int]], TensorSpec],
        *,
        num_envs: int,
        identity: bool,
        device: torch.device | None,
    ) -> None:
        check_counts(num_envs=num_envs)
        super().__init__(device=device, batch_size=[num_envs])
        self.n_agents = n_agents
        self.identity = identity
        self.group_map = {"agents": [f"agent_{i}" for i in range(n_agents)]}
        agents = (num_envs, n_agents)
        size = n_agents if identity else 1
        self.observation_spec = Composite(
            agents=Composite(observation=Unbounded((*agents, size)), shape=agents),
            shape=(num_envs,),
        )
        self.action_spec = Composite(
            agents=Composite(action=action_spec(agents), shape=agents), shape=(num_envs,)
        )
        self.reward_spec = Unbounded((num_envs, 1))
        self.done_spec = Binary(1, shape=(num_envs, 1), dtype=torch.bool)

    @abc.abstractmethod
    def _play(self, action: Tensor) -> Tensor:
        """The team's reward ``[num_envs]`` for the actions of all agents."""

    def _observe(self) -> TensorDict:
        agents = (*self.batch_size, self.n_agents)
        n = self.n_agents
        seen = torch.eye(n, device=self.device) if self.identity else torch.ones(n, 1)
        seen = seen.to(self.device).expand(*agents, -1).clone()
        return TensorDict({"observation": seen}, agents)

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: object) -> TensorDict:
        return TensorDict({"agents": self._observe()}, self.batch_size, device=self.device)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        action = tensordict.get(("agents", "action"), None)
        if action is None:
            raise KeyError(
                f"{type(self).__name__} finds no action ('agents', 'action'); the policy has to "
                "write it."
            )
        reward = self._play(action).unsqueeze(-1)
        done = torch.ones_like(reward, dtype=torch.bool)
        return TensorDict(
            {
                "agents": self._observe(),
                "reward": reward,
                "done": done,
                "terminated": done.clone(),
            },
            self.batch_size,
            device=self.device,
        )

    def _set_seed(self, seed: int | None) -> None:
        pass


class MatrixGame(_OneStepGame):
    """A one-step cooperative game with a shared payoff.

    Each agent picks an action without seeing the others'; all receive the entry of the payoff
    tensor that their actions select, and the episode ends.

    Args:
        payoff (Tensor): the team's reward for each joint action, one dimension per agent, all of
            the same size.

    Keyword Args:
        num_envs (int): games played at once. Defaults to ``1``.
        identity (bool): if ``True``, the observation says who an agent is (one-hot), so that agents
            with shared parameters can tell themselves apart, too. Otherwise all see a constant, and
            agents that share parameters share one policy. Defaults to ``True``.
        seed (int, optional): accepted as other environments do; nothing here is random.
        device (torch.device, optional): device of the data. Defaults to ``None``.

    Raises:
        ValueError: if the agents have different numbers of actions.

    Examples:
        >>> env = MatrixGame(climbing_payoff(), num_envs=4)
        >>> data = env.reset()
        >>> data["agents", "action"] = torch.zeros(4, 2, dtype=torch.long)
        >>> env.step(data)["next", "reward"].squeeze(-1)
        tensor([11., 11., 11., 11.])
    """

    def __init__(
        self,
        payoff: Tensor,
        *,
        num_envs: int = 1,
        identity: bool = True,
        seed: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        _check_payoff(payoff)
        n_actions = payoff.shape[0]
        super().__init__(
            payoff.ndim,
            lambda agents: Categorical(n_actions, shape=agents),
            num_envs=num_envs,
            identity=identity,
            device=device,
        )
        self.payoff = payoff.to(torch.get_default_dtype())
        self.n_actions = n_actions

    def _play(self, action: Tensor) -> Tensor:
        # On an accelerator the comparison would wait for the device at every step.
        if not action.is_cuda and not ((action >= 0) & (action < self.n_actions)).all():
            raise ValueError(
                f"MatrixGame got actions from {action.min()} to {action.max()}, but there are the "
                f"actions 0 to {self.n_actions - 1}."
            )
        return self.payoff.to(action.device)[tuple(action.unbind(-1))]


class DifferentialGame(_OneStepGame):
    r"""A one-step cooperative game with continuous actions.

    Each agent picks a number :math:`a^i \in [low, high]` without seeing the others'; all receive
    :math:`r(a^1, \dots, a^n)`, and the episode ends. The default is the product of the actions,
    the smallest game in which agents that improve at the same time make the team worse: in the
    fourth quadrant the first agent had better come down and the second go up, and if both do
    so far enough they meet in the second quadrant.

    Args:
        reward (callable): from actions ``[*B, n_agents]`` to the team's reward ``[*B]``.
            Defaults to ``None``: the product of the actions.

    Keyword Args:
        n_agents (int): number of agents. Defaults to ``2``.
        low, high (float): bounds of every action. Default to ``-1`` and ``1``.
        num_envs (int): games played at once. Defaults to ``1``.
        identity (bool): as for :class:`MatrixGame`. Defaults to ``True``.
        seed (int, optional): accepted as other environments do; nothing here is random.
        device (torch.device, optional): device of the data. Defaults to ``None``.

    Raises:
        ValueError: if there is no agent or the bounds are not in order.

    Examples:
        >>> env = DifferentialGame(num_envs=2)
        >>> data = env.reset()
        >>> data["agents", "action"] = torch.tensor([[[0.5], [-0.5]], [[-1.0], [-1.0]]])
        >>> env.step(data)["next", "reward"].squeeze(-1)
        tensor([-0.2500,  1.0000])

        Any other function of the actions will do:

        >>> env = DifferentialGame(lambda a: -(a.sum(-1) - 1).square(), n_agents=3)
        >>> env.rollout(1)["next", "reward"].shape
        torch.Size([1, 1, 1])
    """

    def __init__(
        self,
        reward: Callable[[Tensor], Tensor] | None = None,
        *,
        n_agents: int = 2,
        low: float = -1.0,
        high: float = 1.0,
        num_envs: int = 1,
        identity: bool = True,
        seed: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        if n_agents < 1:
            raise ValueError(f"n_agents must be at least 1, got {n_agents}.")
        if not low < high:
            raise ValueError(f"low must be less than high, got low={low} and high={high}.")
        super().__init__(
            n_agents,
            lambda agents: Bounded(low, high, shape=(*agents, 1)),
            num_envs=num_envs,
            identity=identity,
            device=device,
        )
        self.reward = reward

    def _play(self, action: Tensor) -> Tensor:
        action = action.squeeze(-1)
        return action.prod(-1) if self.reward is None else self.reward(action)


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
    """The climbing game of Claus and Boutilier (1998): the way to the optimum leads past losses.

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


def _check_payoff(payoff: Any) -> None:
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
