"""What one update costs, side by side in one interleaved run.

    python benchmarks/update_cost.py --json benchmarks/results/update_cost.json
    python benchmarks/update_cost.py --agents 2 4 8 16 32 --json agents.json --plot agents.png
    python benchmarks/update_cost.py --report-only --json agents.json --plot agents.png
    python benchmarks/update_cost.py --memory --samples 60000
    python benchmarks/update_cost.py --only happo hatrpo haa2c a2po coppo lagrangian macpo

The contestants update the same team on the same data:

- ``floor``: forward and backward of the same networks alone, no losses, no optimiser;
- ``plain``: HAPPO written by hand in plain torch, an honest yardstick;
- ``mappo``: TorchRL's ``MAPPOLoss`` with unshared networks and one Adam;
- ``happo``: this library, and ``happo-compiled`` with ``SequentialUpdater(compile=True)``
  (and ``cudagraphs=True`` on a GPU);
- ``haa2c``, ``a2po``, ``coppo``, ``lagrangian``, ``macpo``: the other algorithms of this library,
  the last two with the critic of a cost besides;
- ``hatrpo``: this library's trust region, and ``hatrpo-compiled``; ``hatrpo-fifth`` with a fifth
  of the samples in the Fisher matrix; ``hatrpo-double``: the same with eleven Fisher-vector
  products by double backward through a new graph each time, as the reference implementation does.

One thread unless told otherwise. Times are medians over the repetitions, of the process's CPU time
on the CPU (the machine may be shared) and of the wall clock on a GPU; look at the ratios.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.modules import IndependentNormal, MultiAgentMLP, ProbabilisticActor
from torchrl.objectives.multiagent import MAPPOLoss

from torchrl_happo import HAPPOLoss, HATRPOLoss, SequentialUpdater, objectives
from torchrl_happo.policy.distributions import kl_divergence
from torchrl_happo.steps.trust_region import local_model
from torchrl_happo.steps.trust_region.natural_gradient import flatten, gradient, unflatten

OBS_DIM, ACT_DIM, EPOCHS, CLIP, LR, MAX_NORM = 24, 2, 5, 0.2, 3e-4, 10.0
Update = Callable[[], object]


def make_team(n_agents: int, hidden: int, discrete: bool, device: str) -> tuple:
    """Joint actor and centralised critic of a MAPPO script."""
    mlp = partial(
        MultiAgentMLP,
        n_agent_inputs=OBS_DIM,
        n_agents=n_agents,
        depth=2,
        num_cells=hidden,
        activation_class=nn.Tanh,
        device=device,
    )
    outputs = ACT_DIM + 3 if discrete else 2 * ACT_DIM
    net = mlp(n_agent_outputs=outputs, centralized=False, share_params=False)
    keys = [("agents", "logits")] if discrete else [("agents", "loc"), ("agents", "scale")]
    actor = ProbabilisticActor(
        TensorDictModule(
            net if discrete else nn.Sequential(net, NormalParamExtractor()),
            in_keys=[("agents", "observation")],
            out_keys=keys,
        ),
        in_keys=keys,
        out_keys=[("agents", "action")],
        distribution_class=Categorical if discrete else IndependentNormal,
        return_log_prob=True,
        default_interaction_type="random",
    )
    critic = TensorDictModule(
        mlp(n_agent_outputs=1, centralized=True, share_params=True),
        in_keys=[("agents", "observation")],
        out_keys=[("agents", "state_value")],
    )
    return actor, critic


def make_batch(actor: nn.Module, samples: int, n_agents: int, device: str) -> TensorDict:
    """A batch of ``samples`` steps in rows of at most 100."""
    time_steps = math.gcd(samples, 100)
    shape = (samples // time_steps, time_steps)

    def agents() -> TensorDict:
        observation = torch.randn(*shape, n_agents, OBS_DIM, device=device)
        return TensorDict({"observation": observation}, (*shape, n_agents))

    done = torch.zeros(*shape, 1, dtype=torch.bool, device=device)
    reward = torch.randn(*shape, 1, device=device)
    costs = {"cost": reward.abs(), "episode_cost": reward.abs()}
    ends = {"done": done, "terminated": done.clone()}
    after = TensorDict({"agents": agents(), "reward": reward, **costs, **ends}, shape)
    batch = TensorDict({"agents": agents(), "next": after}, shape, device=device)
    with torch.no_grad():
        return actor(batch)


def sequential(
    loss_class: type, minibatch: int | None, actor: nn.Module, critic: nn.Module, **kwargs: object
) -> SequentialUpdater:
    """This library's updater with the settings of the benchmark."""
    updater_kwargs = kwargs.pop("updater", {})
    if issubclass(loss_class, HAPPOLoss):
        kwargs = {"entropy_coeff": 0.0, **kwargs}
    if loss_class in (HAPPOLoss, objectives.HAPPOLagrangianLoss):
        kwargs = {"clip_epsilon": CLIP, **kwargs}
    return SequentialUpdater(
        loss_class(actor, critic, **kwargs),
        optimizer=partial(torch.optim.Adam, lr=LR),
        num_epochs=EPOCHS,
        minibatch_size=minibatch,
        max_grad_norm=MAX_NORM,
        **updater_kwargs,
    )


def mappo(batch: TensorDict, minibatch: int | None, actor: nn.Module, critic: nn.Module) -> Update:
    """TorchRL's MAPPO as its multi-agent script runs it."""
    loss = MAPPOLoss(actor, critic, clip_epsilon=CLIP, entropy_coeff=0.0, entropy_bonus=False)
    loss.set_keys(value=("agents", "state_value"), action=("agents", "action"))
    optimizer = torch.optim.Adam(loss.parameters(), lr=LR)

    def update() -> None:
        data = batch.copy()
        with torch.no_grad():
            loss.value_estimator(data)
        data = data.reshape(-1)
        for _ in range(EPOCHS):
            for index in torch.randperm(len(data)).split(minibatch or len(data)):
                losses = loss(data[index.to(data.device)])
                (losses["loss_objective"] + losses["loss_critic"]).backward()
                nn.utils.clip_grad_norm_(loss.parameters(), MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()

    return update


def plain(batch: TensorDict, minibatch: int | None, hidden: int, discrete: bool) -> Update:
    """HAPPO by hand: lists of networks and optimisers, tensors, no framework."""
    n_agents = batch["agents", "observation"].shape[-2]
    device = batch["agents", "observation"].device
    observation = batch["agents", "observation"].flatten(0, 1)
    action = batch["agents", "action"].flatten(0, 1)
    stored = batch["agents", "action_log_prob"].flatten(0, 1)
    observations = [observation[:, i].contiguous() for i in range(n_agents)]
    actions = [action[:, i].contiguous() for i in range(n_agents)]
    state = observation.flatten(1)
    next_state = batch["next", "agents", "observation"].flatten(0, 1).flatten(1)
    outputs = ACT_DIM + 3 if discrete else 2 * ACT_DIM
    actors = [network(OBS_DIM, hidden, outputs, device) for _ in range(n_agents)]
    critic = network(OBS_DIM * n_agents, hidden, 1, device)
    optimizers = [torch.optim.Adam(a.parameters(), lr=LR, fused=True) for a in actors]
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=LR, fused=True)

    def log_prob(net: nn.Module, x: Tensor, a: Tensor) -> Tensor:
        out = net(x)
        if discrete:
            return out.log_softmax(-1).gather(-1, a.unsqueeze(-1)).squeeze(-1)
        loc, raw = out.chunk(2, -1)
        scale = nn.functional.softplus(raw + 0.5413).clamp_min(1e-4)
        return -(0.5 * ((a - loc) / scale).square() + scale.log() + 0.9189).sum(-1)

    def fit(net: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable) -> None:
        for _ in range(EPOCHS):
            for index in torch.randperm(len(state)).split(minibatch or len(state)):
                loss = loss_of(slice(None) if minibatch is None else index.to(device))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM)
                optimizer.step()

    def update() -> None:
        with torch.no_grad():
            value, next_value = critic(state).squeeze(-1), critic(next_state).squeeze(-1)
            advantage, target = gae(batch, value, next_value)
            advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-5)
        factor = torch.ones_like(advantage)
        for i in torch.randperm(n_agents).tolist():
            net, weighted = actors[i], factor * advantage

            def surrogate(index: Tensor, i: int = i, net: nn.Module = net, m: Tensor = weighted):  # noqa: ANN202
                new = log_prob(net, observations[i][index], actions[i][index])
                ratio = (new - stored[index, i]).exp()
                return -torch.min(
                    ratio * m[index], ratio.clamp(1 - CLIP, 1 + CLIP) * m[index]
                ).mean()

            with torch.no_grad():
                before = log_prob(net, observations[i], actions[i])
            fit(net, optimizers[i], surrogate)
            with torch.no_grad():
                factor = factor * (log_prob(net, observations[i], actions[i]) - before).exp()

        def value_loss(index: Tensor) -> Tensor:
            return nn.functional.smooth_l1_loss(critic(state[index]).squeeze(-1), target[index])

        fit(critic, critic_optimizer, value_loss)

    return update


def gae(batch: TensorDict, value: Tensor, next_value: Tensor) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, by a loop over time."""
    shape = batch.shape
    reward, done = batch["next", "reward"].squeeze(-1), batch["next", "done"].squeeze(-1)
    value, next_value = value.view(shape), next_value.view(shape)
    delta = reward + 0.99 * next_value * ~done - value
    advantage, running = torch.empty_like(delta), 0.0
    for t in reversed(range(shape[1])):
        running = delta[:, t] + 0.99 * 0.95 * ~done[:, t] * running
        advantage[:, t] = running
    return advantage.flatten(), (advantage + value).flatten()


def network(inputs: int, hidden: int, outputs: int, device: torch.device) -> nn.Sequential:
    """The network of one agent."""
    return nn.Sequential(
        *(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()),
        nn.Linear(hidden, outputs),
    ).to(device)


def floor(batch: TensorDict, minibatch: int | None, hidden: int, discrete: bool) -> Update:
    """The matrix products alone."""
    observation = batch["agents", "observation"].flatten(0, 1)
    n_agents, device = observation.shape[1], observation.device
    outputs = ACT_DIM + 3 if discrete else 2 * ACT_DIM
    inputs = [observation[:, i].contiguous() for i in range(n_agents)]
    pairs = [(network(OBS_DIM, hidden, outputs, device), x) for x in inputs]
    pairs.append((network(OBS_DIM * n_agents, hidden, 1, device), observation.flatten(1)))

    def update() -> None:
        for net, x in pairs:
            parameters = list(net.parameters())
            for _ in range(EPOCHS):
                for part in x.split(minibatch or len(x)):
                    torch.autograd.grad(net(part).sum(), parameters)

    return update


class Ours:
    """This library's update, each time from the same networks.

    On one and the same batch a trust region would soon have nothing to gain, and reject its steps.
    """

    def __init__(self, updater: SequentialUpdater, update: Update) -> None:
        self.updater = updater
        self.update = update
        self.state: dict | None = None

    def begin(self) -> None:
        """Goes back to where the first call found it."""
        if self.state is None:
            self.state = copy.deepcopy(self.updater.state_dict())
        else:
            self.updater.load_state_dict(self.state)

    def __call__(self) -> object:
        """One update."""
        return self.update()


def double_backward(updater: SequentialUpdater, batch: TensorDict) -> Update:
    """The trust-region update with Hessian products of a divergence that is computed anew."""
    policy: Callable = lambda weights: None  # noqa: E731

    def remember(distribution: Callable, weights: dict, data: TensorDict) -> object:
        nonlocal policy
        policy = partial(distribution, data=data)
        return distribution(weights, data)

    def products(dist: object, parameters: dict, **kwargs: object) -> Callable[[Tensor], Tensor]:
        step = policy
        with torch.no_grad():
            old = step(parameters)

        def matvec(vector: Tensor) -> Tensor:
            kl = kl_divergence(old, step(parameters)).mean()
            slope = gradient([kl], parameters.values(), create_graph=True)
            parts = unflatten(vector, parameters).values()
            along = sum((s * v).sum() for s, v in zip(slope, parts, strict=True))
            return flatten(gradient([along], parameters.values()))

        # The reference multiplies once more, for the length of the step.
        matvec(torch.ones(sum(p.numel() for p in parameters.values()), device=batch.device))
        return matvec

    for inner in updater.steps.values():
        if hasattr(inner, "distribution"):  # not the critic's
            inner.distribution = partial(remember, inner.distribution)
    linearised = local_model.fisher_vector_product

    def update() -> None:
        local_model.fisher_vector_product = products
        try:
            updater(batch)
        finally:
            local_model.fisher_vector_product = linearised

    return Ours(updater, update)


def contestants(args: argparse.Namespace, n_agents: int, samples: int, hidden: int) -> dict:
    """The updates to time, by name."""
    team = partial(make_team, n_agents, hidden, args.discrete, args.device)
    batch = make_batch(team()[0], samples, n_agents, args.device)
    minibatch = args.minibatch

    def ours(loss_class: type, **kwargs: object) -> Update:
        updater = sequential(loss_class, minibatch, *team(), **kwargs)
        return Ours(updater, partial(updater, batch))

    faster = {"compile": True, "cudagraphs": args.device != "cpu"}
    updates = {
        "floor": floor(batch, minibatch, hidden, args.discrete),
        "plain": plain(batch, minibatch, hidden, args.discrete),
        "mappo": mappo(batch, minibatch, *team()),
        "happo": ours(HAPPOLoss),
        "happo-compiled": ours(HAPPOLoss, updater=faster),
        "hatrpo": ours(HATRPOLoss),
        "hatrpo-compiled": ours(HATRPOLoss, updater=faster),
        "hatrpo-fifth": ours(HATRPOLoss, fisher_fraction=0.2),
        "hatrpo-double": double_backward(sequential(HATRPOLoss, minibatch, *team()), batch),
        "haa2c": ours(objectives.HAA2CLoss),
        "a2po": ours(objectives.A2POLoss),
        "coppo": ours(objectives.CoPPOLoss),
        "lagrangian": ours(objectives.HAPPOLagrangianLoss, cost_critic=team()[1], cost_limit=1.0),
        "macpo": ours(objectives.MACPOLoss, cost_critic=team()[1], cost_limit=1.0),
    }
    return {name: update for name, update in updates.items() if name in args.only}


def about(args: argparse.Namespace) -> dict[str, object]:
    """What the figures of a run depend on."""
    name = torch.cuda.get_device_name() if args.device != "cpu" else "cpu"
    return {"torch": torch.__version__, "threads": args.threads, "device": name}


def peak_memory(args: argparse.Namespace, samples: int) -> dict[str, float]:
    """MiB that the process grows by during three updates, each contestant in one of its own."""
    grown = {}
    for name in ("mappo", "happo", "hatrpo"):
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_grow, args=(args, samples, name, sender))
        child.start()
        grown[name] = receiver.recv()
        child.join()
    return grown


def _grow(args: argparse.Namespace, samples: int, name: str, sender: Connection) -> None:
    torch.set_num_threads(args.threads)
    args.only = [name]
    small = contestants(args, args.agents[0], 200, args.hidden[0])[name]
    small()  # what is only loaded once
    update = contestants(args, args.agents[0], samples, args.hidden[0])[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        update()
    sender.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def plot(rows: list[dict], path: Path) -> None:
    """Times against the number of agents and of samples."""
    import matplotlib as mpl
    import matplotlib.ticker

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    most = max(row["samples"] for row in rows if row["samples"] <= 4000)
    few = min(row["agents"] for row in rows)
    for ax, across, kept in (
        (axes[0], "agents", ("samples", most)),
        (axes[1], "samples", ("agents", few)),
    ):
        chosen = sorted((r for r in rows if r[kept[0]] == kept[1]), key=lambda r: r[across])
        for name in NAMES:
            points = [
                (r[across], statistics.median(r["ms"][name])) for r in chosen if name in r["ms"]
            ]
            if points:
                ax.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1.2, label=name)
        ax.set(xscale="log", yscale="log", xlabel=across, ylabel="ms per update")
        sizes = [row[across] for row in chosen]
        ax.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        ax.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        ax.set_title(f"{kept[1]} {kept[0]}", fontsize=9)
        ax.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=7)
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)


def measure(updates: dict[str, Update], repetitions: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each update, in turn, after three that warm up and compile."""
    times: dict[str, list[float]] = {name: [] for name in updates}
    for repetition in range(-3, repetitions):
        for name, update in updates.items():
            if repetition >= 0 and isinstance(update, Ours):
                update.begin()
            if device != "cpu":
                torch.cuda.synchronize()
            clock = time.process_time if device == "cpu" else time.perf_counter
            start = clock()
            update()
            if device != "cpu":
                torch.cuda.synchronize()
            if repetition >= 0:
                times[name].append(1e3 * (clock() - start))
    return times


NAMES = [
    *("floor", "plain", "mappo", "happo", "happo-compiled"),
    *("hatrpo", "hatrpo-compiled", "hatrpo-fifth", "hatrpo-double"),
]
OTHERS = ["haa2c", "a2po", "coppo", "lagrangian", "macpo"]
RATIOS = [
    ("happo", "plain"),
    ("happo", "floor"),
    ("happo", "mappo"),
    ("happo-compiled", "floor"),
    ("happo-compiled", "happo"),
    ("hatrpo", "happo"),
    ("hatrpo-fifth", "happo"),
    ("hatrpo", "hatrpo-double"),
    ("hatrpo-compiled", "hatrpo-double"),
    *((name, "happo") for name in OTHERS),
]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--agents", type=int, nargs="+", default=[3])
    parser.add_argument("--samples", type=int, nargs="+", default=[400, 4000])
    parser.add_argument("--hidden", type=int, nargs="+", default=[128])
    parser.add_argument("--minibatch", type=int, help="samples in a minibatch; default: all")
    parser.add_argument("--discrete", action="store_true")
    parser.add_argument("--only", nargs="+", default=NAMES, choices=[*NAMES, *OTHERS])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="figure of the times against the sizes")
    parser.add_argument("--report-only", action="store_true", help="draw the JSON that is there")
    parser.add_argument("--memory", action="store_true", help="peak memory in place of times")
    args = parser.parse_args()
    if args.report_only:
        plot(json.loads(args.json.read_text())["rows"], args.plot)
        return
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.memory:
        for samples in args.samples:
            grown = peak_memory(args, samples)
            text = ", ".join(f"{name} {mib:.0f} MiB" for name, mib in grown.items())
            print(f"{samples} samples: {text}; happo/mappo {grown['happo'] / grown['mappo']:.2f}")
        return
    rows = []
    for n_agents in args.agents:
        for samples in args.samples:
            for hidden in args.hidden:
                updates = contestants(args, n_agents, samples, hidden)
                times = measure(updates, args.repetitions, args.device)
                medians = {name: statistics.median(values) for name, values in times.items()}
                ratios = {
                    f"{a}/{b}": medians[a] / medians[b]
                    for a, b in RATIOS
                    if a in medians and b in medians
                }
                size = {"agents": n_agents, "samples": samples, "hidden": hidden}
                print(", ".join(f"{value} {name}" for name, value in size.items()))
                for name, median in medians.items():
                    spread = f"{min(times[name]):8.1f} .. {max(times[name]):.1f}"
                    print(f"  {name:<16}{median:10.1f} ms   ({spread})")
                print("  " + "   ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
                rows.append({**size, "discrete": args.discrete, "ms": times, "ratios": ratios})
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"about": about(args), "rows": rows}, indent=1))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
