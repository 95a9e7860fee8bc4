"""How much of the trust region HATRPO's accepted steps use.

    python benchmarks/learning.py run vmas --algorithms hatrpo --seeds 0
    python benchmarks/kl_histogram.py
    python benchmarks/kl_histogram.py --report-only     # the figure from the committed CSV

Reads the metrics of the HATRPO runs under ``benchmarks/runs`` and writes, to
``benchmarks/results/kl_histogram.{csv,png}``, the histogram of the mean divergence of each agent's
accepted step over the bound, after the first ten iterations.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib as mpl
import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "kl_histogram.csv"
MAX_KL, FIRST_ITERATIONS = 0.01, 10
EDGES = np.linspace(0, 1, 21)


def accepted_steps(path: Path) -> tuple[np.ndarray, int]:
    """Divergences of the accepted steps of all agents, and how many steps were tried."""
    kls, tried = [], 0
    with path.open() as file:
        for row in csv.DictReader(file):
            if int(row["iteration"]) <= FIRST_ITERATIONS:
                continue
            for key, value in row.items():
                if not key.endswith("/line_search_success"):
                    continue
                tried += 1
                if float(value) == 1:
                    kls.append(float(row[key.replace("line_search_success", "kl")]))
    return np.array(kls), tried


def record(paths: list[Path]) -> None:
    """Writes the histogram of each task, and prints a line about it."""
    rows = []
    for task in dict.fromkeys(path.parts[-4] for path in paths):
        parts = [accepted_steps(path) for path in paths if path.parts[-4] == task]
        share = np.concatenate([kls for kls, _ in parts]) / MAX_KL
        counts, _ = np.histogram(share, EDGES)
        rows += [[task, f"{low:.2f}", count] for low, count in zip(EDGES, counts, strict=False)]
        tried = sum(count for _, count in parts)
        low, high = np.quantile(share, [0.05, 0.95])
        print(
            f"{task}: {len(share)} of {tried} steps accepted, mean divergence "
            f"{share.mean():.3f} of max_kl, 5 % to 95 %: {low:.2f} to {high:.2f}"
        )
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["task", "share_of_max_kl_from", "steps"])
        writer.writerows(rows)


def draw() -> None:
    """Draws the histograms; their means are those of the bins."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with RESULTS.open() as file:
        rows = list(csv.DictReader(file))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    fig, axes = plt.subplots(1, len(tasks), figsize=(2.6 * len(tasks), 2.4), sharey=True)
    for ax, task in zip(np.atleast_1d(axes), tasks, strict=True):
        counts = np.array([int(row["steps"]) for row in rows if row["task"] == task])
        mean = np.average((EDGES[:-1] + EDGES[1:]) / 2, weights=counts)
        ax.stairs(counts / counts.sum(), EDGES, fill=True, alpha=0.7)
        ax.axvline(mean, color="C1", lw=1.5)
        ax.set_title(f"{task}: mean {mean:.2f}", fontsize=9)
        ax.set_xlabel("divergence / max_kl", fontsize=8)
        ax.tick_params(labelsize=8)
    np.atleast_1d(axes)[0].set_ylabel("share of accepted steps", fontsize=8)
    fig.tight_layout()
    fig.savefig(RESULTS.with_suffix(".png"), dpi=110)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report-only", action="store_true", help="draw the CSV that is there")
    parser.add_argument("--runs", type=Path, default=HERE / "runs", help="where the runs lie")
    args = parser.parse_args()
    if not args.report_only:
        paths = sorted(args.runs.glob("vmas/vmas/*/hatrpo/seed_*/metrics.csv"))
        if not paths:
            parser.error(f"there are no runs of HATRPO in {args.runs}: learning.py run vmas")
        record(paths)
    draw()


if __name__ == "__main__":
    main()
