"""Time what ``compile=True`` gains, and what it costs before.

    python benchmarks/compiler.py --json compiler.json
    python benchmarks/compiler.py --report-only --json compiler.json

Makes the same update of HAPPO (one batch, five epochs, a critic) or, with ``--hatrpo``, of HATRPO,
eager and compiled. Each cell reports the seconds of the first three calls (which compile), the
median of later calls, in turn, and the graphs that were compiled, at the first batch and when the
number of samples, the order and the learning rate have changed. Figures are process times of one
thread on the CPU. A cell in the same process as another may find code of that other one: for first
calls run them one by one.

``results/compiler.json`` is older, and decided how the library compiles: ``stack`` is a compiler
that it had of its own, ``plain`` the ``torch.compile`` of one function that took its place.
``--report-only`` prints that file as well.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from update_cost import Ours, make_batch, make_team, sequential

from torchrl_happo import HAPPOLoss, HATRPOLoss

CONTESTANTS = ["eager", "compiled"]
CELLS = [(3, 400), (3, 4000), (32, 400), (32, 4000)]


def cell(loss_class: type, n_agents: int, samples: int, repetitions: int) -> dict[str, Any]:
    """Time the contestants in one cell."""
    team = partial(make_team, n_agents, 128, False, "cpu")
    actor, _ = team()
    batch = make_batch(actor, samples, n_agents, "cpu")
    other = make_batch(actor, samples // 2, n_agents, "cpu")
    updates, row = {}, {"agents": n_agents, "samples": samples, "contestants": {}}
    for name in CONTESTANTS:
        torch.manual_seed(0)
        options = {"updater": {"compile": True}} if name == "compiled" else {}
        updater = sequential(loss_class, None, *team(), **options)
        updates[name] = Ours(updater, partial(updater, batch))
        counters.clear()  # not the compiler: what has been compiled stays
        start = time.process_time()
        for _ in range(3):
            updater(batch)
        first, graphs = time.process_time() - start, counters["stats"]["unique_graphs"]
        for step in updater.steps.values():
            for group in step.optimizer.param_groups if hasattr(step, "optimizer") else ():
                group["lr"] *= 0.9
        for _ in range(2):
            updater(other)
        again = counters["stats"]["unique_graphs"] - graphs
        row["contestants"][name] = {"first": first, "graphs": graphs, "again": again, "ms": []}
        print(f"  {name:<8} {first:7.1f} s for three calls, {graphs} graphs, {again} more later")
    for _ in range(repetitions):
        for name, update in updates.items():
            update.begin()
            start = time.process_time()
            update()
            row["contestants"][name]["ms"].append(1e3 * (time.process_time() - start))
    return row


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table: the last contestant, and the last but one over it."""
    names = list(rows[0]["contestants"])
    ratio = f"{names[-2]} / {names[-1]}"
    print(f"| agents | samples | {' | '.join(names)} | {ratio} |")
    print("|---" * (3 + len(names)) + "|")
    ratios = []
    for row in rows:
        ms = {name: statistics.median(row["contestants"][name]["ms"]) for name in names}
        ratios.append(ms[names[-2]] / ms[names[-1]])
        times = " | ".join(f"{ms[name]:.1f} ms" for name in names)
        print(f"| {row['agents']} | {row['samples']} | {times} | {ratios[-1]:.2f} |")
    print(f"geometric mean of {ratio}: {math.exp(statistics.fmean(map(math.log, ratios))):.3f}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hatrpo", action="store_true", help="a trust region in place of epochs")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--cells", type=int, nargs="+", default=list(range(len(CELLS))))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(args.json.read_text())["rows"] if args.report_only else []
    for index in () if args.report_only else args.cells:
        print("{} agents, {} samples".format(*CELLS[index]), flush=True)
        rows.append(cell(HATRPOLoss if args.hatrpo else HAPPOLoss, *CELLS[index], args.repetitions))
    report(rows)
    if args.json and not args.report_only:
        about = {"torch": torch.__version__, "threads": 1, "device": "cpu"}
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
