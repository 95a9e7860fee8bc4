"""From the configuration to the arguments of networks, losses and optimisers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn
from torchrl.envs import EnvBase

from torchrl_happo.networks.actors import joint_policy, make_actor
from torchrl_happo.networks.specs import read_groups
from torchrl_happo.recipe.config import AlgorithmConfig, ModelConfig, RecurrentModel, TrainConfig
from torchrl_happo.recipe.references import build_network
from torchrl_happo.versions import PopArtValueNorm, RunningValueNorm, ValueNorm

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


def make_actors(config: TrainConfig, env: EnvBase, **kwargs: Any) -> dict[str, Any]:
    """Build the actor of every group, under the name of its group."""
    model = config.model
    if model.make_actor is not None:
        actors = build_network(model.make_actor, env, "model.make_actor")
    else:
        memory: dict[str, Any] = {}
        if isinstance(model, RecurrentModel):
            memory = {"recurrent": model.name, "hidden_size": model.hidden_size}
        actors = make_actor(
            env,
            **network_settings(model),
            **memory,
            init=cast(Literal["orthogonal", "torch"], model.actor_init),
            state_dependent_std=model.state_dependent_std,
            scale_mapping=f"biased_softplus_{model.initial_std}",
            max_std=model.max_std,
            **kwargs,
        )
    one = not isinstance(actors, dict)
    return {read_groups(env, "observation")[0].name: actors} if one else actors


def policy_of(actors: dict[str, Any], critic: Any = None) -> Any:
    """Return the policy of all groups; a critic that has memory acts along."""
    return joint_policy(actors if len(actors) > 1 else next(iter(actors.values())), critic)


def network_settings(model: ModelConfig) -> dict[str, Any]:
    """Return the arguments that the networks of actors and critics share."""
    return {
        "num_cells": model.num_cells,
        "activation_class": ACTIVATIONS[model.activation],
        "layer_norm": model.layer_norm,
    }


def optimizer_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the factories of the optimiser and of its scheduler."""
    settings, scheduler = config.algorithm, None
    if settings.lr_schedule == "linear":
        scheduler = partial(
            torch.optim.lr_scheduler.LinearLR,
            start_factor=1.0,
            end_factor=0.0,
            total_iters=config.iterations,
        )
    optimizer = partial(torch.optim.Adam, lr=settings.lr, eps=settings.adam_eps)
    return {"optimizer": optimizer, "scheduler": scheduler}


def critic_settings(settings: AlgorithmConfig, env: EnvBase) -> dict[str, Any]:
    """Return the arguments of a loss that are about its critic."""
    norm = None
    if settings.value_norm is not None:
        norm = VALUE_NORMS[settings.value_norm](settings).to(env.device)
    return {
        "critic_coeff": settings.critic_coeff,
        "loss_critic_type": settings.loss_critic_type,
        "clip_value": settings.clip_value,
        "value_norm": norm,
    }


def state_key(env: EnvBase) -> str | None:
    """Return the key of the environment's own state; ``None`` if it has none."""
    return "state" if "state" in env.full_observation_spec.keys() else None
