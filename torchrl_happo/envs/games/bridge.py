"""The bridge game: two agents, one lane, and two ways to be best."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from torchrl_happo.arguments import check_counts

__all__ = ["BridgeGame"]


class BridgeGame(EnvBase):
    r"""Two agents on the two banks of a river cross a bridge that bears one of them.

    The game is that of Fu et al. (2022, https://arxiv.org/abs/2206.07505). An agent waits, goes
    left or goes right. If both would be on the bridge, neither moves. Every step costs 1 until both
    have crossed. It is best that one waits while the other crosses, whoever that is: the team needs
    :math:`2 m + 1` steps on a bridge of length :math:`m`. A policy in which both orders are as
    likely must coordinate the first step; a product of policies cannot, and has to settle for one.

    Args:
        length (int): cells of the bridge. Defaults to ``1``.

    Keyword Args:
        num_envs (int): games played at once. Defaults to ``1``.
        seed (int, optional): accepted as other environments do; nothing here is random.
        device (torch.device, optional): device of the data. Defaults to ``None``.

    Raises:
        ValueError: if ``length`` or ``num_envs`` is below 1.

    Example:
        >>> env = BridgeGame(num_envs=2)
        >>> data = env.reset()
        >>> data["agents", "action"] = torch.tensor([[2, 0], [2, 1]])  # one goes, or both try to
        >>> env.step(data)["next", "position"].tolist()
        [[1, 2], [0, 2]]
    """

    def __init__(
        self,
        length: int = 1,
        *,
        num_envs: int = 1,
        seed: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        check_counts(length=length, num_envs=num_envs)
        super().__init__(device=device, batch_size=[num_envs])
        self.length = length
        self.group_map = {"agents": ["from_left", "from_right"]}
        agents, cells = (num_envs, 2), length + 2
        self.observation_spec = Composite(
            agents=Composite(observation=Unbounded((*agents, 2 * cells + 2)), shape=agents),
            position=Categorical(cells, shape=agents),
            shape=(num_envs,),
        )
        self.action_spec = Composite(
            agents=Composite(action=Categorical(3, shape=agents), shape=agents), shape=(num_envs,)
        )
        self.reward_spec = Unbounded((num_envs, 1))
        self.done_spec = Binary(1, shape=(num_envs, 1), dtype=torch.bool)

    @property
    def best_return(self) -> float:
        """The return of a team in which one waits while the other crosses."""
        return -(2.0 * self.length + 1)

    def _observe(self, position: Tensor) -> TensorDict:
        cells = self.length + 2
        places = torch.nn.functional.one_hot(position, cells).flatten(-2)
        who = torch.eye(2, device=position.device).expand(*position.shape, 2)
        seen = torch.cat([places.unsqueeze(-2).expand(-1, 2, -1).to(who), who], -1)
        agents = TensorDict({"observation": seen}, position.shape)
        return TensorDict(
            {"agents": agents, "position": position}, self.batch_size, device=self.device
        )

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: object) -> TensorDict:
        start = torch.tensor([0, self.length + 1], device=self.device)
        return self._observe(start.expand(*self.batch_size, 2).clone())

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        position, action = tensordict.get("position"), tensordict.get(("agents", "action"))
        last = self.length + 1
        moved = (position + (action == 2).long() - (action == 1).long()).clamp(0, last)
        both = ((moved > 0) & (moved < last)).all(-1, keepdim=True)
        moved = torch.where(both, position, moved)
        goal = torch.tensor([last, 0], device=position.device)
        done = (moved == goal).all(-1, keepdim=True)
        output = self._observe(moved)
        reward = -torch.ones(*self.batch_size, 1, device=self.device)
        return output.update({"reward": reward, "done": done, "terminated": done.clone()})

    def _set_seed(self, seed: int | None) -> None:
        pass
