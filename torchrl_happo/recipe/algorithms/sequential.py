"""What HAPPO and HATRPO share in the recipe: one critic, and the updater that goes in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.distributed as dist
from torchrl.envs import EnvBase
from torchrl.objectives import ValueEstimators

from torchrl_happo.networks.actors import make_critic
from torchrl_happo.policy.memory import has_memory
from torchrl_happo.recipe.algorithms.parts import (
    critic_settings,
    make_actors,
    network_settings,
    optimizer_settings,
    policy_of,
    state_key,
)
from torchrl_happo.recipe.config import (
    AlgorithmConfig,
    ConfigError,
    TrainConfig,
    choice,
    count,
    default_of,
)
from torchrl_happo.recipe.learner import Learner
from torchrl_happo.recipe.references import build_network
from torchrl_happo.update.updater import SequentialUpdater


@dataclass
class SequentialConfig(AlgorithmConfig):
    """What the algorithms that update agent after agent share."""

    splits: ClassVar[bool] = True

    order: str = choice("random", "fixed", default=default_of(SequentialUpdater, "order"))
    """Of the agents, drawn anew for each batch or as they are named."""
    critic_epochs: int | None = count(None)
    """Passes of the critic over the batch; null: num_epochs."""
    popart: bool = False
    """Whether the critic's last layer is rescaled when the statistics move, so that its values do
    not jump."""
    compile: bool = False
    """Whether the update is compiled: a minute or so at the start, then faster."""

    def check(self, config: TrainConfig) -> None:
        """Refuse PopArt without statistics."""
        if self.popart and self.value_norm is None:
            raise ConfigError(
                "algorithm.popart needs statistics of the values: set algorithm.value_norm."
            )

    def make_loss(self, actors: dict[str, Any], critic: Any, **critic_settings: Any) -> Any:
        """Build the loss of a team."""
        raise NotImplementedError

    def further_networks(self, config: TrainConfig, env: EnvBase) -> dict[str, Any]:
        """Return the networks that the loss takes beside the actors and the critic."""
        return {}

    def updater_settings(self) -> dict[str, Any]:
        """Return what the updater needs beyond the shared settings."""
        return {}

    def make_learner(
        self, config: TrainConfig, env: EnvBase, process_group: dist.ProcessGroup | None
    ) -> Learner:
        """Build networks, loss and updater for an environment."""
        actors = make_actors(config, env)
        critic = build_critic(config, env)
        loss = self.make_loss(
            actors,
            critic,
            **self.further_networks(config, env),
            popart=self.popart,
            **critic_settings(self, env),
        )
        loss.make_value_estimator(ValueEstimators.GAE, gamma=self.gamma, lmbda=self.lmbda)
        updater = SequentialUpdater(
            loss,
            **optimizer_settings(config),
            num_epochs=self.num_epochs,
            critic_epochs=self.critic_epochs,
            minibatch_size=self.minibatch_size,
            max_grad_norm=self.max_grad_norm,
            order=self.order,
            sequence_length=getattr(config.model, "sequence_length", None),
            compile=self.compile,
            seed=config.seed,
            process_group=process_group,
            **self.updater_settings(),
        )
        # The memory of a critic goes on from one batch to the next with the policy.
        remembering = loss.critic_network if has_memory(loss.critic_network) else None
        return Learner(policy_of(actors, remembering), updater, actors)


def build_critic(config: TrainConfig, env: EnvBase) -> Any:
    """Build a critic as a configuration asks for it."""
    has_state, critic = state_key(env) is not None, config.critic
    if critic.make_critic is not None:
        return build_network(critic.make_critic, env, "critic.make_critic")
    sees = critic.input
    if sees == "auto":
        sees = "state" if has_state else "observations"
    if sees == "state" and not has_state:
        raise ConfigError(
            f"critic.input=state needs a state of the environment's own, which {config.task.name} "
            "does not have: take observations or agent_specific."
        )
    memory: dict[str, Any] = {}
    if critic.model != "mlp":
        memory = {"recurrent": critic.model, "hidden_size": critic.hidden_size}
    return make_critic(env, input=sees, **memory, **network_settings(config.model))
