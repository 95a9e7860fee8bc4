"""A team's networks, built from the specs of its environment.

:func:`make_actor` gives every agent a policy of its own, :func:`make_critic` the team one critic.
Both are made of TorchRL's modules: whatever takes the networks of a MAPPO script takes these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import NestedKey
from tensordict.nn import (
    AddStateIndependentNormalScale,
    NormalParamExtractor,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torch import Tensor, nn
from torchrl.envs import EnvBase
from torchrl.modules import MLP, MultiAgentMLP, ProbabilisticActor

from torchrl_happo.specs import (
    ActionHead,
    Group,
    observation_shape,
    read_action_head,
    read_groups,
    select_groups,
)

__all__ = ["CentralizedMLP", "joint_policy", "make_actor", "make_critic"]


def make_actor(
    env: EnvBase,
    group: str | None = None,
    *,
    num_cells: Sequence[int] = (128, 128),
    activation_class: type[nn.Module] = nn.Tanh,
    share_params: bool = False,
    state_dependent_std: bool = True,
    scale_mapping: str = "biased_softplus_1.0",
    output_gain: float = 0.01,
    observation_key: str = "observation",
    mask_key: str | None = "action_mask",
    device: torch.device | str | None = None,
) -> ProbabilisticActor | dict[str, ProbabilisticActor]:
    r"""Builds a policy for every agent of an environment.

    The distribution follows the action spec of the group:

    ========================  ===================================================================
    action spec               distribution
    ========================  ===================================================================
    bounded, continuous       :class:`~torchrl.modules.TanhNormal` between the bounds of each
                              agent and each dimension
    unbounded, continuous     :class:`~torchrl.modules.IndependentNormal`
    categorical               :class:`~torch.distributions.Categorical`, or
                              :class:`~torchrl.modules.MaskedCategorical` if there is a mask
    one-hot                   :class:`~torchrl.modules.OneHotCategorical`, or
                              :class:`~torchrl.modules.MaskedOneHotCategorical` if there is a mask
    ========================  ===================================================================

    Weights are orthogonal and biases zero. The small gain of the last layer makes the first policy
    nearly the same at every observation, which on-policy methods are better for
    (`Andrychowicz et al., 2021 <https://arxiv.org/abs/2006.05990>`_). Each agent draws its own
    weights from torch's global generator.

    Args:
        env (EnvBase): the environment, transforms included.
        group (str, optional): the group to build for. Defaults to all groups of the environment.

    Keyword Args:
        num_cells (sequence of int): widths of the hidden layers. Defaults to ``(128, 128)``.
        activation_class (type of nn.Module): activation of the hidden layers.
            Defaults to :class:`~torch.nn.Tanh`.
        share_params (bool): if ``True``, the agents of a group share one network. HAPPO and
            HATRPO then take the group as one block only. Defaults to ``False``.
        state_dependent_std (bool): if ``True``, the network outputs the standard deviation of a
            continuous action; otherwise it is a parameter of each agent and each dimension.
            Defaults to ``True``.
        scale_mapping (str): what makes the standard deviation positive, and its first value, the
            mapping of 0; see :func:`~tensordict.nn.mappings`.
            Defaults to ``"biased_softplus_1.0"``, which starts at 1.
        output_gain (float): gain of the last layer's initialisation. Defaults to ``0.01``.
        observation_key (str): name of the observation in the group.
            Defaults to ``"observation"``.
        mask_key (str, optional): name of the mask of available actions in the group, which is used
            where the environment has one. ``None`` ignores masks. Defaults to ``"action_mask"``.
        device (torch.device or str, optional): device of the parameters. Defaults to the
            environment's.

    Returns:
        the actor of the only group or of the one asked for; for several groups, one actor for each
        in a dict by name. An actor reads ``(group, observation_key)``, of shape ``[*B, n, d]`` for
        a group of ``n`` agents and ``[*B, d]`` for a group without an agent dimension, and writes
        ``(group, "action")`` and ``(group, "action_log_prob")``.

    Raises:
        KeyError: if the environment lacks the group or its observation.
        ValueError: if the observations are not vectors of the default dtype, the agents of a group
            have unlike spaces, or the action spec has no distribution in the table.

    Examples:
        >>> from torchrl.envs import VmasEnv
        >>> env = VmasEnv("balance", num_envs=4)
        >>> actor = make_actor(env, num_cells=(32,))
        >>> env.rollout(3, actor)["agents", "action_log_prob"].shape
        torch.Size([4, 3, 3])

        Unlike agents come in several groups, without padding:

        >>> env = VmasEnv("simple_speaker_listener", num_envs=4)
        >>> actors = make_actor(env)
        >>> sorted(actors)
        ['listener', 'speaker']
        >>> env.rollout(3, joint_policy(actors))["speaker", "action"].shape
        torch.Size([4, 3, 1, 5])
    """
    team = select_groups(read_groups(env, observation_key), None if group is None else [group])
    device = env.device if device is None else device
    actors = {
        member.name: _make_group_actor(
            member,
            read_action_head(env, member, mask_key),
            num_cells=num_cells,
            activation_class=activation_class,
            share_params=share_params,
            state_dependent_std=state_dependent_std,
            scale_mapping=scale_mapping,
            output_gain=output_gain,
            device=device,
        )
        for member in team
    }
    return actors if len(actors) > 1 else next(iter(actors.values()))


def joint_policy(
    actors: TensorDictModuleBase | Mapping[str, TensorDictModuleBase],
) -> TensorDictModuleBase:
    """The one policy that a collector rolls out, from the actors of all groups.

    Args:
        actors (TensorDictModule or mapping of str to it): what :func:`make_actor` returns.

    Returns:
        the actor itself if it is the only one; otherwise a module that calls one after the other
        and shares their parameters.

    Example:
        >>> from torchrl.collectors import Collector
        >>> from torchrl.envs import VmasEnv
        >>> env = VmasEnv("simple_tag", num_envs=4)
        >>> policy = joint_policy(make_actor(env))
        >>> batch = next(iter(Collector(env, policy, frames_per_batch=20)))
        >>> batch["adversary", "action"].shape, batch["agent", "action"].shape
        (torch.Size([4, 5, 3, 2]), torch.Size([4, 5, 1, 2]))
    """
    if not isinstance(actors, Mapping):
        return actors
    if not actors:
        raise ValueError("joint_policy got no actors; pass the actor of each group.")
    return TensorDictSequential(*actors.values())


def make_critic(
    env: EnvBase,
    *,
    groups: Sequence[str] | None = None,
    state_key: NestedKey | None = None,
    num_cells: Sequence[int] = (128, 128),
    activation_class: type[nn.Module] = nn.Tanh,
    output_gain: float = 1.0,
    observation_key: str = "observation",
    out_key: NestedKey = "state_value",
    device: torch.device | str | None = None,
) -> TensorDictModule:
    r"""Builds the centralised critic :math:`V(s)` of a team.

    The team's return is one number, so the critic writes one number, at the root. (A critic with an
    agent dimension would write, and be regressed on, the same number for every agent.)

    Args:
        env (EnvBase): the environment, transforms included.

    Keyword Args:
        groups (sequence of str, optional): whose observations the critic sees. Defaults to all
            groups of the environment.
        state_key (NestedKey, optional): the environment's own global state, to be read in place of
            the observations. Defaults to ``None``: the state is the concatenation of the
            observations of all agents.
        num_cells (sequence of int): widths of the hidden layers. Defaults to ``(128, 128)``.
        activation_class (type of nn.Module): activation of the hidden layers.
            Defaults to :class:`~torch.nn.Tanh`.
        output_gain (float): gain of the last layer's initialisation. Defaults to ``1.0``.
        observation_key (str): name of the observation in the groups.
            Defaults to ``"observation"``.
        out_key (NestedKey): where the value is written. Defaults to ``"state_value"``.
        device (torch.device or str, optional): device of the parameters. Defaults to the
            environment's.

    Returns:
        a module that reads the state or the observations and writes ``out_key``, of shape
        ``[*B, 1]``.

    Raises:
        KeyError: if the environment lacks a group, its observation or the state.
        ValueError: if the observations are not vectors of the default dtype, or the agents of a
            group have unlike ones.

    Example:
        >>> from torchrl.envs import VmasEnv
        >>> env = VmasEnv("simple_speaker_listener", num_envs=4)
        >>> critic = make_critic(env)
        >>> critic(env.reset())["state_value"].shape
        torch.Size([4, 1])
    """
    if state_key is not None and groups is not None:
        raise ValueError(
            "make_critic got both groups and state_key; pass groups to see observations, or "
            "state_key to see the environment's state."
        )
    if state_key is not None:
        shape = observation_shape(env, state_key)
        in_keys, event_dims, in_features = [state_key], [len(shape)], math.prod(shape)
    else:
        team = select_groups(read_groups(env, observation_key), groups)
        in_keys = [group.observation for group in team]
        event_dims = [1 if group.n_agents is None else 2 for group in team]
        in_features = sum(group.n_inputs * (group.n_agents or 1) for group in team)
    critic = CentralizedMLP(
        event_dims,
        in_features=in_features,
        out_features=1,
        num_cells=list(num_cells),
        activation_class=activation_class,
        device=env.device if device is None else device,
    )
    _init_orthogonal(critic.mlp, activation_class, output_gain)
    return TensorDictModule(critic, in_keys=in_keys, out_keys=[out_key])


class CentralizedMLP(nn.Module):
    """An MLP over several inputs, flattened and concatenated.

    Args:
        event_dims (sequence of int): for each input its number of dimensions after those of the
            batch: 1 for a vector ``[*B, d]``, 2 for a group's observations ``[*B, n, d]``.
        **kwargs: arguments of :class:`~torchrl.modules.MLP`.

    Example:
        >>> net = CentralizedMLP([2, 1], in_features=3 * 4 + 5, out_features=1, num_cells=[8])
        >>> net(torch.zeros(7, 3, 4), torch.zeros(7, 5)).shape
        torch.Size([7, 1])
    """

    def __init__(self, event_dims: Sequence[int], **kwargs: Any) -> None:
        super().__init__()
        self.event_dims = tuple(event_dims)
        self.mlp = MLP(**kwargs)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The output for a batch of inputs.

        Args:
            *inputs (torch.Tensor): one tensor for each of ``event_dims``.

        Returns:
            a tensor ``[*B, out_features]``.
        """
        events = zip(inputs, self.event_dims, strict=True)
        return self.mlp(torch.cat([tensor.flatten(-dims) for tensor, dims in events], dim=-1))


def _make_group_actor(
    group: Group,
    head: ActionHead,
    *,
    num_cells: Sequence[int],
    activation_class: type[nn.Module],
    share_params: bool,
    state_dependent_std: bool,
    scale_mapping: str,
    output_gain: float,
    device: torch.device | str | None,
) -> ProbabilisticActor:
    std_from_net = head.continuous and state_dependent_std
    mlp = {"num_cells": list(num_cells), "activation_class": activation_class, "device": device}
    n_outputs = head.size * (2 if std_from_net else 1)
    if group.n_agents is None:
        net = MLP(in_features=group.n_inputs, out_features=n_outputs, **mlp)
    else:
        net = MultiAgentMLP(
            n_agent_inputs=group.n_inputs,
            n_agent_outputs=n_outputs,
            n_agents=group.n_agents,
            centralized=False,
            share_params=share_params,
            **mlp,
        )
    _init_orthogonal(net, activation_class, output_gain)
    if std_from_net:
        net = nn.Sequential(net, NormalParamExtractor(scale_mapping))
    elif head.continuous:
        own_rows = group.n_agents is not None and not share_params
        shape = (group.n_agents, head.size) if own_rows else (head.size,)
        std = AddStateIndependentNormalScale(shape, scale_mapping=scale_mapping, device=device)
        net = nn.Sequential(net, std)
    names = ["loc", "scale"] if head.continuous else ["logits"]
    parameters = {name: group.key(name) for name in names}
    return ProbabilisticActor(
        TensorDictModule(net, in_keys=[group.observation], out_keys=list(parameters.values())),
        in_keys=parameters if head.mask is None else {**parameters, "mask": head.mask},
        out_keys=[group.action],
        distribution_class=head.distribution,
        distribution_kwargs={name: bound.to(device) for name, bound in head.bounds.items()},
        return_log_prob=True,
    )


@torch.no_grad()
def _init_orthogonal(net: nn.Module, activation_class: type[nn.Module], output_gain: float) -> None:
    """Orthogonal weights, each agent its own draw, and zero biases, written in place."""
    stateful = net.get_stateful_net() if isinstance(net, MultiAgentMLP) else net
    layers = [layer for layer in stateful.modules() if isinstance(layer, nn.Linear)]
    hidden_gain = nn.init.calculate_gain("tanh") if activation_class is nn.Tanh else math.sqrt(2)
    for layer in layers:
        gain = output_gain if layer is layers[-1] else hidden_gain
        stack = layer.weight if layer.weight.ndim == 3 else layer.weight.unsqueeze(0)
        for weight in stack:
            nn.init.orthogonal_(weight, gain)
        nn.init.zeros_(layer.bias)
