"""Level-based foraging whose episodes are reproducible by their seeds."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase

from torchrl_happo.arguments import check_counts
from torchrl_happo.versions import LBForagingEnv, set_time_limit, simulator

__all__ = ["SeededForagingEnv"]


class SeededForagingEnv(LBForagingEnv):
    """TorchRL's :class:`~torchrl.envs.libs.lbforaging.LBForagingEnv`, reproducible by its seed.

    Agents collect food together: each food has a level, and only agents around it whose levels
    sum up to that may take it. The reward is sparse. Lbforaging places the agents of a new episode
    where no agent of the last episode stood, so that the episode after a seed depends on the ones
    before it; here it does not.

    Args:
        env_name (str): a task of lbforaging, such as ``"Foraging-8x8-2p-2f-coop-v3"`` (a grid of
            8 x 8, two players, two foods that one player alone cannot take).

    Keyword Args:
        max_steps (int, optional): steps after which an episode is truncated. Defaults to
            lbforaging's own limit of 50.
        **kwargs: arguments of :class:`~torchrl.envs.libs.lbforaging.LBForagingEnv`.

    Raises:
        ImportError: if lbforaging is not installed.
        ValueError: if ``max_steps`` is less than 1.

    Example:
        >>> env = SeededForagingEnv("Foraging-8x8-2p-2f-coop-v3")  # doctest: +SKIP
        >>> env.rollout(3)["agents", "observation"].shape  # doctest: +SKIP
        torch.Size([3, 2, 12])
    """

    def _build_env(self, env_name: str, *, max_steps: int | None = None, **kwargs: Any) -> Any:
        check_counts(max_steps=max_steps, optional=True)
        env = super()._build_env(env_name, **kwargs)
        if max_steps is not None:
            set_time_limit(env, max_steps)  # gymnasium.make would put another one on top
        return env

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        if self._seed is not None:
            for player in simulator(self).unwrapped.players:
                player.position = None
        return super()._reset(tensordict, **kwargs)
