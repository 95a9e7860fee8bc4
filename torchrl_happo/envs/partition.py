"""The partition of an action among agents: its check, and the groups that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import index

from torchrl.envs import MarlGroupMapType

__all__ = ["check_observations", "check_partition", "group_agents"]


def check_partition(partition: Sequence[Sequence[int]]) -> list[list[int]]:
    """Refuse a partition that does not give each entry of an action to exactly one agent.

    Returns:
        the partition, as lists.
    """
    lists = _lists("partition", partition)
    if not lists or not all(lists):
        raise ValueError(
            f"AgentSplit got the partition {lists}, in which an agent has nothing to choose; "
            "give each at least one entry of the action."
        )
    entries = sorted(chain.from_iterable(lists))
    if entries != list(range(len(entries))):
        raise ValueError(
            f"AgentSplit got the partition {lists}, but each of the entries 0 to "
            f"{max(entries)} of the action belongs to exactly one agent."
        )
    return lists


def check_observations(observations: Sequence[Sequence[int]], n_agents: int) -> list[list[int]]:
    """Refuse a list of observed entries that is not one nonempty list for each agent."""
    lists = _lists("observations", observations)
    if len(lists) != n_agents:
        raise ValueError(
            f"AgentSplit got the observations of {len(lists)} agents and the actions of "
            f"{n_agents}; give one list of entries for each agent."
        )
    if not all(lists) or min(chain.from_iterable(lists)) < 0:
        raise ValueError(
            f"AgentSplit got the observations {lists}; give each agent at least one entry of the "
            "state, counted from 0."
        )
    return lists


def _lists(name: str, entries: Sequence[Sequence[int]]) -> list[list[int]]:
    try:
        return [[index(entry) for entry in own] for own in entries]
    except TypeError:
        raise TypeError(
            f"AgentSplit got {name}={entries!r}, but takes a list of whole numbers for each agent, "
            "such as [[0, 1], [2]]."
        ) from None


def group_agents(
    partition: Sequence[Sequence[int]],
    observations: Sequence[Sequence[int]] | None,
    group_map: MarlGroupMapType | None,
) -> dict[str, list[int]]:
    """Return the agents of each group by their numbers."""
    sizes = [len(actions) for actions in partition]
    widths = [len(entries) for entries in observations] if observations is not None else [0]
    alike = len(set(sizes)) == 1 and len(set(widths)) == 1
    if group_map is None:
        group_map = (
            MarlGroupMapType.ALL_IN_ONE_GROUP if alike else MarlGroupMapType.ONE_GROUP_PER_AGENT
        )
    if group_map is MarlGroupMapType.ONE_GROUP_PER_AGENT:
        return {f"agent_{agent}": [agent] for agent in range(len(partition))}
    if not alike:
        raise ValueError(
            f"AgentSplit got agents with {sizes} actions and {widths} observations for one group, "
            "which has to have equal ones; leave group_map out to give each a group of its own."
        )
    return {"agents": list(range(len(partition)))}
