"""HAPPO and HATRPO for TorchRL: train a team of different agents, one after the other.

A script needs four names: `TeamReward` makes one reward of the agents' own, `HAPPOLoss` (or
`HATRPOLoss`, ...) holds actors and critic, `SequentialUpdater` is called with each batch of a
collector, and `make_actor` and `make_critic` build networks from an environment's specs.

- **Algorithms**, a page each: `torchrl_happo.objectives.happo`, `torchrl_happo.objectives.hatrpo`,
  `torchrl_happo.objectives.haa2c`, `torchrl_happo.objectives.coppo`,
  `torchrl_happo.objectives.a2po`, `torchrl_happo.objectives.lagrangian`,
  `torchrl_happo.objectives.macpo`, `torchrl_happo.objectives.mat`,
  `torchrl_happo.objectives.tppo`.
- **Agents that depend on each other**: `torchrl_happo.networks.transformer`,
  `torchrl_happo.update.distillation`.
- **Examples and tuning**: `torchrl_happo.examples`.
- **Metrics** with their healthy ranges: `torchrl_happo.update.metrics`.
- **The parts of an update**, each replaceable: `torchrl_happo.update.order`,
  `torchrl_happo.update.correction`, `torchrl_happo.steps.step`.
- **Runs, checkpoints, export**: `torchrl_happo.recipe`; `python -m torchrl_happo.train --help`.

# Troubleshooting

An error is one sentence with a cure. What else may puzzle, by symptom:

- *"... differ between the agents of the team"*: the theory has one reward. Append
  `TeamReward("mean")` and leave `set_keys(reward=...)` out, or keep it with `in_place=True`.
- *"reward_key requested but more than one key present"* (TorchRL): `TeamReward` has added the
  team's reward. Append it with `in_place=True`, or name `("agents", "reward")` yourself.
- *"... HAPPO updates one agent after the other and needs a network for each"*: build the actor with
  `share_params=False`, or pass `blocks=["agents"]` for agents that move as one.
- *"... share the parameter ..."*: of two agents, or of an actor and a critic. Build them apart.
- *"The batch has no entry ... '_h'"*: TorchRL's collectors drop names that begin with `_`.
- *"... cannot read the batch"*: a network got shapes that it was not built for; the sentence lists
  what it got. Often the critic reads unlike agents as one group.
- *"The gradient of ... was not finite; its update was taken back"* (a warning): look for infinite
  rewards or a policy at the bound of its actions; the parameters are those before.
- *"... was differentiated without an entry 'factor'"* (a warning): a loop of MAPPO around
  `HAPPOLoss` moves all agents at once. Use `SequentialUpdater`, or
  `torchrl_happo.examples.happo_by_hand`.
- *It does not learn*: the symptoms in `torchrl_happo.examples` say what to touch. First look at
  `kl` (do the agents move?) and `explained_variance` (does the critic know anything?).
- *Episodes end at a time limit and values are too low*: `VmasEnv(max_steps=...)` terminates; pass
  `max_steps=None` and append `StepCounter(...)`.
- *An update is slow*: `torch.set_num_threads(1)` on small machines, larger minibatches,
  `compile=True`; on a GPU `cudagraphs=True`.
- *The loss or policy is missing after a process was killed*: `updater.state_dict()` is everything;
  save it with `torch.save` and load it with `weights_only=True`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrl_happo.envs.team_reward import TeamReward
    from torchrl_happo.networks.actors import (
        joint_policy,
        make_actor,
        make_critic,
        memory_transforms,
    )
    from torchrl_happo.networks.transformer.build import make_transformer
    from torchrl_happo.objectives import (
        A2POLoss,
        CoPPOLoss,
        HAA2CLoss,
        HAPPOLagrangianLoss,
        HAPPOLoss,
        HATRPOLoss,
        MACPOLoss,
        MATLoss,
        TPPOLoss,
    )
    from torchrl_happo.policy.actor_list import ActorList
    from torchrl_happo.update.updater import SequentialUpdater

__all__ = [
    "A2POLoss",
    "ActorList",
    "CoPPOLoss",
    "HAA2CLoss",
    "HAPPOLagrangianLoss",
    "HAPPOLoss",
    "HATRPOLoss",
    "MACPOLoss",
    "MATLoss",
    "SequentialUpdater",
    "TPPOLoss",
    "TeamReward",
    "joint_policy",
    "make_actor",
    "make_critic",
    "make_transformer",
    "memory_transforms",
]

__version__ = "0.1.0"

#: Where each name is at home. A name is imported when it is asked for: the command line can answer
#: ``--help`` and refuse a mistake without waiting for torch.
_HOMES = {
    "ActorList": "policy.actor_list",
    **dict.fromkeys(
        (
            *("A2POLoss", "CoPPOLoss", "HAA2CLoss"),
            *("HAPPOLagrangianLoss", "HAPPOLoss", "HATRPOLoss", "MACPOLoss", "MATLoss", "TPPOLoss"),
        ),
        "objectives",
    ),
    "SequentialUpdater": "update.updater",
    "TeamReward": "envs.team_reward",
    **dict.fromkeys(
        ("joint_policy", "make_actor", "make_critic", "memory_transforms"), "networks.actors"
    ),
    "make_transformer": "networks.transformer.build",
}


def __getattr__(name: str) -> Any:
    """Import a public name."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
