"""HAPPO-Lagrangian (Gu et al., 2021): agents in order, with a price on costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchrl.envs import EnvBase

from torchrl_happo.objectives import HAPPOLagrangianLoss
from torchrl_happo.recipe.algorithms.happo import Happo
from torchrl_happo.recipe.algorithms.sequential import build_critic
from torchrl_happo.recipe.config import ConfigError, TrainConfig, choice, default_of, number


@dataclass
class HappoLagrangian(Happo):
    """HAPPO with a price on costs, which keeps the mean cost of an episode below a bound."""

    cost_limit: float = number(at_least=0)
    """Bound of the mean cost of an episode."""
    multiplier: str = choice(
        *("learned", "projected", "fixed"), default=default_of(HAPPOLagrangianLoss, "multiplier")
    )
    """How the price moves: by Adam, as in the paper, or not at all."""
    initial_multiplier: float = number(
        default_of(HAPPOLagrangianLoss, "initial_multiplier"), at_least=0
    )
    """The price at the start, in rewards per cost."""
    multiplier_lr: float = number(default_of(HAPPOLagrangianLoss, "multiplier_lr"), above=0)
    """Learning rate of the price."""

    def check(self, config: TrainConfig) -> None:
        """Refuse a learned price of 0, and a critic with memory."""
        super().check(config)
        if self.multiplier == "learned" and self.initial_multiplier == 0:
            raise ConfigError(
                "algorithm.initial_multiplier is 0.0, but a learned multiplier starts above 0: "
                "raise it, or take algorithm.multiplier=projected."
            )
        if config.critic.model != "mlp":
            raise ConfigError(
                f"critic.model={config.critic.model} gives the critics of reward and cost one "
                "memory: take critic.model=mlp."
            )

    def further_networks(self, config: TrainConfig, env: EnvBase) -> dict[str, Any]:
        """Return the critic of the cost."""
        if "cost" not in env.reward_keys:
            raise ConfigError(
                f"algorithm={self.name} needs a task with a cost, which {config.task.name} does "
                "not have: take one such as task=mujoco/halfcheetah_2x3_velocity."
            )
        return {"cost_critic": build_critic(config, env)}

    def make_loss(
        self, actors: dict[str, Any], critic: Any, **settings: Any
    ) -> HAPPOLagrangianLoss:
        """Build the loss of a team."""
        return HAPPOLagrangianLoss(
            actors,
            critic,
            clip_epsilon=self.clipping,
            entropy_coeff=self.entropy_coeff,
            cost_limit=self.cost_limit,
            multiplier=self.multiplier,  # type: ignore[arg-type]
            initial_multiplier=self.initial_multiplier,
            multiplier_lr=self.multiplier_lr,
            **settings,
        )
