"""The settings and networks of algorithms that keep a cost below a bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchrl.envs import EnvBase

from torchrl_happo.recipe.algorithms.sequential import SequentialConfig, build_critic
from torchrl_happo.recipe.config import ConfigError, TrainConfig, number


@dataclass
class WithCosts(SequentialConfig):
    """A bound of the mean cost of an episode, and a critic of the cost."""

    cost_limit: float = number()
    """Bound of the mean cost of an episode."""
    bootstrap_truncated: bool = False
    """Whether an episode that max_steps ends also costs what is expected to come."""

    def check(self, config: TrainConfig) -> None:
        """Refuse a critic with memory: that of the cost would write to the same."""
        super().check(config)
        if config.critic.model != "mlp":
            raise ConfigError(
                f"critic.model={config.critic.model} gives the critics of reward and cost one "
                "memory: take critic.model=mlp."
            )

    def further_networks(self, config: TrainConfig, env: EnvBase) -> dict[str, Any]:
        """Return the critic of the cost, and its bound."""
        if "cost" not in env.reward_keys:
            raise ConfigError(
                f"algorithm={self.name} needs a task with a cost, which {config.task.name} does "
                "not have: take one such as task=mujoco/halfcheetah_2x3_velocity."
            )
        return {
            "cost_critic": build_critic(config, env),
            "cost_limit": self.cost_limit,
            "bootstrap_truncated": self.bootstrap_truncated,
        }
