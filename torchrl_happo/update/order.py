"""The order in which the agents of a team are updated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import TensorDictBase

from torchrl_happo.distributed import Learners
from torchrl_happo.team.agents import Agent

__all__ = ["LineUp", "Order"]

#: From the batch to the agents' positions (or names), in the order of their updates.
Order = Callable[[TensorDictBase], Sequence[int | str]]


class LineUp:
    """The rule that lines the agents up for an update.

    Args:
        order (str, sequence or callable): ``"random"``: a new permutation for each batch, from
            ``generator``, as the theory of HAPPO asks for; ``"fixed"``: the order of the groups;
            a sequence of positions or names; or a callable that is handed the batch and returns
            such a sequence.
        agents (sequence of Agent): the team.
        generator (torch.Generator): source of the permutations, on the CPU.
        learners (Learners, optional): who all take the first one's order. Defaults to ``None``:
            this process alone.

    Raises:
        ValueError: if ``order`` is an unknown word, or names an agent twice, not at all, or one
            that does not exist.

    Example:
        >>> from types import SimpleNamespace
        >>> team = [SimpleNamespace(name="speaker"), SimpleNamespace(name="listener")]
        >>> line_up = LineUp(["listener", 0], team, torch.Generator())
        >>> [agent.name for agent in line_up(None)]
        ['listener', 'speaker']
    """

    def __init__(
        self,
        order: str | Sequence[int | str] | Order,
        agents: Sequence[Agent],
        generator: torch.Generator,
        learners: Learners | None = None,
    ) -> None:
        if isinstance(order, str) and order not in ("random", "fixed"):
            raise ValueError(
                'order must be "random", "fixed", a sequence of agents or a callable, got '
                f"{order!r}."
            )
        self.order = order
        self.agents = list(agents)
        self.generator = generator
        self.learners = Learners() if learners is None else learners
        if not isinstance(order, str) and not callable(order):
            self.order = [agent.name for agent in self._resolve(order)]

    def __call__(self, batch: TensorDictBase) -> list[Agent]:
        """All agents of the team, each once, in the order of their updates."""
        line = self._own(batch)
        if self.learners.alone:
            return line
        positions = torch.tensor([self.agents.index(agent) for agent in line])
        self.learners.follow_first([positions])
        return [self.agents[position] for position in positions.tolist()]

    def _own(self, batch: TensorDictBase) -> list[Agent]:
        if self.order == "fixed":
            return list(self.agents)
        if self.order == "random":
            order = torch.randperm(len(self.agents), generator=self.generator).tolist()
            return [self.agents[position] for position in order]
        return self._resolve(self.order(batch) if callable(self.order) else self.order)

    def _resolve(self, order: Sequence[int | str]) -> list[Agent]:
        by_name = {agent.name: agent for agent in self.agents}
        try:
            line = [by_name[who] if isinstance(who, str) else self.agents[who] for who in order]
        except (KeyError, IndexError, TypeError):
            line = []
        if sorted(agent.name for agent in line) != sorted(by_name):
            raise ValueError(
                f"The order {order!r} must hold each of the agents {list(by_name)} (or their "
                "positions) once."
            )
        return line
