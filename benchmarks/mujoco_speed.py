"""Env steps per second on HalfCheetah 2x3: collecting at random, and whole training.

    python benchmarks/mujoco_speed.py --json benchmarks/results/mujoco_speed.json

Collecting is TorchRL's ``Collector`` with a random policy, EnvPool on one and on two threads.
Training is whole iterations of the recipe with the task's own settings: collecting, update, metrics
brought back; the same number of frames in a batch, from more environments and fewer steps.
``-compiled``: with ``algorithm.compile=true`` and ``collector.compile_policy=true``. One thread of
torch and one of EnvPool. All take turns, repetition by repetition.

Times are of the wall clock, medians over the repetitions: run it on a quiet machine, on which the
spread that is printed is small. On a busy one ``--clock cpu`` gives the processor's time, of all
threads together, which still compares what takes turns, but not different numbers of threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torchrl.collectors import Collector

from torchrl_happo.envs import make_mujoco
from torchrl_happo.recipe.algorithms import make_learner
from torchrl_happo.recipe.collection import Batches
from torchrl_happo.recipe.compose import compose_config
from torchrl_happo.recipe.environments import make_env
from torchrl_happo.recipe.records import flatten

FRAMES = 4000
TASK = "mujoco/halfcheetah_2x3"
COMPILED = ["algorithm.compile=true", "collector.compile_policy=true"]
LEARNERS = {
    "happo": ["algorithm=happo"],
    "happo-compiled": ["algorithm=happo", *COMPILED],
    "hatrpo": ["algorithm=hatrpo"],
    "hatrpo-compiled": ["algorithm=hatrpo", *COMPILED],
    "mappo": ["algorithm=mappo", "algorithm.share_params=false"],
}
Timed = Callable[[], dict[str, float]]


def collecting(num_envs: int, num_threads: int, clock: Callable[[], float]) -> Timed:
    """Collects a batch with random actions."""
    env = make_mujoco("HalfCheetah", "2x3", num_envs=num_envs, num_threads=num_threads, seed=0)
    frames = 5 * num_envs * (FRAMES // num_envs)
    stream = iter(Collector(env, None, frames_per_batch=frames, total_frames=-1))

    def batch() -> dict[str, float]:
        start = clock()
        next(stream)
        return {"collect": (clock() - start) * FRAMES / frames}

    return batch


def training(overrides: list[str], num_envs: int, clock: Callable[[], float]) -> Timed:
    """One iteration of the recipe."""
    config = compose_config(
        *(f"task={TASK}", *overrides),
        *(f"num_envs={num_envs}", f"steps_per_batch={FRAMES // num_envs}"),
        "collector.restart_interval=0",
    )
    learner = make_learner(config, make_env(config.task, num_envs=1, seed=0))
    batches = Batches(config, learner.policy)
    batches.restart(0)

    def iteration() -> dict[str, float]:
        start = clock()
        batch = batches.next()
        collected = clock()
        flatten(learner.updater(batch))
        batches.policy_changed()
        return {"collect": collected - start, "update": clock() - collected}

    return iteration


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    torch.set_num_threads(1)

    timed = {
        f"random, {num_envs} envs, {threads} threads": collecting(num_envs, threads, clock)
        for num_envs in (20, 80, 200)
        for threads in (1, 2)
    }
    timed |= {
        f"{name}, {num_envs} x {FRAMES // num_envs}": training(overrides, num_envs, clock)
        for name, overrides in LEARNERS.items()
        for num_envs in (20, 40, 80)
    }
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in timed}
    for repetition in range(-3, args.repetitions):
        for name, run in timed.items():
            parts = run()
            if repetition >= 0:  # the first ones warm up and compile
                seconds[name].append(parts)
    for name, runs in seconds.items():
        rates = sorted(FRAMES / sum(parts.values()) for parts in runs)
        medians = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
        each = ", ".join(f"{part} {1e3 * value:.0f} ms" for part, value in medians.items())
        print(
            f"{name:<28}{statistics.median(rates):8.0f} env steps/s "
            f"({rates[0]:.0f} to {rates[-1]:.0f}; {each})"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        about = {"task": TASK, "clock": args.clock, "torch": torch.__version__}
        args.json.write_text(json.dumps({"about": about, "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()
