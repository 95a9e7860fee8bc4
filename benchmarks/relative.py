"""The claim in one figure: return relative to shared MAPPO, against the number of agents.

    python benchmarks/relative.py --plot benchmarks/results/relative.png

One panel shows this library's runs, from the committed CSVs: the mean return of HAPPO and HATRPO
over that of MAPPO with one network for all agents, at the most frames that both were evaluated at,
and a dot for each seed. The other shows the figures of the authors at 10M steps, read off the
curves in the README of their first code (https://github.com/cyanrain7/TRPO-in-MARL), to about 2 %
of their axes. A line joins the tasks of one robot.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path

from learning import runs_of
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from torchrl_happo.recipe.report import Run, common_frames

#: Suites whose runs count, and tasks by robot and number of agents.
SUITES = ("many_agents", "mujoco")
ROBOTS = {
    "HalfCheetah": {2: "mujoco/halfcheetah_2x3", 6: "mujoco/halfcheetah_6x1"},
    "Ant": {2: "mujoco/ant_2x4", 4: "mujoco/ant_4x2", 8: "mujoco/ant_8x1"},
}
BASELINE = "mappo"
COLORS = {"happo": "tab:blue", "hatrpo": "tab:orange"}
MARKERS = {"HalfCheetah": "o", "Ant": "s", "Walker2d": "^"}
#: HATRPO, HAPPO and MAPPO at 10M steps, by robot and number of agents.
PUBLISHED = {
    "HalfCheetah": {2: (5080, 4380, 3180), 3: (5050, 4400, 2700), 6: (4700, 4400, 2100)},
    "Ant": {2: (4500, 2050, 850), 4: (4350, 1950, 780), 8: (4650, 2300, 870)},
    "Walker2d": {2: (4500, 2950, 2870), 3: (3950, 3030, 2670), 6: (4430, 3850, 1930)},
}

#: By algorithm, robot and number of agents: a value a seed.
Ratios = Mapping[tuple[str, str, int], list[float]]


def ours() -> tuple[Ratios, list[str]]:
    """Return the ratios of this library's runs, and a row of a table for each."""
    runs = [run for suite in SUITES for run in runs_of(suite)]
    ratios: dict[tuple[str, str, int], list[float]] = {}
    rows = [
        "| task | agents | steps | algorithm | return | shared MAPPO | ratio |",
        "|" + "---|" * 7,
    ]
    for robot, tasks in ROBOTS.items():
        for n_agents, task in tasks.items():
            base = _of(runs, task, BASELINE)
            for algorithm in COLORS:
                own = _of(runs, task, algorithm)
                frames = max(common_frames([*base, *own])) if base and own else 0
                if not frames:
                    continue
                theirs = statistics.fmean(_returns(base, frames))
                returns = _returns(own, frames)
                mean = statistics.fmean(returns)
                ratios[algorithm, robot, n_agents] = [value / theirs for value in returns]
                rows.append(
                    f"| {task} | {n_agents} | {frames / 1e6:g}M | {algorithm} | {mean:.0f} "
                    f"({len(returns)} seed{'s' * (len(returns) > 1)}) | {theirs:.0f} "
                    f"({len(base)}) | {mean / theirs:.2f} |"
                )
    return ratios, rows


def published() -> Ratios:
    """Return the ratios of the authors' figures."""
    return {
        (algorithm, robot, n_agents): [value / baseline]
        for robot, tasks in PUBLISHED.items()
        for n_agents, (*values, baseline) in tasks.items()
        for algorithm, value in zip(("hatrpo", "happo"), values, strict=True)
    }


def _of(runs: list[Run], task: str, algorithm: str) -> list[Run]:
    return [run for run in runs if (run.task, run.label) == (task, algorithm)]


def _returns(runs: list[Run], frames: float) -> list[float]:
    return [row["return"] for run in runs if (row := run.at(frames)) is not None]


def draw(panels: Mapping[str, Ratios], target: Path) -> None:
    """Draw a panel for each source of ratios."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True)
    for ax, (title, ratios) in zip(axes, panels.items(), strict=True):
        ax.axhline(1, color="black", linewidth=1, linestyle=":")
        for algorithm, color in COLORS.items():
            for robot, marker in MARKERS.items():
                points = {n: v for (a, r, n), v in ratios.items() if (a, r) == (algorithm, robot)}
                if not points:
                    continue
                means = [statistics.fmean(values) for values in points.values()]
                label = f"{algorithm.upper()}, {robot}"
                ax.plot(list(points), means, color=color, marker=marker, label=label)
                for n_agents, values in points.items():
                    ax.plot([n_agents] * len(values), values, ".", color=color, markersize=4)
        ax.set_title(title)
        ax.set_xlabel("number of agents")
    axes[0].set_ylabel("return / return of shared MAPPO")
    handles, names = axes[-1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(target, dpi=120)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--plot", type=Path, help="where to draw the figure")
    options = parser.parse_args()
    ratios, rows = ours()
    print("\n".join(rows))
    if options.plot:
        draw({"this library": ratios, "published, 10M steps": published()}, options.plot)


if __name__ == "__main__":
    main()
