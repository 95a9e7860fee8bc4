r"""A policy as a function of tensors: networks, distribution, log-probability.

An inner step evaluates the same policy hundreds of times on the same actions. Two things are
done once here, so that they need not be done each time:

- networks are called directly, without a tensordict around every one of them;
- the actions of a squashed normal (:class:`~torchrl.modules.TanhNormal`) are unsquashed. With
  :math:`u = \tanh^{-1}(a)` and :math:`J = \log |\mathrm{d}a / \mathrm{d}u|`,

  .. math:: \log \pi(a) = \log \mathcal{N}(u; \mu, \sigma) - J,

  where neither :math:`u` nor :math:`J` depends on the policy. Both sides of every ratio then see
  the same :math:`u`, also for actions at the bounds, where :math:`\tanh^{-1}` is clamped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import (
    CompositeDistribution,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictParams,
    TensorDictSequential,
)
from tensordict.utils import unravel_key
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.func import functional_call
from torchrl.modules import IndependentNormal, SafeModule, TanhNormal

from torchrl_happo.policy.distributions import SquashedNormals, entropy
from torchrl_happo.policy.joint_row import JointRow, row_of
from torchrl_happo.versions import swapped, takes_keywords

__all__ = ["Policy"]

#: Entries that :meth:`Policy.prepare` adds to a view of the batch: the action before squashing and
#: the log-determinant of the squashing.
PREIMAGE = "action_preimage"
LOG_DET = "action_log_det"

#: The parameters of a distribution, by their names in its constructor.
Parameters = dict[str, Tensor]


class Policy:
    """The policy of one agent (or of a group at once) as a function of its view of the batch.

    Args:
        actor (ProbabilisticTensorDictSequential): networks, then the distribution.

    Example:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.modules import ProbabilisticActor
        >>> actor = ProbabilisticActor(
        ...     TensorDictModule(torch.nn.Linear(3, 2), in_keys=["seen"], out_keys=["logits"]),
        ...     in_keys=["logits"],
        ...     distribution_class=torch.distributions.Categorical,
        ...     return_log_prob=True,
        ... )
        >>> data = actor(TensorDict({"seen": torch.randn(5, 3)}, batch_size=[5]))
        >>> policy = Policy(actor)
        >>> parameters = policy.parameters(data)
        >>> bool(torch.allclose(policy.log_prob(parameters, data), data["action_log_prob"]))
        True
    """

    def __init__(self, actor: ProbabilisticTensorDictSequential) -> None:
        self.actor = actor
        #: Evaluates the joint actor and takes one agent's row, where a row alone does not do.
        self.joint_row: JointRow | None = None
        self._squash = SquashedNormals()

    @property
    def head(self) -> TensorDictModuleBase:
        """The last module of the actor, which turns parameters into a distribution."""
        return self.actor[-1]

    @cached_property
    def action_keys(self) -> list[NestedKey]:
        """Keys of the action, one for each head of the policy."""
        return [unravel_key(key) for key in self.actor.dist_sample_keys]

    @cached_property
    def log_prob_keys(self) -> list[NestedKey]:
        """Keys under which a collector stores the log-probability of the action."""
        return [unravel_key(key) for key in self.actor.log_prob_keys]

    @cached_property
    def parameter_keys(self) -> list[NestedKey]:
        """Keys under which the actor leaves the parameters of its distribution."""
        return [unravel_key(key) for key in self.head.in_keys]

    @cached_property
    def written_keys(self) -> list[NestedKey]:
        """Keys that the networks write and the distribution reads, unlike an action mask."""
        written = {unravel_key(key) for m in _flat_modules(self.actor) for key in m.out_keys}
        return [key for key in self.parameter_keys if key in written]

    def parameters(
        self, data: TensorDictBase, weights: Mapping[str, Tensor] | None = None
    ) -> Parameters:
        """Run the networks on the observations of ``data``.

        Args:
            data (TensorDictBase): a view of the batch; not modified.
            weights (mapping of str to Tensor, optional): used in place of the networks' own, by
                their names in the actor. Defaults to ``None``.

        Returns:
            the parameters of the distribution, by their names in its constructor.
        """
        if self.joint_row is not None:
            return self._run_jointly(self.joint_row, data, weights)
        if weights is None:
            return self._run(data)
        if self.is_stacked:
            networks = TensorDict.from_module(self.actor).named_apply(
                lambda path, tensor: weights.get(".".join(path), tensor), nested_keys=True
            )
            with swapped(networks, self.actor):
                return self._run(data)
        named = {f"actor.{name}": weight for name, weight in weights.items()}
        return functional_call(_Networks(self), named, (data,))

    @property
    def is_stacked(self) -> bool:
        """Whether the networks of several agents are stacked in one tensordict of parameters."""
        return any(isinstance(module, TensorDictParams) for module in self.actor.modules())

    @property
    def is_composite(self) -> bool:
        """Whether the distribution takes its parameters in a tensordict, head by head."""
        return self.head.distribution_class is CompositeDistribution

    def _run(self, data: TensorDictBase) -> Parameters:
        modules = list(_flat_modules(self.actor))
        if self.is_composite or not all(_is_plain(module) for module in modules):
            return self._run_modules(modules, data)
        values: dict[NestedKey, Tensor] = {}
        for module in modules:
            inputs = [values[key] if key in values else data.get(key) for key in module.in_keys]
            outputs = module.module(*inputs)
            if isinstance(outputs, (dict, TensorDictBase)):
                # Where its entries belong is for the module to say.
                return self._run_modules(modules, data)
            outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
            values.update(zip(module.out_keys, outputs, strict=True))
        return self._named(values, data)

    def _run_modules(
        self, modules: Iterable[TensorDictModuleBase], data: TensorDictBase
    ) -> Parameters:
        """Do the same with a tensordict around every network, as the collector calls them."""
        scratch = data.copy()
        for module in modules:
            scratch = module(scratch)
        return self._named({key: scratch.get(key) for key in self.parameter_keys}, data)

    @cached_property
    def network_keys(self) -> list[NestedKey]:
        """Keys that the networks read from the data."""
        read: list[NestedKey] = []
        written: set[NestedKey] = set()
        for module in _flat_modules(self.actor):
            read += [key for key in map(unravel_key, module.in_keys) if key not in written]
            written.update(map(unravel_key, module.out_keys))
        return list(dict.fromkeys(read))

    def _run_jointly(
        self, row: JointRow, data: TensorDictBase, weights: Mapping[str, Tensor] | None
    ) -> Parameters:
        """Evaluate all rows, as the collector does, on the observations of the whole group."""
        own = {**dict(self.actor.named_parameters()), **(weights or {})}
        outputs = row.outputs(_flat_modules(row.joint), data, own)
        of_group = {*self.written_keys, *self.network_keys}
        values = {
            key: row_of(outputs.get(key), row.index, data.batch_dims)
            for key in self.head.in_keys
            if unravel_key(key) in of_group
        }
        return self._named(values, data)

    def stored_parameters(self, data: TensorDictBase) -> Parameters | None:
        """The parameters that the behaviour policy left in the data, if it did."""
        if any(data.get(key, None) is None for key in self.parameter_keys):
            return None
        return self._named({}, data)

    def _named(self, values: dict[NestedKey, Tensor], data: TensorDictBase) -> Parameters:
        head = self.head
        return {
            name[-1] if isinstance(name, tuple) else name: (
                values[key] if key in values else data.get(key)
            )
            for name, key in zip(head.dist_keys, head.in_keys, strict=True)
        }

    def distribution(self, parameters: Parameters) -> Distribution:
        """The distribution with these parameters."""
        head = self.head
        kind = self._squash if head.distribution_class is TanhNormal else head.distribution_class
        return kind(**parameters, **head.distribution_kwargs)

    def log_prob(self, parameters: Parameters, data: TensorDictBase) -> Tensor | TensorDictBase:
        """Log-probability of the actions in ``data``, as the distribution files it."""
        if PREIMAGE in data.keys():
            return _normal_log_prob(data.get(PREIMAGE), **parameters) - data.get(LOG_DET)
        if self._is_normal():
            return _normal_log_prob(data.get(self.action_keys[0]), **parameters)
        return self.distribution(parameters).log_prob(self.action(data))

    def scored(self, parameters: Parameters, data: TensorDictBase) -> Distribution:
        """The distribution under which :meth:`scored_log_prob` scores the actions of ``data``.

        For a squashed normal and prepared data this is the normal underneath: divergences, Fisher
        matrices and ratios are the same, and it knows nothing of bounds.
        """
        if PREIMAGE in data.keys():
            return Independent(Normal(**parameters, validate_args=False), 1, validate_args=False)
        return self.distribution(parameters)

    def scored_log_prob(self, dist: Distribution, data: TensorDictBase) -> Tensor | TensorDictBase:
        """Log-probability of the actions in ``data`` under a :meth:`scored` distribution."""
        if PREIMAGE in data.keys():
            return dist.log_prob(data.get(PREIMAGE)) - data.get(LOG_DET)
        return dist.log_prob(self.action(data))

    def action(self, data: TensorDictBase) -> Tensor | TensorDictBase:
        """The stored actions, as the distribution takes them."""
        keys = self.action_keys
        return data.get(keys[0]) if len(keys) == 1 else data.select(*keys)

    def entropy(
        self, parameters: Parameters, data: TensorDictBase, log_prob: Tensor, log_ratio: Tensor
    ) -> Tensor:
        r"""Entropy of the policy at each sample, for the metrics.

        Exact where a closed form is known. Otherwise it is estimated from the stored actions,
        :math:`H = -\mathbb{E}_\text{old}[r \log \pi(a)]`, of a squashed normal only the expected
        log-determinant of the squashing.

        Args:
            parameters (dict of str to Tensor): of the policy's distribution.
            data (TensorDictBase): the prepared view of the batch.
            log_prob (Tensor): joint log-probability of the stored actions under this policy.
            log_ratio (Tensor): log of this policy over the one that acted.
        """
        if PREIMAGE in data.keys():
            normal = (parameters["scale"].log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
            log_det = data.get(LOG_DET).reshape(log_ratio.shape)
            return normal.reshape(log_ratio.shape) + log_ratio.exp() * log_det
        try:
            return entropy(self.distribution(parameters), batch_ndim=log_ratio.ndim)
        except NotImplementedError:
            return -log_ratio.exp() * log_prob

    def prepare(self, data: TensorDictBase) -> TensorDictBase:
        """Add the unsquashed actions to ``data``, if the distribution squashes.

        Args:
            data (TensorDictBase): a view of the batch; modified in place.
        """
        if self.squashes:
            action = data.get(self.action_keys[0])
            # Any location and scale: only the squashing is taken from the distribution.
            zeros, ones = torch.zeros_like(action), torch.ones_like(action)
            dist = self._squash(loc=zeros, scale=ones, **self.head.distribution_kwargs)
            transform = dist.transforms[0]
            preimage = transform.inv(action)
            data.set(PREIMAGE, preimage)
            data.set(LOG_DET, transform.log_abs_det_jacobian(preimage, action).sum(-1))
        return data

    @property
    def squashes(self) -> bool:
        """Whether the policy is a squashed normal that :meth:`prepare` can unsquash."""
        head = self.head
        return (
            head.distribution_class is TanhNormal
            and not head.distribution_kwargs.get("tanh_loc", False)
            and head.distribution_kwargs.get("event_dims") in (None, 1)
        )

    @cached_property
    def may_saturate(self) -> bool:
        """Whether actions may be :func:`~torchrl_happo.policy.distributions.is_saturated`."""
        head = self.head
        kinds = [head.distribution_class]
        if self.is_composite:
            kinds = list(head.distribution_kwargs["distribution_map"].values())
        # A function does not say what it makes.
        return any(not isinstance(kind, type) or issubclass(kind, TanhNormal) for kind in kinds)

    def _is_normal(self) -> bool:
        head = self.head
        return head.distribution_class is IndependentNormal and not head.distribution_kwargs


class _Networks(nn.Module):
    """The networks as a module, so that torch can call them with other weights."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.actor = policy.actor
        self._call = policy._run

    def forward(self, data: TensorDictBase) -> Parameters:
        return self._call(data)


def _flat_modules(module: TensorDictModuleBase) -> Iterator[TensorDictModuleBase]:
    """The networks of an actor in the order of their calls, without the distribution."""
    children = list(module.module)
    if isinstance(module, ProbabilisticTensorDictSequential):
        children = children[:-1]
    for child in children:
        if isinstance(child, TensorDictSequential):
            yield from _flat_modules(child)
        else:
            yield child


def _is_plain(module: TensorDictModuleBase) -> bool:
    """Whether calling the module is calling its network on the entries of its keys."""
    return (
        type(module) in (TensorDictModule, SafeModule)
        and not takes_keywords(module)
        and module.method is None
        and not module.method_kwargs
        and not getattr(module, "safe", False)
        and "_" not in module.out_keys
    )


def _normal_log_prob(action: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Log-density of a diagonal normal, summed over the last dimension."""
    deviation = (action - loc) / scale
    constant = 0.5 * math.log(2 * math.pi) * action.shape[-1]
    return -(0.5 * deviation.square() + scale.log()).sum(-1) - constant
