"""A graph cut in parts: what is computed once, and what again for each value of an argument.

A trust region multiplies a vector by the Fisher matrix ten times for one batch, and tries a few
parameters. Traced as one function, these share the present policy's forward pass; cut, they compute
it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

__all__ = ["split"]


def split(
    graph: GraphModule, *, arguments: Sequence[int], outputs: Sequence[int]
) -> list[GraphModule]:
    """Cuts a graph into what depends on none of some arguments, and what depends on each.

    Args:
        graph (GraphModule): of :func:`trace`.

    Keyword Args:
        arguments (sequence of int): positions of the arguments.
        outputs (sequence of int): number of outputs that depend on none of them, which come first;
            then, for each argument, number of those that depend on no other.

    Returns:
        a graph from the same arguments to the first outputs and all tensors that the rest needs;
        then, for each argument, one from all arguments and these tensors to its outputs.

    Raises:
        ValueError: if an output depends on another of the arguments.

    Example:
        >>> import torch
        >>> from torchrl_happo.steps.compile.cut import split
    >>> from torchrl_happo.steps.compile.graphs import trace
        >>> def function(tensors):
        ...     x, y = tensors
        ...     z = y.sin()
        ...     return z.sum(), x * z
        >>> graph = trace(function, [torch.ones(2), torch.ones(2)], [False, False])
        >>> once, each_time = split(graph, arguments=[0], outputs=[1, 1])
        >>> total, z = once(torch.ones(2), torch.zeros(2))
        >>> each_time(torch.ones(2), torch.zeros(2), z)
        (tensor([0., 0.]),)
    """
    # An argument divides the graph: nodes that depend on it are computed again for each of its
    # values, all others once. The second part needs the frontier, the values that its nodes read
    # from the first: these are saved, as autograd saves activations for a backward pass.
    nodes = list(graph.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    returned = iter(nodes[-1].args[0])
    first, *rest = [list(islice(returned, number)) for number in outputs]
    dependent = [_dependent(nodes, placeholders[position]) for position in arguments]
    for position, nodes_again in zip(arguments, dependent, strict=True):
        others = [own for own, at in zip(rest, arguments, strict=True) if at != position]
        if nodes_again.intersection(sum(others, first)):
            raise ValueError(f"an output that should not depends on argument {position}")

    again = set().union(*dependent)
    saved: dict[Node, None] = {}

    def visit(node: Node) -> None:
        """Finds what to save: tensors that cost something, the last ones before the rest."""
        if node in again or _is_free(node):
            for parent in node.all_input_nodes:
                visit(parent)
        elif node.op != "placeholder":
            saved[node] = None

    # From the end: of a chain of views and casts the last tensor that costs something is saved.
    for node in reversed(nodes):
        if node in again and node.op == "call_function":
            visit(node)
    once = _extract(graph, placeholders, [*first, *saved])
    return [once, *(_extract(graph, [*placeholders, *saved], own) for own in rest)]


def _dependent(nodes: Sequence[Node], argument: Node) -> set[Node]:
    """Everything that must be computed again when an argument changes."""
    dependent: set[Node] = set()
    again = {argument}
    while not again <= dependent:
        dependent |= again
        for node in nodes:
            if dependent.intersection(node.all_input_nodes):
                dependent.add(node)
        # What is written to in place must be there anew each time.
        again = {node.all_input_nodes[0] for node in dependent if _writes(node)}
    return dependent


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _is_free(node: Node) -> bool:
    """Whether a node costs nothing: sizes, constants, views."""
    if node.op == "placeholder":
        return False
    is_tensor = isinstance(node.meta.get("val"), Tensor)
    return node.op == "get_attr" or not is_tensor or getattr(node.target, "is_view", False)


def _extract(graph: GraphModule, inputs: Sequence[Node], outputs: Sequence[Node]) -> GraphModule:
    """The part of a graph that leads from some nodes to others."""
    part = Graph()
    copies: dict[Node, Node] = {}
    for node in inputs:
        copies[node] = part.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    needed, stack = set(), list(outputs)
    while stack:
        node = stack.pop()
        if node not in needed and node not in copies:
            needed.add(node)
            stack += node.all_input_nodes
    for node in graph.graph.nodes:
        if node in needed:
            copies[node] = part.node_copy(node, lambda parent: copies[parent])
    part.output(tuple(copies[node] for node in outputs))
    return GraphModule(graph, part)
