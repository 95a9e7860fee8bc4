"""Who the agents are: names, views of the joint tensordict, slices of a stacked network.

A team is rolled out as one *joint actor* per group, whose networks stack the parameters of all
agents along the first dimension (:class:`~torchrl.modules.MultiAgentMLP` with
``share_params=False``). It is trained agent by agent. :func:`split_actor` makes one
:class:`Agent` per row of the stack. Its parameters are *views into the stack*: an optimiser step
on an agent moves the joint actor in place and leaves every other agent's row alone, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from tensordict import LazyStackedTensorDict, NestedKey, TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModuleBase,
)
from tensordict.utils import unravel_key
from torch import Tensor, nn

from torchrl_happo.policy.actor_list import ActorList
from torchrl_happo.policy.distributions import is_saturated
from torchrl_happo.policy.policy import Parameters, Policy
from torchrl_happo.policy.stacks import Tie, cut_actor, num_agents, same_distribution, shared_part

__all__ = ["Agent", "behaviour_log_prob", "split_actor", "split_team"]


def group_of(key: NestedKey) -> str | None:
    """The group that a key belongs to: the first element of a nested key, ``None`` at the root.

    Example:
        >>> group_of(("agents", "action")), group_of("action")
        ('agents', None)
    """
    key = unravel_key(key)
    return key[0] if isinstance(key, tuple) else None


class Agent:
    """One unit of the sequential update: a single agent, or a block of agents updated as one.

    Args:
        name (str): unique name; metrics and optimisers are filed under it.
        actor (ProbabilisticTensorDictSequential): the policy of this agent alone. It reads the
            keys of the joint actor from a tensordict without the agent dimension.
        group (str or None): first element of the keys that belong to this agent's group.
        position (slice): the agents of the team that this unit stands for, in the order of the
            groups; a single agent is a slice of length 1.
        index (int or None): row of the group's agent dimension. ``None``: the unit is the whole
            group (a group without an agent dimension, a group of one, or a block).
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
        group: str | None,
        position: slice,
        index: int | None = None,
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
        self._ties = tuple(ties)
        self._joint_actor = joint_actor
        self.template = actor if template is None else template

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
        """Names and parameters of this agent alone, rows of the stack where there is one."""
        return self.actor.named_parameters()

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of this agent alone."""
        return list(self.actor.parameters())

    def tie(self) -> None:
        """Points this agent's parameters and buffers at the joint actor's present storage.

        ``.to(...)``, ``load_state_dict(assign=True)`` and ``share_memory()`` move the storage of
        the stack. Called at the start of each update, this makes the slices follow it. Parameter
        objects stay the same, so optimisers keep their state. The slice is in training or in
        evaluation mode as the joint actor is, all of its parts alike.
        """
        for tie in self._ties:
            tie()
        if self._joint_actor is not None:
            self.actor.train(self._joint_actor.training)

    def view(self, tensordict: TensorDictBase, keys: Collection[NestedKey]) -> TensorDict:
        """This agent's part of a joint tensordict.

        Args:
            tensordict (TensorDictBase): joint data of batch size ``[*B]``. Entries of the agent's
                group have shape ``[*B, n_agents, ...]`` if the group has an agent dimension.
            keys (collection of NestedKey): the entries wanted. Absent ones are left out.

        Returns:
            a new tensordict of batch size ``[*B]`` with the same keys. The agent dimension is
            gone from the entries of the group (kept, if the unit is a whole group); all other
            entries are shared with the joint tensordict.
        """
        keys = [unravel_key(key) for key in keys]
        if self.index is None or tensordict.get(self.group, None) is None:
            return tensordict.select(*keys, strict=False)
        own = [key[1:] for key in keys if group_of(key) == self.group]
        view = tensordict.select(
            *(key for key in keys if group_of(key) != self.group), strict=False
        )
        for key, value in self._row(tensordict, own).items():
            view.set((self.group, key), value)
        return view

    def _row(self, tensordict: TensorDictBase, keys: Collection[NestedKey]) -> TensorDictBase:
        """This agent's entries of its group."""
        group = tensordict.get(self.group).select(*keys, strict=False)
        at_row = (slice(None),) * tensordict.batch_dims + (self.index,)
        if isinstance(group, LazyStackedTensorDict):
            return group[at_row]
        # Leaf by leaf: a tensordict would look at the number of items, which may be a symbol.
        return group.apply(lambda leaf: leaf[at_row], batch_size=tensordict.batch_size)

    def log_prob(self, parameters: Parameters, data: TensorDictBase) -> Tensor:
        """Joint log-probability of the actions in ``data`` (see :class:`Policy`).

        Args:
            parameters (dict of str to Tensor): of the policy's distribution.
            data (TensorDictBase): a :meth:`view` of batch size ``[*B]``.

        Returns:
            the log-probability summed over the action's dimensions and heads: ``[*B]``, or
            ``[*B, n_members]`` for a whole group with an agent dimension.
        """
        return self.joint_log_prob(self.policy.log_prob(parameters, data), data)

    def stored_log_prob(self, data: TensorDictBase) -> Tensor:
        """Joint log-probability that the behaviour policy wrote when it acted."""
        keys = self.policy.log_prob_keys
        heads = [self.joint_log_prob(data.get(key), data) for key in keys]
        return torch.stack(heads).sum(0) if len(heads) > 1 else heads[0]

    def joint_log_prob(self, log_prob: Tensor | TensorDictBase, data: TensorDictBase) -> Tensor:
        """Sums a log-probability over the action's heads and dimensions.

        An agent acts with its whole action, so the ratio of the surrogate is that of the product
        over dimensions, whichever way the distribution files them.
        """
        if isinstance(log_prob, TensorDictBase):
            heads = [self.joint_log_prob(head, data) for head in log_prob.values(True, True)]
            return torch.stack(heads).sum(0)
        surplus = log_prob.ndim - len(self.sample_shape(data))
        return log_prob.flatten(-surplus).sum(-1) if surplus > 0 else log_prob

    def sample_shape(self, data: TensorDictBase) -> torch.Size:
        """Shape of this unit's log-probabilities: ``[*B]``, or ``[*B, n_members]`` for a block.

        The agent dimension of a group of one does not count: the group's log-probability is that
        of its only agent, and lines up with the advantage as any single agent's does.
        """
        if self.index is not None or self.group is None:
            return data.batch_size
        rows = data.get(self.group).batch_size[data.batch_dims :].numel()
        members = max(self.num_members, rows)
        return data.batch_size if members == 1 else torch.Size([*data.batch_size, members])


def split_actor(
    actor: ProbabilisticTensorDictSequential | ActorList,
    *,
    group: str | None = None,
    start: int = 0,
    as_block: bool = False,
) -> list[Agent]:
    """Cuts the actor of a group into one actor per agent.

    Args:
        actor (ProbabilisticTensorDictSequential or ActorList): the joint actor of the group.

    Keyword Args:
        group (str, optional): name of the group. Defaults to the first element of the action key.
        start (int): position of the group's first agent in the team. Defaults to ``0``.
        as_block (bool): if ``True``, the whole group is one unit, whose agents may share
            parameters. Defaults to ``False``.

    Returns:
        the agents, in the order of the group's agent dimension.

    Raises:
        TypeError: if ``actor`` is not a probabilistic tensordict module.
        ValueError: if agents share parameters and ``as_block`` is ``False``.

    Example:
        >>> import torch
        >>> from tensordict.nn import NormalParamExtractor, TensorDictModule
        >>> from torchrl.modules import IndependentNormal, MultiAgentMLP, ProbabilisticActor
        >>> net = MultiAgentMLP(
        ...     n_agent_inputs=5,
        ...     n_agent_outputs=4,
        ...     n_agents=3,
        ...     centralized=False,
        ...     share_params=False,
        ... )
        >>> actor = ProbabilisticActor(
        ...     TensorDictModule(
        ...         torch.nn.Sequential(net, NormalParamExtractor()),
        ...         in_keys=[("agents", "observation")],
        ...         out_keys=[("agents", "loc"), ("agents", "scale")],
        ...     ),
        ...     in_keys=[("agents", "loc"), ("agents", "scale")],
        ...     out_keys=[("agents", "action")],
        ...     distribution_class=IndependentNormal,
        ...     return_log_prob=True,
        ... )
        >>> agents = split_actor(actor)
        >>> [agent.name for agent in agents]
        ['agents_0', 'agents_1', 'agents_2']
        >>> stack = next(actor.parameters())
        >>> bool((agents[1].parameters()[0] == stack[1]).all())
        True
    """
    if isinstance(actor, ActorList):
        return [
            Agent(
                f"{group or actor.group}" + (f"_{index}" if len(actor.actors) > 1 else ""),
                single,
                group=actor.group,
                position=slice(start + index, start + index + 1),
                index=index,
            )
            for index, single in enumerate(actor.actors)
        ]
    if not isinstance(actor, ProbabilisticTensorDictSequential):
        raise TypeError(
            f"The actor of group {group!r} is a {type(actor).__name__}; pass a ProbabilisticActor "
            "or another ProbabilisticTensorDictSequential, whose last module is the distribution."
        )
    key_group = group_of(actor.dist_sample_keys[0])
    name = group if group is not None else (key_group or "agent")
    n_agents = num_agents(actor, name)
    shared = None if n_agents is None else shared_part(actor, n_agents)
    if as_block or n_agents is None or (n_agents == 1 and shared is not None):
        size = n_agents or 1
        return [Agent(name, actor, group=key_group, position=slice(start, start + size))]
    if shared is not None:
        raise ValueError(
            f"The actor of group {name!r} has {shared}, but HAPPO updates one agent after the "
            "other and needs a network for each (share_params=False, centralized=False); to update "
            f"agents that share parameters as one block, pass blocks=[{name!r}]."
        )
    agents: list[Agent] = []
    for index in range(n_agents):
        single_actor, ties = cut_actor(actor, n_agents, index)
        alike = (a.actor for a in agents if same_distribution(a.actor, single_actor))
        agents.append(
            Agent(
                name if n_agents == 1 else f"{name}_{index}",
                single_actor,
                group=key_group,
                position=slice(start + index, start + index + 1),
                index=index,
                ties=ties,
                joint_actor=actor,
                template=next(alike, None),
            )
        )
    return agents


def split_team(
    actors: TensorDictModuleBase | Mapping[str, ProbabilisticTensorDictSequential],
    blocks: Collection[str] = (),
) -> list[Agent]:
    """All agents of a team, in the order of its groups.

    Args:
        actors (ProbabilisticTensorDictSequential or mapping of str to it): the joint actor of the
            only group, or one for each group.
        blocks (collection of str): groups that are updated as one unit. Defaults to ``()``.

    Returns:
        the agents of all groups.

    Raises:
        ValueError: if the mapping is empty, a block names no group, or one whose agents have an
            actor each, or two agents have one name.
    """
    if not isinstance(actors, Mapping):
        name = group_of(actors.dist_sample_keys[0]) if hasattr(actors, "dist_sample_keys") else None
        actors = {name or "agent": actors}
    if not actors:
        raise ValueError(
            "The mapping of actors is empty; pass an actor for each group of the team."
        )
    unknown = sorted(set(blocks) - set(actors))
    if unknown:
        raise ValueError(f"blocks names {unknown}, but the groups are {sorted(actors)}.")
    agents: list[Agent] = []
    for group, actor in actors.items():
        if group in blocks and isinstance(actor, ActorList):
            raise ValueError(
                f"blocks names {group!r}, but the agents of an ActorList have an actor each, and "
                "are updated one by one; leave it out, or give the group one ProbabilisticActor."
            )
        start = agents[-1].position.stop if agents else 0
        agents += split_actor(actor, group=group, start=start, as_block=group in blocks)
    names = Counter(agent.name for agent in agents)
    twice = [name for name, times in names.items() if times > 1]
    if twice:
        raise ValueError(
            f"Several agents would have the names {twice}, of which one is its group's and a "
            "number; rename a group."
        )
    return agents


def behaviour_log_prob(agent: Agent, data: TensorDictBase, current: Tensor | None) -> Tensor:
    """The log-probability of the stored action under the policy that took it.

    This is the stored one, except where a :class:`~torchrl.modules.TanhNormal` action lies so
    near its bounds that ``tanh`` cannot be inverted in the tensor's precision. There the
    collector's value (scored before the rounding) and any later one (scored from the stored
    action) differ by several nats, and a policy compared with itself would have a ratio far from
    one. Such actions are scored again, from the distribution's parameters that the actor left in
    the data, so that both sides of the ratio see the same action.

    Args:
        agent (Agent): the agent or group.
        data (TensorDictBase): its view of the batch, prepared by :meth:`Policy.prepare`.
        current (Tensor, optional): log-probability under the current policy, used at saturated
            actions if the data lacks the distribution's parameters. ``None``: the stored
            log-probability is used there.

    Returns:
        the joint log-probability, ``[*B]`` or ``[*B, n_agents]``.
    """
    stored = agent.stored_log_prob(data)
    policy = agent.policy
    if not policy.may_saturate:
        return stored
    parameters = policy.stored_parameters(data)
    if parameters is not None:
        current = agent.log_prob(parameters, data)
    elif current is not None:
        parameters = policy.parameters(data)
    if parameters is None or current is None:
        return stored
    dist = policy.distribution(parameters)
    saturated = is_saturated(dist, policy.action(data), batch_ndim=stored.ndim)
    return torch.where(saturated, current, stored)
