"""Time a transformer over the agents: acting with and without cache, and an update.

    python benchmarks/transformer.py --json benchmarks/results/transformer.json

For teams of 2 to 32 agents, by the process's CPU time (the machine may be shared), medians over
interleaved repetitions, one thread:

- ``act``: one decision of the team in 64 environments, keys and values of the agents before kept;
  ``act-uncached``: each agent decodes all those before it anew; ``act-happo``: a stack of networks,
  all agents at once;
- ``update``: five epochs of MAT on 512 steps; ``update-happo``: of HAPPO, agent after agent.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict

from torchrl_happo import (
    HAPPOLoss,
    MATLoss,
    SequentialUpdater,
    make_actor,
    make_critic,
    make_transformer,
)
from torchrl_happo.envs import DifferentialGame

ENVS, STEPS, EPOCHS = 64, 512, 5


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def acting(policy: Any, observation: TensorDict, use_cache: bool = True) -> None:
    """One decision of a team."""
    policy.use_cache = use_cache
    with torch.no_grad():
        policy(observation.copy())


def contestants(n_agents: int) -> dict[str, Callable[[], object]]:
    """Return the contestants for a team of this size."""
    env = DifferentialGame(n_agents=n_agents, num_envs=ENVS)
    many = DifferentialGame(n_agents=n_agents, num_envs=STEPS)
    actor, critic = make_transformer(env)
    stack, values = make_actor(env, num_cells=(64, 64)), make_critic(env, num_cells=(64, 64))
    observation = env.reset()
    with torch.no_grad():
        batches = {name: many.rollout(1, p) for name, p in (("mat", actor), ("happo", stack))}
    build = partial(SequentialUpdater, num_epochs=EPOCHS, check_finite=False)
    losses = {
        "mat": MATLoss(actor, critic, entropy_coeff=0.0),
        "happo": HAPPOLoss(stack, values, entropy_coeff=0.0),
    }
    updates = {name: partial(build(loss), batches[name]) for name, loss in losses.items()}
    return {
        "act": partial(acting, actor, observation),
        "act-uncached": partial(acting, actor, observation, use_cache=False),
        "act-happo": partial(acting, stack, observation),
        "update": updates["mat"],
        "update-happo": updates["happo"],
    }


def measure(n_agents: int, repetitions: int) -> dict[str, float]:
    """Median CPU seconds of each contestant, after one call that is not counted."""
    torch.manual_seed(0)
    calls = contestants(n_agents)
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure, print a table in milliseconds, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agents", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {n: measure(n, options.repetitions) for n in options.agents}
    names = list(next(iter(rows.values())))
    print("| agents | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for n, row in rows.items():
        print(f"| {n} | " + " | ".join(f"{1000 * row[name]:.1f}" for name in names) + " |")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
