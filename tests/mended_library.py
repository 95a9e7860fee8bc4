"""The cures that sentences about losses and updaters name, as calls that work."""

from __future__ import annotations

from functools import partial

import torch
from mended_calls import (
    ADAM,
    alike,
    seen,
    trains,
    weights,
)
from newer import PopArtValueNorm, RunningValueNorm
from team import make_actor, make_critic
from torch import nn
from torch.optim.lr_scheduler import LinearLR, StepLR
from torchrl.data import LazyTensorStorage, ReplayBuffer
from wrong_calls import (
    STEPS,
    Team,
    categorical,
    critic_of,
    deviating,
    hatrpo,
    loss,
    paid,
    stack,
    two_keys,
)
from wrong_library import ACT, LOG_PROB

from torchrl_happo import (
    ActorList,
    HAPPOLoss,
    HATRPOLoss,
    SequentialUpdater,
)
from torchrl_happo.steps import FirstOrder, Problem, ShuffledMinibatches, TrustRegion
from torchrl_happo.steps.optimizers import build_optimizer, build_scheduler

#: From the name of a wrong call to the call that its sentence asks for.
CALLS = {
    "an actor that is a plain network": lambda: loss(categorical(stack())),
    "a critic that is a plain network": trains(
        lambda: Team(critic=lambda: critic_of(nn.Sequential(nn.Flatten(-2), nn.Linear(15, 1))))
    ),
    "a critic for each group": trains(Team),
    "agents that share a network": lambda: loss(make_actor(share_params=True), blocks=["agents"]),
    "agents that see each other": lambda: loss(
        categorical(stack(centralized=True)), blocks=["agents"]
    ),
    "networks of unlike numbers of agents": trains(
        lambda: Team(categorical(nn.Sequential(stack(), stack(n_agent_inputs=3))))
    ),
    "one actor for two groups": lambda: loss(
        {group: make_actor(group=group) for group in "ab"}, two_keys()
    ),
    "one actor for two agents of a list": trains(
        lambda: Team(ActorList([categorical(nn.Linear(5, 3)) for _ in range(3)]))
    ),
    "a block of a list": lambda: loss(categorical(nn.Linear(5, 3)), blocks=["agents"]),
    "a deviation that agents share": lambda: loss(deviating(), blocks=["agents"]),
    "an action that no actor writes": lambda: loss().set_keys(action=ACT),
    "a value that no critic writes": lambda: loss().set_keys(value=("agents", "state_value")),
    "an unknown key": lambda: loss().set_keys(value=("agents", "state_value")),
    "loss_critic_type": lambda: loss(loss_critic_type="smooth_l1"),
    "popart without statistics": lambda: loss(popart=True, value_norm=PopArtValueNorm(shape=1)),
    "statistics of three values": lambda: loss(value_norm=RunningValueNorm(shape=1)),
    "a weight of no critic": lambda: HAPPOLoss(make_actor(), make_critic(), critic_coeff=1.0),
    "entropy_coeff of no group": lambda: loss(entropy_coeff={LOG_PROB: 0.1}),
    "kl_split": lambda: hatrpo(kl_split="equal"),
    "a loss of TorchRL": trains(Team),
    "agents at the root": trains(lambda: Team(categorical(stack()))),
    "an unknown keyword": lambda: loss(clip_epsilon=0.2),
    "a keyword of the other loss": lambda: hatrpo(max_kl=0.02),
    "a discount": lambda: loss().make_value_estimator(gamma=0.9, lmbda=0.9),
    "an advantage standardised at each step": lambda: SequentialUpdater(
        loss(normalize_advantage_exclude_dims=(-2,))
    ),
    "a loss that is a sum": lambda: SequentialUpdater(loss(reduction="mean")),
    "a frozen actor": trains(lambda: Team(make_actor().requires_grad_(True))),
    "a group by the critic's name": lambda: SequentialUpdater(
        loss({"critics": make_actor(1, group="critics")})
    ),
    "target_kl with HATRPO": trains(lambda: Team(loss=partial(HATRPOLoss, max_kl=0.1))),
    "an optimiser of other parameters": trains(
        lambda: Team(optimizer=partial(torch.optim.Adam, lr=3e-4))
    ),
    "LBFGS": trains(lambda: Team(optimizer=torch.optim.Adam)),
    "a schedule of a metric": trains(lambda: Team(scheduler=partial(LinearLR, total_iters=100))),
    "a buffer without a batch size": trains(
        lambda: Team(
            minibatch_size=None,
            replay_buffer=ReplayBuffer(storage=LazyTensorStorage(24), batch_size=5),
        )
    ),
    "a buffer that is too small": trains(
        lambda: Team(
            minibatch_size=None,
            replay_buffer=ReplayBuffer(storage=LazyTensorStorage(24), batch_size=5),
        )
    ),
    "a setting of nobody": trains(lambda: Team(num_epochs={"agents": 2, "agents_0": 3})),
    "an agent without a setting": trains(lambda: Team(minibatch_size={"agents_0": 5, "agents": 7})),
    "one network for a whole group": trains(lambda: Team(categorical(stack()))),
    "rewards that differ between agents": trains(paid(torch.ones(*STEPS, 3, 1))),
    "chunks that do not fit": trains(lambda: Team(sequence_length=3)),
    "an actor without log-probabilities": trains(
        lambda: Team(categorical(stack(), return_log_prob=True))
    ),
    "no actor": loss,
    "no group": lambda: loss({"agents": make_actor()}),
    "an actor without a distribution": loss,
    "a group named by a number": lambda: loss({"agents": make_actor()}),
    "an actor that has not seen data": lambda: loss(seen(categorical(stack(n_agent_inputs=None)))),
    "actors of a list over one trunk": trains(
        lambda: Team(ActorList([categorical(nn.Linear(5, 3)) for _ in range(3)]))
    ),
    "two agents of one name": lambda: loss(
        {"red": make_actor(2, group="red"), "blue": make_actor(1, group="blue")}
    ),
    "a log-probability that no actor writes": loss,
    "actor and critic that share": lambda: HAPPOLoss(make_actor(), make_critic()),
    "a block of no group": lambda: loss(blocks=["agents"]),
    "blocks in one string": lambda: loss(blocks=["agents"]),
    **alike(
        ("clip_epsilon 0", "clip_epsilon 1.5", "clip_epsilon NaN"), lambda: loss(clip_epsilon=0.99)
    ),
    **alike(
        ("clip_epsilon in words", "clip_epsilon upside down"),
        lambda: loss(clip_epsilon=(0.0, 1.2)),
    ),
    "entropy_coeff NaN": lambda: loss(entropy_coeff=0.1),
    "entropy_coeff of no head": lambda: loss(entropy_coeff={LOG_PROB: 0.1}),
    "critic_coeff below 0": lambda: loss(critic_coeff=0.0),
    "reduction": lambda: loss(reduction="none"),
    "clip_value below 0": lambda: (loss(clip_value=0.1), loss(clip_value=None)),
    "samples_mc_entropy 0": lambda: loss(samples_mc_entropy=1),
    **alike(("max_kl 0", "max_kl as text", "max_kl in words"), lambda: hatrpo(max_kl=0.01)),
    **alike(("damping below 0", "damping in words"), lambda: hatrpo(damping=0.0)),
    **alike(("cg_iterations 0", "cg_iterations 1.5"), lambda: hatrpo(cg_iterations=1)),
    **alike(("accept_ratio 2", "accept_ratio in words"), lambda: hatrpo(accept_ratio=0.0)),
    "backtrack_factor in words": lambda: hatrpo(backtrack_factor=0.5),
    "cg_tolerance in words": lambda: hatrpo(cg_tolerance=1e-10),
    "fisher_fraction in words": lambda: hatrpo(fisher_fraction=0.5),
    "max_backtracks 1.5": lambda: hatrpo(max_backtracks=1),
    "critic_coeff of HATRPO below 0": lambda: hatrpo(critic_coeff=0.0),
    "an actor of HATRPO that is a plain network": hatrpo,
    "line_search": lambda: [hatrpo(line_search=n) for n in ("sequential", "batched", None)],
    **alike(
        (
            *("shares of more than all", "shares of less than all"),
            *("no share for one", "a share in place of shares"),
        ),
        lambda: hatrpo(kl_split=lambda agents: [0.5, 0.25, 0.25]),
    ),
    "no loss": trains(),
    "a hidden layer that PopArt would rescale": lambda: SequentialUpdater(
        loss(value_norm=PopArtValueNorm(shape=1), popart=True)
    ),
    "a frozen critic": lambda: SequentialUpdater(
        loss(critic=make_critic().requires_grad_(False), critic_coeff=0)
    ),
    "a critic that writes other keys": lambda: loss(critic=two_keys()).set_keys(value="first"),
    **alike(
        (
            *("an optimiser in place of a factory", "an optimiser of some parameters"),
            *("a factory of nothing", "the name of an optimiser"),
        ),
        trains(lambda: Team(optimizer=ADAM, critic_optimizer=ADAM)),
    ),
    "a factory of no schedule": trains(lambda: Team(scheduler=partial(StepLR, step_size=100))),
    **alike(
        ("num_epochs 0", "num_epochs 1.5", "critic_epochs 0"),
        trains(lambda: Team(num_epochs=1, critic_epochs=1)),
    ),
    **alike(
        ("minibatch_size 0", "critic_minibatch_size 0", "minibatch_size in words"),
        trains(lambda: Team(minibatch_size=1, critic_minibatch_size=1)),
    ),
    **alike(
        ("max_grad_norm below 0", "max_grad_norm in words", "target_kl NaN"),
        trains(lambda: Team(max_grad_norm=0.1, target_kl=0.1)),
    ),
    "sequence_length 0": trains(lambda: Team(sequence_length=1)),
    **alike(("seed in words", "seed below 0"), trains(lambda: Team(seed=2**63 - 1))),
    "an unknown order": lambda: [Team(order=n) for n in ("random", "fixed", "semi_greedy")],
    **alike(
        (
            "an order with an unknown name",
            "an order with an agent twice",
            "an order that is a number",
        ),
        trains(lambda: Team(order=["agents_2", "agents_0", "agents_1"])),
    ),
    "a buffer that is none": trains(lambda: Team(replay_buffer=None)),
    "a step without epochs": lambda: FirstOrder(num_epochs=1),
    "epochs of one agent that are none": lambda: FirstOrder(num_epochs={"one": 2, "two": 1}),
    "a step of too short gradients": lambda: FirstOrder(max_grad_norm=None),
    "a trust region without a policy": lambda: FirstOrder()(Problem("x", len, weights)),
    "an optimiser that is no factory": lambda: build_optimizer(ADAM, [w for _, w in weights()]),
    "a scheduler that is no factory": lambda: build_scheduler(
        partial(StepLR, step_size=100), ADAM([w for _, w in weights()])
    ),
    "minibatches of nothing": lambda: ShuffledMinibatches(1, None),
    "a trust region without trust": lambda: TrustRegion(backtrack_factor=0.5),
}
