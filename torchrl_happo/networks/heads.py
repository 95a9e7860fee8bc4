"""The last part of an actor: from a network's output to the distribution of an action."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tensordict import NestedKey
from tensordict.nn import (
    AddStateIndependentNormalScale,
    NormalParamExtractor,
    TensorDictModule,
    TensorDictSequential,
    mappings,
)
from torch import Tensor, nn
from torchrl.modules import ProbabilisticActor

from torchrl_happo.networks.specs import ActionHead, Group

__all__ = ["BoundedNormalScale", "ParameterHead"]


class BoundedNormalScale(AddStateIndependentNormalScale):
    r"""A standard deviation that is a parameter, and never passes a bound.

    .. math:: \sigma = \sigma_\text{max} \, \mathrm{sigmoid}(x)

    Args:
        scale_shape (sequence of int): of the parameter :math:`x`.

    Keyword Args:
        initial_std (float): value at the start, below ``max_std``.
        max_std (float): the bound.
        device (torch.device or str, optional): of the parameter. Defaults to torch's.

    Example:
        >>> loc, scale = BoundedNormalScale([2], initial_std=0.3, max_std=0.5)(torch.zeros(4, 2))
        >>> scale.shape, round(scale[0, 0].item(), 6)
        (torch.Size([4, 2]), 0.3)
    """

    def __init__(
        self,
        scale_shape: Sequence[int],
        *,
        initial_std: float,
        max_std: float,
        device: torch.device | str | None = None,
    ) -> None:
        start = math.log(initial_std / (max_std - initial_std))
        super().__init__(scale_shape, init_value=start, device=device)
        self.max_std = max_std

    def forward(self, loc: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Adds the standard deviation, in the shape of ``loc``, behind it."""
        scale = self.max_std * self.state_independent_scale.sigmoid()
        return (loc, scale.expand_as(loc), *others)


class ParameterHead:
    """Turns what a network says about an action into an actor.

    Args:
        group (Group): whose keys are written.
        head (ActionHead): the distribution of the action.

    Keyword Args:
        state_dependent_std (bool): if ``True``, the network outputs the standard deviation of a
            continuous action too; otherwise it is a parameter.
        scale_mapping (str): what makes the standard deviation positive.
        max_std (float, optional): bound of a deviation that is a parameter.
    """

    def __init__(
        self,
        group: Group,
        head: ActionHead,
        *,
        state_dependent_std: bool,
        scale_mapping: str,
        max_std: float | None,
    ) -> None:
        self.group = group
        self.head = head
        self.std_from_net = head.continuous and state_dependent_std
        self.scale_mapping = scale_mapping
        self.max_std = max_std

    @property
    def n_outputs(self) -> int:
        """Numbers that the network puts out for an agent."""
        return self.head.size * (2 if self.std_from_net else 1)

    @property
    def keys(self) -> list[NestedKey]:
        """Where the parameters of the distribution are written."""
        names = ["loc", "scale"] if self.head.continuous else ["logits"]
        return [self.group.key(name) for name in names]

    def split(
        self, net: nn.Module, rows: Sequence[int], device: torch.device | str | None
    ) -> nn.Module:
        """Adds to a network what makes location and scale of its output.

        Args:
            net (nn.Module): puts out :attr:`n_outputs` numbers for each agent.
            rows (sequence of int): shape of the agents that have a deviation each: ``[n_agents]``,
                or empty for one agent, or for agents that share it.
            device (torch.device or str, optional): of the deviation.
        """
        if self.std_from_net:
            return nn.Sequential(net, NormalParamExtractor(self.scale_mapping))
        if self.head.continuous:
            return nn.Sequential(net, self._std((*rows, self.head.size), device))
        return net

    def _std(self, shape: Sequence[int], device: torch.device | str | None) -> nn.Module:
        if self.max_std is None:
            return AddStateIndependentNormalScale(
                shape, scale_mapping=self.scale_mapping, device=device
            )
        start = mappings(self.scale_mapping)(torch.zeros(())).item()
        return BoundedNormalScale(shape, initial_std=start, max_std=self.max_std, device=device)

    def actor(
        self,
        network: TensorDictModule | TensorDictSequential,
        bounds: dict[str, Tensor],
        device: torch.device | str | None,
    ) -> ProbabilisticActor:
        """The network with the distribution behind it.

        Args:
            network (TensorDictModule or TensorDictSequential): writes :attr:`keys`.
            bounds (dict of str to Tensor): of the actions.
            device (torch.device or str, optional): of the bounds.
        """
        parameters = {key if isinstance(key, str) else key[-1]: key for key in self.keys}
        if self.head.mask is not None:
            parameters["mask"] = self.head.mask
        return ProbabilisticActor(
            network,
            in_keys=parameters,
            out_keys=[self.group.action],
            distribution_class=self.head.distribution,
            distribution_kwargs={name: bound.to(device) for name, bound in bounds.items()},
            return_log_prob=True,
        )
