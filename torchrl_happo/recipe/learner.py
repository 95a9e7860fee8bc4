"""What an algorithm gives the recipe: a policy that acts, and the updater that trains it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase


class Updater(Protocol):
    """What the recipe asks of an updater, whatever its algorithm."""

    def __call__(self, batch: TensorDictBase) -> TensorDict:
        """Learn from a batch; return nested scalars to report."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next update depends on, loadable with ``weights_only=True``."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`; one that does not fit changes nothing."""


@dataclass(frozen=True)
class Learner:
    """A policy for all agents, and the updater that trains this very policy."""

    policy: TensorDictModuleBase
    updater: Updater
    actors: dict[str, Any]
    """The actor of each group, parts of the policy that is deployed."""
    deployed: TensorDictModuleBase | None = None
    """The policy to evaluate and to use, if it is another than the one that collects."""

    @property
    def result(self) -> TensorDictModuleBase:
        """The policy to evaluate and to use."""
        return self.policy if self.deployed is None else self.deployed
