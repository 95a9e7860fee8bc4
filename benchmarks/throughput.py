"""Frames per second of collecting and of whole training iterations, in one interleaved run.

    python benchmarks/throughput.py --json benchmarks/results/throughput.json
    python benchmarks/throughput.py --task vmas/simple_spread --num-envs 128 --steps 128 \
        --hidden 64 64 --epochs 4 --minibatch 4096 --json benchmarks/results/throughput_spread.json

Collecting, iteration by iteration in turn:

- ``raw``: the simulator's own ``step`` and the same networks in plain torch, tensors kept in lists;
  With ``--compile-simulator`` also ``raw-compiled``, with ``torch.compile`` of the world's step;
- ``torchrl``: TorchRL's collector with the ``MultiAgentMLP`` actor of its MAPPO script;
- ``ours``: the recipe's collector (TorchRL's) with its actor; ``ours-compiled`` with
  ``collector.compile_policy=true``.

Whole iterations:

- ``mappo-unshared``: TorchRL's MAPPO with one network per agent and the collector of its script;
- ``happo``, ``hatrpo``: this library through its recipe; ``-compiled`` with
  ``algorithm.compile=true`` and ``collector.compile_policy=true``;
- ``plain``: HAPPO in plain torch (``update_cost.py``) after a ``raw`` collection.

Times are CPU times of the process on the CPU and of the wall clock on a GPU, medians over the
iterations; one thread unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import update_cost
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.modules import MultiAgentMLP, ProbabilisticActor, TanhNormal

from torchrl_happo import make_actor
from torchrl_happo.recipe.algorithms import make_learner
from torchrl_happo.recipe.collectors import make_collector
from torchrl_happo.recipe.compose import compose_config
from torchrl_happo.recipe.config import TrainConfig
from torchrl_happo.recipe.environments import make_env

COMPILED = ["algorithm.compile=true", "collector.compile_policy=true"]
LEARNERS = {
    "mappo-unshared": ["algorithm=mappo", "algorithm.share_params=false"],
    "happo": ["algorithm=happo"],
    "happo-compiled": ["algorithm=happo", *COMPILED],
    "hatrpo": ["algorithm=hatrpo"],
    "hatrpo-compiled": ["algorithm=hatrpo", *COMPILED],
}
RATIOS = [("happo", "mappo-unshared"), ("hatrpo", "mappo-unshared"), ("happo-compiled", "happo")]

Times = dict[str, list[float]]


def torchrl_actor(env: EnvBase, hidden: list[int]) -> ProbabilisticActor:
    """The unshared actor of TorchRL's MAPPO script."""
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
        num_cells=hidden,
        activation_class=nn.Tanh,
        device=env.device,
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


def raw_batches(
    env: EnvBase, hidden: list[int], steps: int, episode: int, *, compiled: bool = False
) -> Iterator[tuple]:
    """The simulator's own steps, and the same networks without any framework."""
    net = torchrl_actor(env, hidden).module[0].module  # MultiAgentMLP, NormalParamExtractor
    simulator = env.base_env._env
    if compiled:
        simulator.world.step = torch.compile(simulator.world.step)
    (group,) = env.group_map
    space = env.full_action_spec_unbatched[group, "action"].space
    half, middle = (space.high - space.low) / 2, (space.high + space.low) / 2
    with torch.no_grad():
        observation, age = simulator.reset(), 0
    while True:
        batch = []
        with torch.no_grad():
            for _ in range(steps):
                x = torch.stack(observation, 1)
                loc, scale = net(x)
                preimage = loc + scale * torch.randn_like(loc)
                squashed = preimage.tanh()
                log_prob = -0.5 * ((preimage - loc) / scale).square() - scale.log() - 0.9189
                log_det = (half * (1 - squashed.square()) + 1e-6).log()
                action = middle + half * squashed
                observation, reward, done, _ = simulator.step(list(action.unbind(1)))
                log_prob = (log_prob - log_det).sum(-1)
                batch.append((x, action, log_prob, torch.stack(reward, 1), done))
                age += 1
                if age == episode:
                    observation, age = simulator.reset(), 0
            yield tuple(torch.stack(column, 1) for column in zip(*batch, strict=True))


def torchrl_batches(env: EnvBase, policy: nn.Module, frames: int) -> Iterator:
    """An endless collector's batches, as TorchRL's MAPPO script makes it."""
    return iter(Collector(env, policy, frames_per_batch=frames, total_frames=-1))


class Clock:
    """CPU time on the CPU, the wall clock on a GPU that has finished."""

    def __init__(self, device: str) -> None:
        self.is_cpu = device == "cpu"

    def __call__(self) -> float:
        """Seconds."""
        if self.is_cpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def in_turn(contestants: dict[str, Callable[[], object]], repetitions: int, clock: Clock) -> Times:
    """Seconds of each contestant, after two turns that warm up and compile."""
    times: Times = {name: [] for name in contestants}
    for repetition in range(-2, repetitions):
        for name, run in contestants.items():
            start = clock()
            run()
            if repetition >= 0:
                times[name].append(clock() - start)
    return times


class Benchmark:
    """One task at one number of environments."""

    def __init__(self, args: argparse.Namespace, num_envs: int) -> None:
        self.args = args
        self.num_envs = num_envs
        self.frames = num_envs * args.steps
        self.clock = Clock(args.device)

    def config(self, *overrides: str) -> TrainConfig:
        """The recipe's configuration."""
        args = self.args
        return compose_config(
            f"task={args.task}",
            f"num_envs={self.num_envs}",
            f"steps_per_batch={args.steps}",
            "collector.restart_interval=0",
            f"model.num_cells={args.hidden}",
            f"device={args.device}",
            *overrides,
            f"algorithm.num_epochs={args.epochs}",
            f"algorithm.minibatch_size={args.minibatch}",
        )

    def env(self) -> EnvBase:
        """The recipe's environment."""
        config = self.config()
        return make_env(config.task, num_envs=self.num_envs, seed=0, device=self.args.device)

    def collecting(self) -> Times:
        """Seconds per batch."""
        args = self.args
        episode = self.config().task.max_steps
        env = self.env()
        streams = {
            "raw": raw_batches(self.env(), args.hidden, args.steps, episode),
            "torchrl": torchrl_batches(env, torchrl_actor(env, args.hidden), self.frames),
        }
        if args.compile_simulator:
            streams["raw-compiled"] = raw_batches(
                self.env(), args.hidden, args.steps, episode, compiled=True
            )
        for name, overrides in (("ours", []), ("ours-compiled", COMPILED)):
            policy = make_actor(env, num_cells=args.hidden)
            streams[name] = iter(make_collector(self.config(*overrides), policy, seed=0))
        runs = {name: stream.__next__ for name, stream in streams.items()}
        return in_turn(runs, args.repetitions, self.clock)

    def iterations(self) -> dict[str, Times]:
        """Seconds of collecting and of updating per iteration, for each learner."""
        runs: dict[str, tuple[Callable, Callable]] = {}
        for name, overrides in LEARNERS.items():
            if name not in self.args.learners:
                continue
            config = self.config(*overrides)
            torch.manual_seed(0)
            env = self.env()
            learner = make_learner(config, env)
            if name == "mappo-unshared":
                stream = torchrl_batches(env, learner.policy, self.frames)
            else:
                stream = iter(make_collector(config, learner.policy, seed=0))
            runs[name] = stream.__next__, learner.updater
        if "plain" in self.args.learners:
            runs["plain"] = self.plain()
        times: dict[str, Times] = {name: {"collect": [], "update": []} for name in runs}
        for repetition in range(-2, self.args.repetitions):
            for name, (collect, update) in runs.items():
                start = self.clock()
                batch = collect()
                collected = self.clock()
                with torch.enable_grad():  # the bare simulator leaves gradients switched off
                    update(batch)
                updated = self.clock()
                if repetition >= 0:
                    times[name]["collect"].append(collected - start)
                    times[name]["update"].append(updated - collected)
        return times

    def plain(self) -> tuple[Callable, Callable]:
        """The plain-torch loop; its update is that of ``update_cost`` on one such batch."""
        args, env = self.args, self.env()
        (group,) = env.group_map
        episode = self.config().task.max_steps
        collect = raw_batches(env, args.hidden, args.steps, episode).__next__
        with torch.no_grad():
            policy = torchrl_actor(env, args.hidden)
            batch = env.rollout(args.steps, policy, break_when_any_done=False)
        batch = batch.rename_key_(group, "agents") if group != "agents" else batch
        agents = batch["agents"]
        # The yardstick's own sizes and normal policy: only the time matters here.
        update_cost.OBS_DIM = agents["observation"].shape[-1]
        update_cost.ACT_DIM = agents["action"].shape[-1]
        update_cost.EPOCHS = args.epochs
        update = update_cost.plain(batch, args.minibatch, args.hidden[0], discrete=False)
        return collect, lambda batch: update()


def medians(times: Times) -> dict[str, float]:
    """The median of each list."""
    return {name: statistics.median(values) for name, values in times.items()}


def report(benchmark: Benchmark, collect: Times, whole: dict[str, Times]) -> dict[str, float]:
    """Prints a table; returns the ratios of times."""
    frames, num_envs = benchmark.frames, benchmark.num_envs
    print(f"{benchmark.args.task}, {num_envs} environments x {benchmark.args.steps} steps")
    seconds = medians(collect)
    for name, value in seconds.items():
        share = seconds["raw"] / value
        print(f"  collect {name:<16}{frames / value:10.0f} frames/s   ({share:.2f} of raw)")
    totals = {}
    for name, parts in whole.items():
        each = medians(parts)
        totals[name] = sum(each.values())
        text = ", ".join(f"{part} {1e3 * value:.0f} ms" for part, value in each.items())
        print(f"  whole   {name:<16}{frames / totals[name]:10.0f} frames/s   ({text})")
    ratios = {f"collect {name}/raw": value / seconds["raw"] for name, value in seconds.items()}
    for a, b in RATIOS:
        if a in totals and b in totals:
            ratios[f"{a}/{b}"] = totals[a] / totals[b]
    print("  " + "   ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    return ratios


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*LEARNERS, "plain"]
    parser.add_argument("--task", default="vmas/navigation")
    parser.add_argument("--num-envs", type=int, nargs="+", default=[60])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 128])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--minibatch", type=int, default=1500)
    parser.add_argument("--learners", nargs="*", default=names, choices=names)
    parser.add_argument("--compile-simulator", action="store_true")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for num_envs in args.num_envs:
        benchmark = Benchmark(args, num_envs)
        collect = benchmark.collecting()
        whole = benchmark.iterations()
        ratios = report(benchmark, collect, whole)
        size = {"task": args.task, "num_envs": num_envs, "steps": args.steps}
        rows.append({**size, "collect": collect, "iterations": whole, "ratios": ratios})
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        about = {"torch": torch.__version__, **update_cost.about(args)}
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
