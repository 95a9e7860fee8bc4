"""The trust-region step that keeps a cost below its bound, or brings it back there.

Read :meth:`ConstrainedStep.propose`, then :meth:`ConstrainedProposal.apply`; how far to go which
way is solved in :mod:`torchrl_happo.steps.trust_region.dual`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.distributions import Distribution

from torchrl_happo.steps.step import Problem
from torchrl_happo.steps.trust_region.dual import Case, Combination, solve_dual
from torchrl_happo.steps.trust_region.line_search import LINE_SEARCHES, OneByOne
from torchrl_happo.steps.trust_region.local_model import LocalModel, Objective
from torchrl_happo.steps.trust_region.natural_gradient import flatten, unflatten
from torchrl_happo.steps.trust_region.solve import Direction
from torchrl_happo.steps.trust_region.step import TrustRegion, TrustRegionStep
from torchrl_happo.transaction import uncached_autocast

__all__ = ["ConstrainedProblem", "ConstrainedStep", "ConstrainedTrustRegion"]


@dataclass(frozen=True, eq=False)
class ConstrainedProblem(Problem):
    """A problem with a cost that must stay below a bound.

    Attributes:
        cost (callable, optional): from the agent's policy and data to the surrogate of the cost, a
            scalar, as ``surrogate`` is that of the gain.
        excess (callable, optional): from data to the cost less its bound, a scalar in units of
            ``cost``.
    """

    cost: Callable[[Distribution, TensorDictBase], Tensor] | None = None
    excess: Callable[[TensorDictBase], Tensor] | None = None


@dataclass(frozen=True)
class ConstrainedTrustRegion(TrustRegion):
    """Settings of a constrained trust-region step; called with a problem, they build its step.

    It has the arguments of :class:`~torchrl_happo.steps.trust_region.step.TrustRegion`.
    """

    def __call__(self, problem: Problem) -> ConstrainedStep:
        """Build the step of one agent, whose problem must have a policy and a cost."""
        super().__call__(problem)
        if not isinstance(problem, ConstrainedProblem) or problem.cost is None:
            raise ValueError(
                f"A constrained trust region needs a cost, but the problem of {problem.name!r} has "
                "none; take a TrustRegion step for it."
            )
        return ConstrainedStep(problem, self)


class ConstrainedStep(TrustRegionStep):
    """One natural-gradient step for each batch, within a bound of a cost.

    Args:
        problem (ConstrainedProblem): the policy, its surrogates and its parameters.
        settings (ConstrainedTrustRegion): of this agent.
    """

    problem: ConstrainedProblem

    @property
    def objectives(self) -> list[Objective]:
        """The surrogates of the gain and of the cost."""
        assert self.problem.cost is not None
        return [self.surrogate, self.problem.cost]

    def propose(self, data: TensorDictBase) -> ConstrainedProposal:  # type: ignore[override]
        """Find the natural gradients of the gain and of the cost.

        Args:
            data (TensorDictBase): as for an unconstrained step, and what the cost is read from.
        """
        assert self.problem.excess is not None
        # One forward pass and one Fisher matrix for both.
        (gain, cost), (up, down), evaluate = self.near(data)
        excess = self.problem.excess(data)
        return ConstrainedProposal(self, gain, cost, up, down, excess, evaluate)


@dataclass(frozen=True, eq=False)
class ConstrainedProposal:
    """A constrained step that has not been taken.

    Attributes:
        step (ConstrainedStep): the step of this agent.
        model, cost_model (LocalModel): gain and cost near the present parameters.
        direction, cost_direction (Direction): their natural gradients.
        excess (Tensor): the cost less its bound.
        evaluate (callable): from parameters to gain, cost and mean divergence.
    """

    step: ConstrainedStep
    model: LocalModel
    cost_model: LocalModel
    direction: Direction
    cost_direction: Direction
    excess: Tensor
    evaluate: Callable[[Tensor], tuple[Tensor, ...]]

    def combination(self, max_kl: float) -> Combination:
        """Return how the step is made of the two natural gradients, for a radius."""
        g, b = self.direction, self.cost_direction
        return solve_dual(g.curvature, -b.target.dot(g.x), b.curvature, self.excess.to(g.x), max_kl)

    def _full_step(self, max_kl: float) -> tuple[Tensor, Combination]:
        made = self.combination(max_kl)
        step = made.gain * self.direction.x - made.retreat * self.cost_direction.x
        return torch.where(step.isfinite().all(), step, 0), made

    @property
    def gain(self) -> Tensor:
        """Improvement of the surrogate that the full step promises, a scalar."""
        step, _ = self._full_step(self.step.settings.radius(self.step.problem))
        return step.dot(self.direction.target)

    @property
    def divergence(self) -> Tensor:
        """Mean divergence of the full step to second order, a scalar, in nats."""
        step, _ = self._full_step(self.step.settings.radius(self.step.problem))
        return step.dot(self.model.fisher_product(step)) / 2

    def apply(self, max_kl: float | None = None) -> TensorDict:
        r"""Take the step, or none at all.

        A fraction of the step is accepted if the divergence is below the radius, the surrogate
        grows (asked where the bound is kept), and the surrogate of the cost grows by at most
        :math:`\max(-c, 0)`. A rejected step leaves the parameters as they are, bit for bit.

        Args:
            max_kl (float, optional): radius in place of the step's own; 0: none at all.

        Returns:
            the scalars of a trust-region step; ``case`` (:class:`.dual.Case`), ``price``,
            ``excess``, and ``cost_change``, of the surrogate of the cost by the step that was made.
        """
        settings, problem = self.step.settings, self.step.problem
        trained = self.step.trained()
        theta = flatten(self.step.parameters()).detach()
        radius = settings.radius(problem) if max_kl is None else max_kl
        mean, number = problem.learners.mean, self.model.num_samples
        step, made = self._full_step(radius)
        expected = step.dot(self.direction.target)
        asks_gain = made.case >= Case.BOTH
        before, cost_before = self.model.surrogate, self.cost_model.surrogate
        allowance = (-self.excess).clamp_min(0)

        def within_bound(flat: Tensor) -> tuple[Tensor, ...]:
            gain, cost, kl = self.evaluate(flat)
            (cost,) = mean([cost], number)
            # Whatever breaks a condition of its own is as far as infinity.
            kl = torch.where(cost - cost_before <= allowance, kl, float("inf"))
            return torch.where(asks_gain | gain.isnan(), gain, before + 1), kl

        # A trial that is called for one vector at a time stays such a one.
        search_in = OneByOne(within_bound) if isinstance(self.evaluate, OneByOne) else within_bound
        on_cpu, alone = theta.device.type == "cpu", problem.learners.alone
        kind = settings.line_search or ("sequential" if on_cpu else "batched")
        with torch.no_grad(), uncached_autocast():
            search = LINE_SEARCHES[kind if alone else "sequential"](
                search_in,
                theta,
                step,
                before,
                torch.where(asks_gain, expected, 1.0),
                max_kl=radius,
                backtrack_factor=settings.backtrack_factor,
                max_backtracks=settings.max_backtracks,
                accept_ratio=settings.accept_ratio,
                common=lambda means: mean(means, number),
            )
            # A step of nothing is none: in recovery it would pass for one.
            success = search.success & (step != 0).any()
            fraction = torch.where(success, search.fraction, 0)
            moved = torch.where(success, theta + fraction * step, theta)
            gain, cost, kl = mean(self.evaluate(moved), number)
            for name, value in unflatten(moved, trained).items():
                trained[name].copy_(value)
        residual = self.direction.residual.norm() / self.direction.target.norm().clamp_min(
            torch.finfo(theta.dtype).tiny
        )
        return TensorDict(
            {
                "line_search_success": success.float(),
                "step_fraction": fraction,
                "step_kl": kl,
                "improvement": gain - before,
                "expected_improvement": fraction * expected,
                "curvature": self.direction.curvature,
                "cg_residual": residual,
                "grad_norm": self.model.gradient.norm(),
                "case": made.case.to(theta.dtype),
                "price": made.price,
                "excess": self.excess,
                "cost_change": cost - cost_before,
            }
        )
