"""Whether :func:`torch.compile` was really at work, for the tests."""

from __future__ import annotations

import torch
from torch._dynamo.utils import counters


class Backend:
    """A backend for :func:`torch.compile` that counts graphs and leaves them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


def num_graphs():
    """How many graphs any backend was given in this process since they were forgotten."""
    return counters["stats"]["unique_graphs"]


def forget_graphs():
    """Starts the count again, and the compiler as well."""
    torch._dynamo.reset()
    counters.clear()
