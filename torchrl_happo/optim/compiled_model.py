"""The local model of a trust-region step, and the trial of a step, as compiled functions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.distributions import Distribution

from torchrl_happo.distributions import kl_divergence
from torchrl_happo.optim.flat import (
    data_keys,
    data_layout,
    data_of,
    network_tensors,
    network_with,
    settings,
)
from torchrl_happo.optim.graphs import GraphCompiler, TensorFunction, split, trace
from torchrl_happo.optim.line_search import Evaluate
from torchrl_happo.optim.linearize import linearizable
from torchrl_happo.optim.natural_gradient import (
    fisher_vector_product,
    flatten,
    gradient,
    unflatten,
)
from torchrl_happo.optim.trust_region import LocalModel, mean_divergence

__all__ = ["CompiledModel"]


class Compilable(Protocol):
    """A trust-region step, as far as it is compiled."""

    distribution: Callable[[Mapping[str, Tensor], TensorDictBase], Distribution]
    surrogate: Callable[[Distribution, TensorDictBase], Tensor]
    named_parameters: Callable[[], Iterable[tuple[str, nn.Parameter]]]
    valid_key: str
    sample_shape: Callable[[TensorDictBase], torch.Size]


class _Functions(NamedTuple):
    """What is compiled for one layout of the data.

    Each takes a list: the networks' tensors, a vector, the data, perhaps the Fisher matrix's rows.

    Attributes:
        at_point (callable): surrogate, gradient, and what the Fisher-vector product needs besides.
        product (callable): the product with a vector, which also takes what was needed.
        trial (callable): surrogate and divergence at a vector of parameters.
    """

    at_point: TensorFunction
    product: TensorFunction
    trial: TensorFunction


class CompiledModel:
    r"""What :class:`~torchrl_happo.optim.TrustRegionStep` asks of the policy, compiled.

    The network is linearised by cutting a graph in two. The graph of surrogate, gradient and
    :math:`F v` is traced for a symbolic :math:`v`; what does not depend on :math:`v` is computed
    once for a batch, the rest at each iteration of conjugate gradient.

    Args:
        step (TrustRegionStep): the step.

    Keyword Args:
        networks (sequence of nn.Module): the modules whose parameters and buffers the policy reads.
        owner (nn.Module, optional): a module whose own settings the surrogate reads.
        compiler (GraphCompiler): shared by the agents of a team.
        template (nn.Module, optional): stands for the code of the policy: steps with the same
            template are the same but for their tensors. Defaults to ``None``: no other is.
    """

    def __init__(
        self,
        step: Compilable,
        *,
        networks: Sequence[nn.Module],
        owner: nn.Module | None,
        compiler: GraphCompiler,
        template: nn.Module | None = None,
    ) -> None:
        self.step = step
        self.networks = nn.ModuleList(networks)
        self.owner = owner
        self.compiler = compiler
        self.template = self.networks if template is None else template

    def at(
        self, theta: Tensor, data: TensorDictBase, rows: Tensor | None
    ) -> tuple[LocalModel, Evaluate]:
        """The policy near its present parameters, and the trial of others.

        Args:
            theta (Tensor): the trainable parameters as a vector.
            data (TensorDictBase): the batch.
            rows (Tensor, optional): rows that the Fisher matrix is averaged over. ``None``: all.

        Returns:
            the local model, and a callable from a vector of parameters to the surrogate and the
            mean divergence from the present policy.
        """
        networks = [tensor.detach() for tensor in network_tensors(self.networks)]
        batch = [data.get(key) for key in data_keys(data)]
        if rows is not None:
            batch.append(rows)
        functions = self.compiler.remember(
            (rows is None, *self._key(data)),
            lambda: self._compile(data, theta, networks, batch, has_rows=rows is not None),
        )
        at_point, product, trial = (self.compiler.bind(f, networks) for f in functions)
        surrogate, slope, *saved = at_point([theta, *batch])

        def fisher_product(vector: Tensor) -> Tensor:
            return product([vector, *batch, *saved])[0]

        def evaluate(flat: Tensor) -> tuple[Tensor, Tensor]:
            surrogate, kl = trial([flat, *batch])
            return surrogate, kl

        counts = [self._num_samples(part) for part in (data, data if rows is None else data[rows])]
        return LocalModel(surrogate, slope, fisher_product, *counts), evaluate

    def _num_samples(self, data: TensorDictBase) -> Tensor | float:
        valid, _ = self._samples(data)
        return float(self.step.sample_shape(data).numel()) if valid is None else valid.sum()

    def _key(self, data: TensorDictBase) -> tuple[Hashable, ...]:
        owner: list[nn.Module] = [] if self.owner is None else [self.owner]
        return self.template, data_layout(data), settings([*self.networks.modules(), *owner])

    def _compile(
        self,
        like: TensorDictBase,
        theta: Tensor,
        networks: Sequence[Tensor],
        batch: Sequence[Tensor],
        *,
        has_rows: bool,
    ) -> _Functions:
        """Traces and compiles, and calls each function once, so that what fails fails here."""
        own = {id(tensor): place for place, tensor in enumerate(network_tensors(self.networks))}
        named = dict(self.step.named_parameters())
        trained = {name: own[id(p)] for name, p in named.items() if p.requires_grad}

        def unpack(
            tensors: Sequence[Tensor],
        ) -> tuple[list[Tensor], Tensor, TensorDictBase, Tensor | None]:
            parts, (vector, *rest) = list(tensors[: len(own)]), tensors[len(own) :]
            rows = rest.pop() if has_rows else None
            return parts, vector, data_of(rest, like), rows

        def local(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            parts, vector, data, rows = unpack(tensors)
            leaves = {name: parts[i].detach().requires_grad_() for name, i in trained.items()}
            valid, batch_ndim = self._samples(data)
            with torch.enable_grad(), network_with(self.networks, parts), linearizable():
                old = self.step.distribution(leaves, data)
                surrogate = self.step.surrogate(old, data)
                sample = old if rows is None else self.step.distribution(leaves, data[rows])
            slope = flatten(gradient([surrogate], leaves.values()))
            counted = valid if valid is None or rows is None else valid[rows]
            fisher = fisher_vector_product(sample, leaves, valid=counted, batch_ndim=batch_ndim)
            return surrogate.detach(), slope, fisher(vector)

        def trial(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            parts, flat, data, _ = unpack(tensors)
            present = {name: parts[i] for name, i in trained.items()}
            valid, batch_ndim = self._samples(data)
            with network_with(self.networks, parts):
                old = self.step.distribution(present, data)
                new = self.step.distribution(unflatten(flat, present), data)
            kl = kl_divergence(old, new, batch_ndim=batch_ndim)
            return self.step.surrogate(new, data), mean_divergence(kl, valid)

        tensors = [*networks, theta, *batch]
        batched = [False] * (len(networks) + 1) + [True] * len(batch)
        graph = trace(local, tensors, batched)
        once, each_time = split(graph, argument=len(networks), outputs=2)
        functions = _Functions(
            self.compiler.compile_graph(once),
            self.compiler.compile_graph(each_time),
            self.compiler.compile_graph(trace(trial, tensors, batched)),
        )
        _, _, *saved = functions.at_point(tensors)
        functions.product([*tensors, *saved])
        functions.trial(tensors)
        return functions

    def _samples(self, data: TensorDictBase) -> tuple[Tensor | None, int]:
        """Which entries count, and how many leading dimensions they have."""
        return data.get(self.step.valid_key, None), len(self.step.sample_shape(data))
