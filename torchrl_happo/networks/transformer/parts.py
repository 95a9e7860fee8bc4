"""Parts of a transformer: its size, and the groups of its team."""

from __future__ import annotations

from dataclasses import dataclass

from torchrl_happo.networks.heads import PolicyHead
from torchrl_happo.networks.observations import Entry

__all__ = ["Size", "TeamPart"]


@dataclass(frozen=True)
class Size:
    """The size of a transformer.

    Attributes:
        features (int): of every token. Defaults to ``64``.
        heads (int): of every attention; they divide ``features``. Defaults to ``1``.
        blocks (int): of encoder and decoder each. Defaults to ``1``.
    """

    features: int = 64
    heads: int = 1
    blocks: int = 1


@dataclass(frozen=True)
class TeamPart:
    """One group of the team: what it sees, how it acts.

    Attributes:
        head (PolicyHead): the distribution of its actions.
        action (Entry): its action, as the decoder reads it.
    """

    head: PolicyHead
    action: Entry

    @property
    def n_agents(self) -> int:
        """Number of agents of the group."""
        return self.head.group.n_agents or 1
