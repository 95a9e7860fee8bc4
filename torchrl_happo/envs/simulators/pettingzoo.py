"""Copies of a PettingZoo environment, stepped in one process as one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Bounded, Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase, MarlGroupMapType

from torchrl_happo.arguments import check_counts

__all__ = ["BatchedPettingZooEnv"]

_LARGEST_SEED = 2**31
_COLLECTOR = "collector"


class BatchedPettingZooEnv(EnvBase):
    """A batch of copies of a PettingZoo environment, stepped one after the other.

    :class:`~torchrl.envs.PettingZooWrapper` makes tensordicts of each agent of each copy at each
    step, which takes longer than a small environment's own step. This class makes one of all
    copies, of batch size ``[num_envs]``, for environments of the parallel API whose agents all
    stay until the end:

    ================================  ======================  =================================
    key                               shape                   content
    ================================  ======================  =================================
    ``(group, "observation")``        ``[num_envs, n, d]``    float32
    ``(group, "action")``             ``[num_envs, n, a]``    continuous, float32
    (or)                              ``[num_envs, n]``       discrete, an index
    ``(group, "reward")``             ``[num_envs, n, 1]``    each agent's own
    ``"done"``, ``"terminated"``,     ``[num_envs, 1]``       of the team; a time limit
    ``"truncated"``                                           truncates
    ================================  ======================  =================================

    A copy whose episode has ended waits for its reset: a step of the others leaves its state and
    flags unchanged, and its rewards are zero.

    Args:
        make (callable): builds one copy, for instance ``simple_spread_v3.parallel_env``.

    Keyword Args:
        num_envs (int): number of copies. Defaults to ``1``.
        group_map (MarlGroupMapType or dict of str to list of str, optional): which agents make
            a group, as in :class:`~torchrl.envs.PettingZooWrapper`. Defaults to ``None``: those
            with the same name but for the number after it, under that name (``"collectors"`` for
            ``"collector"``, where TorchRL's collectors keep entries of their own).
        seed (int, optional): seed from which each copy derives its own. Defaults to ``None``:
            drawn from torch's global generator.
        device (torch.device or str, optional): device of the data. Defaults to ``"cpu"``.
        **kwargs: arguments of ``make``.

    Raises:
        ValueError: if there are no copies, the agents of a group have unlike spaces, an
            observation is no vector, an action neither a vector nor discrete, a group is empty or
            its name is ``"collector"``.
        RuntimeError: at a step that ends for some agents only.

    Examples:
        >>> from mpe2 import simple_speaker_listener_v4
        >>> env = BatchedPettingZooEnv(
        ...     simple_speaker_listener_v4.parallel_env, num_envs=4, max_cycles=25, seed=0
        ... )
        >>> rollout = env.rollout(30)
        >>> rollout["listener", "observation"].shape, rollout["speaker", "action"].shape
        (torch.Size([4, 25, 1, 11]), torch.Size([4, 25, 1]))
        >>> bool(rollout["next", "truncated"][:, -1].all())
        True
    """

    def __init__(
        self,
        make: Callable[..., Any],
        *,
        num_envs: int = 1,
        group_map: MarlGroupMapType | Mapping[str, Sequence[str]] | None = None,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        **kwargs: Any,
    ) -> None:
        check_counts(num_envs=num_envs)
        super().__init__(device=torch.device(device), batch_size=[num_envs])
        self._envs = [make(**kwargs) for _ in range(num_envs)]
        agents = list(self._envs[0].possible_agents)
        self.group_map = _group(agents, group_map)
        self._make_specs()
        self._observations: dict[str, np.ndarray] = {
            group: np.zeros(spec["observation"].shape, np.float32)
            for group, spec in self.observation_spec.items()
        }
        self._ends = np.zeros((2, num_envs, 1), bool)  # terminated, truncated
        self._seeds: list[int | None] = []
        if seed is None:
            seed = int(torch.randint(_LARGEST_SEED, ()))
        self.set_seed(seed)

    def _make_specs(self) -> None:
        env, place = self._envs[0], {"device": self.device}
        observations, actions, rewards = (
            Composite(shape=self.batch_size, **place) for _ in range(3)
        )
        for group, agents in self.group_map.items():
            shape = (*self.batch_size, len(agents))
            spaces = [(env.observation_space(agent), env.action_space(agent)) for agent in agents]
            if any(of_agent != spaces[0] for of_agent in spaces):
                raise ValueError(
                    f"The agents {agents} of the group {group!r} have unlike spaces {spaces}; pass "
                    "group_map=MarlGroupMapType.ONE_GROUP_PER_AGENT."
                )
            observation, action = spaces[0]
            leaf = _observation_spec(observation, shape, group)
            observations[group] = Composite(observation=leaf, shape=shape).to(self.device)
            leaf = _action_spec(action, shape, group)
            actions[group] = Composite(action=leaf, shape=shape).to(self.device)
            rewards[group] = Composite(reward=Unbounded((*shape, 1)), shape=shape).to(self.device)
        self.observation_spec, self.action_spec, self.reward_spec = observations, actions, rewards
        flag = Binary(1, shape=(*self.batch_size, 1), dtype=torch.bool, **place)
        self.done_spec = Composite(
            done=flag,
            terminated=flag.clone(),
            truncated=flag.clone(),
            shape=self.batch_size,
            **place,
        )

    def _set_seed(self, seed: int | None) -> None:
        seeds = np.random.SeedSequence(seed).generate_state(len(self._envs)) % _LARGEST_SEED
        self._seeds = [int(own) for own in seeds]

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: Any) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        chosen = [True] * len(self._envs) if mask is None else mask.flatten().tolist()
        for index, env in enumerate(self._envs):
            if chosen[index]:
                observations, _ = env.reset(seed=self._seeds[index])
                self._seeds[index] = None  # once seeded, the generator goes on
                self._ends[:, index] = False
                self._write(index, observations)
        data = TensorDict(self.done_spec.zero(), self.batch_size, device=self.device)
        return self._add_groups(data)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        actions = {
            group: tensordict.get((group, "action")).numpy(force=True) for group in self.group_map
        }
        rewards = {
            group: np.zeros((len(self._envs), len(agents), 1), np.float32)
            for group, agents in self.group_map.items()
        }
        for index, env in enumerate(self._envs):
            if self._ends[:, index].any():
                continue  # PettingZoo steps no agent whose episode has ended
            joint = {
                agent: actions[group][index, member]
                for group, agents in self.group_map.items()
                for member, agent in enumerate(agents)
            }
            observations, paid, *ended, _ = env.step(joint)
            self._write(index, observations)
            for group, agents in self.group_map.items():
                rewards[group][index, :, 0] = [paid[agent] for agent in agents]
            for flag, of_agents in zip(self._ends, ended, strict=True):
                flag[index] = self._of_team(of_agents)
        terminated, truncated = torch.tensor(self._ends, device=self.device)
        data = TensorDict(
            {"done": terminated | truncated, "terminated": terminated, "truncated": truncated},
            self.batch_size,
            device=self.device,
        )
        return self._add_groups(data, rewards)

    def _write(self, index: int, observations: Mapping[str, np.ndarray]) -> None:
        for group, agents in self.group_map.items():
            for member, agent in enumerate(agents):
                self._observations[group][index, member] = observations[agent]

    def _add_groups(
        self, data: TensorDict, rewards: Mapping[str, np.ndarray] | None = None
    ) -> TensorDict:
        for group, agents in self.group_map.items():
            leaves = {"observation": torch.tensor(self._observations[group])}
            if rewards is not None:
                leaves["reward"] = torch.from_numpy(rewards[group])
            data.set(
                group,
                TensorDict(leaves, (*self.batch_size, len(agents)), device=self.device),
            )
        return data

    def _of_team(self, flags: Mapping[str, bool]) -> bool:
        ended = set(flags.values())
        if len(ended) > 1:
            raise RuntimeError(
                f"A step ended for some agents only ({dict(flags)}), but in BatchedPettingZooEnv "
                "all stay until the end; use PettingZooWrapper with a mask."
            )
        return ended.pop()

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close the copies."""
        super().close(raise_if_closed=raise_if_closed)
        for env in self._envs:
            env.close()


def _group(
    agents: list[str], group_map: MarlGroupMapType | Mapping[str, Sequence[str]] | None
) -> dict[str, list[str]]:
    if isinstance(group_map, MarlGroupMapType):
        return group_map.get_group_map(agents)
    if group_map is not None:
        groups = {group: list(members) for group, members in group_map.items()}
        if sorted(agent for members in groups.values() for agent in members) != sorted(agents):
            raise ValueError(f"The group_map {groups} has to hold each of {agents} once.")
        if not all(groups.values()):
            raise ValueError(f"The group_map {groups} has a group without agents; leave it out.")
        if _COLLECTOR in groups:
            raise ValueError(
                f"The group_map has a group {_COLLECTOR!r}, under which TorchRL's collectors keep "
                "entries of their own; choose another name."
            )
        return groups
    groups = {}
    for agent in agents:
        name, _, number = agent.rpartition("_")
        group = name if name and number.isdigit() else agent
        groups.setdefault(f"{group}s" if group == _COLLECTOR else group, []).append(agent)
    return groups


def _observation_spec(space: Any, shape: tuple[int, ...], group: str) -> TensorSpec:
    if len(getattr(space, "shape", None) or ()) != 1:
        raise ValueError(
            f"The agents of {group!r} observe {space}, but BatchedPettingZooEnv takes vectors."
        )
    return Unbounded((*shape, *space.shape))


def _action_spec(space: Any, shape: tuple[int, ...], group: str) -> TensorSpec:
    if hasattr(space, "n"):
        return Categorical(int(space.n), shape=shape)
    if hasattr(space, "low") and len(space.shape) == 1:
        low, high = (torch.tensor(bound).float() for bound in (space.low, space.high))
        return Bounded(
            low.expand(*shape, -1).clone(), high.expand(*shape, -1).clone(), dtype=torch.float32
        )
    raise ValueError(
        f"The agents of {group!r} act in {space}, but BatchedPettingZooEnv takes discrete actions "
        "and vectors."
    )
