"""Cuts the actors of a team into its agents.

A team is rolled out as one *joint actor* per group, whose networks stack the parameters of all
agents along the first dimension (:class:`~torchrl.modules.MultiAgentMLP` with
``share_params=False``). It is trained agent by agent: :func:`split_actor` makes one
:class:`~torchrl_happo.team.agent.Agent` per row of the stack, whose parameters are *views into the
stack*. An optimiser step on an agent moves the joint actor in place and leaves every other agent's
row alone, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from tensordict import NestedKey
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase
from tensordict.utils import unravel_key

from torchrl_happo.policy.actor_list import ActorList
from torchrl_happo.policy.memory import has_memory
from torchrl_happo.policy.rows import cut_actor, num_agents, same_distribution, shared_part
from torchrl_happo.team.agent import Agent
from torchrl_happo.team.entries import path_of

__all__ = ["group_of_actor", "split_actor", "split_team", "split_units"]


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
                (group or _named(actor.group)) + (f"_{index}" if len(actor.actors) > 1 else ""),
                single,
                group=actor.group,
                position=slice(start + index, start + index + 1),
                index=index,
                group_name=group or _named(actor.group),
            )
            for index, single in enumerate(actor.actors)
        ]
    if not isinstance(actor, ProbabilisticTensorDictSequential):
        raise TypeError(
            f"The actor of group {group!r} is a {type(actor).__name__}; pass a ProbabilisticActor "
            "or another ProbabilisticTensorDictSequential, whose last module is the distribution."
        )
    key_group = group_of_actor(actor)
    name = group if group is not None else _named(key_group)
    depending = getattr(actor, "num_agents", None)
    if depending is not None:  # agents that depend on each other know how many they are
        return [Agent(name, actor, group=key_group, position=slice(start, start + depending))]
    n_agents = num_agents(actor, name)
    shared = None if n_agents is None else shared_part(actor, n_agents)
    if as_block or n_agents is None or (n_agents == 1 and shared is not None):
        size = n_agents or 1
        agent = Agent(name, actor, group=key_group, position=slice(start, start + size))
        agent.takes_size_of_group = as_block and n_agents is None and key_group is not None
        return [agent]
    if shared is not None:
        own = "share_params=False, centralized=False"
        if has_memory(actor):
            own = "an ActorList, such as make_actor(env, recurrent='gru')"
        raise ValueError(
            f"The actor of group {name!r} has {shared}, but HAPPO updates one agent after the "
            f"other and needs a network for each ({own}); to update agents that share parameters "
            f"as one block, pass blocks=[{name!r}]."
        )
    if key_group is None:
        raise ValueError(
            f"The actor of {name!r} has networks for {n_agents} agents, but its action "
            f"{actor.dist_sample_keys[0]!r} lies at the root of the data, where no dimension is "
            "that of agents; name a group in the actor's keys, such as ('agents', 'action'), and "
            "rename the environment's entries by a RenameTransform."
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
                group_name=name,
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
        is_actor = hasattr(actors, "dist_sample_keys")
        actors = {_named(group_of_actor(actors) if is_actor else None): actors}
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


def split_units(
    actors: TensorDictModuleBase | Mapping[str, ProbabilisticTensorDictSequential],
) -> list[Agent]:
    """Return the units that are evaluated at once: a stack, or each actor of an ``ActorList``."""
    units: list[Agent] = []
    for name, actor in actors.items() if isinstance(actors, Mapping) else [(None, actors)]:
        start = units[-1].position.stop if units else 0
        units += split_actor(actor, group=name, start=start, as_block=True)
    return units


def group_of_actor(actor: TensorDictModuleBase) -> NestedKey | None:
    """Return the group that an actor acts for: the common beginning of the keys of its own.

    Keys of the actor's own are its actions, log-probabilities and, of its observations, all that
    begin with the same name.

    Example:
        >>> from types import SimpleNamespace as Actor
        >>> group_of_actor(
        ...     Actor(
        ...         dist_sample_keys=[("team", "left", "action")],
        ...         log_prob_keys=[("team", "left", "action_log_prob")],
        ...         in_keys=[("team", "left", "observation"), "state"],
        ...     )
        ... )
        ('team', 'left')
    """
    written = [path_of(key) for key in (*actor.dist_sample_keys, *actor.log_prob_keys)]
    first = written[0][0]
    read = [path for path in map(path_of, actor.in_keys) if path[0] == first and len(path) > 1]
    group: list[str] = []
    for names in zip(*(path[:-1] for path in (*written, *read)), strict=False):
        if len(set(names)) > 1:
            break
        group.append(names[0])
    return unravel_key(tuple(group)) if group else None


def _named(group: NestedKey | None) -> str:
    """Return the name of a group, by which its agents are called."""
    return "agent" if group is None else "_".join(path_of(group))
