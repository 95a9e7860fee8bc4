r"""Finite Markov games that are solved exactly: values, advantages, occupancies without samples.

A cooperative Markov game has states :math:`s`, one action :math:`a^i` per agent, transitions
:math:`P(s' | s, a)`, a shared reward :math:`r(s, a)` and a discount :math:`\gamma`. Under a joint
policy :math:`\pi(a | s) = \prod_i \pi^i(a^i | s)` everything is linear algebra:

.. math::
    V = (I - \gamma P_\pi)^{-1} r_\pi, \qquad
    Q(s, a) = r(s, a) + \gamma \sum_{s'} P(s' | s, a) V(s'), \qquad
    \rho = (I - \gamma P_\pi^\top)^{-1} d.

The tests prove the theory of HAPPO and HATRPO on such games, and not on learning curves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

__all__ = ["TabularGame", "TabularGameEnv"]

#: One table of action probabilities ``[*G, S, k_i]`` for each agent.
Policies = Sequence[Tensor]


class TabularGame:
    r"""A finite cooperative Markov game, or a batch of them.

    Args:
        transition (Tensor): probabilities :math:`P(s' | s, a)`, ``[*G, S, k_1, ..., k_n, S]`` for
            ``S`` states and ``n`` agents, the i-th of which has ``k_i`` actions.
        reward (Tensor): the team's :math:`r(s, a)`, ``[*G, S, k_1, ..., k_n]``.

    Keyword Args:
        gamma (float): discount, in [0, 1). Defaults to ``0.9``.
        initial (Tensor, optional): distribution :math:`d` of the first state, ``[*G, S]``.
            Defaults to ``None``: uniform.
        batch_dims (int): number of dimensions ``*G`` of a batch of games. Defaults to ``0``.

    Raises:
        ValueError: if shapes do not fit or ``gamma`` is out of range.

    Examples:
        Two agents want to be in the second of two states, where only both together can bring them:

        >>> transition = torch.zeros(2, 2, 2, 2, dtype=torch.float64)
        >>> transition[..., 0] = 1.0
        >>> transition[:, 1, 1] = torch.tensor([0.0, 1.0], dtype=torch.float64)
        >>> reward = torch.tensor([0.0, 1.0], dtype=torch.float64)
        >>> game = TabularGame(transition, reward[:, None, None].expand(2, 2, 2), gamma=0.5)
        >>> policies = [torch.full((2, 2), 0.5, dtype=torch.float64) for _ in range(2)]
        >>> game.value(policies)
        tensor([0.2500, 1.2500], dtype=torch.float64)

        What the first agent's second action is worth depends on the second agent's (in columns):

        >>> game.multi_agent_advantage(policies, [0])[0]
        tensor([[-0.1250],
                [ 0.1250]], dtype=torch.float64)
        >>> game.multi_agent_advantage(policies, [0], given=[1])[0]
        tensor([[ 0.0000, -0.2500],
                [ 0.0000,  0.2500]], dtype=torch.float64)
    """

    def __init__(
        self,
        transition: Tensor,
        reward: Tensor,
        *,
        gamma: float = 0.9,
        initial: Tensor | None = None,
        batch_dims: int = 0,
    ) -> None:
        if not 0 <= gamma < 1:
            raise ValueError(f"gamma must be at least 0 and less than 1, got {gamma}.")
        n_agents = reward.ndim - batch_dims - 1
        if n_agents < 1 or transition.shape != (*reward.shape, reward.shape[batch_dims]):
            raise ValueError(
                f"The transition has shape {list(transition.shape)} and the reward "
                f"{list(reward.shape)} with batch_dims={batch_dims}; the reward must be "
                "[*G, S, k_1, ..., k_n] and the transition have one more dimension of size S."
            )
        self.transition = transition
        self.reward = reward
        self.gamma = gamma
        self.batch_dims = batch_dims
        self.n_agents = n_agents
        self.n_states = reward.shape[batch_dims]
        self.n_actions = tuple(reward.shape[batch_dims + 1 :])
        if initial is None:
            initial = torch.full_like(reward.flatten(batch_dims + 1)[..., 0], 1 / self.n_states)
        self.initial = initial

    @classmethod
    def random(
        cls,
        n_states: int,
        n_actions: Sequence[int],
        *,
        gamma: float = 0.9,
        batch_size: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> TabularGame:
        """Return a game with random transitions and normal rewards, in double precision.

        Args:
            n_states (int): number of states.
            n_actions (sequence of int): number of actions of each agent.

        Keyword Args:
            gamma (float): discount. Defaults to ``0.9``.
            batch_size (sequence of int): shape ``*G`` of a batch of games. Defaults to ``()``.
            generator (torch.Generator, optional): source of the randomness.
        """
        shape = (*batch_size, n_states, *n_actions)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        return cls(
            (2 * normal(*shape, n_states)).softmax(-1),
            normal(*shape),
            gamma=gamma,
            initial=normal(*batch_size, n_states).softmax(-1),
            batch_dims=len(batch_size),
        )

    @classmethod
    def one_step(cls, payoff: Tensor) -> TabularGame:
        """Return a matrix game as a game with one state and no future, in double precision.

        Args:
            payoff (Tensor): the team's reward for each joint action, one dimension per agent.

        Example:
            >>> game = TabularGame.one_step(torch.eye(2))
            >>> game.expected_return([torch.tensor([[0.5, 0.5]], dtype=torch.float64)] * 2)
            tensor(0.5000, dtype=torch.float64)
        """
        reward = payoff.double().unsqueeze(0)
        return cls(torch.ones_like(reward).unsqueeze(-1), reward, gamma=0.0)

    def random_policies(
        self, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """Return a random stochastic policy for each agent.

        Keyword Args:
            temperature (float): the lower, the nearer to deterministic. Defaults to ``1.0``.
            generator (torch.Generator, optional): source of the randomness.
        """
        shape = self.reward.shape[: self.batch_dims + 1]
        logits = [
            torch.randn(*shape, k, generator=generator, dtype=self.reward.dtype)
            for k in self.n_actions
        ]
        return [(table / temperature).softmax(-1) for table in logits]

    # -- the joint policy ----------------------------------------------------------------------

    def joint_policy(self, policies: Policies) -> Tensor:
        r"""Return :math:`\pi(a | s) = \prod_i \pi^i(a^i | s)`, ``[*G, S, k_1, ..., k_n]``."""
        joint = torch.ones_like(self.reward)
        for agent, policy in enumerate(policies):
            joint = joint * self._along(policy, agent)
        return joint

    def mean(self, values: Tensor, policies: Policies, agents: Iterable[int]) -> Tensor:
        """Average a function of state and actions over the actions of some agents.

        Args:
            values (Tensor): ``[*G, S, k_1, ..., k_n]``.
            policies (sequence of Tensor): the policies.
            agents (iterable of int): whose actions to average over. Their dimensions stay, with
                size 1.
        """
        for agent in agents:
            values = (values * self._along(policies[agent], agent)).sum(self._dim(agent), True)
        return values

    def _dim(self, agent: int) -> int:
        return self.batch_dims + 1 + agent

    def _along(self, policy: Tensor, agent: int) -> Tensor:
        """Return a policy's table with its actions along the dimension of its agent."""
        before, after = [1] * agent, [1] * (self.n_agents - agent - 1)
        return policy.reshape(*policy.shape[:-1], *before, policy.shape[-1], *after)

    # -- exact values --------------------------------------------------------------------------

    def _bellman(self, policies: Policies) -> tuple[Tensor, Tensor]:
        r""":math:`I - \gamma P_\pi` and the joint policy with the actions in one dimension."""
        joint = self.joint_policy(policies).flatten(self.batch_dims + 1)
        transition = self.transition.flatten(self.batch_dims + 1, -2)
        mean_transition = (joint.unsqueeze(-2) @ transition).squeeze(-2)
        identity = torch.eye(self.n_states).to(mean_transition)
        return identity - self.gamma * mean_transition, joint

    def value(self, policies: Policies) -> Tensor:
        r"""Return the value :math:`V(s)` by a linear solve, ``[*G, S]``."""
        matrix, joint = self._bellman(policies)
        mean_reward = (joint * self.reward.flatten(self.batch_dims + 1)).sum(-1)
        return torch.linalg.solve(matrix, mean_reward)

    def action_value(self, policies: Policies) -> Tensor:
        r"""Return the joint :math:`Q(s, a)`, ``[*G, S, k_1, ..., k_n]``."""
        value = self.value(policies).reshape(
            *self.reward.shape[: self.batch_dims], *[1] * self.n_agents, 1, self.n_states
        )
        return self.reward + self.gamma * (self.transition * value).sum(-1)

    def advantage(self, policies: Policies) -> Tensor:
        r"""Return the advantage :math:`A(s, a) = Q(s, a) - V(s)`, ``[*G, S, k_1, ..., k_n]``."""
        value = self.value(policies)
        return self.action_value(policies) - value.reshape(*value.shape, *[1] * self.n_agents)

    def occupancy(self, policies: Policies) -> Tensor:
        r"""Return discounted visits :math:`\rho(s) = \sum_t \gamma^t P(s_t = s)`, ``[*G, S]``.

        They sum to :math:`1 / (1 - \gamma)`.
        """
        matrix, _ = self._bellman(policies)
        return torch.linalg.solve(matrix.mT, self.initial)

    def expected_return(self, policies: Policies) -> Tensor:
        r"""Return the joint return :math:`J(\pi) = \sum_s d(s) V(s)`, ``[*G]``."""
        return (self.initial * self.value(policies)).sum(-1)

    def multi_agent_action_value(self, policies: Policies, agents: Sequence[int]) -> Tensor:
        r"""Return the value of the actions of some agents when the others follow their policies.

        .. math::
            Q^{i_{1:m}}(s, a^{i_{1:m}}) = E_{a^{-i_{1:m}} \sim \pi}[Q(s, a)]

        Args:
            policies (sequence of Tensor): the policies.
            agents (sequence of int): :math:`i_{1:m}`, in any order. None of them: :math:`V`; all:
                :math:`Q`.

        Returns:
            shape ``[*G, S, k_1, ..., k_n]`` with size 1 in the dimensions of the others.
        """
        others = [agent for agent in range(self.n_agents) if agent not in agents]
        return self.mean(self.action_value(policies), policies, others)

    def multi_agent_advantage(
        self, policies: Policies, agents: Sequence[int], given: Sequence[int] = ()
    ) -> Tensor:
        r"""Return the advantage of some agents' actions, given the actions of others.

        .. math::
            A^{i_{1:m}}(s, a^{j_{1:k}}, a^{i_{1:m}})
            = Q^{j_{1:k}, i_{1:m}}(s, a^{j_{1:k}}, a^{i_{1:m}}) - Q^{j_{1:k}}(s, a^{j_{1:k}})

        Args:
            policies (sequence of Tensor): the policies.
            agents (sequence of int): :math:`i_{1:m}`.
            given (sequence of int): :math:`j_{1:k}`, none of ``agents``. Defaults to ``()``.

        Returns:
            shape ``[*G, S, k_1, ..., k_n]`` with size 1 in the dimensions of all other agents.
        """
        together = self.multi_agent_action_value(policies, [*given, *agents])
        return together - self.multi_agent_action_value(policies, given)


class TabularGameEnv(EnvBase):
    """An environment that plays a :class:`TabularGame` with samples.

    Every agent sees the state (one-hot). The game goes on forever: append a
    :class:`~torchrl.envs.StepCounter` to truncate it, and let the loss discount by ``game.gamma``.

    Args:
        game (TabularGame): a single game, whose agents all have the same number of actions.

    Keyword Args:
        num_envs (int): games played at once. Defaults to ``1``.
        seed (int): of states and transitions. Defaults to ``0``.
        device (torch.device, optional): device of the data. Defaults to ``None``.

    Raises:
        ValueError: if ``game`` is a batch of games or the agents have unlike actions.

    Example:
        >>> game = TabularGame.random(3, [2, 2], generator=torch.Generator().manual_seed(0))
        >>> env = TabularGameEnv(game, num_envs=4)
        >>> env.rollout(5)["next", "reward"].shape
        torch.Size([4, 5, 1])
    """

    def __init__(
        self,
        game: TabularGame,
        *,
        num_envs: int = 1,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        if game.batch_dims or len(set(game.n_actions)) != 1:
            raise ValueError(
                f"The game has batch_dims={game.batch_dims} and {list(game.n_actions)} actions; "
                "pass a single game whose agents have the same number of actions."
            )
        super().__init__(device=device, batch_size=[num_envs])
        self.game = game
        self.group_map = {"agents": [f"agent_{i}" for i in range(game.n_agents)]}
        agents = (num_envs, game.n_agents)
        self.observation_spec = Composite(
            agents=Composite(observation=Unbounded((*agents, game.n_states)), shape=agents),
            state=Categorical(game.n_states, shape=(num_envs, 1)),
            shape=(num_envs,),
        )
        self.action_spec = Composite(
            agents=Composite(action=Categorical(game.n_actions[0], shape=agents), shape=agents),
            shape=(num_envs,),
        )
        self.reward_spec = Unbounded((num_envs, 1))
        self.done_spec = Binary(1, shape=(num_envs, 1), dtype=torch.bool)
        self._set_seed(seed)

    def _observe(self, state: Tensor) -> TensorDict:
        one_hot = torch.nn.functional.one_hot(state, self.game.n_states)
        seen = one_hot.to(torch.get_default_dtype()).expand(-1, self.game.n_agents, -1).clone()
        agents = TensorDict({"observation": seen}, seen.shape[:2])
        return TensorDict({"state": state, "agents": agents}, self.batch_size, device=self.device)

    def _draw(self, probabilities: Tensor) -> Tensor:
        return torch.multinomial(probabilities, 1, generator=self._generator).to(self.device)

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: object) -> TensorDict:
        return self._observe(self._draw(self.game.initial.expand(*self.batch_size, -1)))

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        action = tensordict.get(("agents", "action"))
        at = (tensordict.get("state").squeeze(-1).cpu(), *action.cpu().unbind(-1))
        output = self._observe(self._draw(self.game.transition[at]))
        reward = self.game.reward[at].unsqueeze(-1).to(torch.get_default_dtype())
        done = torch.zeros(*self.batch_size, 1, dtype=torch.bool)
        output.update({"reward": reward, "done": done, "terminated": done.clone()})
        return output

    def _set_seed(self, seed: int | None) -> None:
        self._generator = torch.Generator().manual_seed(0 if seed is None else seed)
