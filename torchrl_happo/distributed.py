"""The processes that train one team together, and the few numbers they share.

Each learner is a process with environments of its own. What they have in common is the policy:
whatever decides a step (gradients, Fisher-vector products, divergences, statistics) is a mean over
the entries of all learners, so that all of them take the same step. The words are those of
:mod:`torch.distributed`, whose collectives do the work; every learner calls the same ones in the
same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Average", "Learners", "own_mean"]

#: From a learner's own means, and the number of entries they are taken over, to those of all.
Average: TypeAlias = Callable[[Sequence[Tensor], Tensor | float], list[Tensor]]


def own_mean(means: Sequence[Tensor], weight: Tensor | float) -> list[Tensor]:
    """The :data:`Average` of a learner that is alone: what it was given."""
    return list(means)


class Learners:
    """The learners of a process group; without one this process learns alone.

    Alone, every method returns what it was given and costs nothing.

    Args:
        group (ProcessGroup, optional): of :mod:`torch.distributed`, for example
            ``torch.distributed.group.WORLD``. Defaults to ``None``: alone.

    Raises:
        ValueError: if the group is none, or this process is not in it.

    Example:
        >>> import torch
        >>> learners = Learners()
        >>> learners.size, learners.rank, learners.mean([torch.tensor(3.0)], weight=10)
        (1, 0, [tensor(3.)])
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise ValueError(
                "process_group must be a process group that this process belongs to, such as "
                "torch.distributed.group.WORLD after torch.distributed.init_process_group(), got "
                f"{group!r}."
            )
        self.group = group
        self.size = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()

    @property
    def alone(self) -> bool:
        """Whether there is nobody to share with."""
        return self.size == 1

    @property
    def _device(self) -> torch.device:
        """Where small numbers of the host have to lie to be sent."""
        backend = dist.get_backend(self.group)
        return torch.device("cuda" if backend == "nccl" else "cpu")

    def mean(self, means: Sequence[Tensor], weight: Tensor | float) -> list[Tensor]:
        r"""Means over the entries of all learners, from each learner's own, in one message.

        .. math:: \frac{\sum_k w_k x_k}{\sum_k w_k}

        Args:
            means (sequence of Tensor): this learner's, of any shapes and one device.
            weight (Tensor or float): number :math:`w_k` of the entries that they are taken over.
                With 0 they may be anything, NaN included. If all learners' are 0, so is the mean.

        Returns:
            tensors of the same shapes and types.
        """
        if self.alone:
            return list(means)
        flat = torch.cat([mean.detach().reshape(-1) for mean in means])
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))  # counts outgrow halves
        share = torch.as_tensor(weight, dtype=flat.dtype, device=flat.device).reshape(1)
        message = torch.cat([torch.where(share > 0, flat * share, 0), share])
        dist.all_reduce(message, group=self.group)
        total = message[-1]
        parts = (message[:-1] / torch.where(total > 0, total, 1)).split([m.numel() for m in means])
        return [part.view(m.shape).to(m.dtype) for part, m in zip(parts, means, strict=True)]

    def maximum(self, values: Tensor) -> Tensor:
        """The largest of the learners' values, element by element."""
        if self.alone:
            return values
        values = values.detach().clone()
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def most(self, number: int) -> int:
        """The largest of a number that each learner has on the host."""
        if self.alone:
            return number
        return int(self.maximum(torch.tensor(number, device=self._device)))

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all learners, who may have differently many, one below the other."""
        if self.alone:
            return rows
        length = self.most(len(rows))
        padded = rows.new_zeros(length + 1, *rows.shape[1:])
        padded[: len(rows)] = rows
        padded[-1] = len(rows)  # how many of them there are
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[: int(part[-1].flatten()[0])] for part in parts])

    @torch.no_grad()
    def follow_first(self, tensors: Iterable[Tensor]) -> None:
        """Copies the first learner's tensors into everyone's, in place; one message per type."""
        if self.alone:
            return
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_type.setdefault(tensor.dtype, []).append(tensor)
        for dtype, members in by_type.items():
            sent = torch.uint8 if dtype == torch.bool else dtype
            flat = torch.cat([member.detach().reshape(-1).to(sent) for member in members])
            flat = flat.to(self._device if flat.device.type == "cpu" else flat.device)
            dist.broadcast(flat, group=self.group, group_src=0)
            for member, part in zip(members, flat.split([m.numel() for m in members]), strict=True):
                member.copy_(part.view(member.shape))

    def draw_as_first(self, generators: Iterable[torch.Generator]) -> None:
        """Gives everyone's generators the first learner's states."""
        if self.alone:
            return
        sources = list(generators)
        states = [generator.get_state() for generator in sources]
        self.follow_first(states)
        for generator, state in zip(sources, states, strict=True):
            generator.set_state(state)

    @contextmanager
    def agreement(self) -> Iterator[None]:
        """What one learner refuses, all of them refuse.

        Raises:
            ValueError: where another learner's body has raised; there, the error itself.
        """
        if self.alone:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        refusing = self.most(0 if error is None else self.rank + 1)
        if error is not None:
            raise error
        if refusing:
            raise ValueError(
                f"Learner {refusing - 1} of {self.size} refused its batch and says why; nothing "
                "was updated here either."
            )
