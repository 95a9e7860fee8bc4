"""Batches of the Laser Learning Environment: agents that pass a beam only by each other's help."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from torchrl_happo.envs.simulators.masked import LARGEST_SEED, MaskedTeamEnv, Seen

__all__ = ["LLEEnv"]

_LEVELS = range(1, 7)
# LLE's words but for pictures and layers of agents that are not there.
_OBSERVATIONS = (
    *("flattened", "layered", "normalized-state", "partial3x3", "partial5x5"),
    *("partial7x7", "perspective", "state"),
)


class LLEEnv(MaskedTeamEnv):
    """A batch of copies of a level of `LLE <https://github.com/yamoling/lle>`_.

    Agents of unlike colours collect gems on a grid and leave by exits. A laser kills, and ends the
    episode, but an agent of its colour stands in it unharmed and stops the beam for those behind.
    The team is paid 1 for each gem, for each agent at an exit and for the last of them, and -1 for
    each death.

    The entries are those of :class:`~torchrl_happo.envs.simulators.masked.MaskedTeamEnv`, without
    ``("agents", "active")``: nobody goes on after a death, and who has left can only stay.
    ``"won"`` says that all agents have left (LLE's ``exit_rate`` is 1). In most kinds of
    observation all agents see the same, so that which of them one is follows the observation, as
    one number for each agent.

    Args:
        level (int): level of LLE, from 1 to 6. Level 6, of four agents, is the one of its paper.

    Keyword Args:
        num_envs (int): number of copies, stepped one after the other. Defaults to ``1``.
        observation (str): what an agent sees of the world, in LLE's words: ``"flattened"`` (a
            layer for each kind of thing), ``"layered"`` (the same numbers), ``"perspective"``,
            ``"partial3x3"``, ``"partial5x5"``, ``"partial7x7"``, ``"state"`` or
            ``"normalized-state"``. All are flattened. Defaults to ``"flattened"``.
        walkable_lasers (bool): whether agents may step into a beam that kills them. Defaults to
            ``True``.
        seed (int, optional): seed from which each copy derives its own, for levels that draw where
            agents start. Defaults to ``None``: drawn from torch's global generator.
        device (torch.device or str, optional): device of the data. Defaults to ``"cpu"``.

    Raises:
        ImportError: if LLE is not installed.
        ValueError: if there is no such level or kind of observation, or there are no copies; at a
            step with an action that the mask forbids.

    Examples:
        >>> env = LLEEnv(6, num_envs=4, seed=0)  # doctest: +SKIP
        >>> env.rollout(3)["agents", "action_mask"].shape  # doctest: +SKIP
        torch.Size([4, 3, 4, 5])
    """

    def __init__(
        self,
        level: int,
        *,
        num_envs: int = 1,
        observation: str = "flattened",
        walkable_lasers: bool = True,
        seed: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if level not in _LEVELS:
            raise ValueError(f"LLE has no level {level!r}; it has 1 to {_LEVELS[-1]}.")
        if observation not in _OBSERVATIONS:
            raise ValueError(
                f"observation is {observation!r}, but must be one of {', '.join(_OBSERVATIONS)}."
            )
        lle = _import_lle()
        super().__init__(num_envs, device)
        self.level = level
        self._envs = [
            lle.LLE.level(level)
            .obs_type(observation)
            .state_type("normalized-state")
            .walkable_lasers(walkable_lasers)
            .build()
            for _ in range(num_envs)
        ]
        env = self._envs[0]
        n = env.n_agents
        size = int(np.prod(env.observation_shape))
        (state_size,) = env.state_shape
        agents = [f"agent_{index}" for index in range(n)]
        self._make_specs(agents, size + n, env.n_actions, state_size, can_die=False)
        shape = (num_envs, n)
        identity = np.broadcast_to(np.eye(n, dtype=np.float32), (*shape, n))
        self._shown: Seen = {
            "observation": np.concatenate([np.zeros((*shape, size), np.float32), identity], -1),
            "action_mask": np.zeros((*shape, env.n_actions), bool),
            "state": np.zeros((num_envs, state_size), np.float32),
            "won": np.zeros((num_envs, 1), bool),
        }
        self._seed_or_draw(seed)

    def _set_seed(self, seed: int | None) -> None:
        seeds = np.random.SeedSequence(seed).generate_state(len(self._envs)) % LARGEST_SEED
        for env, own in zip(self._envs, seeds, strict=True):
            env.world.seed(int(own))  # LLE's own seed() would seed Python's global generator

    def _begin(self, chosen: np.ndarray) -> Seen:
        for index in chosen.nonzero()[0].tolist():
            self._show(index, *self._envs[index].reset(), won=False)
        return self._shown

    def _play(self, actions: np.ndarray) -> tuple[Seen, np.ndarray, np.ndarray]:
        rewards, over = np.zeros(len(self._envs), np.float32), self._over[:, 0].copy()
        for index in (~over).nonzero()[0].tolist():
            step = self._envs[index].step(actions[index])
            rewards[index] = step.reward.sum()
            over[index] = step.is_terminal
            self._show(index, step.obs, step.state, won=step.info["exit_rate"] == 1)
        return self._shown, rewards, over

    def _show(self, index: int, observation: Any, state: Any, *, won: bool) -> None:
        shown, data = self._shown, observation.data
        shown["observation"][index, :, : data[0].size] = data.reshape(len(data), -1)
        shown["action_mask"][index] = observation.available_actions
        shown["state"][index] = state.data
        shown["won"][index] = won


def _import_lle() -> Any:
    try:
        import lle
    except ImportError as error:
        raise ImportError(
            "LLEEnv needs LLE; install it by: pip install --prefer-binary 'torchrl_happo[lle]'."
        ) from error
    return lle
