"""What several learners and collectors cost, on paper and measured.

    python benchmarks/scale.py paper      # messages and bytes of an update, for 8 to 1024 learners
    python benchmarks/scale.py measure --json benchmarks/results/scale.json

:func:`traffic` is the formula; ``tests/test_learners.py`` counts the messages of real updates and
finds the same numbers, to the byte. ``measure`` runs the recipe with one and two collectors, and
with one and two learners, in turns, and reads frames per second from what the runs record.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GENERATOR_BYTES = 5056  # the state of a generator of torch's, on the CPU


@dataclass(frozen=True)
class Update:
    """One update of a team, as each learner sees it.

    Args:
        algorithm: ``"happo"`` or ``"hatrpo"``.
        actors: parameters of each agent's network.
        critic: parameters of the critic.
        epochs, minibatches: of each agent and of the critic; for HATRPO of the critic alone.
        tries: steps that each agent's line search evaluates (HATRPO).
        cg_iterations: of conjugate gradient (HATRPO).
        returns: numbers that the value normalisation takes in; 0: there is none.
        number_bytes: size of a number.
        values_of_agents: whether the critic has a value for each agent, standardised at once.
    """

    algorithm: str
    actors: tuple[int, ...]
    critic: int
    epochs: int
    minibatches: int
    tries: int = 1
    cg_iterations: int = 10
    returns: int = 0
    number_bytes: int = 4
    values_of_agents: bool = False


def traffic(update: Update) -> tuple[int, int]:
    """Messages that each learner takes part in, and the bytes that it puts into them."""
    messages = [*_beginning(update)]
    for parameters in update.actors:
        messages += _agent(update, parameters)
    messages += _critic(update)
    return len(messages), sum(messages)


def _numbers(update: Update, *counts: int) -> list[int]:
    return [count * update.number_bytes for count in counts]


def _beginning(update: Update) -> list[int]:
    """Whether all accept the batch, what is drawn, who acts at all, advantages of each agent."""
    joint = _numbers(update, 2, 2) if update.values_of_agents else []
    return [8, 2 * GENERATOR_BYTES, 4 * len(update.actors), *joint]


def _agent(update: Update, parameters: int) -> list[int]:
    """The turn of one agent."""
    happo = update.algorithm == "happo"
    agreement, rounds = [8], [8] if happo else []
    advantage = [] if update.values_of_agents else _numbers(update, 2, 2)
    steps = update.epochs * update.minibatches
    if happo:
        move = _numbers(update, *[parameters + 2] * steps)
    else:
        products = [parameters + 1] * update.cg_iterations
        move = _numbers(update, parameters + 2, *products, *[3] * update.tries)
    metrics = _numbers(update, 1, 2, 3, 6 + happo, 2)
    return agreement + advantage + rounds + move + metrics


def _critic(update: Update) -> list[int]:
    """Whether there is anything to fit, the critic, its statistics, and how well it does."""
    steps = update.epochs * update.minibatches
    norm = [8, *_numbers(update, update.returns + 1)] if update.returns else []
    fit = [8, *_numbers(update, *[update.critic + 2] * steps)]
    return [8, *norm, *fit, *_numbers(update, 2, 2, 2, 2)]


# -- on paper --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """What carries the messages: a hop's latency in seconds, and bytes per second of each learner.

    An all-reduce passes ``2 log2(N)`` hops one after the other (a tree, up and down) and each
    learner sends and receives every byte about twice.
    """

    name: str
    latency: float
    bandwidth: float

    def seconds(self, learners: int, messages: int, size: int) -> float:
        """Time that ``messages`` of ``size`` bytes in all take, one after the other."""
        if learners == 1:
            return 0.0
        hops = 2 * math.ceil(math.log2(learners))
        return messages * hops * self.latency + 2 * size / self.bandwidth


NETWORKS = (
    Network("10 Gbit/s Ethernet", latency=30e-6, bandwidth=1.25e9),
    Network("200 Gbit/s InfiniBand", latency=3e-6, bandwidth=25e9),
)
LEARNERS = (8, 64, 256, 1024)
OBSERVATION, ACTION, HIDDEN, FRAMES = 24, 2, 128, 6000


def team(algorithm: str, n_agents: int, minibatches: int = 4, block: int = 1) -> Update:
    """An update of the recipe's networks, for agents with 24 observations and 2 actions."""

    def mlp(inputs: int, outputs: int) -> int:
        return (inputs + 1) * HIDDEN + (HIDDEN + 1) * HIDDEN + (HIDDEN + 1) * outputs

    return Update(
        algorithm,
        (block * mlp(OBSERVATION, 2 * ACTION),) * (n_agents // block),
        mlp(n_agents * OBSERVATION, 1),
        epochs=10,
        minibatches=minibatches,
    )


def paper(seconds_per_sample: dict[str, float]) -> str:
    """Tables of traffic, and of the share of the time that is not spent on messages.

    Args:
        seconds_per_sample: what an agent's update takes for each frame of the batch, critic
            included, as measured.
    """
    lines = ["| algorithm | agents | messages | MB | of them small messages |", "|---" * 5 + "|"]
    for algorithm in ("happo", "hatrpo"):
        for n_agents in (3, 10, 100):
            update = team(algorithm, n_agents)
            messages, size = traffic(update)
            large = n_agents * (40 if algorithm == "happo" else 11) + 40
            row = [algorithm, n_agents, messages, f"{size / 1e6:.1f}", messages - large]
            lines.append("| " + " | ".join(map(str, row)) + " |")
    lines += ["", *_shares(seconds_per_sample)]
    return "\n".join(lines)


def _shares(seconds_per_sample: dict[str, float]) -> list[str]:
    # How the frames of a batch grow, how fast the work is, and the settings of the update.
    cases: dict[str, tuple[bool, int, dict[str, Any]]] = {
        "6000 frames each": (True, 1, {}),
        "6000 frames together": (False, 1, {}),
        "6000 frames each, work 50 times as fast": (True, 50, {}),
        "the same, one minibatch": (True, 50, {"minibatches": 1}),
        "the same, blocks of ten": (True, 50, {"block": 10}),
        "the same, both": (True, 50, {"minibatches": 1, "block": 10}),
    }
    head = ["algorithm", "network", "100 agents, a batch of", *map(str, LEARNERS)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for algorithm, per_sample in seconds_per_sample.items():
        for network in NETWORKS:
            for name, (grows, speed, settings) in cases.items():
                update = team(algorithm, 100, **settings)
                shares = []
                for learners in LEARNERS:
                    work = 100 * (FRAMES if grows else FRAMES / learners) * per_sample / speed
                    wait = network.seconds(learners, *traffic(update))
                    shares.append(f"{100 * work / (work + wait):.0f} %")
                lines.append("| " + " | ".join([algorithm, network.name, name, *shares]) + " |")
    return lines


# -- measured --------------------------------------------------------------------------------------

DOUBLE = ["num_envs=120", "algorithm.minibatch_size=3000"]
RUNS = {
    "one process": [],
    "one worker": ["collector=multi", "collector.num_workers=1"],
    "two workers": ["collector=multi", "collector.num_workers=2"],
    "two workers, 12000 frames": ["collector=multi", "collector.num_workers=2", *DOUBLE],
    "two learners": [],
    "two learners, 12000 frames": DOUBLE,
    "one process, hatrpo": ["algorithm=hatrpo"],
    "two learners, hatrpo": ["algorithm=hatrpo"],
    "two learners, 12000 frames, hatrpo": ["algorithm=hatrpo", *DOUBLE],
}
SETTINGS = [
    *("task=vmas/navigation", "steps_per_batch=100", "render=false"),
    *(
        "progress=false",
        "evaluation.interval=0",
        "evaluation.episodes=1",
        "collector.restart_interval=0",
    ),
]
SHORT, LONG = 2, 8


def run(name: str, iterations: int) -> tuple[float, list[dict[str, str]]]:
    """Processor seconds of all processes of a run, and the rows of its table."""
    frames = 2 * FRAMES if "12000 frames" in name else FRAMES
    launcher = ["-m"]
    if name.startswith("two learners"):
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    with tempfile.TemporaryDirectory() as folder:
        before = os.times()
        subprocess.run(
            [
                *(sys.executable, *launcher, "torchrl_happo.train", f"hydra.run.dir={folder}"),
                *(f"total_frames={iterations * frames}", *SETTINGS, *RUNS[name]),
            ],
            check=True,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        after = os.times()
        with (Path(folder) / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
    user, system = (after[i] - before[i] for i in (2, 3))
    return user + system, rows


def measure(repetitions: int) -> dict[str, dict[str, float]]:
    """Of each way to run, an iteration's processor seconds and seconds by the clock, in turns.

    Processor seconds are the difference between a long and a short run, so that what it takes to
    start does not count.
    """
    times: dict[str, dict[str, list[float]]] = {
        name: {"processor": [], "collect": [], "update": []} for name in RUNS
    }
    for _ in range(repetitions):
        for name in RUNS:
            (short, _), (long, rows) = run(name, SHORT), run(name, LONG)
            times[name]["processor"].append((long - short) / (LONG - SHORT))
            for part in ("collect", "update"):
                times[name][part] += [float(row[f"{part}_seconds"]) for row in rows[1:]]
    return {
        name: {part: statistics.median(values) for part, values in parts.items()}
        for name, parts in times.items()
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["paper", "measure"])
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results/scale.json")
    args = parser.parse_args()
    if args.action == "measure":
        results = {"load": os.getloadavg()[0], **measure(args.repetitions)}
        args.json.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(results, indent=1))
    else:
        results = json.loads(args.json.read_text())
        alone = {"happo": results["one process"], "hatrpo": results["one process, hatrpo"]}
        print(paper({name: _per_sample(times) for name, times in alone.items()}))


def _per_sample(times: dict[str, float]) -> float:
    """Processor seconds of an agent's update for each frame; navigation has three agents."""
    share = times["update"] / (times["collect"] + times["update"])
    return times["processor"] * share / (3 * FRAMES)


if __name__ == "__main__":
    main()
