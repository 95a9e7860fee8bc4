"""Functions of tensors replayed from CUDA graphs, without Python or launches in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["GraphReplay", "TensorFunction"]

#: A function of tensors alone. It may change them in place.
TensorFunction: TypeAlias = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]

WARM_UPS = 3


class GraphReplay:
    """One function on tensors of fixed shapes, captured once and replayed from then on.

    Calls copy their arguments into buffers and enqueue the graph; nothing waits for the device.
    (:class:`~tensordict.nn.CudaGraphModule` synchronises before each replay.) Capturing runs the
    function a few times, whose changes are undone.

    Args:
        function (callable): from a list of tensors, the fixed ones first, to a tuple of tensors. It
            may change the fixed ones in place.
        fixed (sequence of Tensor): arguments that stay where they are in memory.
        varying (sequence of Tensor): examples of the others.
    """

    def __init__(
        self, function: TensorFunction, fixed: Sequence[Tensor], varying: Sequence[Tensor]
    ) -> None:
        self._fixed = list(fixed)  # their memory must live as long as the graph
        self._inputs = [tensor.clone() for tensor in varying]
        arguments = [*self._fixed, *self._inputs]
        before = [tensor.clone() for tensor in self._fixed]
        stream = torch.cuda.Stream(varying[0].device)
        stream.wait_stream(torch.cuda.current_stream(varying[0].device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function(arguments)
        torch.cuda.current_stream(varying[0].device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = function(arguments)
        for tensor, value in zip(self._fixed, before, strict=True):
            tensor.copy_(value)

    def __call__(self, varying: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Runs the function on other arguments of the same shapes."""
        torch._foreach_copy_(self._inputs, list(varying))
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)
