"""Optimisers and schedulers from the user's factories, checked before they may do anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from torchrl_happo.arguments import check_callables

__all__ = ["OptimizerFactory", "SchedulerFactory", "build_optimizer", "build_scheduler"]

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


def build_optimizer(factory: OptimizerFactory, parameters: Sequence[nn.Parameter]) -> Optimizer:
    """Calls a factory with the parameters of one agent.

    Args:
        factory (callable): from parameters to their optimiser.
        parameters (sequence of nn.Parameter): all that the optimiser may move.

    Raises:
        TypeError: if the factory is none, or returns no optimiser.
        ValueError: if the optimiser holds other parameters, or wants what it will not be given.

    Example:
        >>> from functools import partial
        >>> build_optimizer(partial(torch.optim.SGD, lr=0.1), [nn.Parameter(torch.zeros(2))])
        SGD (...
    """
    check_callables(optimizer=factory)
    optimizer = factory(parameters)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"The optimizer factory returned {optimizer!r}; it must return a torch.optim.Optimizer."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "The optimizer LBFGS evaluates the loss again and again within one step, which "
            "minibatches do not allow; pass another one, e.g. torch.optim.Adam."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held != {id(p) for p in parameters}:
        raise ValueError(
            "The optimizer holds other parameters than the ones of this agent; pass a factory "
            "that uses the parameters it is called with, e.g. "
            "optimizer=partial(torch.optim.Adam, lr=3e-4)."
        )
    return optimizer


def build_scheduler(factory: SchedulerFactory | None, optimizer: Optimizer) -> LRScheduler | None:
    """Calls a factory with the optimiser of one agent; ``None`` builds nothing.

    Raises:
        TypeError: if the factory is none, or returns no scheduler.
        ValueError: if the scheduler wants a metric with each step.
    """
    if factory is None:
        return None
    check_callables(scheduler=factory)
    scheduler = factory(optimizer)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "The scheduler ReduceLROnPlateau wants a metric with each step, and there is none to "
            "give; pass one that counts batches, e.g. partial(LinearLR, total_iters=100)."
        )
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(
            f"The scheduler factory returned {scheduler!r}; it must return a learning-rate "
            "scheduler of torch.optim.lr_scheduler."
        )
    return scheduler
