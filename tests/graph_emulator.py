"""CUDA graphs on the CPU: a capture is the list of operations of a call, a replay calls them again.

The operations of a replay read and write the very tensors of the capture, as a graph does. So a
function that is captured with an argument that moves, with a result that is overwritten before it
is read, or with a number that Python has read, gives other numbers than eager here as well.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchrl_happo.steps.compile import cuda_graphs
from torchrl_happo.steps.compile.code import Compiler
from torchrl_happo.update import assembly

#: What a stream refuses while it is captured: the host waits for a number.
READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
)


class Recorder(TorchDispatchMode):
    """Appends each operation to a list, as it is called."""

    def __init__(self, operations):
        super().__init__()
        self.operations = operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result


class Graph:
    """In the place of :class:`torch.cuda.CUDAGraph`."""

    def __init__(self):
        self.operations = []

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Device:
    """In the place of :mod:`torch.cuda`; counts, and remembers what captures were asked for."""

    CUDAGraph = Graph

    def __init__(self):
        self.captures, self.pools, self.modes, self.current = 0, set(), set(), []
        self.streams = 0
        self.default_generators = {None: torch.default_generator}
        self.breaks = False

    def graph_pool_handle(self):
        return object()

    def Stream(self, device):
        self.streams += 1
        return SimpleNamespace(wait_stream=lambda other: None)

    def current_stream(self, device):
        return SimpleNamespace(wait_stream=lambda other: None)

    def stream(self, stream):
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def device(self, device):
        self.current.append(device)
        yield
        self.current.pop()

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        assert self.current, "captured on the current device, whatever the networks' is"
        self.captures += 1
        self.pools.add(id(pool))
        self.modes.add(capture_error_mode)
        if self.breaks:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        with Recorder(graph.operations):
            yield


class Torch:
    """Torch, but for its :mod:`torch.cuda`."""

    def __init__(self, cuda):
        self.cuda = cuda

    def __getattr__(self, name):
        return getattr(torch, name)


def emulate(monkeypatch):
    """Let ``cudagraphs=True`` use the emulated device; return that."""
    device = Device()
    monkeypatch.setattr(cuda_graphs, "torch", Torch(device))
    monkeypatch.setattr(
        assembly,
        "make_compiler",
        lambda compile, cudagraphs, device: Compiler(None, cudagraphs=True) if cudagraphs else None,
    )
    return device
