"""Frames per second of collecting and of whole training iterations, in one interleaved run.

    python benchmarks/throughput.py --json benchmarks/results/throughput.json

Whole iterations: HAPPO, HATRPO and TorchRL's MAPPO with one network per agent, all through the
recipe at its benchmark settings (60 environments x 100 steps, [128, 128], 10 epochs, minibatches of
1500), take turns, iteration by iteration.
Collecting: the actor of ``make_actor`` and one built by hand from ``MultiAgentMLP``, as TorchRL's
script has it, take turns on the same kind of environment.

Times are CPU times of the process, medians over the iterations; one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tensordict import TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.modules import MultiAgentMLP, ProbabilisticActor, TanhNormal

from torchrl_happo import make_actor
from torchrl_happo.recipe.algorithms import make_learner
from torchrl_happo.recipe.compose import compose_config
from torchrl_happo.recipe.environments import make_env

LEARNERS = {
    "mappo-unshared": ["algorithm=mappo", "algorithm.share_params=false"],
    "happo": ["algorithm=happo"],
    "hatrpo": ["algorithm=hatrpo"],
}


def torchrl_actor(env: EnvBase) -> ProbabilisticActor:
    """The unshared actor of TorchRL's MAPPO script, [128, 128] and tanh."""
    (group,) = env.group_map
    n_agents = len(env.group_map[group])
    obs_dim = env.observation_spec[group, "observation"].shape[-1]
    space = env.full_action_spec_unbatched[group, "action"].space
    net = MultiAgentMLP(
        n_agent_inputs=obs_dim,
        n_agent_outputs=2 * space.low.shape[-1],
        n_agents=n_agents,
        centralized=False,
        share_params=False,
        depth=2,
        num_cells=128,
        activation_class=nn.Tanh,
    )
    keys = [(group, "loc"), (group, "scale")]
    return ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(net, NormalParamExtractor()),
            in_keys=[(group, "observation")],
            out_keys=keys,
        ),
        in_keys=keys,
        out_keys=[(group, "action")],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": space.low, "high": space.high},
        return_log_prob=True,
    )


def batches(env: EnvBase, policy: nn.Module, frames: int) -> Iterator[TensorDictBase]:
    """An endless collector's batches."""
    collector = Collector(
        env,
        policy,
        frames_per_batch=frames,
        total_frames=-1,
        auto_register_policy_transforms=False,
    )
    return iter(collector)


def collecting(task: str, num_envs: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds per batch of both actors."""
    config = compose_config(f"task={task}", f"num_envs={num_envs}")
    frames = config.num_envs * config.steps_per_batch
    streams = {}
    for name, build in {"torchrl": torchrl_actor, "make_actor": make_actor}.items():
        env = make_env(config.task, num_envs=config.num_envs, seed=0, device="cpu")
        streams[name] = batches(env, build(env), frames)
    times: dict[str, list[float]] = {name: [] for name in streams}
    for repetition in range(repetitions + 1):
        for name, stream in streams.items():
            start = time.process_time()
            next(stream)
            if repetition:
                times[name].append(time.process_time() - start)
    return times


def iterations(task: str, num_envs: int, repetitions: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of collecting and of updating per iteration, for each learner."""
    runs = {}
    for name, overrides in LEARNERS.items():
        config = compose_config(f"task={task}", f"num_envs={num_envs}", *overrides)
        torch.manual_seed(0)
        env = make_env(config.task, num_envs=config.num_envs, seed=0, device="cpu")
        learner = make_learner(config, env)
        frames = config.num_envs * config.steps_per_batch
        runs[name] = learner, batches(env, learner.policy, frames)
    times: dict = {name: {"collect": [], "update": []} for name in runs}
    for repetition in range(repetitions + 1):
        for name, (learner, stream) in runs.items():
            start = time.process_time()
            batch = next(stream)
            collected = time.process_time()
            learner.updater(batch)
            if repetition:
                times[name]["collect"].append(collected - start)
                times[name]["update"].append(time.process_time() - collected)
    return times


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="vmas/navigation")
    parser.add_argument("--num-envs", type=int, default=60)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    frames = args.num_envs * 100

    collect = collecting(args.task, args.num_envs, args.repetitions)
    print(f"collecting, {args.task}, {args.num_envs} environments")
    for name, values in collect.items():
        print(f"  {name:<16}{frames / statistics.median(values):10.0f} frames/s")
    ratio = statistics.median(collect["make_actor"]) / statistics.median(collect["torchrl"])
    print(f"  time of make_actor / torchrl: {ratio:.2f}")

    whole = iterations(args.task, args.num_envs, args.repetitions)
    print("whole iterations")
    totals = {}
    for name, parts in whole.items():
        medians = {part: statistics.median(values) for part, values in parts.items()}
        totals[name] = sum(medians.values())
        each = ", ".join(f"{part} {1e3 * seconds:.0f} ms" for part, seconds in medians.items())
        print(f"  {name:<16}{frames / totals[name]:10.0f} frames/s   ({each})")
    for name in ("happo", "hatrpo"):
        print(f"  time of {name} / mappo-unshared: {totals[name] / totals['mappo-unshared']:.2f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        about = {"task": args.task, "num_envs": args.num_envs, "torch": torch.__version__}
        args.json.write_text(
            json.dumps({"about": about, "collect": collect, "iterations": whole}, indent=1)
        )


if __name__ == "__main__":
    main()
