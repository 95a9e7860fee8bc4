"""The trust-region step: one natural-gradient step on the whole batch.

Read :meth:`TrustRegionStep.propose`, then :meth:`TrustRegionProposal.apply`; the mathematics is in
:mod:`torchrl_happo.steps.trust_region.solve`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.distributions import Distribution

from torchrl_happo.steps.compile.trust_region import CompiledModel
from torchrl_happo.steps.minibatches import draw_rows
from torchrl_happo.steps.step import VALID, Problem, setting_of
from torchrl_happo.steps.trust_region.line_search import LINE_SEARCHES, Evaluate
from torchrl_happo.steps.trust_region.local_model import (
    LocalModel,
    Objective,
    local_models,
    trial,
)
from torchrl_happo.steps.trust_region.natural_gradient import flatten, unflatten
from torchrl_happo.steps.trust_region.solve import (
    Direction,
    TrustRegionResult,
    find_direction,
    take_step,
)
from torchrl_happo.transaction import load_generator_state, uncached_autocast

__all__ = ["TrustRegion", "TrustRegionProposal", "TrustRegionStep"]


@dataclass(frozen=True)
class TrustRegion:
    r"""Settings of a trust-region step; called with a problem, they build its step.

    Args:
        max_kl (float, mapping or callable): bound :math:`\delta` of the mean divergence, in nats;
            by name of agent or group; or a callable from an agent's name to it, which is asked
            anew for each batch, as a schedule wants. Defaults to ``0.01``.
        damping (float): added to the diagonal of the Fisher matrix. Defaults to ``0.1``.
        cg_iterations (int): iterations of conjugate gradient. Defaults to ``10``.
        cg_tolerance (float): squared residual at which they stop. Defaults to ``1e-10``.
        backtrack_factor (float): ratio of a step fraction to the one tried before, in (0, 1).
            Defaults to ``0.8``.
        max_backtracks (int): step fractions to try, the full step included. Defaults to ``10``.
        accept_ratio (float): least accepted ratio of actual to expected improvement, in [0, 1).
            Defaults to ``0.5``.
        fisher_fraction (float): share of the batch's rows, drawn at random, that the Fisher matrix
            is averaged over, in (0, 1]. Defaults to ``1.0``.
        line_search (str, optional): ``"sequential"`` tries one fraction after the other and stops
            at the first acceptable one, a flag read per try; ``"batched"`` evaluates all at once
            and reads nothing. Defaults to ``None``: batched on accelerators, sequential on the CPU.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> weight = nn.Parameter(torch.zeros(()))
        >>> problem = Problem(
        ...     "agent",
        ...     loss=lambda data: -weight,
        ...     named_parameters=lambda: [("w", weight)],
        ...     distribution=lambda params, data: torch.distributions.Normal(
        ...         params["w"] + data["x"], 1.0
        ...     ),
        ...     surrogate=lambda dist, data: dist.mean.mean(),
        ... )
        >>> step = TrustRegion(max_kl=0.02, damping=0.0)(problem)
        >>> proposal = step.propose(TensorDict({"x": torch.zeros(4)}, batch_size=[4]))
        >>> proposal.gain, proposal.divergence
        (tensor(0.2000), tensor(0.0200))
        >>> metrics = proposal.apply()
        >>> round(weight.item(), 4), metrics["line_search_success"].item()
        (0.2, 1.0)
    """

    max_kl: float | Mapping[str, float] | Callable[[str], float] = 0.01
    damping: float = 0.1
    cg_iterations: int = 10
    cg_tolerance: float = 1e-10
    backtrack_factor: float = 0.8
    max_backtracks: int = 10
    accept_ratio: float = 0.5
    fisher_fraction: float = 1.0
    line_search: Literal["sequential", "batched"] | None = None

    def __post_init__(self) -> None:
        if not callable(self.max_kl):
            radii = self.max_kl.values() if isinstance(self.max_kl, Mapping) else [self.max_kl]
            for radius in radii:
                _check_radius(radius)
        searches = (None, *LINE_SEARCHES)
        for name, valid, wanted in (
            ("damping", 0 <= self.damping < math.inf, "non-negative and finite"),
            ("cg_iterations", self.cg_iterations >= 1, "at least 1"),
            ("cg_tolerance", self.cg_tolerance >= 0, "non-negative"),
            ("backtrack_factor", 0 < self.backtrack_factor < 1, "between 0 and 1, exclusively"),
            ("max_backtracks", self.max_backtracks >= 1, "at least 1"),
            ("accept_ratio", 0 <= self.accept_ratio < 1, "at least 0 and less than 1"),
            ("fisher_fraction", 0 < self.fisher_fraction <= 1, "greater than 0 and at most 1"),
            ("line_search", self.line_search in searches, "'sequential', 'batched' or None"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}.")

    def __call__(self, problem: Problem) -> TrustRegionStep:
        """Build the step of one agent, whose problem must have a policy."""
        if problem.distribution is None or problem.surrogate is None:
            raise ValueError(
                f"A trust region needs a policy, but the problem of {problem.name!r} has no "
                "distribution or no surrogate; take a FirstOrder step for it."
            )
        self.radius(problem)
        return TrustRegionStep(problem, self)

    def radius(self, problem: Problem) -> float:
        """Return the bound of the divergence for one agent, as it is now."""
        if callable(self.max_kl):
            radius = self.max_kl(problem.name)
        else:
            radius = setting_of(problem, "max_kl", self.max_kl, type(self).max_kl)
        return _check_radius(radius)


class TrustRegionStep:
    """One natural-gradient step for each batch; built by :class:`TrustRegion`.

    Args:
        problem (Problem): the policy, its surrogate and its parameters.
        settings (TrustRegion): of this agent.
    """

    def __init__(self, problem: Problem, settings: TrustRegion) -> None:
        assert problem.distribution is not None
        assert problem.surrogate is not None
        self.problem = problem
        self.settings = settings
        self.distribution = problem.distribution
        self.surrogate = problem.surrogate
        #: Draws the rows of the Fisher matrix; ``None``: nothing is drawn.
        self.generator = problem.generator if settings.fisher_fraction < 1 else None
        self._compiled = None if problem.code is None else CompiledModel(self, problem.code)

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are not frozen."""
        return list(self.trained().values())

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are not frozen by their names."""
        return {name: p for name, p in self.problem.named_parameters() if p.requires_grad}

    def propose(self, data: TensorDictBase) -> TrustRegionProposal:
        """Find the natural gradient of the surrogate.

        Args:
            data (TensorDictBase): the entries that the policy and the surrogate read, and perhaps
                ``"valid"``, which says what divergence and Fisher matrix are averaged over.
        """
        (model,), (direction,), evaluate = self.near(data)
        return TrustRegionProposal(self, model, direction, evaluate)

    @property
    def objectives(self) -> list[Objective]:
        """The functions of policy and data that the step knows near the parameters."""
        return [self.surrogate]

    def near(self, data: TensorDictBase) -> tuple[list[LocalModel], list[Direction], Evaluate]:
        """Return each objective near the parameters, its natural gradient, and the trial of others.

        Args:
            data (TensorDictBase): as for :meth:`propose`.
        """
        with uncached_autocast():
            compiled = self._compiled_models(data)
            if compiled is not None:
                return compiled
            # Objectives, their gradients and Fisher-vector product at the present parameters.
            models, evaluate = self.local_models(data)
            # With several processes each of these is a mean over the samples of all.
            models = [model.common(self.problem.learners.mean) for model in models]
            return models, [self.direction(model) for model in models], evaluate

    def direction(self, model: LocalModel) -> Direction:
        """Return the direction x that solves (F + damping I) x = g."""
        settings = self.settings
        return find_direction(
            model,
            damping=settings.damping,
            cg_iterations=settings.cg_iterations,
            cg_tolerance=settings.cg_tolerance,
        )

    def local_models(self, data: TensorDictBase) -> tuple[list[LocalModel], Evaluate]:
        """Return the objectives near the parameters by one forward pass, and their trial."""
        objectives = self.objectives
        named = dict(self.problem.named_parameters())
        # Copies that share the values: no gradient is left behind at the network's own.
        leaves = {name: p.detach().requires_grad_() for name, p in self.trained().items()}

        def policy(own: Mapping[str, Tensor], seen: TensorDictBase) -> Distribution:
            return self.distribution({**named, **own}, seen)

        rows = self.draw_rows(data)
        part = data if rows is None else data[rows]
        batch_ndim = len(self.problem.sample_shape(data))
        old, models = local_models(policy, leaves, data, part, objectives, batch_ndim)
        number, share = self.count(data), self.count(part)

        def evaluate(flat: Tensor) -> tuple[Tensor, ...]:
            return trial(policy, old, unflatten(flat, leaves), data, objectives, batch_ndim)

        models = [m._replace(num_samples=number, num_fisher_samples=share) for m in models]
        return models, evaluate

    def _compiled_models(
        self, data: TensorDictBase
    ) -> tuple[list[LocalModel], list[Direction], Evaluate] | None:
        """Return the same from compiled code; ``None`` if that cannot be had."""
        compiled = self._compiled
        if compiled is None or compiled.code.is_given_up or len(data) < 2:
            return None
        before = self.state_dict()
        try:
            return compiled.at(data, self.draw_rows(data))
        except Exception as error:
            compiled.code.give_up(error)
            self.load_state_dict(before)
            return None

    def draw_rows(self, data: TensorDictBase) -> Tensor | None:
        """Draw the rows of the Fisher matrix; ``None``: all."""
        if self.settings.fisher_fraction == 1:
            return None
        share = self.settings.fisher_fraction
        return draw_rows(len(data), data.get(VALID, None), share, self.generator)

    def count(self, data: TensorDictBase) -> Tensor | float:
        """Return the number of samples that means over the data are taken over."""
        valid = data.get(VALID, None)
        return float(self.problem.sample_shape(data).numel()) if valid is None else valid.sum()

    def follow(self) -> None:
        """Refuse hooks on gradients, which are no part of a trust region's local model."""
        self.problem.refuse_hooks()

    def end_batch(self) -> None:
        """Do nothing: a schedule sets ``max_kl`` from outside."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the generator, if rows are drawn."""
        return {} if self.generator is None else {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        if self.generator is not None:
            load_generator_state(self.generator, state["generator"])


@dataclass(frozen=True, eq=False)
class TrustRegionProposal:
    """A natural-gradient step that has not been taken.

    Attributes:
        step (TrustRegionStep): the step of this agent.
        model (LocalModel): the policy near its present parameters.
        direction (Direction): the natural gradient; its ``curvature`` is :math:`g^T F^{-1} g`.
        evaluate (callable): from parameters, as a vector, to surrogate and mean divergence.
    """

    step: TrustRegionStep
    model: LocalModel
    direction: Direction
    evaluate: Evaluate

    @property
    def gain(self) -> Tensor:
        """Improvement of the surrogate that the full step promises, a scalar."""
        return self.direction.gain(self.step.settings.radius(self.step.problem))

    @property
    def divergence(self) -> Tensor:
        """Mean divergence of the full step to second order, a scalar, in nats."""
        return self.direction.divergence(self.step.settings.radius(self.step.problem))

    def apply(self, max_kl: float | None = None) -> TensorDict:
        """Take the step, or none at all.

        Args:
            max_kl (float, optional): radius in place of the step's own; 0: none at all.

        Returns:
            scalars: ``line_search_success`` (1 or 0), ``step_fraction`` (0 if rejected),
            ``step_kl`` (of the last step tried), ``improvement``, ``expected_improvement``,
            ``curvature``, ``cg_residual`` (relative), ``grad_norm``.
        """
        trained = self.step.trained()
        moved, result = self.take(max_kl and _check_radius(max_kl))
        with torch.no_grad():
            for name, value in unflatten(moved, trained).items():
                trained[name].copy_(value)
        return TensorDict(
            {
                "line_search_success": result.success.float(),
                "step_fraction": result.step_fraction,
                "step_kl": result.kl,
                "improvement": result.improvement,
                "expected_improvement": result.expected_improvement,
                "curvature": result.curvature,
                "cg_residual": result.cg_residual,
                "grad_norm": result.gradient_norm,
            }
        )

    def take(self, max_kl: float | None = None) -> tuple[Tensor, TrustRegionResult]:
        """Return the parameters that :meth:`apply` moves to, as one vector, and what happened."""
        step, settings = self.step, self.step.settings
        theta = flatten(step.parameters()).detach()
        with uncached_autocast():
            # Stretch the natural gradient to the boundary of the region, and search back from
            # there for a step that keeps to the true divergence and improves the true surrogate.
            return take_step(
                theta,
                self.model,
                self.direction,
                self.evaluate,
                max_kl=settings.radius(step.problem) if max_kl is None else max_kl,
                line_search=settings.line_search or ("sequential" if theta.is_cpu else "batched"),
                backtrack_factor=settings.backtrack_factor,
                max_backtracks=settings.max_backtracks,
                accept_ratio=settings.accept_ratio,
                average=step.problem.learners.mean,
            )


def _check_radius(value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"max_kl must be positive and finite, got {value!r}.")
    return value
