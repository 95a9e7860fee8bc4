"""Time an update of HATRPO against one of HAPPO, with a GRU for each agent.

    python benchmarks/memory_cost.py --json benchmarks/results/memory_cost.json

A team of VMAS balance acts for 60 rows of 100 steps, 6000 frames. Episodes last as long as the
rows, or end within them, so that TorchRL packs sequences of unlike lengths. Both algorithms have
the settings that the library gives them by itself. Times are of the process's CPU, medians over the
repetitions, in turn; look at the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from tensordict import TensorDictBase
from torchrl.envs import TransformedEnv, VmasEnv

from torchrl_happo import (
    HAPPOLoss,
    HATRPOLoss,
    SequentialUpdater,
    TeamReward,
    make_actor,
    make_critic,
    memory_transforms,
)

ROWS, STEPS = 60, 100


def cut_episodes(batch: TensorDictBase) -> TensorDictBase:
    """End an episode in each row, after 33, 50 or 71 steps."""
    batch = batch.clone()
    for index, last in enumerate((33, 50, 71)):
        rows = slice(index, None, 3)
        for key in ("done", "terminated"):
            batch["next", key][rows, last] = True
        batch["is_init"][rows, last + 1] = True
        batch["agents", "recurrent_state"][rows, last + 1] = 0.0
    return batch


def measure(repetitions: int) -> dict[str, dict[str, float]]:
    """Return median seconds of an update, by kind of episodes and algorithm."""
    torch.manual_seed(0)
    env = TransformedEnv(VmasEnv("balance", num_envs=ROWS, seed=0), TeamReward())
    actor = make_actor(env, recurrent="gru", hidden_size=64)
    for transform in memory_transforms(actor):
        env = env.append_transform(transform)
    with torch.no_grad():
        whole = env.rollout(STEPS, actor, break_when_any_done=False)
    batches = {"whole": whole, "cut": cut_episodes(whole)}
    updaters = {
        name: SequentialUpdater(loss(actor, make_critic(env)))
        for name, loss in {"happo": HAPPOLoss, "hatrpo": HATRPOLoss}.items()
    }
    times: dict[tuple[str, str], list[float]] = {}
    for repetition in range(repetitions + 1):
        for kind, batch in batches.items():
            for name, updater in updaters.items():
                start = time.process_time()
                updater(batch)
                if repetition:  # the first one warms up
                    times.setdefault((kind, name), []).append(time.process_time() - start)
    return {
        kind: {name: statistics.median(times[kind, name]) for name in updaters} for kind in batches
    }


def main() -> None:
    """Measure, print the ratios, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds = measure(options.repetitions)
    for kind, by_name in seconds.items():
        happo, hatrpo = by_name["happo"], by_name["hatrpo"]
        print(f"{kind:>6}  HAPPO {happo:.2f} s  HATRPO {hatrpo:.2f} s  {hatrpo / happo:.2f}")
    if options.json:
        record = {"seconds": seconds, "torch": torch.__version__}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
