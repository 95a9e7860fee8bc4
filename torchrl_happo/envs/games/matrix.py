r"""One-step cooperative games: no state, a shared payoff, everything known exactly.

Each isolates one difficulty of training a team. No agent sees the others' actions, so the best
action of one depends on the actions that the others are about to take:

====================================  =============================================================
game                                  difficulty
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

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from torchrl_happo.arguments import check_counts
from torchrl_happo.envs.games.payoffs import check_payoff

__all__ = ["DifferentialGame", "MatrixGame"]


class _OneStepGame(EnvBase):
    """The base of one-step games: every agent acts once, all receive the same reward.

    Args:
        n_agents (int): number of agents.
        action_spec (callable): from the shape of the agents to the spec of the group's action.
        num_envs (int): games played at once.
        identity (bool): whether an agent observes its identity.
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
        """Return the team's reward ``[num_envs]`` for the actions of all agents."""

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
        identity (bool): if ``True``, agents observe their identity (one-hot), so that agents with
            shared parameters may act differently. Otherwise all observe a constant, and agents
            that share parameters share one policy. Defaults to ``True``.
        seed (int, optional): accepted as other environments do; nothing here is random.
        device (torch.device, optional): device of the data. Defaults to ``None``.

    Raises:
        ValueError: if the agents have different numbers of actions.

    Examples:
        >>> from torchrl_happo.envs import climbing_payoff
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
        check_payoff(payoff)
        n_actions = payoff.shape[0]
        super().__init__(
            payoff.ndim,
            lambda agents: Categorical(n_actions, shape=agents),
            num_envs=num_envs,
            identity=identity,
            device=device,
        )
        self.payoff = payoff.to(self.device, torch.get_default_dtype())
        self.n_actions = n_actions

    def _play(self, action: Tensor) -> Tensor:
        # On an accelerator the comparison would wait for the device at every step.
        if action.is_cpu and not ((action >= 0) & (action < self.n_actions)).all():
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
