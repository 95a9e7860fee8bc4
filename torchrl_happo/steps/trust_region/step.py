"""The trust-region inner step of one agent: one natural-gradient step on the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.distributions import Distribution

from torchrl_happo.distributed import Learners
from torchrl_happo.steps.compile.code import Code
from torchrl_happo.steps.compile.compiled_model import CompiledModel
from torchrl_happo.steps.minibatches import draw_rows
from torchrl_happo.steps.trust_region.natural_gradient import flatten, unflatten
from torchrl_happo.steps.trust_region.solve import (
    TrustRegion,
    TrustRegionResult,
    step_within_trust_region,
    trust_region_step,
)
from torchrl_happo.transaction import Undo, load_generator_state

__all__ = ["TrustRegionStep"]


class TrustRegionStep:
    """One :func:`~torchrl_happo.steps.trust_region.solve.trust_region_step` for each batch.

    Args:
        distribution (callable): from parameters by name and data to the policy's distribution.
        surrogate (callable): from a distribution and data to the scalar to increase.
        parameters (callable): returns the names and parameters this step may move.

    Keyword Args:
        settings (TrustRegion): bound, damping, iterations, line search.
        valid_key (str): entry of the data that marks the valid samples, if there is one.
        sample_shape (callable): from the data to the leading dimensions of the distribution that
            count samples, over which divergences are averaged. Defaults to the batch size.
        generator (torch.Generator, optional): draws the samples of the Fisher matrix.
        learners (Learners, optional): who take the step together. Defaults to ``None``: alone.
        code (Code, optional): what policy and surrogate read besides the data, to compile them:
            surrogate, gradient, Fisher-vector product and the trials of the line search. Defaults
            to ``None``: nothing is compiled.

    Example:
        >>> weight = nn.Parameter(torch.zeros(()))
        >>> step = TrustRegionStep(
        ...     lambda params, data: torch.distributions.Normal(params["w"] + data["x"], 1.0),
        ...     lambda dist, data: dist.mean.mean(),
        ...     lambda: [("w", weight)],
        ...     settings=TrustRegion(max_kl=0.02, damping=0.0),
        ... )
        >>> metrics = step(TensorDict({"x": torch.zeros(4)}, batch_size=[4]))
        >>> round(weight.item(), 4), metrics["line_search_success"].item()
        (0.2, 1.0)
    """

    def __init__(
        self,
        distribution: Callable[[Mapping[str, Tensor], TensorDictBase], Distribution],
        surrogate: Callable[[Distribution, TensorDictBase], Tensor],
        parameters: Callable[[], Iterable[tuple[str, nn.Parameter]]],
        *,
        settings: TrustRegion,
        valid_key: str = "valid",
        sample_shape: Callable[[TensorDictBase], torch.Size] = lambda data: data.batch_size,
        generator: torch.Generator | None = None,
        learners: Learners | None = None,
        code: Code | None = None,
    ) -> None:
        self.distribution = distribution
        self.surrogate = surrogate
        self.named_parameters = parameters
        self.settings = settings
        self.valid_key = valid_key
        self.sample_shape = sample_shape
        self.generator = generator
        self.learners = Learners() if learners is None else learners
        self._compiled = None if code is None else CompiledModel(self, code)

    def __call__(self, data: TensorDictBase) -> TensorDict:
        """Takes the step, or none at all.

        Args:
            data (TensorDictBase): everything the policy and the surrogate read.

        Returns:
            scalars: ``line_search_success`` (1 or 0), ``step_fraction`` (0 if rejected),
            ``step_kl`` (of the last step tried), ``improvement`` and ``expected_improvement`` of
            the surrogate, ``curvature``, ``cg_residual`` (relative), ``grad_norm``.
        """
        parameters = dict(self.named_parameters())
        moved, result = self._compiled_step(data) or self._step(data)
        with torch.no_grad():
            for name, parameter in parameters.items():
                if parameter.requires_grad:
                    parameter.copy_(moved[name])
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

    def _step(self, data: TensorDictBase) -> tuple[dict[str, Tensor], TrustRegionResult]:
        valid = data.get(self.valid_key, None)

        def policy(values: Mapping[str, Tensor], rows: Tensor | None) -> Distribution:
            return self.distribution(values, data if rows is None else data[rows])

        return trust_region_step(
            policy,
            lambda dist: self.surrogate(dist, data),
            dict(self.named_parameters()),
            self.settings,
            valid=valid,
            batch_ndim=len(self.sample_shape(data)),
            generator=self.generator,
            average=self.learners.mean,
        )

    def _compiled_step(
        self, data: TensorDictBase
    ) -> tuple[dict[str, Tensor], TrustRegionResult] | None:
        """The same step from a compiled model of the policy; ``None`` if that cannot be had."""
        model = self._compiled
        if model is None or model.code.is_given_up or len(data) < 2:
            return None
        trained = {n: p.detach() for n, p in self.named_parameters() if p.requires_grad}
        theta = flatten(trained.values())
        before = self.state_dict()
        try:
            local, evaluate, iteration = model.at(theta, data, self._rows(data))
        except Exception as error:
            model.code.give_up(error)
            self.load_state_dict(before)
            return None
        moved, result = step_within_trust_region(
            theta,
            local,
            evaluate,
            self.settings,
            average=self.learners.mean,
            iteration=iteration,
        )
        return unflatten(moved, trained), result

    def _rows(self, data: TensorDictBase) -> Tensor | None:
        """Rows for the Fisher matrix; ``None``: all."""
        if self.settings.fisher_fraction == 1:
            return None
        valid = data.get(self.valid_key, None)
        return draw_rows(len(data), valid, self.settings.fisher_fraction, self.generator)

    def rebind(self) -> None:
        """Nothing is held that could go stale."""

    def end_batch(self) -> Undo:
        """There is no schedule."""
        return lambda: None

    def snapshot(self) -> dict[str, Any]:
        """A copy of the parameters and of the generator's state."""
        parameters = {name: p.detach().clone() for name, p in self.named_parameters()}
        return {"parameters": parameters, **self.state_dict()}

    @torch.no_grad()
    def restore(self, snapshot: dict[str, Any]) -> None:
        """Puts parameters and generator back, bit for bit."""
        for name, parameter in self.named_parameters():
            parameter.copy_(snapshot["parameters"][name])
        self.load_state_dict(snapshot)

    def state_dict(self) -> dict[str, Any]:
        """State of the generator, the only one there is."""
        return {} if self.generator is None else {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned."""
        if self.generator is not None:
            load_generator_state(self.generator, state["generator"])
