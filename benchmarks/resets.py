"""Partial resets of VMAS: TorchRL's environment and ours in turn, as a ratio of their times.

    python benchmarks/resets.py --num-envs 1024 --resets 102

Each line is a scenario, the medians of both in milliseconds, and how many times faster ours is.
Times are CPU times of the process, on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torchrl.envs import VmasEnv

from torchrl_happo.envs import BatchedResetVmasEnv


def measure(scenario: str, num_envs: int, resets: int, rounds: int) -> tuple[float, float]:
    """Return the median milliseconds of a partial reset, VMAS's and ours."""
    kinds = (VmasEnv, BatchedResetVmasEnv)
    envs = [kind(scenario, num_envs=num_envs, max_steps=None, seed=0) for kind in kinds]
    mask = torch.zeros(num_envs, 1, dtype=torch.bool)
    mask[torch.randperm(num_envs)[:resets]] = True
    data = [env.reset().set("_reset", mask) for env in envs]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for env, own, taken in zip(envs, data, times, strict=True):
            start = time.process_time()
            env.reset(own.clone())
            taken.append(1e3 * (time.process_time() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--scenarios", nargs="+", default=["balance", "navigation", "simple_spread"]
    )
    parser.add_argument("--num-envs", type=int, default=1024)
    parser.add_argument("--resets", type=int, default=102)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for scenario in args.scenarios:
        theirs, ours = measure(scenario, args.num_envs, args.resets, args.rounds)
        print(f"{scenario:16} {theirs:8.1f} {ours:8.1f} {theirs / ours:6.1f}")


if __name__ == "__main__":
    main()
