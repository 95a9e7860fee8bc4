"""Functions of tensors, traced to a graph and compiled once for all agents of one architecture.

An inner step calls the same code hundreds of times on tensors of the same kind. It is written
once, in Python that speaks of tensordicts, modules and distributions. Here it is run once on
symbolic tensors, which leaves a graph of nothing but tensor operations, backward pass included;
that graph is what :func:`torch.compile` is given. Two agents whose steps are the same leave the
same graph and share the compiled code: what tells them apart, parameters and data, are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from torchrl_happo.steps.compile.cuda_graphs import GraphReplay, TensorFunction

__all__ = ["GraphCompiler", "TensorFunction", "trace"]

Compiled = TypeVar("Compiled")


class GraphCompiler:
    """Compiles functions of tensors, each distinct graph once.

    Args:
        options (mapping, optional): keyword arguments of :func:`torch.compile`. With its default
            backend, random numbers are those of eager torch.
        cudagraphs (bool): whether bound functions (:meth:`bind`) are replayed from CUDA graphs.
            Defaults to ``False``.

    Example:
        >>> import torch
        >>> from torchrl_happo.steps.compile.graphs import GraphCompiler
        >>> compiler = GraphCompiler({"backend": "eager"})
        >>> def mean_of_multiple(factor):
        ...     return lambda tensors: ((factor * tensors[0]).mean(),)
        >>> for items in (5, 3):
        ...     data = [torch.ones(items)]
        ...     double = compiler(mean_of_multiple(2), data, batched=[True])
        ...     double(data)
        (tensor(2.),)
        (tensor(2.),)
        >>> compiler.num_graphs
        1
    """

    def __init__(
        self, options: Mapping[str, Any] | None = None, *, cudagraphs: bool = False
    ) -> None:
        self.options = {"backend": "inductor", **(options or {})}
        if self.options["backend"] == "inductor" and "mode" not in self.options:
            chosen = self.options.get("options", {})
            self.options["options"] = {"fallback_random": True, **chosen}
        self._compiled: dict[Hashable, Callable[..., tuple[Tensor, ...]]] = {}
        self._made: dict[Hashable, Any] = {}
        self.cudagraphs = cudagraphs
        self.complaints: set[str] = set()  # why something was not compiled
        self._replays: dict[Hashable, GraphReplay] = {}

    @property
    def num_graphs(self) -> int:
        """Number of distinct graphs so far."""
        return len(self._compiled)

    def __call__(
        self, function: TensorFunction, tensors: Sequence[Tensor], *, batched: Sequence[bool]
    ) -> TensorFunction:
        """Compiles a function that is to be called without gradients.

        Args:
            function (callable): from a list of tensors to a tuple of tensors.
            tensors (sequence of Tensor): arguments to trace it with, which are not changed. Those
                of later calls must have the same types and shapes. None may require a gradient.

        Keyword Args:
            batched (sequence of bool): whether the first dimension of a tensor counts the items
                of a batch, whose number may be another at each call, but at least 2.

        Returns:
            callable: the same function.

        Raises:
            ValueError: if what the function does depends on the number of items.
        """
        return self.compile_graph(trace(function, tensors, batched))

    def remember(self, key: Hashable, make: Callable[[], Compiled]) -> Compiled:
        """What ``make`` returned for this key before, or returns now."""
        if key not in self._made:
            self._made[key] = make()
        made: Compiled = self._made[key]
        return made

    def bind(self, function: TensorFunction, fixed: Sequence[Tensor]) -> TensorFunction:
        """Gives a function those of its arguments that stay where they are in memory.

        Args:
            function (callable): of a list of tensors; from :meth:`__call__` or
                :meth:`compile_graph`.
            fixed (sequence of Tensor): the first ones.

        Returns:
            callable: from a list of the others to the same results.
        """
        if not self.cudagraphs:
            return lambda varying: function([*fixed, *varying])
        place = tuple(tensor.data_ptr() for tensor in fixed)

        def replay(varying: Sequence[Tensor]) -> tuple[Tensor, ...]:
            key = (function, place, tuple(tensor.shape for tensor in varying))
            if key not in self._replays:
                self._replays[key] = GraphReplay(function, fixed, varying)
            return self._replays[key](varying)

        return replay

    def compile_graph(self, graph: GraphModule) -> TensorFunction:
        """Compiles a graph of :func:`trace`, which is modified (see :meth:`__call__`)."""
        used = _drop_unused_arguments(graph)
        constants = _lift_constants(graph)
        kinds = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
        key = (graph.code, tuple(map(_describe, kinds)))
        if key not in self._compiled:
            self._compiled[key] = torch.compile(graph, fullgraph=True, **self.options)
        compiled = self._compiled[key]
        is_first = True

        def call(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            nonlocal is_first
            arguments = [*(tensors[index] for index in used), *constants]
            if is_first:
                arguments = [
                    _mark_symbols(argument, kind)
                    for argument, kind in zip(arguments, kinds, strict=True)
                ]
                is_first = False
            with torch.no_grad():
                return compiled(*arguments)

        return call


def _mark_symbols(tensor: Tensor, kind: Tensor) -> Tensor:
    """Tells the compiler which sizes may change; the mark is on another object than the tensor."""
    marked = tensor.detach()
    for dim, size in enumerate(kind.shape):
        if isinstance(size, torch.SymInt):
            torch._dynamo.mark_dynamic(marked, dim)
    return marked


def _describe(kind: Tensor) -> tuple[Any, ...]:
    """What compiled code takes for granted about an argument; a batch's size is a symbol."""
    return (str(tuple(kind.shape)), kind.dtype, kind.device, kind.layout)


def _drop_unused_arguments(graph: GraphModule) -> list[int]:
    """Removes them from the graph; returns the positions of the others."""
    # A tensor that the graph does not read would be guarded, and copied for a replay, for nothing.
    used = []
    for index, node in enumerate(graph.graph.find_nodes(op="placeholder")):
        if node.users:
            used.append(index)
        else:
            graph.graph.erase_node(node)
    graph.recompile()
    return used


def _lift_constants(graph: GraphModule) -> list[Tensor]:
    """Turns the tensors that the function found elsewhere into arguments, behind the others."""
    # Buffers of the loss, say. As constants they would make the graphs of two agents differ, and a
    # schedule that writes to them would not be seen.
    constants: dict[str, Tensor] = {}
    placeholders: dict[str, Node] = {}
    last = graph.graph.find_nodes(op="placeholder")[-1]
    for node in graph.graph.find_nodes(op="get_attr"):
        if node.target not in constants:
            constants[node.target] = getattr(graph, node.target)
            with graph.graph.inserting_after(last):
                last = placeholders[node.target] = graph.graph.placeholder(node.target)
            last.meta = dict(node.meta)
        node.replace_all_uses_with(placeholders[node.target])
        graph.graph.erase_node(node)
    for name in constants:
        delattr(graph, name)
    graph.recompile()
    return list(constants.values())


def trace(
    function: TensorFunction, tensors: Sequence[Tensor], batched: Sequence[bool]
) -> GraphModule:
    """The graph of the tensor operations of a function, whatever Python it is written in.

    Args:
        function (callable): from a list of tensors to a tuple of tensors.
        tensors (sequence of Tensor): arguments; only their types and shapes are looked at.
        batched (sequence of bool): which of them have a first dimension of any size.

    Returns:
        a module that takes the tensors as its arguments, one by one.

    Raises:
        ValueError: if what the function does depends on the number of items.

    Example:
        >>> import torch
        >>> from torchrl_happo.steps.compile.graphs import trace
        >>> graph = trace(
        ...     lambda tensors: (tensors[0] + tensors[1],), [torch.ones(2)] * 2, [True] * 2
        ... )
        >>> [node.op for node in graph.graph.nodes]
        ['placeholder', 'placeholder', 'call_function', 'output']
    """
    # Heavy, and only needed by those who compile.
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        ShapeEnv,
        StatelessSymbolicContext,
    )

    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)

    def symbolic(tensor: Tensor, is_batched: bool) -> Tensor:
        sizes = [DimDynamic.STATIC] * tensor.ndim
        if is_batched:
            sizes[0] = DimDynamic.DUCK  # one symbol for all, as they have the same size
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(tensor.detach(), symbolic_context=context)

    def flat(*arguments: Tensor) -> tuple[Tensor, ...]:
        return function(arguments)

    arguments = [symbolic(t, b) for t, b in zip(tensors, batched, strict=True)]
    with torch.no_grad(), _compiling():
        graph = make_fx(flat, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*arguments)
    if shapes.guards:
        raise ValueError(f"its code depends on the number of items: {shapes.guards[0].expr}")
    graph.graph.eliminate_dead_code()
    return graph


@contextmanager
def _compiling() -> Iterator[None]:
    """Lets code know that it is compiled, as :func:`torch.export.export` does.

    Distributions, for one, then leave out checks that read numbers.
    """
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before
