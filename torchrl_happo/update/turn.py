"""One agent's turn: what is evaluated of its policy before its step, and after it."""

from __future__ import annotations

from functools import partial

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchrl_happo.distributed import Learners
from torchrl_happo.objectives.base import (
    ADVANTAGE,
    OLD_LOG_PROB,
    VALID,
    SequentialLossMixin,
)
from torchrl_happo.policy.policy import Parameters
from torchrl_happo.steps.compile.code import Code
from torchrl_happo.team.agents import Agent, behaviour_log_prob
from torchrl_happo.team.values import check_actions, explained
from torchrl_happo.update.metrics import agent_metrics, ratio_range

__all__ = ["Turn"]

#: Entries for the second pass, which the step does not read: the parameters of the distribution
#: and the log-probability of the stored actions, both of the policy just before the step.
_OLD_POLICY = "old_policy"
_LOG_PROB = "log_prob_before"


class Turn:
    """The two passes over an agent's view of the batch, between which it takes its step.

    Args:
        loss (HAPPOLoss or HATRPOLoss): the team's loss.
        agent (Agent): the agent.

    Keyword Args:
        code (Code, optional): to compile the passes. Defaults to ``None``: they run as they are.
        learners (Learners, optional): over whose entries metrics are taken. Defaults to ``None``:
            this process's alone.
    """

    def __init__(
        self,
        loss: SequentialLossMixin,
        agent: Agent,
        *,
        code: Code | None = None,
        learners: Learners | None = None,
    ) -> None:
        self.loss = loss
        self.agent = agent
        self.code = code
        self.learners = Learners() if learners is None else learners

    @torch.no_grad()
    def before(self, data: TensorDictBase, *, read_values: bool) -> TensorDictBase:
        """Evaluates the policy that the agent starts from.

        Args:
            data (TensorDictBase): the agent's view of the batch; entries are added.

        Keyword Args:
            read_values (bool): whether to look at the values of the actions.

        Returns:
            the view, with what the step and :meth:`after` read besides.

        Raises:
            ValueError: if the actor cannot read the data, or its actions cannot be its own.
        """
        agent, policy = self.agent, self.agent.policy
        with explained(f"The actor of agent {agent.name!r}", data, self.loss.agent_keys(agent)):
            old = self._evaluate(partial(_policy, agent), data)
        parameters = _parameters(old)
        valid = data.get(VALID, None)
        check_actions(agent, parameters, data, valid=valid, read_values=read_values)
        policy.prepare(data, parameters)
        log_prob = agent.log_prob(parameters, data)
        data.set(OLD_LOG_PROB, behaviour_log_prob(agent, data, log_prob))
        data.set(_LOG_PROB, log_prob)
        return data.set(_OLD_POLICY, old)

    def step_view(self, data: TensorDictBase) -> TensorDictBase:
        """What the step reads of the data that :meth:`before` returned."""
        policy = self.agent.policy
        return data.exclude(*policy.log_prob_keys, *policy.written_keys, _OLD_POLICY, _LOG_PROB)

    @torch.no_grad()
    def after(self, data: TensorDictBase) -> tuple[Tensor, TensorDict]:
        """Compares the policy that the agent arrived at with the one it started from.

        Args:
            data (TensorDictBase): what :meth:`before` returned.

        Returns:
            the log of the new over the old policy at the stored actions, and metrics of all
            learners.
        """
        result = self._evaluate(partial(_after, self.loss, self.agent), data)
        log_ratio = result.pop("log_ratio")
        most, least = self.learners.maximum(result.pop("ratio_range"))
        weight = 1.0 if self.learners.alone else self.loss.agent_weight(self.agent, data)
        means = self.learners.mean(list(result.values()), weight)
        report = dict(zip(result.keys(), means, strict=True))
        return log_ratio, TensorDict({**report, "ratio_max": most, "ratio_min": -least})

    def _evaluate(self, function: partial[TensorDict], data: TensorDictBase) -> TensorDictBase:
        return function(data) if self.code is None else self.code.run(function, data)


def _policy(agent: Agent, data: TensorDictBase) -> TensorDict:
    """The parameters of the agent's distribution."""
    return TensorDict(agent.policy.parameters(data), batch_size=data.batch_size)


def _after(loss: SequentialLossMixin, agent: Agent, data: TensorDictBase) -> TensorDict:
    """The ratio of the policies after and before the step, and what is reported of it."""
    policy = agent.policy
    old = _parameters(data.get(_OLD_POLICY))
    new = policy.parameters(data)
    log_prob = agent.log_prob(new, data)
    log_ratio = log_prob - data.get(_LOG_PROB)
    valid = data.get(VALID, None)
    means = agent_metrics(
        policy.scored(old, data),
        policy.scored(new, data),
        log_ratio,
        data.get(ADVANTAGE),
        policy.entropy(new, data, log_prob, log_ratio),
        valid,
    )
    means.update(loss.agent_report(log_ratio, valid))
    limits = ratio_range(log_ratio, valid)
    return TensorDict({**means, "log_ratio": log_ratio, "ratio_range": limits})


def _parameters(old: TensorDictBase) -> Parameters:
    return dict(old.items())
