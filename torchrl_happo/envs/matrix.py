"""Matrix games: one step, a shared payoff, everything known exactly."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

__all__ = ["MatrixGame"]


class MatrixGame(EnvBase):
    """A one-step cooperative game with a shared payoff.

    Each agent picks an action without seeing the others'; all receive the entry of the payoff
    tensor that their actions select, and the episode ends. The observation says who an agent is
    (one-hot), so that agents with shared parameters can tell themselves apart, too.

    Args:
        payoff (Tensor): the team's reward for each joint action, one dimension per agent, all of
            the same size.

    Keyword Args:
        num_envs (int): games played at once. Defaults to ``1``.
        seed (int, optional): accepted as other environments do; nothing here is random.
        device (torch.device, optional): device of the data. Defaults to ``None``.

    Raises:
        ValueError: if the agents have different numbers of actions.

    Examples:
        >>> climbing = torch.tensor([[11.0, -30, 0], [-30, 7, 6], [0, 0, 5]])
        >>> env = MatrixGame(climbing, num_envs=4)
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
        seed: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        if payoff.ndim < 1 or len(set(payoff.shape)) != 1:
            raise ValueError(
                f"The payoff has shape {list(payoff.shape)}; it needs one dimension per agent, all "
                "of the same size, the number of actions."
            )
        super().__init__(device=device, batch_size=[num_envs])
        self.payoff = payoff.to(torch.get_default_dtype())
        self.n_agents = payoff.ndim
        self.n_actions = payoff.shape[0]
        self.group_map = {"agents": [f"agent_{i}" for i in range(self.n_agents)]}
        agents = (num_envs, self.n_agents)
        self.observation_spec = Composite(
            agents=Composite(observation=Unbounded((*agents, self.n_agents)), shape=agents),
            shape=(num_envs,),
        )
        self.action_spec = Composite(
            agents=Composite(action=Categorical(self.n_actions, shape=agents), shape=agents),
            shape=(num_envs,),
        )
        self.reward_spec = Unbounded((num_envs, 1))
        self.done_spec = Binary(1, shape=(num_envs, 1), dtype=torch.bool)

    def _observe(self) -> TensorDict:
        agents = (*self.batch_size, self.n_agents)
        who = torch.eye(self.n_agents, device=self.device)
        return TensorDict({"observation": who.expand(*agents, -1).clone()}, agents)

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: object) -> TensorDict:
        return TensorDict({"agents": self._observe()}, self.batch_size, device=self.device)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        action = tensordict.get(("agents", "action"))
        reward = self.payoff.to(action.device)[tuple(action.unbind(-1))].unsqueeze(-1)
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
