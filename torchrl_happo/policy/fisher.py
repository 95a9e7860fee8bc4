"""The Fisher matrix of a policy's distribution in its parameters, as pure functions.

A distribution is a product of *components*, as in :mod:`torchrl_happo.policy.distributions`. Each
rule is written for one component.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from tensordict.nn import CompositeDistribution
from torch import Tensor
from torch import distributions as D

from torchrl_happo.policy.distributions import CATEGORICAL, kl_divergence

__all__ = ["distribution_parameters", "fisher_product"]


def distribution_parameters(dist: D.Distribution) -> tuple[Tensor, ...]:
    """The tensors that parametrise a distribution, as :func:`fisher_product` orders them.

    They are ``(loc, scale)`` for normal distributions (those of the base for a
    :class:`~torchrl.modules.TanhNormal`, hence after its scaling of the mean), the normalised
    ``logits`` for categorical ones, and the arguments that it was built from for any other;
    the tuples of a product's components follow each other.

    Args:
        dist (Distribution): the distribution.

    Returns:
        tuple of Tensor: the parameters, each beginning with the dimensions of ``dist.batch_shape``.

    Example:
        >>> import torch
        >>> from torchrl.modules import IndependentNormal
        >>> from torchrl_happo.policy.fisher import distribution_parameters
        >>> dist = IndependentNormal(torch.zeros(3, 2), torch.ones(3, 2))
        >>> [parameter.shape for parameter in distribution_parameters(dist)]
        [torch.Size([3, 2]), torch.Size([3, 2])]
    """
    parameters = [_component_parameters(component) for component in _components(dist)]
    return tuple(tensor for group in parameters for tensor in group.values())


def fisher_product(dist: D.Distribution, tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
    r"""Product of the distribution's Fisher information matrix with a tangent, sample by sample.

    .. math::
        M = E_{a \sim \pi}[\nabla_\phi \log \pi(a) \, \nabla_\phi \log \pi(a)^\top]
          = \nabla^2_{\phi'} D_{KL}(\pi_\phi \| \pi_{\phi'}) |_{\phi' = \phi}

    with respect to the parameters :math:`\phi` of :func:`distribution_parameters`. For example

    - normal: :math:`M t = (t_\mu / \sigma^2, \; 2 t_\sigma / \sigma^2)`;
    - categorical: :math:`(M t)_a = p_a (t_a - \sum_b p_b t_b)`, zero for masked actions.

    A distribution without a rule of its own is handled by differentiating its divergence twice in
    the few numbers that parametrise it.

    Args:
        dist (Distribution): the distribution, in whose parameters no gradient is taken.
        tangents (sequence of Tensor): one tensor for each of ``distribution_parameters(dist)``,
            of the same shape.

    Returns:
        tuple of Tensor: the products, shaped and ordered like ``tangents``.

    Raises:
        NotImplementedError: if torch has no exact divergence for the distribution, or it cannot be
            built from its parameters alone.
        ValueError: if the number of tangents is not that of the parameters.

    Example:
        >>> import torch
        >>> from torch.distributions import Categorical
        >>> from torchrl_happo.policy.fisher import fisher_product
        >>> fisher_product(Categorical(logits=torch.zeros(2)), [torch.tensor([1.0, 0.0])])
        (tensor([ 0.2500, -0.2500]),)
    """
    count = len(distribution_parameters(dist))
    if len(tangents) != count:
        raise ValueError(
            f"tangents must hold one tensor for each of the {count} parameters of the "
            f"{type(dist).__name__}, got {len(tangents)}; see distribution_parameters."
        )
    products: list[Tensor] = []
    remaining = iter(tangents)
    with torch.no_grad():
        for component in _components(dist):
            parameters = _component_parameters(component)
            products += _component_fisher(component, [next(remaining) for _ in parameters])
    return tuple(products)


def _components(dist: D.Distribution) -> Iterator[D.Distribution]:
    """The independent factors of a distribution, with fixed transforms taken off."""
    if isinstance(dist, CompositeDistribution):
        for component in dist.dists.values():
            yield from _components(component)
    elif isinstance(dist, (D.Independent, D.TransformedDistribution)):
        yield from _components(dist.base_dist)
    else:
        yield dist


def _component_parameters(component: D.Distribution) -> dict[str, Tensor]:
    if isinstance(component, (*CATEGORICAL, D.Bernoulli)):
        return {"logits": component.logits}
    if isinstance(component, D.Beta):
        return {name: getattr(component, name) for name in ("concentration1", "concentration0")}
    # What a distribution was built from is what it stores under the name of an argument.
    stored = vars(component)
    return {name: stored[name] for name in component.arg_constraints if name in stored}


def _component_fisher(component: D.Distribution, tangents: list[Tensor]) -> list[Tensor]:
    if isinstance(component, CATEGORICAL):
        probs = component.probs
        # A masked action's logit is minus infinity and so may be its tangent.
        tangent = torch.where(probs > 0, tangents[0], 0)
        return [probs * (tangent - (probs * tangent).sum(-1, keepdim=True))]
    if isinstance(component, D.Normal):
        precision = component.scale.square().reciprocal()
        return [precision * tangents[0], 2 * precision * tangents[1]]
    if isinstance(component, D.Laplace):
        # The divergence's kink at equality hides the curvature from automatic differentiation.
        precision = component.scale.square().reciprocal()
        return [precision * tangent for tangent in tangents]
    return _fisher_by_differentiation(component, tangents)


def _fisher_by_differentiation(component: D.Distribution, tangents: list[Tensor]) -> list[Tensor]:
    """Hessian-vector product of the divergence in the parameters of one component."""
    parameters = {k: p.detach() for k, p in _component_parameters(component).items()}
    kind: Callable[..., D.Distribution] = type(component)
    try:
        old = kind(**parameters)
    except TypeError as error:
        raise NotImplementedError(
            f"No Fisher matrix of {kind.__name__} is known, and the parameters in its "
            f"arg_constraints ({', '.join(parameters) or 'none'}) do not build one to "
            "differentiate; list there what its constructor takes and keep each as an attribute, "
            "or choose another distribution."
        ) from error
    with torch.enable_grad():
        moving = {k: p.clone().requires_grad_() for k, p in parameters.items()}
        kl = kl_divergence(old, kind(**moving))
        leaves = list(moving.values())
        gradient = torch.autograd.grad(kl.sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(gradient, leaves, tangents, materialize_grads=True))
