"""Actions so near a bound that their log-probability is not reproducible."""

from __future__ import annotations

import math

import torch
from tensordict import TensorDictBase
from tensordict.nn import CompositeDistribution
from torch import Tensor
from torch import distributions as D
from torchrl.modules import TanhNormal

from torchrl_happo.policy.side_by_side import SideBySide

__all__ = ["is_saturated"]


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
        >>> from torchrl_happo.policy.saturation import is_saturated
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
