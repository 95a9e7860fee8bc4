"""Whether the compiler earns its lines: eager, the library's compiler, and plain ``torch.compile``.

    python benchmarks/compiler.py --json benchmarks/results/compiler.json
    python benchmarks/compiler.py --report-only --json benchmarks/results/compiler.json

The contestants make the same update of HAPPO, one batch, five epochs, a critic:

- ``eager``: ``SequentialUpdater``;
- ``stack``: ``SequentialUpdater(compile=True)``;
- ``plain``: ``torch.compile`` of one function of (weights, optimiser state, data), written below.
  It calls the loss of the first agent of an architecture with another agent's weights
  (``functional_call``), differentiates, clips, and makes the step of Adam; the policy's passes
  before and after the step are compiled in the same way.

Each cell reports the seconds of the first three calls (which compile), the median of later calls,
in turn, and the graphs that were compiled, at the first batch and when the number of samples, the
order and the learning rate have changed. Figures are process times of one thread on the CPU. A cell
in the same process as another may find code of that other one: for first calls run them one by one.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.func import functional_call
from torch.optim.adam import adam
from update_cost import make_batch, make_team, sequential

from torchrl_happo import HAPPOLoss, SequentialUpdater
from torchrl_happo.steps.compile.flat import Layout
from torchrl_happo.transaction import restored_slots

CONTESTANTS = ["eager", "stack", "plain"]
CELLS = [(3, 400), (3, 4000), (32, 400), (32, 4000)]
TRACING = {"trace_autograd_ops": True}


class Call(nn.Module):
    """A function as the forward pass of the networks that it reads, for ``functional_call``."""

    def __init__(self, network: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.network = network
        self.function = function

    def forward(self, data: TensorDictBase) -> Any:
        """The function's result."""
        return self.function(data)


class Compiled:
    """A function of weights and data, compiled for any number of items."""

    def __init__(self, function: Callable[..., Any], network: nn.Module | None = None) -> None:
        self.networks = [] if network is None else [network]
        self.layout: Layout | None = None
        self.function = function
        self.run = torch.compile(self.flat, fullgraph=True, options={"fallback_random": True})

    def flat(self, tensors: list[Tensor], *args: Any) -> Any:
        """The function of the data's tensors: a tensordict has a batch size that is no symbol."""
        return self.function(*args, self.layout.fill(tensors))

    def __call__(self, *args: Any) -> Any:
        """Call it without gradients; the last argument is the data."""
        *args, data = args
        is_first, self.layout = self.layout is None, self.layout or Layout.of(data)
        tensors = [tensor.detach() for tensor in self.layout.tensors(data)]
        for tensor in tensors if is_first else ():
            torch._dynamo.mark_dynamic(tensor, 0)
        # Traced by dynamo, a MultiAgentMLP is left with other tensors than its own.
        slots = restored_slots(self.networks)
        with slots, torch.no_grad(), torch._dynamo.config.patch(TRACING):
            return self.run(tensors, *args)


class PlainStep:
    """A first-order step with Adam as one compiled function of weights, moments, rate and data."""

    functions: dict[Any, Callable[..., Any]]

    def __init__(self, step: Any, network: nn.Module, key: Any, functions: dict) -> None:
        self.step, self.functions, self.key = step, functions, key
        self.network = network

    def make(self) -> Callable[..., Any]:
        """The compiled function."""
        step, (group,) = self.step, self.step.optimizer.param_groups
        module = Call(self.network, step.objective)
        names = [f"network.{name}" for name, _ in self.network.named_parameters()]
        own = self.key is None

        def update(weights: list, moments: list, rate: Tensor, data: TensorDictBase) -> tuple:
            with torch.enable_grad():
                swapped = dict(zip(names, weights, strict=True))
                loss = step.objective(data) if own else functional_call(module, swapped, (data,))
                gradients = torch.autograd.grad(loss, weights)
            norm = nn.utils.get_total_norm(gradients)
            scale = (step.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            adam(
                [weight.detach() for weight in weights],
                [scale * gradient for gradient in gradients],
                [own["exp_avg"] for own in moments],
                [own["exp_avg_sq"] for own in moments],
                [],
                [own["step"] for own in moments],
                foreach=False,
                fused=False,
                differentiable=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=rate,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            return loss.detach(), norm

        return Compiled(update, self.network if own else None)

    def begin(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """As the library's compiled step."""
        optimizer, weights = self.step.optimizer, self.step.parameters()
        if not optimizer.state:
            return self.step.step
        moments = [dict(optimizer.state[weight]) for weight in weights]
        if self.key is not None:  # other objects than the network's own, or all would compile twice
            weights = [weight.detach().requires_grad_() for weight in weights]
        rate = torch.tensor(optimizer.param_groups[0]["lr"])
        key = id(self) if self.key is None else self.key
        if key not in self.functions:
            self.functions[key] = self.make()
        function = self.functions[key]

        def step(data: TensorDictBase, weight: object) -> tuple[Tensor, Tensor]:
            return function(weights, moments, rate, data)

        return step


class PlainPasses:
    """The passes of a policy before and after its step, compiled once for an architecture."""

    def __init__(self, network: nn.Module, key: Any, functions: dict) -> None:
        self.network, self.key, self.functions = network, key, functions
        self.seen: set = set()

    def run(self, function: partial, data: TensorDictBase) -> TensorDictBase:
        """As the library's compiled passes."""
        if function.func not in self.seen:  # the first batch runs as it is, as with the library
            self.seen.add(function.func)
            return function(data)
        key = (self.key, function.func)
        if key not in self.functions:
            module = Call(self.network, function)
            self.functions[key] = Compiled(
                lambda weights, data: functional_call(module, weights, (data,))
            )
        named = self.network.named_parameters()
        weights = {f"network.{name}": weight.detach() for name, weight in named}
        return self.functions[key](weights, data)


def plain(updater: SequentialUpdater) -> SequentialUpdater:
    """Put plainly compiled steps and passes in the place of the library's."""
    functions: dict = {}
    for agent in updater.loss.agents:
        step = updater.steps[agent.name]
        step._compiled = PlainStep(step, agent.actor, ("step", id(agent.template)), functions)
        passes = PlainPasses(agent.actor, id(agent.template), functions)
        updater._passes[agent.name].code = passes
    critic = updater.steps["critic"]
    critic._compiled = PlainStep(critic, updater.loss.critic_network, None, functions)
    return updater


def cell(n_agents: int, samples: int, repetitions: int) -> dict[str, Any]:
    """Time the contestants in one cell."""
    actor, _ = make_team(n_agents, 128, False, "cpu")
    batch = make_batch(actor, samples, n_agents, "cpu")
    other = make_batch(actor, samples // 2, n_agents, "cpu")
    updaters, row = {}, {"agents": n_agents, "samples": samples, "contestants": {}}
    for name in CONTESTANTS:
        torch.manual_seed(0)
        options = {"updater": {"compile": True}} if name == "stack" else {}
        updater = sequential(HAPPOLoss, None, *make_team(n_agents, 128, False, "cpu"), **options)
        updaters[name] = plain(updater) if name == "plain" else updater
        counters.clear()  # not the compiler: what has been compiled stays
        start = time.process_time()
        for _ in range(3):
            updater(batch)
        first, graphs = time.process_time() - start, counters["stats"]["unique_graphs"]
        for step in updater.steps.values():
            step.optimizer.param_groups[0]["lr"] *= 0.9
        for _ in range(2):
            updater(other)
        again = counters["stats"]["unique_graphs"] - graphs
        row["contestants"][name] = {"first": first, "graphs": graphs, "again": again, "ms": []}
        print(
            f"  {name:<6} {first:7.1f} s for the first calls, {graphs} graphs, {again} more later"
        )
    for _ in range(repetitions):
        for name, updater in updaters.items():
            start = time.process_time()
            updater(batch)
            row["contestants"][name]["ms"].append(1e3 * (time.process_time() - start))
    return row


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table and what decides."""
    print("| agents | samples | " + " | ".join(CONTESTANTS) + " | stack / plain |")
    print("|---" * (3 + len(CONTESTANTS)) + "|")
    ratios = []
    for row in rows:
        ms = {name: statistics.median(row["contestants"][name]["ms"]) for name in CONTESTANTS}
        ratios.append(ms["stack"] / ms["plain"])
        times = " | ".join(f"{ms[name]:.1f} ms" for name in CONTESTANTS)
        print(f"| {row['agents']} | {row['samples']} | {times} | {ratios[-1]:.2f} |")
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    print(f"geometric mean of stack / plain: {mean:.3f}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--cells", type=int, nargs="+", default=list(range(len(CELLS))))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(args.json.read_text())["rows"] if args.report_only else []
    for index in () if args.report_only else args.cells:
        print("{} agents, {} samples".format(*CELLS[index]), flush=True)
        rows.append(cell(*CELLS[index], args.repetitions))
    report(rows)
    if args.json and not args.report_only:
        about = {"torch": torch.__version__, "threads": 1, "device": "cpu"}
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
