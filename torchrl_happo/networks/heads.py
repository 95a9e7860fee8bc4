"""The last part of an actor: from a network's output to the distribution of an action."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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
from torch.distributions import Categorical, Distribution
from torchrl.data import Categorical as CategoricalSpec
from torchrl.data import MultiCategorical as MultiCategoricalSpec
from torchrl.data import OneHot, TensorSpec, Unbounded
from torchrl.envs import EnvBase
from torchrl.modules import (
    IndependentNormal,
    MaskedCategorical,
    MaskedOneHotCategorical,
    OneHotCategorical,
    ProbabilisticActor,
    TanhNormal,
)

from torchrl_happo.networks.discrete import (
    IntMaskedCategorical,
    IntMaskedOneHotCategorical,
    MultiCategorical,
)
from torchrl_happo.networks.specs import Group, agent_specs

__all__ = ["BoundedNormalScale", "NormalStd", "PolicyHead", "read_head"]

# By kind of spec: without a mask of available actions, with a boolean one, with one of numbers.
_SINGLE: dict[type[TensorSpec], tuple[type[Distribution], ...]] = {
    CategoricalSpec: (Categorical, MaskedCategorical, IntMaskedCategorical),
    OneHot: (OneHotCategorical, MaskedOneHotCategorical, IntMaskedOneHotCategorical),
}


class BoundedNormalScale(AddStateIndependentNormalScale):
    r"""A standard deviation that is a parameter, and never passes a bound.

    .. math:: \sigma = \sigma_\text{max} \, \mathrm{sigmoid}(x)

    Args:
        scale_shape (sequence of int): shape of the parameter :math:`x`.

    Keyword Args:
        initial_std (float): value at the start, below ``max_std``.
        max_std (float): the bound.
        device (torch.device or str, optional): device of the parameter. Defaults to torch's.

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
        """Add the standard deviation, in the shape of ``loc``, behind it."""
        scale = self.max_std * self.state_independent_scale.sigmoid()
        return (loc, scale.expand_as(loc), *others)


@dataclass(frozen=True)
class NormalStd:
    """The origin of the standard deviation of a continuous action.

    Attributes:
        state_dependent (bool): whether the network outputs it, or it is a parameter.
        mapping (str): name of the mapping that makes it positive.
        bound (float or None): upper bound of a deviation that is a parameter.
    """

    state_dependent: bool
    mapping: str
    bound: float | None

    def layer(self, shape: Sequence[int], device: torch.device | str | None) -> nn.Module:
        """Build the layer that adds the deviation to a network's output.

        Args:
            shape (sequence of int): shape of a deviation that is a parameter.
            device (torch.device or str, optional): device of the parameter.
        """
        if self.state_dependent:
            return NormalParamExtractor(self.mapping)
        if self.bound is None:
            return AddStateIndependentNormalScale(shape, scale_mapping=self.mapping, device=device)
        start = mappings(self.mapping)(torch.zeros(())).item()
        return BoundedNormalScale(shape, initial_std=start, max_std=self.bound, device=device)


@dataclass(frozen=True)
class PolicyHead:
    """The distribution of an agent's action, and how a network parametrises it.

    Attributes:
        group (Group): the group whose keys are written.
        distribution (type of Distribution): the distribution of the action.
        size (int): number of logits, or of dimensions of a continuous action.
        std (NormalStd or None): standard deviation of a continuous action.
        mask (NestedKey or None): key of the mask of available actions.
        arguments (dict): further arguments of the distribution: ``nvec``, or the bounds ``low``
            and ``high``, each ``[n_agents, size]``, or ``[size]`` without an agent dimension.
    """

    group: Group
    distribution: type[Distribution]
    size: int
    std: NormalStd | None = None
    mask: NestedKey | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_outputs(self) -> int:
        """Number of outputs of the network for an agent."""
        return self.size * (2 if self.std is not None and self.std.state_dependent else 1)

    @property
    def keys(self) -> list[NestedKey]:
        """Keys of the parameters that the network writes."""
        names = ["loc", "scale"] if self.std is not None else ["logits"]
        return [self.group.key(name) for name in names]

    def of_agent(self, index: int) -> PolicyHead:
        """Return the head of one agent of a group with an agent dimension."""
        rows = {
            name: value[index] if isinstance(value, Tensor) else value
            for name, value in self.arguments.items()
        }
        return replace(self, arguments=rows)

    def parametrize(
        self, net: nn.Module, rows: Sequence[int], device: torch.device | str | None
    ) -> nn.Module:
        """Turn the output of a network into the parameters of the distribution.

        Args:
            net (nn.Module): outputs :attr:`n_outputs` numbers for each agent.
            rows (sequence of int): ``[n_agents]`` if each agent has a deviation of its own that
                is a parameter; empty for one agent, or for agents that share it.
            device (torch.device or str, optional): device of the deviation.
        """
        if self.std is None:
            return net
        return nn.Sequential(net, self.std.layer((*rows, self.size), device))

    def actor(
        self,
        network: TensorDictModule | TensorDictSequential,
        device: torch.device | str | None,
    ) -> ProbabilisticActor:
        """Return the actor: a network that writes :attr:`keys`, then the distribution.

        Args:
            network (TensorDictModule or TensorDictSequential): writes :attr:`keys`.
            device (torch.device or str, optional): device of the bounds.
        """
        parameters = {key if isinstance(key, str) else key[-1]: key for key in self.keys}
        if self.mask is not None:
            parameters["mask"] = self.mask
        return ProbabilisticActor(
            network,
            in_keys=parameters,
            out_keys=[self.group.action],
            distribution_class=self.distribution,
            distribution_kwargs={
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in self.arguments.items()
            },
            return_log_prob=True,
        )


def read_head(env: EnvBase, group: Group, mask_key: NestedKey | None, std: NormalStd) -> PolicyHead:
    """Choose the distribution that fits the action spec of a group.

    Raises:
        ValueError: if the action has no distribution, or its mask another size.
    """
    spec = env.full_action_spec[group.action]
    agents = agent_specs(
        env, group.action, spec, group.n_agents is not None, "unlike action spaces"
    )
    spec = agents[0]
    if (type(spec), spec.ndim) in ((CategoricalSpec, 0), (OneHot, 1)):
        mask, kind = _read_mask(env, group, mask_key, spec.space.n)
        return PolicyHead(group, _SINGLE[type(spec)][kind], spec.space.n, mask=mask)
    if isinstance(spec, (CategoricalSpec, MultiCategoricalSpec)) and spec.ndim == 1:
        is_multi = isinstance(spec, MultiCategoricalSpec)
        nvec = tuple(spec.nvec.tolist()) if is_multi else (spec.space.n,) * spec.shape[0]
        mask, _ = _read_mask(env, group, mask_key, sum(nvec))
        return PolicyHead(group, MultiCategorical, sum(nvec), mask=mask, arguments={"nvec": nvec})
    if spec.domain == "continuous" and spec.ndim == 1:
        if isinstance(spec, Unbounded):
            return PolicyHead(group, IndependentNormal, spec.shape[-1], std)
        bounds = {
            name: torch.stack([getattr(agent.space, name) for agent in agents])
            for name in ("low", "high")
        }
        if all(bool(bound.isfinite().all()) for bound in bounds.values()):
            head = PolicyHead(group, TanhNormal, spec.shape[-1], std, arguments=bounds)
            return head.of_agent(0) if group.n_agents is None else head
    raise ValueError(
        f"The action {group.action!r} has the spec {type(spec).__name__} of shape "
        f"{tuple(spec.shape)} per agent, but a vector without bounds or between finite ones, a "
        "categorical, multi-categorical or one-hot action is supported; transform it, or build the "
        "actor by hand."
    )


def _read_mask(
    env: EnvBase, group: Group, mask_key: NestedKey | None, size: int
) -> tuple[NestedKey | None, int]:
    """Return the key of a group's mask, if it has one, and 0 (none), 1 (boolean) or 2 (numbers)."""
    known = list(env.full_observation_spec.keys(True, True))
    if mask_key is None:
        return None, 0
    leaf = mask_key[-1] if isinstance(mask_key, tuple) else mask_key
    # In a dict of observations the mask lies beside them.
    beside = {(*key[:-1], leaf) for key in group.in_keys if isinstance(key, tuple)}
    for key in (group.key(mask_key), *sorted(beside)):
        if key in known:
            spec = env.full_observation_spec[key]
            if spec.shape[-1] != size:
                raise ValueError(
                    f"The mask {key!r} has {spec.shape[-1]} entries per agent, but there are "
                    f"{size} choices of the action {group.action!r}; pass another mask_key, or "
                    "None to ignore it."
                )
            return key, 1 if spec.dtype == torch.bool else 2
    return None, 0
