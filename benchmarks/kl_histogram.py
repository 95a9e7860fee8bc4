"""How much of the trust region HATRPO's accepted steps use.

    python benchmarks/learning.py run vmas --algorithms hatrpo --seeds 0
    python benchmarks/kl_histogram.py

Reads the metrics of the HATRPO runs under ``benchmarks/runs`` and writes, to
``benchmarks/results/kl_histogram.{csv,png}``, the histogram of the mean divergence of each agent's
accepted step over the bound, after the first ten iterations.
"""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib as mpl
import numpy as np

HERE = Path(__file__).parent
MAX_KL, FIRST_ITERATIONS = 0.01, 10


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


def main() -> None:
    """Writes the table and the figure, and prints a line for each task."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    runs = sorted((HERE / "runs").glob("vmas/*/hatrpo/seed_*/metrics.csv"))
    tasks = list(dict.fromkeys(path.parts[-4] for path in runs))
    edges = np.linspace(0, 1, 21)
    fig, axes = plt.subplots(1, len(tasks), figsize=(2.6 * len(tasks), 2.4), sharey=True)
    rows = []
    for ax, task in zip(np.atleast_1d(axes), tasks, strict=True):
        parts = [accepted_steps(path) for path in runs if path.parts[-4] == task]
        share = np.concatenate([kls for kls, _ in parts]) / MAX_KL
        tried = sum(count for _, count in parts)
        counts, _ = np.histogram(share, edges)
        ax.stairs(counts / counts.sum(), edges, fill=True, alpha=0.7)
        ax.axvline(share.mean(), color="C1", lw=1.5)
        ax.set_title(f"{task}: mean {share.mean():.2f}", fontsize=9)
        ax.set_xlabel("divergence / max_kl", fontsize=8)
        ax.tick_params(labelsize=8)
        rows += [[task, f"{low:.2f}", count] for low, count in zip(edges, counts, strict=False)]
        print(
            f"{task}: {len(share)} of {tried} steps accepted, mean divergence "
            f"{share.mean():.3f} of max_kl, 5 % to 95 %: "
            f"{np.quantile(share, 0.05):.2f} to {np.quantile(share, 0.95):.2f}"
        )
    np.atleast_1d(axes)[0].set_ylabel("share of accepted steps", fontsize=8)
    fig.tight_layout()
    fig.savefig(HERE / "results" / "kl_histogram.png", dpi=110)
    with (HERE / "results" / "kl_histogram.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["task", "share_of_max_kl_from", "steps"])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
