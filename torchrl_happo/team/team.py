"""The facts about a team that an update needs: its agents, and the keys of everything it reads.

A :class:`Team` is a value. It stands below every loss and knows none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.utils import unravel_key

from torchrl_happo.team.agent import Agent
from torchrl_happo.team.entries import has, next_key, path_of

__all__ = ["CriticKeys", "Team"]


@dataclass(frozen=True)
class CriticKeys:
    """Keys of the entries that belong to one critic.

    Attributes:
        reads (tuple of NestedKey): everything that the critic reads, states of its memory included.
        value (NestedKey): where the critic writes its value.
        advantage (NestedKey): the advantage that is estimated from the values.
        value_target (NestedKey): the returns that the critic is fitted to.
        reward (NestedKey): what the values sum up, under ``"next"``: a reward, or a cost.
        done (NestedKey): whether a trajectory ends, under ``"next"``.
        terminated (NestedKey): whether an episode ends, under ``"next"``.
        states (frozenset of NestedKey): states of its memory, which the update makes anew.
        init (NestedKey, optional): where its memory reads that an episode begins.
        actions (frozenset of NestedKey): actions that it reads, which the next step has not.
        needs_next (bool): whether the next observations are read; an estimator with
            ``shifted=True`` takes them from the following steps.
    """

    reads: tuple[NestedKey, ...]
    value: NestedKey
    advantage: NestedKey
    value_target: NestedKey
    reward: NestedKey
    done: NestedKey
    terminated: NestedKey
    states: frozenset[NestedKey] = frozenset()
    init: NestedKey | None = None
    actions: frozenset[NestedKey] = frozenset()
    needs_next: bool = True

    @property
    def observations(self) -> list[NestedKey]:
        """Keys that the environment must have written, now and at the next step."""
        made = {*self.states, *self.actions, self.init}
        return [key for key in self.reads if key not in made]

    def entries_read(self, batch: TensorDictBase) -> list[NestedKey]:
        """Return the keys whose numbers enter an update with this batch."""
        if has(batch, self.advantage):
            return [*self.reads, self.advantage, self.value_target]
        seen = [key for key in self.reads if key not in self.actions] if self.needs_next else []
        after = (self.reward, *seen)
        return [*self.reads, *(next_key(key) for key in after)]


@dataclass(frozen=True, eq=False)
class Team:
    """The facts about a team that an update needs, whatever the loss.

    Attributes:
        agents (tuple of Agent): the units of the sequential update, in the order of the groups.
        keys (Any): the accepted keys of the loss (``advantage``, ``factor``, ``reward``, ...).
        critics (mapping of str to CriticKeys): the entries of each critic.
        mask_keys (tuple of NestedKey): TorchRL's validity masks of whole steps.
    """

    agents: tuple[Agent, ...]
    keys: Any
    critics: Mapping[str, CriticKeys]
    mask_keys: tuple[NestedKey, ...] = ()

    @property
    def num_agents(self) -> int:
        """Number of agents in the team, the members of blocks counted one by one."""
        return self.agents[-1].position.stop

    def active_keys(self, agent: Agent) -> list[NestedKey]:
        """Return the keys under which a batch may say at which steps an agent acts.

        There is one for each group of the agent, of which only a block may have several.
        """
        name, keys = path_of(self.keys.active), []
        for group in agent.groups:
            path = () if group is None else path_of(group)
            keys.append(unravel_key(name if name[: len(path)] == path else (*path, *name)))
        return keys

    def seen_in(self, batch: TensorDictBase) -> Team:
        """Return the team as a batch shows it.

        The size of a block whose network does not say it is that of its group. Where nothing is
        under the key ``active``, TorchRL's mask of dead agents, ``(group, "mask")``, is taken.
        """
        _settle(self.agents, batch)
        if self.keys.active != "active" or any(
            has(batch, key) for agent in self.agents for key in self.active_keys(agent)
        ):
            return self
        keys = copy.copy(self.keys)
        keys.active = "mask"
        other = replace(self, keys=keys)
        grouped = [agent for agent in self.agents if None not in agent.groups]
        places = [key for agent in grouped for key in other.active_keys(agent)]
        is_mask = (has(batch, key) and batch.get(key).dtype == torch.bool for key in places)
        return other if any(is_mask) else self

    def is_masked(self, batch: TensorDictBase) -> bool:
        """Whether a batch holds any mask: of steps, or of agents."""
        active = [key for agent in self.agents for key in self.active_keys(agent)]
        keys = {*self.mask_keys, *active}
        return any(has(batch, place) for key in keys for place in (key, next_key(key)))

    def entries_read(self, batch: TensorDictBase) -> list[NestedKey]:
        """Return the keys whose numbers enter an update with this batch."""
        read: list[NestedKey] = []
        for agent in self.agents:
            read += agent.keys
            if agent.policy.may_saturate and not agent.policy.is_composite:
                # They score actions at the bounds again. (Of a composite some may be infinite
                # rightly: the logits of a masked head.)
                read += agent.policy.parameter_keys
        for critic in self.critics.values():
            read += critic.entries_read(batch)
        if not self.critics:
            read.append(self.keys.advantage)
        return list(dict.fromkeys(unravel_key(key) for key in read))


def _settle(agents: Iterable[Agent], batch: TensorDictBase) -> None:
    """Set the positions of agents behind blocks whose size only the batch says."""
    start = 0
    for agent in agents:
        size = agent.num_members
        if agent.takes_size_of_group:
            log_prob = batch.get(agent.policy.log_prob_keys[0])
            size = log_prob.shape[batch.batch_dims] if log_prob.ndim > batch.batch_dims else 1
        agent.position = slice(start, start + size)
        start += size
