"""Functions of weights, state and data, compiled once for all agents of one architecture."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictParams
from torch import Tensor, nn
from torch.func import functional_call

from torchrl_happo.arguments import first_line
from torchrl_happo.steps.compile.cuda_graphs import Function, GraphPool, GraphReplays
from torchrl_happo.steps.compile.layout import Layout
from torchrl_happo.transaction import restored_slots

__all__ = ["Code", "Compiler", "Function", "make_compiler"]

logger = logging.getLogger(__name__)

_LIBRARIES = ("torch", "__builtins_dict__", "__import_torch", "__import_tensordict")
_MADE_FOR = ("layout", "result", "settings", "trained")
#: How the names of guards begin that need not be asked.
_CONSTANT = (*(f"G['{name}" for name in _LIBRARIES), *(f"L['{name}'" for name in _MADE_FOR))


class Compiler:
    """Holds what a team's steps share: compiled functions, the memory of graphs, complaints.

    Args:
        options (mapping, optional): keyword arguments of :func:`torch.compile`; with its default
            backend random numbers equal eager torch's. ``None``: functions run as they are.
        cudagraphs (bool): whether functions are replayed from CUDA graphs. Defaults to ``False``.
    """

    def __init__(self, options: Mapping[str, Any] | None, *, cudagraphs: bool = False) -> None:
        self.options = None if options is None else {"backend": "inductor", **options}
        if self.options and self.options["backend"] == "inductor" and "mode" not in self.options:
            chosen = self.options.get("options", {})
            self.options["options"] = {"fallback_random": True, **chosen}
        self.pool = GraphPool() if cudagraphs else None
        self.functions: dict[Hashable, Function] = {}
        self.complaints: set[str] = set()  # why something was not compiled

    def compile(self, function: Function, network: nn.Module | None) -> Function:
        """Compile a function that is to be called without gradients.

        Args:
            function (callable): a :data:`Function`. The number of items may be another at each
                call, but at least 2.
            network (nn.Module, optional): is read with its own tensors in place.
        """
        options = self.options
        if options is None:
            return torch.no_grad()(function)
        # All such functions are made by the same few lines, and torch counts by line: isolated,
        # they do not count as one. Not dynamic but where it is marked: torch would take a number
        # that differs between two functions for one that changes at each call.
        settings: dict[str, Any] = {"fullgraph": True, "isolate_recompiles": True}
        settings |= {"dynamic": False, **options}
        if "mode" not in settings:
            settings["options"] = {"guard_filter_fn": _may_change, **settings.get("options", {})}
        compiled = torch.compile(function, **settings)
        tracing = torch._dynamo.config.patch(trace_autograd_ops=True)

        def call(*arguments: Any) -> tuple[Any, ...]:
            *fixed, items = arguments
            items = [tensor.detach() for tensor in items]  # a mark stays off the caller's tensors
            for tensor in items:
                torch._dynamo.mark_dynamic(tensor, 0)
            # Code from dynamo leaves a stack of networks with other tensors than its own.
            slots = nullcontext() if network is None else restored_slots([network])
            with slots, torch.no_grad(), tracing:
                return compiled(*fixed, items)

        return call


def _may_change(guards: Sequence[Any]) -> list[bool]:
    """Say which of the conditions that compiled code was made under are asked at each call.

    Modules, their settings and tensors may change between two calls. The names that a library
    defines do not, nor does what a function is made for, which tells it apart from others. To ask
    for these takes half of the time.
    """
    return [not guard.name.startswith(_CONSTANT) for guard in guards]


class Code:
    """The network that an inner step reads, and the compiled functions of it.

    Where agents have the code of one template, the network of the first one is called with the
    weights of each. All else is read with its own tensors in place, as are stacked networks, which
    keep them in a tensordict.

    Args:
        compiler (Compiler): shared by the agents of a team.
        network (nn.Module): the network whose weights are arguments of what is compiled.

    Keyword Args:
        template (callable, optional): returns what stands for the code, as of now; where it is the
            same, only tensors differ. Defaults to ``None``: no other step's code is like this.
    """

    def __init__(
        self,
        compiler: Compiler,
        network: nn.Module,
        *,
        template: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.compiler = compiler
        self.network = network
        self.is_stacked = any(isinstance(module, TensorDictParams) for module in network.modules())
        self.template = None if self.is_stacked else template
        self.replays = None if compiler.pool is None else GraphReplays(compiler.pool)
        self.is_given_up = False
        self._results: dict[Hashable, Layout] = {}

    def weights(self) -> dict[str, Tensor]:
        """Return the tensors of the network by name, as compiled code takes them."""
        if self.template is None:
            return dict(self.network.named_parameters())
        # Not the parameters themselves: the first agent's would be compiled for it alone.
        network = self.network
        named = [*network.named_parameters(), *network.named_buffers()]
        return {name: t.detach().requires_grad_(t.requires_grad) for name, t in named}

    def reading(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of weights (:meth:`weights`), and of what ``function`` takes."""
        if self.template is None:
            return lambda weights, *args: function(*args)
        module = _Reader(self.network, function)

        def read(weights: Mapping[str, Tensor], *args: Any) -> Any:
            named = {f"network.{name}": weight for name, weight in weights.items()}
            return functional_call(module, named, args)

        return read

    def bind(
        self, key: Hashable, make: Callable[[], Function], *fixed: Any
    ) -> Callable[[Sequence[Tensor]], tuple[Any, ...]]:
        """Return a compiled function of items alone.

        Args:
            key (Hashable): tells functions of one code apart.
            make (callable): returns the function.
            *fixed: its first arguments, tensors that stay where they are in memory.
        """
        compiler = self.compiler
        owner = self if self.template is None else self.template()
        if (owner, key) not in compiler.functions:
            network = self.network if self.template is None else None
            compiler.functions[owner, key] = compiler.compile(make(), network)
        function = compiler.functions[owner, key]
        if self.replays is None:
            return partial(function, *fixed)
        return self.replays.bind(function, fixed)

    def settle(self, items: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return items as several bound functions will read them: copied once, if at all."""
        return items if self.replays is None else self.replays.settle(items)

    def run(self, function: partial[TensorDictBase], data: TensorDictBase) -> TensorDictBase:
        """Call a function that reads the network and the data, without gradients.

        Data of a layout that was not seen before is left to Python, whose errors say more.

        Args:
            function (partial): from data to a tensordict. Its ``func`` stands for its code.
            data (TensorDictBase): items along the first dimension. Not modified.

        Returns:
            what the function returns: items again, or tensors by name without a batch dimension.
        """
        layout = Layout.of(data)
        key = (function.func, layout)
        if self.is_given_up or len(data) < 2 or key not in self._results:
            returned = function(data)
            self._results[key] = Layout.of(returned)
            return returned
        result = self._results[key]

        def make() -> Function:
            read = self.reading(function)

            def of_tensors(
                weights: Mapping[str, Tensor], tensors: Sequence[Tensor]
            ) -> tuple[Tensor, ...]:
                return tuple(result.tensors(read(weights, layout.fill(tensors))))

            return of_tensors

        try:
            # Of one memory layout: code would be compiled anew for another.
            batch = [tensor.contiguous() for tensor in layout.tensors(data)]
            return result.fill(self.bind(key, make, self.weights())(batch))
        except Exception as error:
            self.give_up(error)
            return function(data)

    def give_up(self, error: Exception) -> None:
        """Leave the code as it is, uncompiled, and say why, once for all of a team."""
        self.is_given_up = True
        why = first_line(error)
        if why not in self.compiler.complaints:
            self.compiler.complaints.add(why)
            logger.warning("A step is not compiled, and slower than it could be: %s", why)


class _Reader(nn.Module):
    """A function as the forward pass of the network that it reads."""

    def __init__(self, network: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.network = network
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def make_compiler(
    compile: bool | Mapping[str, Any], cudagraphs: bool, device: torch.device
) -> Compiler | None:
    """Return the compiler that an updater was asked for.

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
    options = {} if compile is True else None if compile is False else compile
    return Compiler(options, cudagraphs=cudagraphs)
