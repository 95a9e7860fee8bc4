"""The cures that sentences about batches, states and builders name, as calls that work."""

from __future__ import annotations

from functools import partial

import torch
from mended_calls import (
    alike,
    in_double,
    loads,
    reads,
    renamed,
    resumes,
    trains,
)
from team import make_actor, make_observations
from tensordict import TensorDict
from torch import nn
from torch.optim.lr_scheduler import StepLR
from wrong_calls import (
    STEPS,
    Team,
    categorical,
    changed,
    flat_actor,
    game,
    play,
    ramp,
    setting,
    stack,
)
from wrong_library import ACT, DONE, LOG_PROB, NEXT_OBS, OBS, REWARD

from torchrl_happo import (
    ActorList,
    HATRPOLoss,
    TeamReward,
    joint_policy,
)
from torchrl_happo import make_actor as build_actor
from torchrl_happo import make_critic as build_critic
from torchrl_happo.envs import MatrixGame

#: From the name of a wrong call to the call that its sentence asks for.
DATA = {
    **alike(
        (
            *(f"no {key}" for key in (OBS, ACT, LOG_PROB, NEXT_OBS)),
            *("actions of another size", "actions of another type", "actions beyond the bounds"),
            *("log-probabilities of nobody", "log-probabilities that are whole", "fewer agents"),
            *("a dict", "next observations of another size", "a mask of too few steps"),
        ),
        trains(),
    ),
    f"no {REWARD}": reads(renamed(REWARD, ("next", "pay")), reward="pay"),
    f"no {DONE}": reads(renamed(DONE, ("next", "over")), done="over"),
    f"no {('next', 'terminated')}": reads(
        renamed(("next", "terminated"), ("next", "dead")), terminated="dead"
    ),
    "rewards that are whole": reads(setting(REWARD, lambda reward: reward.long().float())),
    "an advantage without a target": reads(
        lambda batch: batch.update(
            {"advantage": ramp(*STEPS, 1), "value_target": ramp(*STEPS, 3, 1)}
        )
    ),
    "a single step": reads(lambda batch: batch[:1, :1]),
    "no step": reads(lambda batch: batch[:, :1]),
    **alike(
        ("another device", "one entry on another device"), reads(lambda batch: batch.to("cpu"))
    ),
    "log-probabilities with a gradient": reads(setting(LOG_PROB, lambda p: p.clone().detach())),
    "a reward without its last dimension": reads(
        setting(REWARD, lambda reward: reward.squeeze(-1).unsqueeze(-1))
    ),
    "done as a number": reads(setting(DONE, lambda done: done.float().bool())),
    "an advantage of two agents": reads(
        lambda batch: batch.update(
            {"advantage": ramp(*STEPS, 3, 1), "value_target": ramp(*STEPS, 3, 1)}
        )
    ),
    "a whole advantage": reads(
        lambda batch: batch.update(
            {"advantage": ramp(*STEPS, 1).float(), "value_target": ramp(*STEPS, 3, 1)}
        )
    ),
    "a mask that does not fit": reads(
        lambda batch: batch.set(("agents", "active"), torch.ones(*STEPS, 3, dtype=torch.bool))
    ),
    "a mask of numbers": reads(
        lambda batch: batch.set(("collector", "mask"), torch.ones(STEPS, dtype=torch.bool))
    ),
    "networks of another type": trains(
        changed(Team, lambda team: setattr(team, "batch", in_double(team)))
    ),
    "observations of another type": reads(setting(OBS, lambda seen: seen.double().float())),
    **alike(
        (
            *("observations of another size", "a target for the team alone"),
            *("a critic of two values", "networks on the meta device", "networks on two devices"),
        ),
        trains(),
    ),
    "a trust region without a divergence": trains(lambda: Team(loss=HATRPOLoss)),
    "actions that do not exist": trains(lambda: Team(categorical(stack()))),
    "a critic of what is not there": trains(Team),
    "an order that forgets an agent": trains(lambda: Team(order=lambda batch: [0, 1, 2])),
    **alike(
        (
            *(
                "a state with a network more",
                "a state with words for weights",
                "a number for a state",
            ),
            *("a state without an agent", "a state of a larger team", "an empty state"),
            *("a state of narrower moments", "a state without its counters"),
        ),
        loads(Team),
    ),
    "a state of HATRPO": loads(partial(Team, loss=HATRPOLoss)),
    "a state with a schedule": loads(partial(Team, scheduler=partial(StepLR, step_size=1))),
    **alike(
        ("a state without an optimiser", "a state of another optimiser"),
        loads(partial(Team, optimizer=partial(torch.optim.SGD, lr=0.1))),
    ),
    **alike(
        ("networks for no environment", "an unknown group", "an unknown observation"),
        lambda: build_actor(game(), observation_key="observation"),
    ),
    **alike(
        ("a layer of width 0", "a number for layers"), lambda: build_actor(game(), num_cells=(8, 1))
    ),
    "the name of an activation": lambda: build_actor(game(), activation_class=nn.Tanh),
    "an unknown mapping": lambda: build_actor(game(), scale_mapping="softplus"),
    "a bound of no parameter": lambda: build_actor(game(), max_std=None),
    "a bound that is passed at once": lambda: build_actor(
        game(), max_std=1.5, state_dependent_std=False
    ),
    "a gain of NaN": lambda: build_actor(game(), output_gain=0.01),
    **alike(
        (
            *("a critic of no environment", "a critic of no groups"),
            *("a critic of groups in one string", "a critic of no state", "a critic of both"),
        ),
        lambda: (build_critic(game(), groups=["agents"]), build_critic(game())),
    ),
    **alike(("no actors to join", "nothing to join"), lambda: joint_policy(build_actor(game()))),
    "a list of no actors": lambda: ActorList([make_actor(1)]),
    "a list of two groups": lambda: ActorList([flat_actor() for _ in range(2)]),
    "a list of too many actors": lambda: ActorList([flat_actor() for _ in range(3)])(
        make_observations()
    ),
    **alike(
        ("a payoff in a list", "a payoff of unlike sizes", "a payoff of NaN", "no games"),
        lambda: MatrixGame(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), num_envs=1),
    ),
    "an action that does not exist": lambda: play(torch.full((4, 2), 1)),
    "a game without action": lambda: game().rollout(2, build_actor(game())),
    "an unknown reduction": lambda: [TeamReward(n) for n in ("mean", "sum", None)],
    "a reduction of nothing": lambda: (TeamReward(), TeamReward(in_keys=[("agents", "reward")])),
    "a reward that is missing": lambda: TeamReward(in_keys=["pay"])(
        TensorDict({"next": {"pay": torch.zeros(2, 1)}}, [2])
    ),
    "a reward of no shape": lambda: TeamReward(in_keys=[("a", "r")])(
        TensorDict({"next": {"a": {"r": torch.zeros(2, 3, 1)}}}, [2])
    ),
    "a device that is not there": lambda: resumes("device=cpu"),
}

#: The wrong calls whose sentences name no cure: what is damaged stays so, what is not finite has
#: its reason elsewhere, and an unknown keyword is refused by Python.
WITHOUT_CURE = {
    *(f"{value} in {key}" for value in ("nan", "inf") for key in (OBS, ACT, LOG_PROB)),
    *(f"{value} in {key}" for value in ("nan", "inf") for key in (REWARD, NEXT_OBS)),
    *(f"NaN in the {what}" for what in ("advantage", "target", "stored distribution")),
    "NaN in the rewards of agents",
    "an unknown setting",
    *("a state of an optimiser in words", "a state of another version", "a state without networks"),
    *("a state of impossible generators", "a state that counts in words"),
    "a state without generators",
}
