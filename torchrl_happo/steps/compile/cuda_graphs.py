"""Functions of tensors replayed from CUDA graphs, without Python or launches in between."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["Function", "GraphPool", "GraphReplays", "Settled"]

#: From tensors that stay where they are, in lists and mappings, and a last list of tensors that
#: have items along the first dimension, to a tuple of tensors. It may change the former in place.
Function: TypeAlias = Callable[..., tuple[Any, ...]]

WARM_UPS = 3
#: Graphs of one step; the one that was not replayed for the longest time makes room.
MAX_GRAPHS = 8


class Settled(list[Tensor]):
    """Tensors in the memory that graphs read them from."""


class GraphPool:
    """The memory, and the stream of warm-ups, that all graphs of a team share.

    Graphs may share memory because none runs beside another, and because their results are copied
    before the next one runs.
    """

    def __init__(self) -> None:
        self._shared: dict[torch.device, tuple[Any, Any]] = {}

    def capture(
        self, function: Function, fixed: Sequence[Any], items: Sequence[Tensor]
    ) -> tuple[Any, tuple[Any, ...]]:
        """Capture one call of a function.

        Capturing calls the function a few times before, by which libraries and the compiler get
        ready. What this changes, numbers drawn included, is put back, whether or not it fails.

        Returns:
            the graph, and the tensors in which a replay leaves the results.
        """
        device = next(_leaves([*fixed, items])).device
        generator = torch.cuda.default_generators[device.index]
        changed = list(_leaves(fixed))
        before, drawn = [tensor.clone() for tensor in changed], generator.get_state()
        # The networks' device need not be the current one.
        with torch.cuda.device(device):
            if device not in self._shared:
                self._shared[device] = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
            pool, stream = self._shared[device]
            graph = torch.cuda.CUDAGraph()
            try:
                stream.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(stream):
                    for _ in range(WARM_UPS):
                        function(*fixed, items)
                torch.cuda.current_stream(device).wait_stream(stream)
                # What other threads do meanwhile, such as collect, is not captured.
                mode = "thread_local"
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
                    results = function(*fixed, items)
            finally:
                torch.cuda.current_stream(device).wait_stream(stream)
                for tensor, value in zip(changed, before, strict=True):
                    tensor.detach().copy_(value.detach())
                generator.set_state(drawn)
        return graph, results


class GraphReplays:
    """The graphs of one step.

    Nothing waits for the device (:class:`~tensordict.nn.CudaGraphModule` synchronises before each
    replay). A call that is like none before runs as it is: sizes that do not come again, such as
    the number of steps at which an agent was alive, are not worth a capture.

    Args:
        pool (GraphPool): shared by the steps of a team.
    """

    def __init__(self, pool: GraphPool) -> None:
        self.pool = pool
        self._inputs: OrderedDict[Hashable, Settled] = OrderedDict()
        self._graphs: OrderedDict[Hashable, tuple[Any, ...] | None] = OrderedDict()

    def settle(self, items: Sequence[Tensor]) -> Settled:
        """Copy tensors to where graphs read them; those of before with these shapes are gone."""
        if isinstance(items, Settled):
            return items
        kinds = tuple((t.shape, t.stride(), t.dtype, t.device) for t in items)
        if kinds in self._inputs:
            torch._foreach_copy_(self._inputs[kinds], list(items))
        else:
            self._inputs[kinds] = Settled(tensor.clone() for tensor in items)
        return _latest(self._inputs, kinds)

    def bind(
        self, function: Function, fixed: Sequence[Any]
    ) -> Callable[[Sequence[Tensor]], tuple[Any, ...]]:
        """Return a function of items alone, which may be settled already."""

        def call(items: Sequence[Tensor]) -> tuple[Any, ...]:
            settled = self.settle(items)
            # Settled tensors of another shape or type lie elsewhere while a graph reads these.
            key = (function, *(tensor.data_ptr() for tensor in _leaves([*fixed, settled])))
            if key not in self._graphs:
                self._graphs[key] = None
                _latest(self._graphs, key)
                return function(*fixed, settled)
            if self._graphs[key] is None:
                # Kept with the graph: the memory that it reads and writes must live as long.
                captured = self.pool.capture(function, fixed, settled)
                self._graphs[key] = (*captured, fixed, settled)
            graph, results, *_ = _latest(self._graphs, key)
            graph.replay()
            return tuple(None if result is None else result.clone() for result in results)

        return call


def _latest(kept: OrderedDict[Hashable, Any], key: Hashable) -> Any:
    """Return an entry, as the one used last; the one used longest ago may have to go."""
    kept.move_to_end(key)
    if len(kept) > MAX_GRAPHS:
        kept.popitem(last=False)
    return kept[key]


def _leaves(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    else:
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(part)
