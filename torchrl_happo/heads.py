"""The last part of an actor: from a network's output to the distribution of an action."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey
from tensordict.nn import (
    AddStateIndependentNormalScale,
    NormalParamExtractor,
    TensorDictModule,
    TensorDictSequential,
)
from torch import Tensor, nn
from torchrl.modules import ProbabilisticActor

from torchrl_happo.specs import ActionHead, Group

__all__ = ["ParameterHead"]


class ParameterHead:
    """Turns what a network says about an action into an actor.

    Args:
        group (Group): whose keys are written.
        head (ActionHead): the distribution of the action.

    Keyword Args:
        state_dependent_std (bool): if ``True``, the network outputs the standard deviation of a
            continuous action too; otherwise it is a parameter.
        scale_mapping (str): what makes the standard deviation positive.
    """

    def __init__(
        self, group: Group, head: ActionHead, *, state_dependent_std: bool, scale_mapping: str
    ) -> None:
        self.group = group
        self.head = head
        self.std_from_net = head.continuous and state_dependent_std
        self.scale_mapping = scale_mapping

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
            shape = (*rows, self.head.size)
            std = AddStateIndependentNormalScale(
                shape, scale_mapping=self.scale_mapping, device=device
            )
            return nn.Sequential(net, std)
        return net

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
