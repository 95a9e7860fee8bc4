"""From a configuration to what learns: the policy that acts and the updater that trains it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias, cast

import torch
import torch.distributed as dist
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import nn
from torchrl.envs import EnvBase
from torchrl.modules import PopArtValueNorm, RunningValueNorm, ValueNorm
from torchrl.objectives import ValueEstimators
from torchrl.objectives.multiagent import IPPOLoss, MAPPOLoss

from torchrl_happo.networks.actors import joint_policy, make_actor, make_critic
from torchrl_happo.networks.specs import read_groups
from torchrl_happo.objectives import HAPPOLoss, HATRPOLoss
from torchrl_happo.objectives.base import SequentialLossMixin
from torchrl_happo.objectives.value_norm import RealValues
from torchrl_happo.policy.memory import has_memory
from torchrl_happo.recipe.baselines import SimultaneousUpdater, make_group_critic
from torchrl_happo.recipe.config import (
    AlgorithmConfig,
    ConfigError,
    Happo,
    Hatrpo,
    Ippo,
    Mappo,
    ModelConfig,
    RecurrentModel,
    TrainConfig,
)
from torchrl_happo.update.updater import SequentialUpdater

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
}

VALUE_NORMS: dict[str, Callable[[AlgorithmConfig], ValueNorm]] = {
    "popart_ema": lambda settings: PopArtValueNorm(shape=1, beta=settings.value_norm_decay),
    "running": lambda settings: RunningValueNorm(shape=1),
}


Group: TypeAlias = dist.ProcessGroup | None


class Updater(Protocol):
    """What the recipe asks of an updater, whatever its algorithm."""

    def __call__(self, batch: TensorDictBase) -> TensorDict:
        """Learns from a batch; returns nested scalars to report."""

    def state_dict(self) -> dict[str, Any]:
        """Everything the next update depends on, loadable with ``weights_only=True``."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`; one that does not fit changes nothing."""


@dataclass(frozen=True)
class Learner:
    """A policy for all agents, and the updater that trains this very policy."""

    policy: TensorDictModuleBase
    updater: Updater


def make_learner(config: TrainConfig, env: EnvBase, process_group: Group = None) -> Learner:
    """Builds networks, loss and updater for an environment.

    Args:
        config (TrainConfig): the run.
        env (EnvBase): any environment of the task, for its specs.
        process_group (ProcessGroup, optional): of several learners. Defaults to ``None``: alone.
    """
    for schema, build in _BUILDERS.items():
        if isinstance(config.algorithm, schema):
            return build(config, env, config.algorithm, process_group)
    raise ConfigError(f"The recipe does not know the algorithm {config.algorithm.name!r}.")


def _make_happo(
    config: TrainConfig, env: EnvBase, settings: Happo, process_group: Group
) -> Learner:
    actor = make_actor(env, **_policies(config.model))
    loss = HAPPOLoss(
        _by_group(env, actor),
        _make_critic(config, env),
        clip_epsilon=_clip_range(settings),
        entropy_coeff=settings.entropy_coeff,
        popart=settings.popart,
        **_critic_loss(settings, env),
    )
    return _sequential(config, settings, actor, loss, process_group)


def _make_hatrpo(
    config: TrainConfig, env: EnvBase, settings: Hatrpo, process_group: Group
) -> Learner:
    actor = make_actor(env, **_policies(config.model))
    loss = HATRPOLoss(
        _by_group(env, actor),
        _make_critic(config, env),
        max_kl=settings.max_kl,
        kl_split=cast(Literal["equal"] | None, settings.kl_split),
        damping=settings.damping,
        cg_iterations=settings.cg_iterations,
        fisher_fraction=settings.fisher_fraction,
        popart=settings.popart,
        **_critic_loss(settings, env),
    )
    return _sequential(config, settings, actor, loss, process_group)


def _sequential(
    config: TrainConfig,
    settings: Happo | Hatrpo,
    actor: Any,
    loss: SequentialLossMixin,
    process_group: Group,
) -> Learner:
    loss.make_value_estimator(ValueEstimators.MAGAE, gamma=settings.gamma, lmbda=settings.lmbda)
    updater = SequentialUpdater(
        loss,
        **_optimization(config),
        num_epochs=settings.num_epochs,
        critic_epochs=settings.critic_epochs,
        minibatch_size=settings.minibatch_size,
        max_grad_norm=settings.max_grad_norm,
        order=settings.order,
        target_kl=settings.target_kl if isinstance(settings, Happo) else None,
        sequence_length=getattr(config.model, "sequence_length", None),
        compile=settings.compile,
        seed=config.seed,
        process_group=process_group,
    )
    # Its memory then goes on from one batch to the next.
    critic = loss.critic_network if has_memory(loss.critic_network) else None
    return Learner(joint_policy(actor, critic), updater)


def _make_baseline(
    config: TrainConfig, env: EnvBase, settings: Mappo | Ippo, process_group: Group
) -> Learner:
    assert process_group is None  # see ranks.part_of
    centralized = isinstance(settings, Mappo)
    loss_class = MAPPOLoss if centralized else IPPOLoss
    share = settings.share_params
    actors = _by_group(env, make_actor(env, share_params=share, **_policies(config.model)))
    losses = {}
    for group in read_groups(env, "observation"):
        critic: TensorDictModuleBase = make_group_critic(
            env,
            group,
            centralized=centralized,
            state_key=_state_key(env),
            share_params=share,
            device=env.device,
            **_networks(config.model),
        )
        critic_loss = _critic_loss(settings, env)
        if critic_loss["value_norm"] is not None:
            # TorchRL's losses expect real values and normalise them: so the network, behind this,
            # predicts normalised ones, as with HAPPO.
            critic = RealValues(critic, critic_loss["value_norm"], group.key("state_value"))
        losses[group.name] = loss = loss_class(
            actors[group.name],
            critic,
            clip_epsilon=settings.clip_epsilon,
            entropy_coeff=settings.entropy_coeff,
            # TanhNormal has no closed-form entropy: unused, it would only cost time.
            entropy_bonus=settings.entropy_coeff > 0,
            functional=False,
            **critic_loss,
        )
        loss.set_keys(
            action=group.action,
            sample_log_prob=group.key("action_log_prob"),
            value=group.key("state_value"),
            advantage=group.key("advantage"),
            value_target=group.key("value_target"),
        )
        loss.make_value_estimator(ValueEstimators.MAGAE, gamma=settings.gamma, lmbda=settings.lmbda)
    updater = SimultaneousUpdater(
        losses,
        **_optimization(config),
        num_epochs=settings.num_epochs,
        minibatch_size=settings.minibatch_size or config.frames_per_batch,
        max_grad_norm=settings.max_grad_norm,
    )
    return Learner(joint_policy(actors), updater)


def _networks(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_cells": model.num_cells,
        "activation_class": ACTIVATIONS[model.activation],
        "layer_norm": model.layer_norm,
    }


def _policies(model: ModelConfig) -> dict[str, Any]:
    memory = {}
    if isinstance(model, RecurrentModel):
        memory = {"recurrent": model.name, "hidden_size": model.hidden_size}
    return {
        **_networks(model),
        **memory,
        "init": model.actor_init,
        "state_dependent_std": model.state_dependent_std,
        "scale_mapping": f"biased_softplus_{model.initial_std}",
        "max_std": model.max_std,
    }


def _optimization(config: TrainConfig) -> dict[str, Any]:
    settings = config.algorithm
    return {
        "optimizer": partial(torch.optim.Adam, lr=settings.lr, eps=settings.adam_eps),
        "scheduler": partial(
            torch.optim.lr_scheduler.LinearLR,
            start_factor=1.0,
            end_factor=0.0,
            total_iters=config.iterations,
        )
        if settings.lr_schedule == "linear"
        else None,
    }


def _make_critic(config: TrainConfig, env: EnvBase) -> TensorDictModule | TensorDictSequential:
    has_state = _state_key(env) is not None
    sees = config.critic.input
    if sees == "auto":
        sees = "state" if has_state else "observations"
    if sees == "state" and not has_state:
        raise ConfigError(
            f"critic.input=state needs a state of the environment's own, which {config.task.name} "
            "does not have: take observations or agent_specific."
        )
    memory: dict[str, Any] = {}
    if config.critic.model != "mlp":
        memory = {"recurrent": config.critic.model, "hidden_size": config.critic.hidden_size}
    return make_critic(env, input=sees, **memory, **_networks(config.model))


def _critic_loss(settings: AlgorithmConfig, env: EnvBase) -> dict[str, Any]:
    norm = None
    if settings.value_norm is not None:
        norm = VALUE_NORMS[settings.value_norm](settings).to(env.device)
    return {
        "loss_critic_type": settings.loss_critic_type,
        "critic_coeff": settings.critic_coeff,
        "clip_value": settings.clip_value,
        "value_norm": norm,
    }


def _clip_range(settings: Happo) -> float | tuple[float, float]:
    high = settings.clip_epsilon_high
    return settings.clip_epsilon if high is None else (settings.clip_epsilon, high)


def _state_key(env: EnvBase) -> str | None:
    """What a centralised critic sees: the environment's own state, or else all observations."""
    return "state" if "state" in env.full_observation_spec.keys() else None


def _by_group(env: EnvBase, actor: Any) -> dict[str, Any]:
    """Actors under the names of their groups, also where there is only one group."""
    return actor if isinstance(actor, dict) else {read_groups(env, "observation")[0].name: actor}


_BUILDERS: dict[type[AlgorithmConfig], Callable[[TrainConfig, EnvBase, Any, Group], Learner]] = {
    Happo: _make_happo,
    Hatrpo: _make_hatrpo,
    Mappo: _make_baseline,
    Ippo: _make_baseline,
}
