"""What the code of an inner step reads besides its data, for whoever compiles it."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from torchrl_happo.arguments import first_line
from torchrl_happo.steps.compile.flat import (
    Layout,
    network_tensors,
    network_with,
    settings,
)
from torchrl_happo.steps.compile.graphs import GraphCompiler, TensorFunction

__all__ = ["Code", "make_compiler"]

logger = logging.getLogger(__name__)


class Code:
    """The code of an inner step: its compiler, and the modules that it reads.

    Args:
        compiler (GraphCompiler): shared by the agents of a team.
        networks (sequence of nn.Module): modules whose parameters and buffers are read. They
            become arguments of what is compiled.

    Keyword Args:
        owner (nn.Module, optional): a module whose own settings and buffers are read besides. What
            is compiled is made anew if they change. Defaults to ``None``.
        template (nn.Module, optional): stands for the code: where it is the same, only tensors
            differ. Defaults to ``None``: no other step's code is like this.
    """

    def __init__(
        self,
        compiler: GraphCompiler,
        networks: Sequence[nn.Module],
        *,
        owner: nn.Module | None = None,
        template: nn.Module | None = None,
    ) -> None:
        self.compiler = compiler
        self.networks = nn.ModuleList(networks)
        self.owner = owner
        self.template = self.networks if template is None else template
        self.is_given_up = False
        self._seen: set[Hashable] = set()

    def tensors(self) -> list[Tensor]:
        """The parameters and buffers of the networks, without gradients."""
        return [tensor.detach() for tensor in network_tensors(self.networks)]

    def places(self, parameters: Iterable[nn.Parameter]) -> list[int]:
        """Where some of the parameters stand among :meth:`tensors`."""
        places = {id(tensor): place for place, tensor in enumerate(network_tensors(self.networks))}
        return [places[id(parameter)] for parameter in parameters]

    def reading(self, tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
        """A context in which the networks hold other tensors, in the order of :meth:`tensors`."""
        return network_with(self.networks, tensors)

    def key(self, layout: Layout) -> tuple[Hashable, ...]:
        """Whatever is no argument of what is compiled, and may yet change."""
        modules, buffers = list(self.networks.modules()), []
        if self.owner is not None:
            modules.append(self.owner)
            # A buffer is read where it is; one that was replaced is another.
            buffers = [id(buffer) for buffer in self.owner.buffers(recurse=False)]
        return self.template, layout, settings(modules), tuple(buffers)

    def run(self, function: partial[TensorDictBase], data: TensorDictBase) -> TensorDictBase:
        """Calls a function that reads the networks and the data, without gradients.

        Data of a layout that was not seen before is left to Python, whose errors say more.

        Args:
            function (partial): from data to a tensordict. Its ``func`` stands for its code.
            data (TensorDictBase): items along the first dimension. Not modified.

        Returns:
            what the function returns: items again, or tensors by name without a batch dimension.
        """
        layout = Layout.of(data)
        key = (function.func, *self.key(layout))
        if self.is_given_up or len(data) < 2 or key not in self._seen:
            self._seen.add(key)
            return function(data)
        try:
            # Of one memory layout: code would be compiled anew for another.
            batch = [tensor.contiguous() for tensor in layout.tensors(data)]
            run, result = self.compiler.remember(key, lambda: self._compile(function, data, batch))
            return result.fill(self.compiler.bind(run, self.tensors())(batch))
        except Exception as error:
            self.give_up(error)
            return function(data)

    def _compile(
        self, function: partial[TensorDictBase], data: TensorDictBase, batch: Sequence[Tensor]
    ) -> tuple[TensorFunction, Layout]:
        """The function of networks and batch, and the layout of its result."""
        networks = self.tensors()
        argument, result = Layout.of(data), Layout.of(function(data))

        def of_tensors(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            with self.reading(tensors[: len(networks)]):
                returned = function(argument.fill(tensors[len(networks) :]))
            return tuple(result.tensors(returned))

        batched = [False] * len(networks) + [True] * len(batch)
        return self.compiler(of_tensors, [*networks, *batch], batched=batched), result

    def give_up(self, error: Exception) -> None:
        """Leaves the code as it is, uncompiled, and says why, once for all of a team."""
        self.is_given_up = True
        why = first_line(error)
        if why not in self.compiler.complaints:
            self.compiler.complaints.add(why)
            logger.warning("A step is not compiled, and slower than it could be: %s", why)


def make_compiler(
    compile: bool | Mapping[str, Any], cudagraphs: bool, device: torch.device
) -> GraphCompiler | None:
    """The compiler that an updater was asked for.

    Args:
        compile (bool or mapping): whether to compile, or keyword arguments of
            :func:`torch.compile`.
        cudagraphs (bool): whether to replay from CUDA graphs, compiled or not. Without a CUDA
            device a warning says that this is not possible.
        device (torch.device): where the networks are.

    Returns:
        the compiler, or ``None`` if there is nothing to do.
    """
    if cudagraphs and device.type != "cuda":
        logger.warning(
            "cudagraphs=True needs networks on a CUDA device, but these are on %r; the update runs "
            "without.",
            str(device),
        )
        cudagraphs = False
    if compile is False and not cudagraphs:
        return None
    if isinstance(compile, bool):
        return GraphCompiler({} if compile else {"backend": "eager"}, cudagraphs=cudagraphs)
    return GraphCompiler(compile, cudagraphs=cudagraphs)
