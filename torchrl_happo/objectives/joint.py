"""The terms of a loss for the whole team, lined up over its agents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["JointTerms"]


class JointTerms:
    """Terms of several groups as one tensor for each name, ``[*B, n_agents]``.

    Args:
        terms (sequence of mapping): of each group, in the order of the agents; each term has the
            shape ``[*B]`` or ``[*B, n_members]``.
        valid (Tensor, optional): which decisions count, ``[*B, n_agents]``. ``None``: all.
        batch_dims (int): number of dimensions of ``B``.

    Keyword Args:
        squeezes (bool): whether a team of one drops the dimension of agents.

    Example:
        >>> terms = JointTerms(
        ...     [{"loss_objective": torch.zeros(4)}, {"loss_objective": torch.ones(4, 2)}],
        ...     None,
        ...     1,
        ...     squeezes=False,
        ... )
        >>> terms["loss_objective"].shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        terms: Sequence[Mapping[str, Any]],
        valid: Tensor | None,
        batch_dims: int,
        *,
        squeezes: bool,
    ) -> None:
        self.terms = terms
        self._batch_dims = batch_dims
        self._squeezes = squeezes
        self.valid = valid.squeeze(-1) if squeezes and valid is not None else valid

    @property
    def losses(self) -> list[str]:
        """Names of the terms to minimise."""
        return [name for name in self.terms[0] if name.startswith("loss_")]

    def of_each(self, name: str) -> list[Any]:
        """Return a term of each group, or none if a group lacks it."""
        parts = [term[name] for term in self.terms if name in term]
        return parts if len(parts) == len(self.terms) else []

    def __getitem__(self, name: str) -> Tensor:
        parts = [term[name] for term in self.terms]
        joint = torch.cat([p if p.ndim > self._batch_dims else p.unsqueeze(-1) for p in parts], -1)
        return joint.squeeze(-1) if self._squeezes else joint
