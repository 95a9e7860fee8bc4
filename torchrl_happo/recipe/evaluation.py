"""Deterministic episodes that leave no trace in the training run."""

from __future__ import annotations

import logging
import time

import torch
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_happo.networks.actors import memory_transforms
from torchrl_happo.recipe.config import ConfigError, TrainConfig
from torchrl_happo.recipe.environments import make_env
from torchrl_happo.recipe.randomness import isolated_randomness

logger = logging.getLogger(__name__)

#: Without a time limit: seconds after which an evaluation says that it is waiting for episodes to
#: end, and steps after which they count as endless.
PATIENCE, LONGEST = 20, 10_000


class Evaluation:
    """Plays the first episode of many environments at once, always from the same seed.

    One episode of each environment counts, whenever it ends: taking the first to finish instead
    would favour short episodes. The environments are built at the first call and kept.

    Where ``task.max_steps`` is null, an episode that has not ended after 10,000 steps is refused.

    Args:
        config (TrainConfig): the run; ``config.evaluation`` has the number of episodes.
        deterministic (bool, optional): whether agents take their most likely actions. Defaults to
            ``True``.
    """

    def __init__(self, config: TrainConfig, deterministic: bool = True) -> None:
        self.config = config
        self.kind = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
        self._env: EnvBase | None = None

    @torch.no_grad()
    def __call__(self, policy: TensorDictModuleBase) -> dict[str, float]:
        """Evaluates ``policy`` as it is now.

        Returns:
            the mean undiscounted return of the team, its standard deviation over the episodes and
            the standard error of the mean, the mean length, and the seconds it took; where the
            environment says what they cost or who has won, also ``cost`` and ``win_rate``.
        """
        start = time.perf_counter()
        seed = self.config.evaluation.seed
        with isolated_randomness(seed), set_exploration_type(self.kind):
            played = self._play(policy, seed)
        returns = played["return"]
        return {
            "return": returns.mean().item(),
            "return_std": returns.std(correction=0).item(),
            "return_stderr": (returns.std(correction=0) / len(returns) ** 0.5).item(),
            "episode_length": played["length"].mean().item(),
            "episodes": float(len(returns)),
            **(self._of_costs(played["cost"]) if "cost" in played else {}),
            **({"win_rate": played["won"].double().mean().item()} if "won" in played else {}),
            "evaluation_seconds": time.perf_counter() - start,
        }

    def _of_costs(self, costs: torch.Tensor) -> dict[str, float]:
        """Return the mean cost of an episode and the share of episodes within the bound."""
        limit = getattr(self.config.algorithm, "cost_limit", None)
        within = {} if limit is None else {"within_limit": (costs <= limit).double().mean().item()}
        return {"cost": costs.mean().item(), **within}

    def _play(self, policy: TensorDictModuleBase, seed: int) -> dict[str, torch.Tensor]:
        """Return how the first episode of each environment went, each entry ``[E, 1]``."""
        env = self._environments(policy, seed)
        state = env.reset()
        running = torch.ones_like(state["done"])
        sums = [name for name in ("reward", "cost") if f"episode_{name}" in state.keys()]
        zero = torch.zeros_like(state["episode_reward"])
        played = {name: zero.clone() for name in (*sums, "length")}
        if "won" in state.keys():
            played["won"] = torch.zeros_like(running)
        limit, start, is_said = self.config.task.max_steps, time.perf_counter(), False
        while running.any():
            if limit is None and not is_said and time.perf_counter() - start > PATIENCE:
                is_said = True
                logger.warning(
                    "After %d steps of an evaluation %d of %d episodes go on; set task.max_steps "
                    "if they have no end.",
                    *(int(played["length"].max()), int(running.sum()), len(running)),
                )
            if limit is None and played["length"].max() >= LONGEST:
                raise ConfigError(
                    f"The episodes of {self.config.task.name} do not end: {int(running.sum())} of "
                    f"{len(running)} go on after {LONGEST} steps; set task.max_steps."
                )
            step, state = env.step_and_maybe_reset(policy(state))
            after = step["next"]
            for name in sums:
                played[name] += after[name] * running
            played["length"] += running
            if "won" in played:
                played["won"] |= after["won"] & running
            running &= ~after["done"]
        return {"return": played.pop("reward"), **played}

    def _environments(self, policy: TensorDictModuleBase, seed: int) -> EnvBase:
        if self._env is None:
            self._env = make_env(
                self.config.task,
                num_envs=self.config.evaluation.episodes,
                seed=seed,
                device=self.config.device,
                transforms=memory_transforms(policy),
            )
        self._env.set_seed(seed)
        return self._env

    def close(self) -> None:
        """Closes the environments."""
        if self._env is not None:
            self._env.close()
            self._env = None
