"""T-PPO (Ye et al., 2022): PPO on the chain of choices, distilled into agents that act alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.distributed as dist
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import EnvBase

from torchrl_happo.objectives import TPPOLoss
from torchrl_happo.recipe.algorithms.mat import Mat
from torchrl_happo.recipe.algorithms.parts import make_actors, optimizer_settings, policy_of
from torchrl_happo.recipe.config import TrainConfig, choice, count, default_of
from torchrl_happo.recipe.learner import Learner
from torchrl_happo.update.distillation import Distillation
from torchrl_happo.update.updater import SequentialUpdater


@dataclass
class Tppo(Mat):
    """Transformed PPO: each choice has its own credit; agents learn to act alone.

    The coordinated policy collects; evaluations, and what load returns, are of the agents alone.
    """

    loss = TPPOLoss
    prefix_values: ClassVar[bool] = True
    splits: ClassVar[bool] = False

    target: str = choice("full", "greedy", default=default_of(Distillation, "target"))
    """Target of the agents: the distribution of the coordinated policy, or its best actions."""
    distillation_epochs: int | None = count(None)
    """Passes of the agents over a batch; null: num_epochs."""

    def make_learner(
        self, config: TrainConfig, env: EnvBase, process_group: dist.ProcessGroup | None
    ) -> Learner:
        """Build the coordinated policy and its updater, and the agents that learn from it."""
        updater = self.make_updater(config, env, process_group)
        actors = make_actors(config, env)
        teacher: Any = updater.loss.actor_network
        distillation = Distillation(
            teacher,
            actors,
            target=self.target,  # type: ignore[arg-type]
            optimizer=optimizer_settings(config)["optimizer"],
            num_epochs=self.distillation_epochs or self.num_epochs,
            minibatch_size=self.minibatch_size,
            max_grad_norm=self.max_grad_norm,
            seed=config.seed,
        )
        both = TaughtTeam(updater, distillation)
        return Learner(teacher, both, actors, deployed=policy_of(actors))


class TaughtTeam:
    """The updater of a coordinated policy and the distillation of it, one after the other.

    Args:
        updater (SequentialUpdater): of the coordinated policy.
        distillation (Distillation): of the agents that act alone.
    """

    def __init__(self, updater: SequentialUpdater, distillation: Distillation) -> None:
        self.updater = updater
        self.distillation = distillation

    def __call__(self, batch: TensorDictBase) -> TensorDict:
        """Learn from a batch; return the metrics of both, those of agents under their names."""
        taught = self.distillation(batch)  # by the policy that acted
        return self.updater(batch).update({f"alone_{name}": taught[name] for name in taught.keys()})

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both."""
        return {
            "updater": self.updater.state_dict(),
            "distillation": self.distillation.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`; one that does not fit changes nothing."""
        before = self.updater.state_dict()
        self.updater.load_state_dict(state["updater"])
        try:
            self.distillation.load_state_dict(state["distillation"])
        except ValueError:
            self.updater.load_state_dict(before)
            raise
