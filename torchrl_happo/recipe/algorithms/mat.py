"""MAT (Wen et al., 2022): agents that choose one after the other, one transformer for the team."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.distributed as dist
from torchrl.envs import EnvBase
from torchrl.objectives import ValueEstimators

from torchrl_happo.networks.transformer.build import make_transformer
from torchrl_happo.objectives import MATLoss
from torchrl_happo.recipe.algorithms.happo import Happo
from torchrl_happo.recipe.algorithms.parts import critic_settings, optimizer_settings
from torchrl_happo.recipe.config import ConfigError, TrainConfig, choice, count, default_of
from torchrl_happo.recipe.learner import Learner
from torchrl_happo.update.updater import SequentialUpdater


@dataclass
class Mat(Happo):
    """Multi-agent transformer: agents choose one after the other, and learn as one block."""

    loss: ClassVar[type[MATLoss]] = MATLoss
    decentralized: ClassVar[bool] = False
    prefix_values: ClassVar[bool] = False

    size: int = count(default_of(make_transformer, "size"))
    """Of every token."""
    num_heads: int = count(default_of(make_transformer, "num_heads"))
    """Of every attention; they divide the size."""
    num_blocks: int = count(default_of(make_transformer, "num_blocks"))
    """Of the encoder and of the decoder."""
    agent_embedding: bool = default_of(make_transformer, "agent_embedding")
    """Whether agents are told apart by a learned vector each."""
    ratio: str = choice("agent", "dimensions", default=default_of(MATLoss, "ratio"))
    """One ratio of each agent, or of each dimension of its action, as the authors' code has it."""

    def check(self, config: TrainConfig) -> None:
        """Raise if a network is set that the transformer replaces, or a setting has no effect."""
        super().check(config)
        if self.size % self.num_heads:
            raise ConfigError(
                f"algorithm.num_heads={self.num_heads} does not divide algorithm.size={self.size}: "
                "take a divisor, such as 1."
            )
        if config.model.name != "mlp" or config.model.make_actor is not None:
            raise ConfigError(
                f"algorithm={self.name} builds a transformer: take model=mlp, without make_actor."
            )
        critic = config.critic
        if (critic.input, critic.model, critic.make_critic) != ("auto", "mlp", None):
            raise ConfigError(
                f"The critic of algorithm={self.name} is the transformer's own: leave out what is "
                "set under critic."
            )
        unused = {
            "popart": self.popart,
            "critic_epochs": self.critic_epochs is not None,
            "order": self.order != default_of(SequentialUpdater, "order"),
        }
        for name, is_set in unused.items():
            if is_set:
                raise ConfigError(
                    f"algorithm={self.name} moves all agents and the critic by one optimiser: "
                    f"leave out algorithm.{name}."
                )

    def make_networks(self, config: TrainConfig, env: EnvBase) -> tuple[Any, Any]:
        """Build policy and critic of the team."""
        model = config.model
        return make_transformer(
            env,
            size=self.size,
            num_heads=self.num_heads,
            num_blocks=self.num_blocks,
            agent_embedding=self.agent_embedding,
            decentralized=self.decentralized,
            share_params=getattr(self, "share_policies", False),
            prefix_values=self.prefix_values,
            state_dependent_std=model.state_dependent_std,
            scale_mapping=f"biased_softplus_{model.initial_std}",
            max_std=model.max_std,
        )

    def own_settings(self) -> dict[str, Any]:
        """Return which ratio."""
        return {"ratio": self.ratio}

    def make_updater(self, config: TrainConfig, env: EnvBase, group: Any) -> SequentialUpdater:
        """Build networks, loss and updater of the block."""
        actor, critic = self.make_networks(config, env)
        loss = self.make_loss(actor, critic, **critic_settings(self, env))
        loss.make_value_estimator(ValueEstimators.GAE, gamma=self.gamma, lmbda=self.lmbda)
        return SequentialUpdater(
            loss,
            **optimizer_settings(config),
            num_epochs=self.num_epochs,
            minibatch_size=self.minibatch_size,
            max_grad_norm=self.max_grad_norm,
            compile=self.compile,
            seed=config.seed,
            process_group=group,
            **self.updater_settings(),
        )

    def make_learner(
        self, config: TrainConfig, env: EnvBase, process_group: dist.ProcessGroup | None
    ) -> Learner:
        """Build networks, loss and updater for an environment."""
        updater = self.make_updater(config, env, process_group)
        (block,) = updater.loss.agents
        return Learner(block.actor, updater, {block.group_name: block.actor})
