"""One agent's policy before and after its step, and a glossary of what an update reports.

``SequentialUpdater`` returns scalars under the name of each agent and of each critic. Ratios, means
and divergences run over an agent's valid decisions of the whole batch, before and after its step.
Where an agent acts nowhere, they and the report of its step are absent; on accelerators, where to
know this would take time, they are 0 (but ``epochs``).

Of every agent:

- ``position``: its place in the order of this batch, from 0. Random orders: all places, over time.
- ``factor_mean``: mean of the factor that it was given; 1 for the first. Healthy: 0.9 to 1.1.
- ``factor_max``: the largest factor of a decision. Healthy: below 10.
- ``factor_ess``: effective sample size of the factor, relative to the batch: 1 for the first,
  smaller the further the agents before have moved. Healthy: above 0.8; below 0.5 the agent learns
  from half of its batch.
- ``surrogate_before``, ``surrogate``: mean of the corrected advantage before, and times the ratio
  after its step. Healthy: the second is the larger.
- ``ratio_mean``: healthy 0.98 to 1.02. ``ratio_max``, ``ratio_min``: the extremes.
- ``kl``: exact divergence of the old from the new policy (an estimate, where there is no closed
  form). Healthy: 0.001 to 0.05; for HATRPO at most ``max_kl``.
- ``entropy``: of the new policy. Falls slowly; of densities it may be negative.
- ``grad_norm``: norm of the gradient before clipping, a mean over its steps. Finite.

Of a first-order step (HAPPO, HAA2C, CoPPO, A2PO, MAT, critics):

- ``loss``: mean over the minibatches of all epochs, entropy bonus and weights included.
- ``epochs``: passes that were made; fewer than ``num_epochs`` where ``target_kl`` stopped them.
- ``clip_fraction`` (HAPPO, CoPPO, A2PO, MAT): share of decisions outside the clipping range.
  Healthy: 0.02 to 0.3.

Of HATRPO:

- ``line_search_success``: 1, or 0 if no step was accepted. Healthy: 1 nearly always.
- ``step_fraction``: accepted share of the full step. Healthy: 0.5 to 1; 0 without success.
- ``step_kl``: divergence of the last step tried. Healthy: near ``max_kl``.
- ``improvement``, ``expected_improvement``: of the surrogate, by the last step tried and by its
  gradient. Healthy: the first at least half of the second.
- ``curvature``: ``x @ (F + damping) @ x`` along the direction. Positive and finite.
- ``cg_residual``: relative residual of conjugate gradient. Healthy: below 0.1.

Of HAPPO-Lagrangian, for each cost (here ``cost``):

- ``multiplier_cost``: the price of the cost for this agent. Settles where the bound is just kept.
- ``episode_cost``: mean cost of the episodes that ended. Healthy: near its bound, or below it.

Of MACPO, beside the metrics of HATRPO:

- ``case``: 0 recovery, 1 the bound is being restored, 2 bound and trust region limit the step,
  3 the bound is out of reach, 4 the cost has no slope. Healthy: seldom 0.
- ``excess``: how far the costs are above their bound, times 1 - gamma; what the agents before have
  added counts. Healthy: at most 0.
- ``price``: multiplier of the cost in this step.
- ``cost_change``: what the step changes of the cost.

Of a critic, beside its ``loss``, ``grad_norm`` and ``epochs`` (a critic that a block owns is fitted
by the block's step, which has them):

- ``explained_variance``: share of the variance of the returns that its values explained before the
  fit. Rises towards 1; at or below 0 the critic knows nothing.
"""

from __future__ import annotations

from functools import partial

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchrl_happo.distributed import Learners
from torchrl_happo.masked import VALID, largest, masked_mean
from torchrl_happo.objectives.base import SequentialLoss
from torchrl_happo.objectives.surrogate import corrected_advantage
from torchrl_happo.policy.distributions import kl_divergence
from torchrl_happo.steps.compile.code import Code
from torchrl_happo.team.agent import OLD_LOG_PROB, Agent
from torchrl_happo.team.values import check_actions, check_log_prob, explained
from torchrl_happo.update.batch import TeamBatch
from torchrl_happo.update.correction import Correction

__all__ = ["Passes"]

#: Entries of an agent's data that its step does not read: the parameters of the distribution and
#: the log-probability of the stored actions, both of the policy just before the step.
OLD_POLICY = "old_policy"
LOG_PROB_BEFORE = "log_prob_before"


class Passes:
    """The two passes over an agent's data, between which it takes its step.

    Args:
        loss (SequentialLoss): the team's loss.
        agent (Agent): the agent.

    Keyword Args:
        code (Code, optional): to compile the passes. Defaults to ``None``: they run as they are.
        learners (Learners): over whose entries metrics are taken.
    """

    def __init__(
        self, loss: SequentialLoss, agent: Agent, *, learners: Learners, code: Code | None = None
    ) -> None:
        self.loss = loss
        self.agent = agent
        self.code = code
        self.learners = learners

    def ready(
        self, batch: TeamBatch, correction: Correction, *, read_values: bool
    ) -> TensorDictBase:
        """Return the agent's corrected data, with the policy that it starts from.

        Args:
            batch (TeamBatch): the batch of the update.
            correction (Correction): what the agents that have moved have changed.

        Keyword Args:
            read_values (bool): as for :meth:`before`.
        """
        with self.learners.agreement():
            data = batch.agent_data(self.agent, correction.entries(self.agent))
            self.before(data, read_values=read_values)
        return data

    @torch.no_grad()
    def before(self, data: TensorDictBase, *, read_values: bool) -> None:
        """Evaluate the policy that the agent starts from; add its log-probabilities to the data.

        Args:
            data (TensorDictBase): the agent's data; modified in place.

        Keyword Args:
            read_values (bool): whether to look at the values of the actions.

        Raises:
            ValueError: if the actor cannot read the data, or its actions cannot be its own.
        """
        agent = self.agent
        with explained(f"The actor of agent {agent.name!r}", data, agent.update_keys):
            old = self._evaluate(partial(_parameters, agent), data)
        parameters = dict(old.items())
        valid = data.get(VALID, None)
        check_actions(agent, parameters, data, valid=valid, read_values=read_values)
        agent.policy.prepare(data)
        log_prob = agent.log_prob(parameters, data)
        if read_values:
            check_log_prob(agent, log_prob, data)
        data.set(OLD_LOG_PROB, agent.behaviour_log_prob(data, log_prob))
        data.set(LOG_PROB_BEFORE, log_prob)
        data.set(OLD_POLICY, old)

    def step_data(self, data: TensorDictBase) -> TensorDictBase:
        """Return the entries of the data that the step reads."""
        policy = self.agent.policy
        left_out = [*policy.log_prob_keys, *policy.written_keys, OLD_POLICY, LOG_PROB_BEFORE]
        return data.exclude(*left_out)

    @torch.no_grad()
    def after(self, data: TensorDictBase) -> tuple[Tensor, TensorDict]:
        """Compare the policy that the agent arrived at with the one it started from.

        Args:
            data (TensorDictBase): the data after :meth:`before`.

        Returns:
            the log of the new over the old policy at the stored actions, as items, and metrics of
            all learners.
        """
        result = self._evaluate(partial(_compare, self.loss, self.agent), data)
        log_ratio = result.pop("log_ratio")
        extremes = self.learners.maximum(result.pop("ratio_range"))
        most, least = torch.where(extremes == -torch.inf, 0.0, extremes)
        weight = 1.0 if self.learners.alone else self.loss.agent_weight(self.agent, data)
        means = self.learners.mean(list(result.values()), weight)
        report = dict(zip(result.keys(), means, strict=True))
        return log_ratio, TensorDict({**report, "ratio_max": most, "ratio_min": -least})

    def _evaluate(self, function: partial[TensorDict], data: TensorDictBase) -> TensorDictBase:
        return function(data) if self.code is None else self.code.run(function, data)


def _parameters(agent: Agent, data: TensorDictBase) -> TensorDict:
    """Return the parameters of an agent's distribution at the items of its data."""
    return TensorDict(agent.policy.parameters(data), batch_size=data.batch_size)


def _compare(loss: SequentialLoss, agent: Agent, data: TensorDictBase) -> TensorDict:
    r"""Return the log-ratio of the policies after and before the step, and means of metrics.

    The means over the valid decisions are: ``surrogate_before`` and ``surrogate`` (of the corrected
    advantage :math:`M` and :math:`r M`), ``ratio_mean``, ``kl`` (exact, old to new; estimated by
    :math:`r - 1 - \log r` where the distribution has no known divergence), and ``entropy`` of the
    new policy.
    """
    policy, valid = agent.policy, data.get(VALID, None)
    old = dict(data.get(OLD_POLICY).items())
    new = policy.parameters(data)
    log_prob = agent.log_prob(new, data)
    log_ratio = log_prob - data.get(LOG_PROB_BEFORE)
    ratio, corrected = log_ratio.exp(), corrected_advantage(data, loss.tensor_keys)
    try:
        dists = policy.scored(old, data), policy.scored(new, data)
        kl = kl_divergence(*dists, batch_ndim=log_ratio.ndim)
    except NotImplementedError:
        kl = ratio - 1 - log_ratio
    means = {
        "surrogate_before": corrected,
        "surrogate": ratio * corrected,
        "ratio_mean": ratio,
        "kl": kl,
        "entropy": policy.entropy(new, data, log_prob, log_ratio),
    }
    return TensorDict(
        {
            **{name: masked_mean(value, valid) for name, value in means.items()},
            **loss.agent_report(agent, log_ratio, valid),
            "log_ratio": log_ratio,
            "ratio_range": _range(ratio, valid),
        }
    )


def _range(ratio: Tensor, valid: Tensor | None) -> Tensor:
    """Return the largest ratio and minus the least one; minus infinity where nothing is valid."""
    return torch.stack([largest(ratio, valid), largest(-ratio, valid)])
