"""Divergences, Fisher matrices and entropies of a policy's distribution, as pure functions.

A distribution is a product of *components*: :class:`~tensordict.nn.CompositeDistribution`
multiplies distributions of several actions, :class:`~torch.distributions.Independent` those of
several dimensions, and the squashing of :class:`~torchrl.modules.TanhNormal` is a fixed bijection,
which leaves divergences and Fisher matrices as they are. Each rule is written for one component.

Functions that return one number per sample sum over the action's dimensions. ``batch_ndim`` says
how many leading dimensions count samples, where the action is in the batch shape as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from tensordict.nn import CompositeDistribution
from torch import Tensor
from torch import distributions as D
from torchrl.modules import TanhNormal

from torchrl_happo.policy.side_by_side import SideBySide

__all__ = [
    "distribution_parameters",
    "entropy",
    "fisher_product",
    "kl_divergence",
]

# TorchRL's masked, ordinal and one-hot classes derive from the first.
_CATEGORICAL = (D.Categorical, D.OneHotCategorical)

_QUADRATURE_NODES = 32
_QUADRATURE_RANGE = 6.0


def kl_divergence(
    old: D.Distribution, new: D.Distribution, *, batch_ndim: int | None = None
) -> Tensor:
    r"""Exact Kullback-Leibler divergence of each sample, summed over the action's dimensions.

    .. math::
        D_{KL}(\pi_{old} \| \pi_{new}) = E_{a \sim \pi_{old}}[\log \pi_{old}(a) - \log \pi_{new}(a)]

    Actions of probability zero under ``old`` (masked ones, for instance) contribute exactly zero to
    the value and to the gradient. The transform of a :class:`~torchrl.modules.TanhNormal` cancels,
    so that its divergence is that of the underlying normals; both arguments must have the same
    bounds, which is not checked as it would read them back from the device.

    Args:
        old (Distribution): the policy that the data is drawn from.
        new (Distribution): the policy to compare, of the same structure.

    Keyword Args:
        batch_ndim (int, optional): number of leading dimensions that count samples. Defaults to
            ``len(old.batch_shape)``.

    Returns:
        Tensor: the divergence in nats, of shape ``old.batch_shape[:batch_ndim]``.

    Raises:
        NotImplementedError: if torch has no exact divergence for the distributions.

    Example:
        >>> import torch
        >>> from torchrl.modules import TanhNormal
        >>> from torchrl_happo.policy.distributions import kl_divergence
        >>> old = TanhNormal(torch.zeros(3, 2), torch.ones(3, 2))
        >>> new = TanhNormal(torch.ones(3, 2), torch.ones(3, 2))
        >>> kl_divergence(old, new)
        tensor([1., 1., 1.])
    """
    batch_ndim = len(old.batch_shape) if batch_ndim is None else batch_ndim
    if isinstance(old, SideBySide) and isinstance(new, SideBySide):
        return old.each(kl_divergence, new)
    if isinstance(old, CompositeDistribution) and isinstance(new, CompositeDistribution):
        pairs = [(old.dists[name], new.dists[name]) for name in old.dists]
        return torch.stack([kl_divergence(p, q, batch_ndim=batch_ndim) for p, q in pairs]).sum(0)
    for wrapper in (D.Independent, TanhNormal):
        if isinstance(old, wrapper) and isinstance(new, wrapper):
            return kl_divergence(old.base_dist, new.base_dist, batch_ndim=batch_ndim)
    if isinstance(old, _CATEGORICAL) and isinstance(new, _CATEGORICAL):
        # torch's own rule takes 0 * inf at masked actions and repairs the value, but not the
        # gradient of the old policy; its indexed assignment cannot be vectorised, either.
        log_ratio = torch.where(old.probs > 0, old.logits - new.logits, 0)
        return _sum_action((old.probs * log_ratio).sum(-1), batch_ndim)
    try:
        return _sum_action(D.kl_divergence(old, new), batch_ndim)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"No exact Kullback-Leibler divergence of {type(old).__name__} to {type(new).__name__} "
            "is known; register one with torch.distributions.register_kl or choose another "
            "distribution for the policy."
        ) from error


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
        >>> from torchrl_happo.policy.distributions import distribution_parameters
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
        >>> from torchrl_happo.policy.distributions import fisher_product
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


def entropy(dist: D.Distribution, *, batch_ndim: int | None = None) -> Tensor:
    r"""Entropy of each sample, summed over the action's dimensions.

    It is analytic where an expression is known. A :class:`~torchrl.modules.TanhNormal` has none:

    .. math::
        H[\pi] = H[N(\mu, \sigma)] + \sum_d \log \frac{high_d - low_d}{2}
               + \sum_d E_{u \sim N(\mu_d, \sigma_d)}[\log(1 - \tanh^2 u)],

    whose last term is integrated by the trapezoidal rule on 32 nodes, which converges
    geometrically for such integrands. The result is a deterministic, differentiable function
    of the parameters; its error per dimension is below 1e-8 nats for scales up to 1,
    1e-5 up to 2 and 5e-4 up to 3 (Gauss-Hermite quadrature with as many nodes errs by
    6e-8, 2e-4 and 3e-3).

    Args:
        dist (Distribution): the distribution.

    Keyword Args:
        batch_ndim (int, optional): number of leading dimensions that count samples. Defaults to
            ``len(dist.batch_shape)``.

    Returns:
        Tensor: the entropy in nats, of shape ``dist.batch_shape[:batch_ndim]``.

    Raises:
        NotImplementedError: if neither torch nor this function knows the entropy.

    Example:
        >>> import torch
        >>> from torchrl.modules import TanhNormal
        >>> from torchrl_happo.policy.distributions import entropy
        >>> entropy(TanhNormal(torch.zeros(3, 2), torch.full((3, 2), 0.5), low=-2.0, high=2.0))
        tensor([2.3862, 2.3862, 2.3862])
    """
    batch_ndim = len(dist.batch_shape) if batch_ndim is None else batch_ndim
    if isinstance(dist, SideBySide):
        return dist.each(entropy)
    if isinstance(dist, CompositeDistribution):
        return torch.stack([entropy(d, batch_ndim=batch_ndim) for d in dist.dists.values()]).sum(0)
    if isinstance(dist, D.Independent):
        return entropy(dist.base_dist, batch_ndim=batch_ndim)
    if isinstance(dist, TanhNormal):
        return _sum_action(_tanh_normal_entropy(dist), batch_ndim)
    if isinstance(dist, _CATEGORICAL):
        log_probs = torch.where(dist.probs > 0, dist.logits, 0)
        return _sum_action(-(dist.probs * log_probs).sum(-1), batch_ndim)
    try:
        return _sum_action(dist.entropy(), batch_ndim)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"No closed form of the entropy of {type(dist).__name__} is known; estimate it from "
            "samples or choose another distribution for the policy."
        ) from error


def _components(dist: D.Distribution) -> Iterator[D.Distribution]:
    """The independent factors of a distribution, with fixed transforms taken off."""
    if isinstance(dist, CompositeDistribution):
        for component in dist.dists.values():
            yield from _components(component)
    elif isinstance(dist, (D.Independent, D.TransformedDistribution)):
        yield from _components(dist.base_dist)
    else:
        yield dist


def _sum_action(values: Tensor, batch_ndim: int) -> Tensor:
    return values.flatten(batch_ndim).sum(-1) if values.ndim > batch_ndim else values


def _component_parameters(component: D.Distribution) -> dict[str, Tensor]:
    if isinstance(component, (*_CATEGORICAL, D.Bernoulli)):
        return {"logits": component.logits}
    if isinstance(component, D.Beta):
        return {name: getattr(component, name) for name in ("concentration1", "concentration0")}
    # What a distribution was built from is what it stores under the name of an argument.
    stored = vars(component)
    return {name: stored[name] for name in component.arg_constraints if name in stored}


def _component_fisher(component: D.Distribution, tangents: list[Tensor]) -> list[Tensor]:
    if isinstance(component, _CATEGORICAL):
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
            f"No Fisher matrix of {kind.__name__} is known, and {' and '.join(parameters)} alone "
            "do not build one to differentiate; choose another distribution for the policy."
        ) from error
    with torch.enable_grad():
        moving = {k: p.clone().requires_grad_() for k, p in parameters.items()}
        kl = kl_divergence(old, kind(**moving))
        leaves = list(moving.values())
        gradient = torch.autograd.grad(kl.sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(gradient, leaves, tangents, materialize_grads=True))


def _tanh_normal_entropy(dist: TanhNormal) -> Tensor:
    """Entropy of each dimension of a squashed normal."""
    normal = dist.root_dist
    like = {"dtype": normal.loc.dtype, "device": normal.loc.device}
    nodes = torch.linspace(-_QUADRATURE_RANGE, _QUADRATURE_RANGE, _QUADRATURE_NODES, **like)
    weights = torch.softmax(-nodes.square() / 2, dim=0)
    u = normal.loc.unsqueeze(-1) + normal.scale.unsqueeze(-1) * nodes
    log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2), without overflow
    log_width = ((dist.high - dist.low).to(u.dtype) / 2).log()
    return normal.entropy() + log_width + (log_slope * weights).sum(-1)
