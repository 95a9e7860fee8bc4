"""The games that motivate HAPPO and HATRPO, against MAPPO, with and without parameter sharing.

    OMP_NUM_THREADS=1 python benchmarks/games.py          # results/games/games.csv and games.png

Every algorithm gets the same networks, samples and optimiser. Recorded is the exact expected return
of the stochastic policies, not an average of samples, and the number of updates that lowered it by
more than a thousandth of the optimum. "MAPPO shared" is one policy that all agents follow, as in
proposition 1 of Kuba et al. (2022); "MAPPO shared + id" tells it who is asking, as is common.
"""

from __future__ import annotations

import argparse
import csv
import logging
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import ValueEstimators
from torchrl.objectives.multiagent import MAPPOLoss

from torchrl_happo import HAPPOLoss, HATRPOLoss, SequentialUpdater, make_actor, make_critic
from torchrl_happo.envs import (
    DifferentialGame,
    MatrixGame,
    TabularGame,
    climbing_payoff,
    penalty_payoff,
    permutation_payoff,
    xor_payoff,
)
from torchrl_happo.networks.specs import read_groups
from torchrl_happo.recipe.algorithms.simultaneous import SimultaneousUpdater, make_group_critic

logger = logging.getLogger("games")

KEYS = ["game", "algorithm", "seed", "decreases"]
RESULTS = Path(__file__).parent / "results" / "games"
NUM_ENVS, NUM_UPDATES, RECORD_EVERY = 64, 40, 2
ADAM = partial(torch.optim.Adam, lr=5e-3)
NETWORK = {"num_cells": (32,), "output_gain": 0.01}
UPDATES = {"num_epochs": 5, "max_grad_norm": 1.0}


@dataclass(frozen=True)
class Game:
    """A game and what is known about it.

    Attributes:
        title: what the figure calls it.
        make: from keyword arguments to the environment.
        optimum: the best return of individual policies.
        shared: the best return of one policy for all agents, where it is less.
    """

    title: str
    make: Callable[..., EnvBase]
    optimum: float
    shared: float | None = None


#: Actions around 0 are then actions around (0.3, -0.3), in the fourth quadrant.
FOURTH_QUADRANT = torch.tensor([0.3, -0.3])

GAMES = {
    "xor-2": Game("XOR, 2 agents", partial(MatrixGame, xor_payoff(2)), 1.0, 2 / 2**2),
    "xor-4": Game("XOR, 4 agents", partial(MatrixGame, xor_payoff(4)), 1.0, 2 / 2**4),
    "permutation-3": Game(
        "permutation, 3 agents", partial(MatrixGame, permutation_payoff(3)), 1.0, 6 / 3**3
    ),
    "climbing": Game("climbing", partial(MatrixGame, climbing_payoff()), 11.0),
    "penalty": Game("penalty (-30)", partial(MatrixGame, penalty_payoff(-30.0)), 10.0),
    "product": Game(
        "$r = a^1 a^2$, from the fourth quadrant",
        partial(DifferentialGame, lambda a: (a + FOURTH_QUADRANT).prod(-1)),
        1.3 * 0.7,
    ),
}

# -- algorithms ------------------------------------------------------------------------------------


def _sequential(
    loss_class: Callable[..., HAPPOLoss | HATRPOLoss], env: EnvBase, seed: int
) -> tuple[ProbabilisticActor, SequentialUpdater]:
    actor = make_actor(env, **NETWORK)
    loss = loss_class(actor, make_critic(env, num_cells=(32,)))
    return actor, SequentialUpdater(loss, optimizer=ADAM, seed=seed, **UPDATES)


def _mappo(
    env: EnvBase, seed: int, *, share_params: bool
) -> tuple[ProbabilisticActor, SimultaneousUpdater]:
    actor = make_actor(env, share_params=share_params, **NETWORK)
    group = read_groups(env, "observation")[0]
    critic = make_group_critic(
        env, group, centralized=True, share_params=share_params, num_cells=[32]
    )
    loss = MAPPOLoss(actor, critic, clip_epsilon=0.2, entropy_bonus=False, entropy_coeff=0.0)
    loss.set_keys(
        action=group.action,
        sample_log_prob=group.key("action_log_prob"),
        value=group.key("state_value"),
        advantage=group.key("advantage"),
        value_target=group.key("value_target"),
    )
    loss.make_value_estimator(ValueEstimators.MAGAE, gamma=0.99, lmbda=0.95)
    updater = SimultaneousUpdater(
        {"agents": loss}, optimizer=ADAM, minibatch_size=NUM_ENVS, **UPDATES
    )
    return actor, updater


@dataclass(frozen=True)
class Algorithm:
    """How to make an actor and its updater, and how to draw their curve."""

    title: str
    make: Callable[[EnvBase, int], tuple[ProbabilisticActor, Callable]]
    identity: bool = True
    colour: str = "k"


ALGORITHMS = {
    "happo": Algorithm(
        "HAPPO", partial(_sequential, partial(HAPPOLoss, entropy_coeff=0.0)), colour="C3"
    ),
    "hatrpo": Algorithm(
        "HATRPO", partial(_sequential, partial(HATRPOLoss, max_kl=0.02)), colour="C1"
    ),
    "mappo-unshared": Algorithm("MAPPO unshared", partial(_mappo, share_params=False), colour="C0"),
    "mappo-shared-id": Algorithm(
        "MAPPO shared + id", partial(_mappo, share_params=True), colour="C2"
    ),
    "mappo-shared": Algorithm(
        "MAPPO shared", partial(_mappo, share_params=True), identity=False, colour="C7"
    ),
}

# -- runs ------------------------------------------------------------------------------------------


@torch.no_grad()
def expected_return(env: EnvBase, actor: ProbabilisticActor) -> float:
    """The return that the stochastic policies of the agents have on average, without sampling."""
    dist = actor.get_dist(env.reset()[:1])
    if isinstance(env, MatrixGame):
        policies = list(dist.probs.squeeze(0).double().unsqueeze(1).unbind(0))
        return TabularGame.one_step(env.payoff).expected_return(policies).item()
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(64))
    actions = (dist.loc + dist.scale * nodes).tanh().squeeze(0)
    means = (actions * weights).sum(-1) / weights.sum()
    return (means + FOURTH_QUADRANT).prod().item()


def run(game: Game, algorithm: Algorithm, seed: int) -> list[float]:
    """Trains once; the expected return before and after each update."""
    torch.manual_seed(seed)
    env = game.make(num_envs=NUM_ENVS, identity=algorithm.identity)
    actor, updater = algorithm.make(env, seed)
    frames = NUM_ENVS * NUM_UPDATES
    returns = [expected_return(env, actor)]
    collector = Collector(env, actor, frames_per_batch=NUM_ENVS, total_frames=frames)
    for batch in collector:
        updater(batch)
        returns.append(expected_return(env, actor))
    collector.shutdown()
    return returns


def decreases(game: Game, returns: list[float]) -> int:
    """How many updates lowered the return noticeably."""
    return int((np.diff(returns) < -1e-3 * game.optimum).sum())


def run_all(seeds: int, path: Path) -> None:
    """Every game, algorithm and seed; one row each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    updates = range(0, NUM_UPDATES + 1, RECORD_EVERY)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*KEYS, *(NUM_ENVS * update for update in updates)])
        for name, game in GAMES.items():
            for key, algorithm in ALGORITHMS.items():
                start = time.perf_counter()
                for seed in range(seeds):
                    returns = run(game, algorithm, seed)
                    row = [name, key, seed, decreases(game, returns)]
                    writer.writerow([*row, *(f"{returns[update]:.3f}" for update in updates)])
                logger.info("%s %s: %.1f s", name, key, time.perf_counter() - start)


# -- report ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """What the CSV holds.

    Attributes:
        frames: samples at which the returns were recorded.
        returns: ``[seeds, points]`` of each game and algorithm.
        decreases: updates that lowered the return, ``[seeds]`` of each game and algorithm.
    """

    frames: list[int]
    returns: dict[tuple[str, str], np.ndarray]
    decreases: dict[tuple[str, str], np.ndarray]


def read(path: Path) -> Results:
    """Reads the CSV."""
    with path.open() as file:
        header, *rows = csv.reader(file)
    returns: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    drops: dict[tuple[str, str], list[int]] = defaultdict(list)
    for game, algorithm, _, dropped, *curve in rows:
        returns[game, algorithm].append([float(value) for value in curve])
        drops[game, algorithm].append(int(dropped))
    return Results(
        [int(frame) for frame in header[len(KEYS) :]],
        {key: np.array(value) for key, value in returns.items()},
        {key: np.array(value) for key, value in drops.items()},
    )


def table(results: Results) -> Iterable[str]:
    """Markdown: seeds within 10 % of the optimum, mean final return, updates that lowered it."""
    yield "| game | optimum | " + " | ".join(a.title for a in ALGORITHMS.values()) + " |"
    yield "|---|---|" + "---|" * len(ALGORITHMS)
    for name, game in GAMES.items():
        cells = []
        for key in ALGORITHMS:
            final = results.returns[name, key][:, -1]
            solved = (final > 0.9 * game.optimum).sum()
            share = results.decreases[name, key].mean() / NUM_UPDATES
            cells.append(f"{solved}/{len(final)}, {final.mean():.2f}, {share:.1%}")
        yield f"| {game.title} | {game.optimum:g} | " + " | ".join(cells) + " |"


def draw(results: Results, path: Path) -> None:
    """One panel for each game: mean over the seeds and the band between the outer quartiles."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(11, 6), constrained_layout=True)
    for axis, (name, game) in zip(axes.flat, GAMES.items(), strict=True):
        for key, algorithm in ALGORITHMS.items():
            returns = results.returns[name, key]
            low, high = np.quantile(returns, [0.25, 0.75], axis=0)
            axis.plot(
                results.frames, returns.mean(0), color=algorithm.colour, label=algorithm.title
            )
            axis.fill_between(
                results.frames, low, high, color=algorithm.colour, alpha=0.15, linewidth=0
            )
        _mark(axis, game.optimum, "optimum")
        if game.shared is not None:
            _mark(axis, game.shared, f"best shared policy: {game.shared:.3g}")
        axis.set_title(game.title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[1]:
        axis.set_xlabel("samples")
    for axis in axes[:, 0]:
        axis.set_ylabel("expected return")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=80)


def _mark(axis: Any, level: float, text: str) -> None:
    """A known return as a dotted line, named at its right end."""
    axis.axhline(level, color="k", linewidth=0.8, linestyle=":")
    above = {"xytext": (0, 2), "textcoords": "offset points", "ha": "right", "fontsize": 8}
    axis.annotate(text, (1, level), xycoords=("axes fraction", "data"), **above)


def main() -> None:
    """Runs, unless only the figure is asked for, and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report-only", action="store_true", help="draw the CSV that is there")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "The env passed to Collector", FutureWarning)
    torch.set_num_threads(1)
    path = arguments.results / "games.csv"
    if not arguments.report_only:
        run_all(arguments.seeds, path)
    results = read(path)
    draw(results, path.with_suffix(".png"))
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
