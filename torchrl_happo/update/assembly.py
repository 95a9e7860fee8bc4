"""Builds the steps of an updater, and the passes around them, from the loss and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from torchrl_happo.distributed import Learners
from torchrl_happo.objectives.base import SequentialLoss
from torchrl_happo.objectives.value_norm import last_linear
from torchrl_happo.steps.compile.code import Code, make_compiler
from torchrl_happo.steps.first_order import FirstOrder
from torchrl_happo.steps.optimizers import OptimizerFactory
from torchrl_happo.steps.step import Problem, Step, StepFactory
from torchrl_happo.team.agent import Agent
from torchrl_happo.update.metrics import Passes

__all__ = ["Assembly", "with_own"]


class Assembly:
    """Gives every step its problem: the loss's part, and the updater's.

    Args:
        loss (SequentialLoss): the team's loss.
        compile (bool or mapping): as for :class:`~torchrl_happo.SequentialUpdater`.
        cudagraphs (bool): likewise.
        learners (Learners): the processes that train together.
        generator (torch.Generator): draws minibatches.
    """

    def __init__(
        self,
        loss: SequentialLoss,
        compile: bool | Mapping[str, Any],
        cudagraphs: bool,
        learners: Learners,
        generator: torch.Generator,
    ) -> None:
        self.loss = loss
        self.compiler = make_compiler(compile, cudagraphs, generator.device)
        agents = loss.agents
        names = [*(a.name for a in agents), *(a.group_name for a in agents), *loss.critics]
        self.common = {
            "names": tuple(dict.fromkeys(names)),
            "learners": learners,
            "generator": generator,
        }
        self.learners = learners

    def passes(self, agent: Agent) -> Passes:
        """Return the passes of an agent around its step.

        Their code is not that of the step: where one cannot be compiled, the other may be.
        """
        return Passes(self.loss, agent, code=self._code(agent), learners=self.learners)

    def steps(self, agent_step: StepFactory, critic_step: StepFactory) -> dict[str, Step]:
        """Return the steps of all agents and of the critics that are fitted, by name."""
        steps = {agent.name: self.agent_step(agent, agent_step) for agent in self.loss.agents}
        for name, critic in self.loss.critics.items():
            if critic.estimator is not None:
                critic.estimator()  # its coefficients are part of the state from the start
            if critic.is_fitted and critic.popart:
                last_linear(critic.network, most_outputs=self.loss.num_agents)
            if critic.is_fitted and not critic.is_owned:
                steps[name] = self.critic_step(name, critic_step)
        return steps

    def agent_step(self, agent: Agent, factory: StepFactory) -> Step:
        """Return the step of an agent."""
        problem = self.loss.agent_problem(agent, code=self._code(agent), **self.common)
        return self._build(factory, problem)

    def critic_step(self, name: str, factory: StepFactory) -> Step:
        """Return the step of a critic."""
        critic, code = self.loss.critics[name], None
        if self.compiler is not None:
            code = Code(self.compiler, critic.network)
        return self._build(factory, self.loss.critic_problem(name, code=code, **self.common))

    def _code(self, agent: Agent) -> Code | None:
        if self.compiler is None:
            return None
        loss = self.loss
        shares = not (loss.has_settings_by_agent or loss.owns_critic)
        template = (lambda: agent.template) if shares else None
        return Code(self.compiler, loss.moved_by(agent), template=template)

    @staticmethod
    def _build(factory: StepFactory, problem: Problem) -> Step:
        step = factory(problem)
        if not isinstance(step, Step):
            raise TypeError(
                f"The step factory returned {step!r} for {problem.name!r}; it must return a Step, "
                "with the methods of torchrl_happo.steps.Step."
            )
        return step


def with_own(
    settings: FirstOrder,
    optimizer: OptimizerFactory | None,
    num_epochs: int | None,
    minibatch_size: int | None,
) -> FirstOrder:
    """Return the settings with what a critic has of its own."""
    own: dict[str, Any] = {
        "optimizer": optimizer,
        "num_epochs": num_epochs,
        "minibatch_size": minibatch_size,
    }
    return replace(settings, **{k: v for k, v in own.items() if v is not None})
