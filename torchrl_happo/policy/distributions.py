"""Divergences and entropies of a policy's distribution, as pure functions.

A distribution is a product of *components*: :class:`~tensordict.nn.CompositeDistribution`
multiplies distributions of several actions, :class:`~torch.distributions.Independent` those of
several dimensions, and the squashing of :class:`~torchrl.modules.TanhNormal` is a fixed bijection,
which leaves divergences and Fisher matrices as they are. Each rule is written for one component.

Functions that return one number per sample sum over the action's dimensions. ``batch_ndim`` says
how many leading dimensions count samples, where the action is in the batch shape as well.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from tensordict.nn import CompositeDistribution
from torch import Tensor
from torch import distributions as D
from torchrl.modules import TanhNormal

from torchrl_happo.policy.side_by_side import SideBySide

__all__ = ["CATEGORICAL", "SquashedNormals", "entropy", "is_saturated", "kl_divergence"]

#: TorchRL's masked, ordinal and one-hot classes derive from the first.
CATEGORICAL = (D.Categorical, D.OneHotCategorical)

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
    if isinstance(old, CATEGORICAL) and isinstance(new, CATEGORICAL):
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
    if isinstance(dist, CATEGORICAL):
        log_probs = torch.where(dist.probs > 0, dist.logits, 0)
        return _sum_action(-(dist.probs * log_probs).sum(-1), batch_ndim)
    try:
        return _sum_action(dist.entropy(), batch_ndim)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"No closed form of the entropy of {type(dist).__name__} is known; estimate it from "
            "samples or choose another distribution for the policy."
        ) from error


def is_saturated(
    dist: D.Distribution, action: Tensor | TensorDictBase, *, batch_ndim: int | None = None
) -> Tensor:
    r"""Whether an action lies so near a bound that its log-probability is not reproducible.

    Scoring a stored action of a :class:`~torchrl.modules.TanhNormal` inverts the tanh. Near a bound
    that inverse is lossy, and TorchRL clamps it at ``1 - torch.finfo(dtype).resolution``; a
    fresh sample, however, is scored with its true value before the tanh. The two differ by up to
    several nats. Actions are called saturated where, in any dimension,

    .. math::
        1 - |y| < \sqrt{\epsilon}, \quad y = \frac{2 a - high - low}{high - low} \in [-1, 1],

    with :math:`\epsilon` the spacing of the dtype at 1: 3.5e-4 in float32, 1.5e-8 in float64.
    An action beyond a bound is saturated, too. Other distributions score stored actions
    faithfully: for them the result is ``False`` everywhere.

    Args:
        dist (Distribution): the distribution.
        action (Tensor or TensorDictBase): stored actions; a tensordict with an entry for each
            component if ``dist`` is a :class:`~tensordict.nn.CompositeDistribution`.

    Keyword Args:
        batch_ndim (int, optional): number of leading dimensions that count samples. Defaults to
            ``len(dist.batch_shape)``.

    Returns:
        Tensor: booleans of shape ``dist.batch_shape[:batch_ndim]``.

    Example:
        >>> import torch
        >>> from torchrl.modules import TanhNormal
        >>> from torchrl_happo.policy.distributions import is_saturated
        >>> dist = TanhNormal(torch.zeros(3, 1), torch.ones(3, 1), low=-2.0, high=2.0)
        >>> is_saturated(dist, torch.tensor([[2.0], [1.0], [-1.9999]]))
        tensor([ True, False,  True])
    """
    batch_ndim = len(dist.batch_shape) if batch_ndim is None else batch_ndim
    if isinstance(dist, SideBySide):
        return dist.each(lambda part, own: is_saturated(part, own).long(), action).bool()
    if isinstance(dist, CompositeDistribution):
        flags = [
            is_saturated(component, action[name], batch_ndim=batch_ndim)
            for name, component in dist.dists.items()
        ]
        return torch.stack(flags).any(0)
    if isinstance(dist, D.Independent):
        return is_saturated(dist.base_dist, action, batch_ndim=batch_ndim)
    if not isinstance(dist, TanhNormal):
        return torch.zeros(dist.batch_shape[:batch_ndim], dtype=torch.bool, device=action.device)
    distance = torch.minimum(action - dist.low, dist.high - action) / ((dist.high - dist.low) / 2)
    near_bound = distance < math.sqrt(torch.finfo(action.dtype).eps)
    return near_bound.flatten(batch_ndim).any(-1) if near_bound.ndim > batch_ndim else near_bound


def _sum_action(values: Tensor, batch_ndim: int) -> Tensor:
    return values.flatten(batch_ndim).sum(-1) if values.ndim > batch_ndim else values


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


class SquashedNormals:
    """Builds the squashed normals of one policy, with the arguments of their class.

    :class:`~torchrl.modules.TanhNormal` copies its bounds to the device and reads back whether they
    are the trivial ones, each time that it is built. Here it is built once for each device, and
    then given other parameters (TorchRL 0.14.1).

    Example:
        >>> build = SquashedNormals()
        >>> dist = build(loc=torch.zeros(2), scale=torch.ones(2), high=2.0)
        >>> dist.high, build(loc=torch.ones(2), scale=dist.scale, high=2.0).loc
        (tensor(2.), tensor([1., 1.]))
    """

    def __init__(self) -> None:
        self._built: dict[torch.device, tuple[dict[str, Any], TanhNormal]] = {}

    def __reduce__(self) -> tuple[type[SquashedNormals], tuple[()]]:
        return SquashedNormals, ()  # transforms cannot be copied

    def __call__(self, *, loc: Tensor, scale: Tensor, **settings: Any) -> TanhNormal:
        """Return the distribution with these parameters and settings."""
        if loc.ndim == 0 or torch.compiler.is_compiling():
            return TanhNormal(loc=loc, scale=scale, **settings)
        before, built = self._built.get(loc.device, ({}, None))
        same = before.keys() == settings.keys() and all(before[n] is settings[n] for n in before)
        if built is None or not same:
            built = TanhNormal(loc=loc.detach()[:0], scale=scale.detach()[:0], **settings)
            self._built[loc.device] = settings, built
        dist = copy.copy(built)
        del dist.base_dist  # a normal that the copies would share
        dist.update(loc, scale)
        return dist
