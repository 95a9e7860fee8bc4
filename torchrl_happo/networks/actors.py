"""A team's networks, built from the specs of its environment.

:func:`make_actor` gives every agent a policy of its own, :func:`make_critic` the team one critic.
Both are made of TorchRL's modules: whatever takes the networks of a MAPPO script takes these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import nn
from torchrl.envs import EnvBase
from torchrl.modules import MLP, MultiAgentMLP, ProbabilisticActor

from torchrl_happo.arguments import check_counts
from torchrl_happo.networks.checks import (
    check_builder,
    check_critic,
    check_policies,
    check_scale_mapping,
    check_std,
)
from torchrl_happo.networks.critics import CentralizedMLP, make_critic
from torchrl_happo.networks.heads import ParameterHead
from torchrl_happo.networks.initialization import init_orthogonal
from torchrl_happo.networks.layer_norm import LayerNormMLP, MultiAgentLayerNormMLP
from torchrl_happo.networks.recurrent import CELLS, make_recurrent_actor, memory_transforms
from torchrl_happo.networks.specs import (
    ActionHead,
    Group,
    read_action_head,
    read_groups,
    select_groups,
)
from torchrl_happo.policy.actor_list import ActorList
from torchrl_happo.policy.memory import memory_of

__all__ = ["CentralizedMLP", "joint_policy", "make_actor", "make_critic", "memory_transforms"]


def make_actor(
    env: EnvBase,
    group: str | None = None,
    *,
    num_cells: Sequence[int] = (128, 128),
    activation_class: type[nn.Module] = nn.Tanh,
    layer_norm: bool = False,
    share_params: bool = False,
    state_dependent_std: bool = True,
    scale_mapping: str = "biased_softplus_1.0",
    max_std: float | None = None,
    output_gain: float = 0.01,
    init: Literal["orthogonal", "torch"] = "orthogonal",
    observation_key: str = "observation",
    mask_key: str | None = "action_mask",
    recurrent: str | None = None,
    hidden_size: int = 128,
    device: torch.device | str | None = None,
) -> ProbabilisticActor | ActorList | dict[str, ProbabilisticActor | ActorList]:
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
        layer_norm (bool): whether the observation and the output of each hidden layer are
            normalised (:class:`~torch.nn.LayerNorm`), as in the authors' code of HAPPO.
            Defaults to ``False``.
        share_params (bool): if ``True``, the agents of a group share one network. HAPPO and
            HATRPO then take the group as one block only. Defaults to ``False``.
        state_dependent_std (bool): if ``True``, the network outputs the standard deviation of a
            continuous action; otherwise it is a parameter of each agent and each dimension.
            Defaults to ``True``.
        scale_mapping (str): what makes the standard deviation positive, and its first value, the
            mapping of 0; see :func:`~tensordict.nn.mappings`.
            Defaults to ``"biased_softplus_1.0"``, which starts at 1.
        max_std (float, optional): bound of a standard deviation that is a parameter, which then is
            ``max_std * sigmoid(parameter)`` and starts where ``scale_mapping`` does.
            Defaults to ``None``: no bound.
        output_gain (float): gain of the last layer's initialisation. Defaults to ``0.01``.
        init (str): ``"orthogonal"``, or ``"torch"`` for the initialisation of torch's own layers,
            under which the agents' first policies differ more. Defaults to ``"orthogonal"``.
        observation_key (str): name of the observation in the group.
            Defaults to ``"observation"``.
        mask_key (str, optional): name of the mask of available actions in the group, which is used
            where the environment has one. ``None`` ignores masks. Defaults to ``"action_mask"``.
        recurrent (str, optional): memory of the policies, ``"gru"`` or ``"lstm"``: hidden layers
            of ``num_cells``, the memory, and a linear layer. The environment must keep its state
            (:func:`memory_transforms`). Defaults to ``None``: no memory.
        hidden_size (int): size of the memory. Defaults to ``128``.
        device (torch.device or str, optional): device of the parameters. Defaults to the
            environment's.

    Returns:
        the actor of the only group or of the one asked for; for several groups, one actor for each
        in a dict by name. With memory, the actor of a group with an agent dimension is an
        :class:`~torchrl_happo.ActorList`. An actor reads ``(group, observation_key)``, of shape
        ``[*B, n, d]`` for a group of ``n`` agents and ``[*B, d]`` for a group without an agent
        dimension, and writes ``(group, "action")`` and ``(group, "action_log_prob")``.

    Raises:
        KeyError: if the environment lacks the group or its observation.
        ValueError: if the observations are not vectors of the default dtype, the agents of a group
            have unlike spaces, the action spec has no distribution in the table, agents with memory
            are to share parameters, or the first standard deviation is not below ``max_std``.

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
    check_builder(
        env,
        num_cells=num_cells,
        activation_class=activation_class,
        output_gain=output_gain,
        observation_key=observation_key,
    )
    check_scale_mapping(scale_mapping)
    check_std(max_std, scale_mapping, state_dependent_std)
    check_counts(hidden_size=hidden_size)
    team = select_groups(read_groups(env, observation_key), None if group is None else [group])
    device = env.device if device is None else device
    if init not in ("orthogonal", "torch"):
        raise ValueError(f'init must be "orthogonal" or "torch", got {init!r}.')
    build = partial(_make_group_actor, share_params=share_params)
    if recurrent is not None:
        _check_recurrent(recurrent, share_params)
        build = partial(make_recurrent_actor, cell=recurrent, hidden_size=hidden_size)
    actors = {
        member.name: build(
            member,
            read_action_head(env, member, mask_key),
            num_cells=num_cells,
            activation_class=activation_class,
            layer_norm=layer_norm,
            state_dependent_std=state_dependent_std,
            scale_mapping=scale_mapping,
            max_std=max_std,
            output_gain=output_gain,
            init=init,
            device=device,
        )
        for member in team
    }
    return actors if len(actors) > 1 else next(iter(actors.values()))


def joint_policy(
    actors: TensorDictModuleBase | Mapping[str, TensorDictModuleBase],
    critic: TensorDictModuleBase | None = None,
) -> TensorDictModuleBase:
    """The one policy that a collector rolls out, from the actors of all groups.

    Args:
        actors (TensorDictModule or mapping of str to it): what :func:`make_actor` returns.
        critic (TensorDictModule, optional): a critic with memory, whose state is to go on from
            one batch to the next; see :func:`make_critic`. Defaults to ``None``.

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
    check_policies(actors if isinstance(actors, Mapping) else {None: actors})
    policies = list(actors.values()) if isinstance(actors, Mapping) else [actors]
    if not policies:
        raise ValueError("joint_policy got no actors; pass the actor of each group.")
    if critic is not None:
        check_critic(critic)
        policies.append(memory_of(critic))
    if len(policies) == 1 and not isinstance(actors, Mapping):
        return policies[0]
    return TensorDictSequential(*policies)


def _check_recurrent(recurrent: str, share_params: bool) -> None:
    if recurrent not in CELLS:
        raise ValueError(f"recurrent must be one of {', '.join(CELLS)} or None, got {recurrent!r}.")
    if share_params:
        raise ValueError(
            f"make_actor got recurrent={recurrent!r} and share_params=True, but agents with memory "
            "have a network each; leave share_params out."
        )


def _make_group_actor(
    group: Group,
    head: ActionHead,
    *,
    num_cells: Sequence[int],
    activation_class: type[nn.Module],
    layer_norm: bool,
    share_params: bool,
    state_dependent_std: bool,
    scale_mapping: str,
    max_std: float | None,
    output_gain: float,
    init: str,
    device: torch.device | str | None,
) -> ProbabilisticActor:
    parameters = ParameterHead(
        group,
        head,
        state_dependent_std=state_dependent_std,
        scale_mapping=scale_mapping,
        max_std=max_std,
    )
    mlp: dict[str, Any] = {
        "num_cells": list(num_cells),
        "activation_class": activation_class,
        "device": device,
    }
    if group.n_agents is None:
        single = LayerNormMLP if layer_norm else MLP
        net = single(in_features=group.n_inputs, out_features=parameters.n_outputs, **mlp)
    else:
        stack = MultiAgentLayerNormMLP if layer_norm else MultiAgentMLP
        net = stack(
            n_agent_inputs=group.n_inputs,
            n_agent_outputs=parameters.n_outputs,
            n_agents=group.n_agents,
            centralized=False,
            share_params=share_params,
            **mlp,
        )
    if init == "orthogonal":
        init_orthogonal(net, activation_class, output_gain)
    rows = () if group.n_agents is None or share_params else (group.n_agents,)
    net = parameters.split(net, rows, device)
    module = TensorDictModule(net, in_keys=[group.observation], out_keys=parameters.keys)
    return parameters.actor(module, head.bounds, device)
