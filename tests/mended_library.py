"""The cures that the sentences of wrong calls name, as calls that work."""

from __future__ import annotations

from functools import partial

import torch
from team import make_actor, make_critic
from torch import nn
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.modules import PopArtValueNorm, RunningValueNorm
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

from torchrl_happo import ActorList, HAPPOLoss, HATRPOLoss, SequentialUpdater


def trains(given):
    """A call that updates a team with its own batch, from a factory of the team."""
    return lambda: (lambda team: team.updater(team.batch))(given())


#: From the name of a wrong call to the call that its sentence asks for.
MENDED = {
    "an actor that is a plain network": lambda: loss(categorical(stack())),
    "a critic that is a plain network": trains(
        lambda: Team(critic=lambda: critic_of(nn.Sequential(nn.Flatten(-2), nn.Linear(15, 1))))
    ),
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
    "a schedule of a metric": trains(
        lambda: Team(scheduler=partial(torch.optim.lr_scheduler.LinearLR, total_iters=100))
    ),
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
}
