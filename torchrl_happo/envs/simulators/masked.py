"""Batches of simulators whose agents may not always choose every action: the common part."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from torchrl_happo.arguments import check_counts

__all__ = ["LARGEST_SEED", "MaskedTeamEnv"]

LARGEST_SEED = 2**31
_GROUP = "agents"

#: What copies show, by name, each ``[num_envs, ...]``.
Seen = dict[str, np.ndarray]


class MaskedTeamEnv(EnvBase):
    """A batch of copies of a game that a team of masked agents plays for one reward.

    ================================  ========================  ===================================
    key                               shape                     content
    ================================  ========================  ===================================
    ``("agents", "observation")``     ``[num_envs, n, d]``      float32
    ``("agents", "action_mask")``     ``[num_envs, n, a]``      which actions may be chosen
    ``("agents", "active")``          ``[num_envs, n]``         who acts; where agents can die
    ``("agents", "action")``          ``[num_envs, n]``         an index
    ``"state"``                       ``[num_envs, s]``         float32, for a critic
    ``"won"``                         ``[num_envs, 1]``         whether the team has won
    ``"reward"``                      ``[num_envs, 1]``         the team's
    ``"done"``, ``"terminated"``      ``[num_envs, 1]``         whether the episode is over
    ================================  ========================  ===================================

    There is no time limit: append a :class:`~torchrl.envs.StepCounter`, which truncates. A copy
    whose episode has ended waits for its reset: a step of the others leaves it unchanged, and its
    reward is zero.

    A subclass builds its copies, calls :meth:`_make_specs` and :meth:`_seed_or_draw`, and says how
    copies begin and step.

    Args:
        num_envs (int): number of copies.
        device (torch.device or str): device of the data; the simulation is elsewhere.

    Raises:
        ValueError: if there are no copies; at a step with an action that the mask forbids.
    """

    def __init__(self, num_envs: int, device: torch.device | str) -> None:
        check_counts(num_envs=num_envs)
        super().__init__(device=torch.device(device), batch_size=[num_envs])
        self._seen: Seen | None = None
        self._over = np.zeros((num_envs, 1), bool)

    @abstractmethod
    def _begin(self, chosen: np.ndarray) -> Seen:
        """Begin an episode in the chosen copies, ``[num_envs]``; return what all copies show."""

    @abstractmethod
    def _play(self, actions: np.ndarray) -> tuple[Seen, np.ndarray, np.ndarray]:
        """Step the copies that are not over.

        Args:
            actions (numpy.ndarray): allowed ones, ``[num_envs, n]``.

        Returns:
            what all copies show, their rewards ``[num_envs]`` and whether they are over
            ``[num_envs]``. Those that were over are as they were, and their rewards are ignored.
        """

    def _make_specs(
        self, agents: Sequence[str], size: int, n_actions: int, state_size: int, *, can_die: bool
    ) -> None:
        """Describe the data.

        Args:
            agents (sequence of str): their names.
            size (int): of an agent's observation.
            n_actions (int): of each agent.
            state_size (int): of the state.

        Keyword Args:
            can_die (bool): whether there is an entry ``"active"``.
        """
        self.group_map = {_GROUP: list(agents)}
        batch, place = self.batch_size, {"device": self.device}
        team = torch.Size([*batch, len(agents)])
        seen = {
            "observation": Unbounded((*team, size), **place),
            "action_mask": Binary(n_actions, (*team, n_actions), dtype=torch.bool, **place),
        }
        if can_die:
            seen["active"] = Binary(len(agents), team, dtype=torch.bool, **place)
        flag = Binary(1, (*batch, 1), dtype=torch.bool, **place)
        self.observation_spec = Composite(
            {
                _GROUP: Composite(seen, shape=team, **place),
                "state": Unbounded((*batch, state_size), **place),
                "won": flag,
            },
            shape=batch,
            **place,
        )
        action = Composite(action=Categorical(n_actions, team, **place), shape=team, **place)
        self.action_spec = Composite({_GROUP: action}, shape=batch, **place)
        self.reward_spec = Unbounded((*batch, 1), **place)
        self.done_spec = Composite(done=flag.clone(), terminated=flag.clone(), shape=batch, **place)

    def _seed_or_draw(self, seed: int | None) -> None:
        """Seed the copies, by a number from torch's global generator where there is none."""
        self.set_seed(int(torch.randint(LARGEST_SEED, ())) if seed is None else seed)

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: object) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        chosen = np.ones(self.batch_size, bool)
        if mask is not None and self._seen is not None:  # before a first episode all begin
            chosen = mask.flatten().numpy(force=True)
        self._seen = self._begin(chosen)
        self._over = self._over & ~chosen[:, None]
        return self._data()

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        actions = tensordict.get((_GROUP, "action")).numpy(force=True)
        self._check(actions)
        before = self._over
        self._seen, rewards, over = self._play(actions)
        self._over = before | over[:, None]
        data = self._data()
        done = self._tensor(self._over)
        paid = np.where(before, 0, rewards[:, None])
        return data.update(
            {"reward": self._tensor(paid).float(), "done": done, "terminated": done.clone()}
        )

    def _check(self, actions: np.ndarray) -> None:
        """Refuse a step in which an agent does what its mask forbids: no copy has moved then."""
        mask = self._known()["action_mask"]
        inside = (actions >= 0) & (actions < mask.shape[-1])
        index = np.where(inside, actions, 0)[..., None]
        allowed = inside & np.take_along_axis(mask, index, -1)[..., 0]
        wrong = ~(allowed | self._over)
        if wrong.any():
            copy, agent = np.argwhere(wrong)[0].tolist()
            raise ValueError(
                f"The action {int(actions[copy, agent])} of agent "
                f"{self.group_map[_GROUP][agent]!r} in copy {copy} is forbidden: its entry "
                f"{(_GROUP, 'action_mask')!r} allows {mask[copy, agent].nonzero()[0].tolist()}; "
                "act by a policy that reads the mask, such as make_actor's."
            )

    def _known(self) -> Seen:
        if self._seen is None:
            raise RuntimeError("The environment has not begun an episode; call reset() first.")
        return self._seen

    def rand_action(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        """Draw an allowed action for each agent.

        Args:
            tensordict (TensorDictBase, optional): where the actions are written. Defaults to
                ``None``: into a new one.

        Raises:
            RuntimeError: before the first reset.
        """
        mask = torch.tensor(self._known()["action_mask"])
        drawn = torch.multinomial(mask.flatten(0, 1).float(), 1).reshape(mask.shape[:2])
        if tensordict is None:
            tensordict = self.full_action_spec.zero()
        return tensordict.set((_GROUP, "action"), drawn.to(self.device))

    def _data(self) -> TensorDict:
        """Return what the copies show as a tensordict, with memory of its own."""
        seen = {name: self._tensor(value) for name, value in self._known().items()}
        root = {name: seen.pop(name) for name in ("state", "won")}
        team = (*self.batch_size, len(self.group_map[_GROUP]))
        group = TensorDict(seen, team, device=self.device)
        return TensorDict({_GROUP: group, **root}, self.batch_size, device=self.device)

    def _tensor(self, value: np.ndarray) -> Tensor:
        tensor = torch.tensor(value, device=self.device)
        return tensor.float() if tensor.is_floating_point() else tensor
