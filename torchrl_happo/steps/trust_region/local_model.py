"""A policy near its present parameters, and at others, as a trust-region step sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple, TypeAlias

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.distributions import Distribution

from torchrl_happo.distributed import Average
from torchrl_happo.masked import VALID, masked_mean
from torchrl_happo.policy.distributions import kl_divergence
from torchrl_happo.steps.trust_region.linearize import linearizable
from torchrl_happo.steps.trust_region.natural_gradient import (
    MatVec,
    fisher_vector_product,
    flatten,
    gradient,
)

__all__ = ["LocalModel", "Objective", "Policy", "local_models", "trial"]

#: From the policy and the data to a scalar, such as the surrogate.
Objective: TypeAlias = Callable[[Distribution, TensorDictBase], Tensor]
#: From the parameters that are not frozen, by name, and the data to the policy.
Policy: TypeAlias = Callable[[Mapping[str, Tensor], TensorDictBase], Distribution]


class LocalModel(NamedTuple):
    """The policy near the present parameters, as far as a trust-region step knows it.

    Attributes:
        surrogate (Tensor): the surrogate at the present parameters, a scalar.
        gradient (Tensor): its gradient, one vector.
        fisher_product (callable): from a vector to its product with the Fisher matrix.
        num_samples (Tensor or float): samples that surrogate and gradient are means over.
            Defaults to ``1``; it matters where processes with unlike numbers step together.
        num_fisher_samples (Tensor or float): samples that the Fisher matrix is a mean over.
    """

    surrogate: Tensor
    gradient: Tensor
    fisher_product: MatVec
    num_samples: Tensor | float = 1.0
    num_fisher_samples: Tensor | float = 1.0

    def common(self, average: Average) -> LocalModel:
        """Return the model of all processes that step together."""
        surrogate, gradient = average([self.surrogate, self.gradient], self.num_samples)

        def fisher_product(vector: Tensor) -> Tensor:
            return average([self.fisher_product(vector)], self.num_fisher_samples)[0]

        return self._replace(surrogate=surrogate, gradient=gradient, fisher_product=fisher_product)


def local_models(
    policy: Policy,
    leaves: Mapping[str, Tensor],
    data: TensorDictBase,
    part: TensorDictBase,
    objectives: Sequence[Objective],
    batch_ndim: int,
) -> tuple[Distribution, list[LocalModel]]:
    """Linearise the policy, and objectives of it, by one forward pass.

    Args:
        policy (callable): the policy as a function of parameters and data.
        leaves (mapping of str to Tensor): the present parameters, which require gradients.
        data (TensorDictBase): what the objectives are means over.
        part (TensorDictBase): what the Fisher matrix is a mean over: ``data`` itself, or a share
            of it, which estimates the matrix.
        objectives (sequence of callable): from policy and data to scalars.
        batch_ndim (int): number of leading dimensions that count samples.

    Returns:
        the policy at the data, and for each objective a model without numbers of samples.
    """
    # What torch's compiler decomposes anyway needs no other kernels.
    swapped = nullcontext() if torch.compiler.is_compiling() else linearizable()
    with torch.enable_grad(), swapped:
        old = policy(leaves, data)
        sample = old if part is data else policy(leaves, part)
    with torch.enable_grad():
        values = [objective(old, data) for objective in objectives]
    valid = part.get(VALID, None)
    product = fisher_vector_product(sample, leaves, valid=valid, batch_ndim=batch_ndim)
    slopes = [flatten(gradient([value], leaves.values())) for value in values]
    at = zip(values, slopes, strict=True)
    return old, [LocalModel(value.detach(), slope, product) for value, slope in at]


def trial(
    policy: Policy,
    old: Distribution,
    parameters: Mapping[str, Tensor],
    data: TensorDictBase,
    objectives: Sequence[Objective],
    batch_ndim: int,
) -> tuple[Tensor, ...]:
    """Return the objectives, and the mean divergence from the old policy, at other parameters."""
    new = policy(parameters, data)
    divergence = kl_divergence(old, new, batch_ndim=batch_ndim)
    values = [objective(new, data) for objective in objectives]
    return *values, masked_mean(divergence, data.get(VALID, None))
