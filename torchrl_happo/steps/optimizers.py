"""Optimisers and schedulers from the user's factories, checked before they may do anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from torchrl_happo.arguments import check_callables

__all__ = [
    "OptimizerFactory",
    "SchedulerFactory",
    "build_optimizer",
    "build_scheduler",
    "check_optimizer_state",
    "laid_out_as",
]

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


def build_optimizer(factory: OptimizerFactory, parameters: Sequence[nn.Parameter]) -> Optimizer:
    """Call a factory with the parameters of one agent.

    Args:
        factory (callable): from parameters to their optimiser.
        parameters (sequence of nn.Parameter): all that the optimiser may move, frozen ones
            included. A factory may leave frozen ones out.

    Returns:
        the optimiser, which shares no hyperparameter with another one, and uses torch's fused
        kernel where there is one and the user chose none.

    Raises:
        TypeError: if the factory cannot be called, or returns no optimiser.
        ValueError: if the optimiser holds other parameters, or evaluates the loss by itself.

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
    trained = {id(p) for p in parameters if p.requires_grad}
    if not trained <= held <= {id(p) for p in parameters}:
        raise ValueError(
            "The optimizer holds other parameters than the ones of this agent; pass a factory "
            "that uses the parameters it is called with, e.g. "
            "optimizer=partial(torch.optim.Adam, lr=3e-4)."
        )
    for group in optimizer.param_groups:
        # partial(Adam, lr=tensor) gives every agent one tensor, which each schedule multiplies.
        shared = {name: value for name, value in group.items() if isinstance(value, Tensor)}
        group.update({name: value.clone() for name, value in shared.items()})
    return _fuse(optimizer)


def _fuse(optimizer: Optimizer) -> Optimizer:
    """Switch to torch's fused kernel where there is one and the user chose none.

    An agent's network is small, and a step of Adam then costs more in its many little kernels
    than in arithmetic: fused it takes a third of the time.
    """
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        for group in optimizer.param_groups:
            chosen = group.get("fused") is not None or group.get("foreach") is not None
            special = group.get("differentiable", False) or isinstance(group["lr"], Tensor)
            if not chosen and not special:
                group["fused"] = True
    return optimizer


def build_scheduler(factory: SchedulerFactory | None, optimizer: Optimizer) -> LRScheduler | None:
    """Call a factory with the optimiser of one agent; ``None`` builds nothing.

    Raises:
        TypeError: if the factory cannot be called, or returns no scheduler.
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


def check_optimizer_state(optimizer: Optimizer, state: object, factory: OptimizerFactory) -> None:
    """Refuse the state of another kind of optimiser, or of one for other parameters.

    Args:
        optimizer (Optimizer): the optimiser that is to load the state.
        state (object): should be the ``state_dict`` of an optimiser of the same kind.
        factory (callable): built ``optimizer``, and builds the one that says which shapes fit.

    Raises:
        ValueError: in one sentence that says what differs. Torch would load such a state, and
            fail at the next step.
    """
    own = optimizer.state_dict()
    if not isinstance(state, Mapping) or state.keys() != own.keys():
        raise ValueError("the state of its optimizer is none of torch.optim; it is damaged")
    groups = [set(group) for group in state["param_groups"]]
    if groups != [set(group) for group in own["param_groups"]]:
        raise ValueError(
            f"the state of its optimizer is not from {type(optimizer).__name__}; build the updater "
            "with the optimizer that wrote it"
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    odd = [
        (index, name, value.shape)
        for index, values in state["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor) and value.ndim and value.shape != parameters[index].shape
    ]
    wanted = _state_shapes(factory, parameters) if odd else {}
    for index, name, shape in odd:
        if wanted.get((index, name)) != shape:
            raise ValueError(
                f"the optimizer's {name!r} has shape {list(shape)} for a parameter of shape "
                f"{list(parameters[index].shape)}; build the same networks"
            )


def _state_shapes(
    factory: OptimizerFactory, parameters: Sequence[nn.Parameter]
) -> dict[tuple[int, str], torch.Size]:
    """Return the shapes of an optimiser's state, by position of the parameter and name.

    They need not be those of the parameter: Adafactor keeps moments of rows and columns. So a
    second optimiser takes a step on zeros, and its state is looked at.
    """
    zeros = [nn.Parameter(torch.zeros_like(p)) for p in parameters]
    for zero in zeros:
        zero.grad = torch.zeros_like(zero)
    probe = factory(zeros)
    probe.step()
    held = [p for group in probe.param_groups for p in group["params"]]
    return {
        (index, name): value.shape
        for index, p in enumerate(held)
        for name, value in probe.state[p].items()
        if isinstance(value, Tensor)
    }


def laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient in the memory layout of its parameter, as ``backward()`` would.

    Torch's fused kernels go through both side by side, whatever their strides; the gradient of a
    stack of networks comes out transposed.
    """
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
