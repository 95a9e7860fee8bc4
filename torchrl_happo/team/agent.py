"""One unit of the sequential update: its name, its policy, and its part of the joint data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from functools import cached_property

import torch
from tensordict import LazyStackedTensorDict, NestedKey, TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential
from tensordict.utils import unravel_key
from torch import Tensor, nn

from torchrl_happo.masked import VALID, masked
from torchrl_happo.policy.distributions import is_saturated
from torchrl_happo.policy.joint_row import JointRow
from torchrl_happo.policy.memory import has_memory
from torchrl_happo.policy.policy import Parameters, Policy
from torchrl_happo.policy.rows import Tie, follow_settings, signature
from torchrl_happo.team.entries import has, path_of

__all__ = ["OLD_LOG_PROB", "Agent"]

#: Entry of an agent's data: the log-probability that the importance ratio starts from.
OLD_LOG_PROB = "old_log_prob"


class Agent:
    """One unit of the sequential update: a single agent, or a block of agents updated as one.

    Args:
        name (str): unique name; metrics and optimisers are filed under it.
        actor (ProbabilisticTensorDictSequential): the policy of this agent alone. It reads the
            keys of the joint actor from a tensordict without the agent dimension.
        group (NestedKey or None): common part of the keys that belong to this agent's group.
        position (slice): the agents of the team that this unit represents, in the order of the
            groups; a single agent is a slice of length 1.
        index (int or None): row of the group's agent dimension. ``None``: the unit is the whole
            group (a group without an agent dimension, a group of one, or a block).
        group_name (str, optional): name of the group among the actors of the team. Defaults to the
            agent's name.
        ties (iterable of Tie): which of the actor's parameters are rows of which stack.
        joint_actor (nn.Module, optional): the module that the actor was cut from.
        template (nn.Module, optional): the actor of another agent whose code is the same as this
            one's, so that they differ in their tensors alone. Defaults to the agent's own actor.
    """

    def __init__(
        self,
        name: str,
        actor: ProbabilisticTensorDictSequential,
        *,
        group: NestedKey | None,
        position: slice,
        index: int | None = None,
        group_name: str | None = None,
        ties: Iterable[Tie] = (),
        joint_actor: nn.Module | None = None,
        template: nn.Module | None = None,
    ) -> None:
        self.name = name
        self.actor = actor
        self.policy = Policy(actor)
        self.group = group
        self.position = position
        self.index = index
        self.group_name = name if group_name is None else group_name
        self._ties = tuple(ties)
        self._joint_actor = joint_actor
        self.template = actor if template is None else template
        self._signature = signature(self.source)
        self.has_memory = has_memory(actor)
        #: Whether the number of members is that of the group in the batch.
        self.takes_size_of_group = False
        #: Whether the agent's policy was compared with the joint actor, in its present modes.
        self.is_checked = False

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name={self.name!r}, group={self.group!r}, index={self.index})"
        )

    @property
    def num_members(self) -> int:
        """Number of agents in this unit: 1, or the size of the block."""
        return self.position.stop - self.position.start

    @property
    def source(self) -> nn.Module:
        """The module that holds the parameters: the joint actor, or the agent's own."""
        return self.actor if self._joint_actor is None else self._joint_actor

    def is_another_row_of(self, other: Agent) -> bool:
        """Whether two agents are unlike rows of one stack."""
        stack = self._joint_actor
        return stack is not None and stack is other._joint_actor and self.index != other.index

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return names and parameters of this agent alone, rows of the stack where there is one."""
        return self.actor.named_parameters()

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of this agent alone."""
        return list(self.actor.parameters())

    @property
    def ties(self) -> tuple[Tie, ...]:
        """Which of the parameters are rows of which stack."""
        return self._ties

    def tie(self) -> None:
        """Follow the joint actor: storage, settings and modes of its modules.

        ``.to(...)``, ``load_state_dict(assign=True)`` and ``share_memory()`` move the storage of
        the stack. The updater calls this at the start of each update. Parameter objects stay the
        same, so optimisers keep their state.

        Raises:
            ValueError: if the joint actor has other modules than when it was cut into agents.
        """
        now = signature(self.source)
        is_new = now != self._signature
        if is_new and self._joint_actor is not None:
            before, after = ([part[0] for part in each] for each in (self._signature, now))
            if before != after:
                raise ValueError(
                    f"The joint actor of {self.group_name!r} has other modules than when the loss "
                    "was built; build the loss and its updater anew."
                )
        for tie in self._ties:
            tie()
        if self._joint_actor is not None:
            follow_settings(self.actor, self._joint_actor)
        if is_new:
            self._signature, self.is_checked = now, False

    def evaluate_jointly(self) -> None:
        """Evaluate this agent's policy by the joint actor from now on, with all other rows."""
        assert self._joint_actor is not None
        assert self.index is not None
        self.policy.joint_row = JointRow(self._joint_actor, self.actor, self._ties, self.index)
        self.template = self.actor  # the row is part of the code

    # -- data ----------------------------------------------------------------------------------

    @cached_property
    def keys(self) -> tuple[NestedKey, ...]:
        """Keys that every update of this agent reads: observations, actions, log-probabilities."""
        policy = self.policy
        keys = (*self.actor.in_keys, *policy.action_keys, *policy.log_prob_keys)
        return tuple(dict.fromkeys(unravel_key(key) for key in keys))

    @cached_property
    def update_keys(self) -> tuple[NestedKey, ...]:
        """Keys of this agent's view of a batch: ``keys``, and the distribution's parameters."""
        parameters = (unravel_key(key) for key in self.policy.parameter_keys)
        return tuple(dict.fromkeys((*self.keys, *parameters)))

    @cached_property
    def groups(self) -> tuple[NestedKey | None, ...]:
        """The agent's group; of a block of several groups, those of its actions, in order."""
        paths = [path_of(key)[:-1] for key in self.policy.action_keys]
        if self.group is not None or self.num_members == 1 or not all(paths):
            return (self.group,)
        return tuple(unravel_key(path) for path in paths)

    def owns(self, key: NestedKey) -> bool:
        """Whether a key belongs to this agent's group."""
        group = () if self.group is None else path_of(self.group)
        return bool(group) and path_of(key)[: len(group)] == group

    def view(self, tensordict: TensorDictBase, keys: Collection[NestedKey]) -> TensorDict:
        """Return this agent's part of a joint tensordict.

        Args:
            tensordict (TensorDictBase): joint data of batch size ``[*B]``. Entries of the agent's
                group have shape ``[*B, n_agents, ...]`` if the group has an agent dimension.
            keys (collection of NestedKey): the entries wanted. Absent ones are left out.

        Returns:
            a new tensordict of batch size ``[*B]`` with the same keys. The agent dimension is
            gone from the entries of the group (kept, if the unit is a whole group); all other
            entries are shared with the joint tensordict.
        """
        if self.index is None or tensordict.get(self.group, None) is None:
            return tensordict.select(*keys, strict=False)
        depth = len(path_of(self.group))
        # The joint actor reads the observations of the whole group.
        whole = self.policy.network_keys if self.policy.joint_row is not None else ()
        own = [path_of(key)[depth:] for key in keys if self.owns(key) and key not in whole]
        shared = [key for key in keys if not self.owns(key)]
        view = tensordict.select(*shared, strict=False)
        for key, value in self._row(tensordict, own).items():
            view.set((*path_of(self.group), key), value)
        for key in whole:
            if self.owns(key) and has(tensordict, key):
                view.set(key, tensordict.get(key))
        return view

    def _row(self, tensordict: TensorDictBase, keys: Collection[NestedKey]) -> TensorDictBase:
        """Return this agent's entries of its group."""
        group = tensordict.get(self.group).select(*keys, strict=False)
        at_row = (slice(None),) * tensordict.batch_dims + (self.index,)
        if isinstance(group, LazyStackedTensorDict):
            return group[at_row]
        # Leaf by leaf: a tensordict would look at the number of items, which may be a symbol.
        return group.apply(lambda leaf: leaf[at_row], batch_size=tensordict.batch_size)

    def share_of(self, value: Tensor, batch_dims: int) -> Tensor:
        """Return this unit's part of a number for the team or for each agent.

        Args:
            value (Tensor): ``[*B, 1]`` or ``[*B, n_agents, 1]``.
            batch_dims (int): number of dimensions of ``B``.

        Returns:
            ``[*B]``, or ``[*B, n_members]`` for a block.
        """
        value = value.squeeze(-1)
        if value.ndim > batch_dims:
            value = value[..., self.position]
            return value.squeeze(-1) if self.num_members == 1 else value
        if self.num_members == 1:
            return value
        return value.unsqueeze(-1).expand(*value.shape, self.num_members)

    def sample_shape(self, data: TensorDictBase) -> torch.Size:
        """Return the shape of this unit's log-probabilities: ``[*B]``, or ``[*B, n_members]``.

        The agent dimension of a group of one does not count: the group's log-probability is that
        of its only agent, and lines up with the advantage as any single agent's does.
        """
        if self.index is not None:
            return data.batch_size
        if self.group is None:  # at the root, or a block of several groups
            several = () if self.num_members == 1 else (self.num_members,)
            return torch.Size([*data.batch_size, *several])
        rows = data.get(self.group).batch_size[data.batch_dims :].numel()
        members = max(self.num_members, rows)
        return data.batch_size if members == 1 else torch.Size([*data.batch_size, members])

    # -- log-probabilities ---------------------------------------------------------------------

    def log_prob(self, parameters: Parameters, data: TensorDictBase) -> Tensor:
        """Return the joint log-probability of the actions in ``data`` (see :class:`Policy`).

        Args:
            parameters (dict of str to Tensor): of the policy's distribution.
            data (TensorDictBase): a :meth:`view` of batch size ``[*B]``.

        Returns:
            the log-probability summed over the action's dimensions and heads: ``[*B]``, or
            ``[*B, n_members]`` for a whole group with an agent dimension.
        """
        return self.joint_log_prob(self.policy.log_prob(parameters, data), data)

    def log_ratio(self, parameters: Parameters, data: TensorDictBase) -> Tensor:
        """Return the log of the importance ratio, 0 where a decision does not count.

        Args:
            parameters (dict of str to Tensor): of the policy's distribution.
            data (TensorDictBase): the agent's data, with ``"old_log_prob"`` and perhaps
                ``"valid"``.
        """
        log_ratio = self.log_prob(parameters, data) - data.get(OLD_LOG_PROB)
        return masked(log_ratio, data.get(VALID, None))

    def stored_log_prob(self, data: TensorDictBase) -> Tensor:
        """Return the joint log-probability that the behaviour policy wrote when it acted."""
        keys = self.policy.log_prob_keys
        heads = [self.joint_log_prob(data.get(key), data) for key in keys]
        return torch.stack(heads).sum(0) if len(heads) > 1 else heads[0]

    def joint_log_prob(self, log_prob: Tensor | TensorDictBase, data: TensorDictBase) -> Tensor:
        """Sum a log-probability over the action's heads and dimensions.

        An agent acts with its whole action, so the ratio of the surrogate is that of the product
        over dimensions, whichever way the distribution files them.
        """
        if isinstance(log_prob, TensorDictBase):
            heads = [self.joint_log_prob(head, data) for head in log_prob.values(True, True)]
            return torch.stack(heads).sum(0)
        surplus = log_prob.ndim - len(self.sample_shape(data))
        return log_prob.flatten(-surplus).sum(-1) if surplus > 0 else log_prob

    def behaviour_log_prob(self, data: TensorDictBase, current: Tensor | None = None) -> Tensor:
        """Return the log-probability of the stored action under the policy that took it.

        It is the stored one, except where a :class:`~torchrl.modules.TanhNormal` action lies so
        near its bounds that ``tanh`` cannot be inverted in the tensor's precision. There the
        collector's value (scored before the rounding) and any later one (scored from the stored
        action) differ by several nats, and a policy compared with itself would have a ratio far
        from one. These actions are scored again, from the distribution's parameters that the actor
        left in the data, so that both sides of the ratio see the same action.

        Args:
            data (TensorDictBase): its view of the batch, prepared by :meth:`Policy.prepare`.
            current (Tensor, optional): log-probability under the current policy, used at saturated
                actions if the data lacks the distribution's parameters. ``None``: the stored
                log-probability is used there.

        Returns:
            the joint log-probability, ``[*B]`` or ``[*B, n_agents]``.
        """
        stored = self.stored_log_prob(data)
        policy = self.policy
        if not policy.may_saturate:
            return stored
        parameters = policy.stored_parameters(data)
        if parameters is not None:
            current = self.log_prob(parameters, data)
        elif current is not None:
            parameters = policy.parameters(data)
        if parameters is None or current is None:
            return stored
        dist = policy.distribution(parameters)
        saturated = is_saturated(dist, policy.action(data), batch_ndim=stored.ndim)
        return torch.where(saturated, current, stored)
