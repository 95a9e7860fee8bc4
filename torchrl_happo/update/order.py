"""The order in which the agents of a team are updated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from tensordict import TensorDictBase

from torchrl_happo.distributed import Learners
from torchrl_happo.team.agent import Agent
from torchrl_happo.update.batch import TeamBatch
from torchrl_happo.update.correction import Correction
from torchrl_happo.update.semi_greedy import SemiGreedy

__all__ = ["Fixed", "Order", "OrderLike", "RandomOrder", "Turns"]


@runtime_checkable
class Order(Protocol):
    """The rule that says whose turn it is; it is asked again before each turn."""

    def next_agents(
        self, remaining: Sequence[Agent], batch: TeamBatch, correction: Correction
    ) -> Sequence[Agent]:
        """Return the agents that are updated next.

        Args:
            remaining (sequence of Agent): the agents that have not had their turn, in the order of
                the groups.
            batch (TeamBatch): the batch of the update.
            correction (Correction): what the agents that have moved have changed.

        Returns:
            one of the remaining agents (or its name), or several that move together: each of them
            is corrected by those before, and by none of its companions.
        """


#: What ``order`` may be: a word, positions or names, a callable from the joint batch to such a
#: sequence, or an :class:`Order`.
OrderLike: TypeAlias = (
    str | Sequence[int | str] | Callable[[TensorDictBase], Sequence[int | str]] | Order
)


class RandomOrder:
    """A new permutation for each batch, as the theory of HAPPO asks for.

    Args:
        generator (torch.Generator): source of the permutations, on the CPU.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self._line: list[str] = []

    def next_agents(
        self, remaining: Sequence[Agent], batch: TeamBatch, correction: Correction
    ) -> Sequence[Agent]:
        """Return the next agent of the permutation, which is drawn at the first turn."""
        if len(remaining) == len(batch.team.agents):
            order = torch.randperm(len(remaining), generator=self.generator).tolist()
            self._line = [remaining[position].name for position in order]
        by_name = {agent.name: agent for agent in remaining}
        return [by_name[self._line[-len(remaining)]]]


class Fixed:
    """The same sequence of agents for each batch, or one that a callable returns for it.

    Args:
        order (sequence or callable): positions or names of all agents, each once; or a callable
            from the joint batch to such a sequence.
    """

    def __init__(
        self, order: Sequence[int | str] | Callable[[TensorDictBase], Sequence[int | str]]
    ) -> None:
        self.order = order
        self._line: list[str] = []

    def next_agents(
        self, remaining: Sequence[Agent], batch: TeamBatch, correction: Correction
    ) -> Sequence[Agent]:
        """Return the next agent of the sequence, which is asked for at the first turn."""
        if len(remaining) == len(batch.team.agents):
            order = self.order(batch.source) if callable(self.order) else self.order
            self._line = [agent.name for agent in resolve(order, batch.team.agents)]
        by_name = {agent.name: agent for agent in remaining}
        return [by_name[self._line[-len(remaining)]]]


class Turns:
    """The turns of one team: asks the order, checks its answer, and lets all learners agree.

    Args:
        order (OrderLike): see :class:`~torchrl_happo.SequentialUpdater`.
        agents (sequence of Agent): the team.
        generator (torch.Generator): source of random orders, on the CPU.
        learners (Learners): the processes that all follow the first one's order.

    Raises:
        ValueError: if ``order`` is an unknown word, or names an agent twice, not at all, or one
            that does not exist.
    """

    def __init__(
        self,
        order: OrderLike,
        agents: Sequence[Agent],
        generator: torch.Generator,
        learners: Learners,
    ) -> None:
        self.agents = tuple(agents)
        self.learners = learners
        self.order = self._rule(order, generator)
        # Learners draw alike, and a sequence is a sequence; a callable may look at its own batch.
        self._is_alike = isinstance(self.order, RandomOrder) or (
            isinstance(self.order, Fixed) and not callable(self.order.order)
        )

    def _rule(self, order: OrderLike, generator: torch.Generator) -> Order:
        if isinstance(order, Order):
            return order
        if isinstance(order, str):
            if order == "random":
                return RandomOrder(generator)
            if order == "semi_greedy":
                return SemiGreedy(generator)
            if order == "fixed":
                return Fixed(range(len(self.agents)))
            raise ValueError(
                'order must be "random", "fixed", "semi_greedy", a sequence of agents, a callable '
                f"or an Order, got {order!r}."
            )
        if callable(order):
            return Fixed(order)
        return Fixed([agent.name for agent in resolve(order, self.agents)])

    def next(
        self, remaining: Sequence[Agent], batch: TeamBatch, correction: Correction
    ) -> list[Agent]:
        """Return the agents whose turn it is, at least one of the remaining."""
        chosen = self.order.next_agents(tuple(remaining), batch, correction)
        by_name = {agent.name: agent for agent in remaining}
        is_list = isinstance(chosen, Sequence) and not isinstance(chosen, str)
        names = [str(getattr(who, "name", who)) for who in chosen] if is_list else []
        if not names or len(set(names)) < len(names) or not by_name.keys() >= set(names):
            raise ValueError(
                f"{type(self.order).__name__}.next_agents returned {chosen!r}; it must return one "
                f"or several of the agents {list(by_name)}, each once."
            )
        listed = [by_name[name] for name in names]
        if self.learners.alone or self._is_alike:
            return listed
        flags = torch.zeros(len(self.agents), dtype=torch.int64)
        for place, name in enumerate(names):
            flags[[agent.name for agent in self.agents].index(name)] = place + 1
        self.learners.follow_first([flags])
        places = flags.tolist()
        line = sorted((place, index) for index, place in enumerate(places) if place)
        return [self.agents[index] for _, index in line]


def resolve(order: Sequence[int | str], agents: Sequence[Agent]) -> list[Agent]:
    """Return the agents that a sequence of positions or names stands for, each once.

    Raises:
        ValueError: if an agent is missing, there twice, or unknown.
    """
    by_name = {agent.name: agent for agent in agents}
    try:
        line = [by_name[who] if isinstance(who, str) else agents[who] for who in order]
    except (KeyError, IndexError, TypeError):
        line = []
    if sorted(agent.name for agent in line) != sorted(by_name):
        raise ValueError(
            f"The order {order!r} must hold each of the agents {list(by_name)} (or their "
            "positions) once."
        )
    return line
