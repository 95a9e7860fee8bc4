"""A team's networks, built from the specs of its environment.

:func:`make_actor` gives every agent a policy of its own, :func:`make_critic` the team one critic.
Both are made of TorchRL's modules, and fit wherever the networks of a MAPPO script do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import nn
from torchrl.envs import EnvBase
from torchrl.modules import ProbabilisticActor

from torchrl_happo.arguments import check_counts
from torchrl_happo.networks.architecture import Architecture
from torchrl_happo.networks.checks import (
    check_builder,
    check_critic,
    check_policies,
    check_recurrent,
    check_scale_mapping,
    check_std,
)
from torchrl_happo.networks.critics import CentralizedMLP, make_critic
from torchrl_happo.networks.heads import NormalStd, PolicyHead, read_head
from torchrl_happo.networks.observations import ObservationEncoder, encode_inputs
from torchrl_happo.networks.recurrent import CELLS, make_recurrent_actor, memory_transforms
from torchrl_happo.networks.specs import read_groups, select_groups
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
    observation_key: NestedKey | list[NestedKey] = "observation",
    mask_key: NestedKey | None = "action_mask",
    recurrent: str | None = None,
    hidden_size: int = 128,
    device: torch.device | str | None = None,
) -> ProbabilisticActor | ActorList | dict[str, ProbabilisticActor | ActorList]:
    r"""Build a policy for every agent of an environment.

    The distribution follows the action spec of the group:

    ========================  ===================================================================
    action spec               distribution
    ========================  ===================================================================
    bounded, continuous       :class:`~torchrl.modules.TanhNormal` between the bounds of each
                              agent and each dimension
    unbounded, continuous     :class:`~torchrl.modules.IndependentNormal`
    categorical               :class:`~torch.distributions.Categorical`, or
                              :class:`~torchrl.modules.MaskedCategorical` if there is a mask
    multi-categorical         :class:`~torchrl_happo.networks.discrete.MultiCategorical`: an
                              independent categorical for each component, masked or not
    one-hot                   :class:`~torchrl.modules.OneHotCategorical`, or
                              :class:`~torchrl.modules.MaskedOneHotCategorical` if there is a mask
    ========================  ===================================================================

    Vectors are read as they are, whole numbers and booleans are cast, categorical observations
    become one-hot vectors, images ``[C, H, W]`` pass through convolutions
    (:class:`~torchrl.modules.MultiAgentConvNet`); several entries are then concatenated. Masks
    may be boolean or of numbers, zero where an action is forbidden.

    Weights are orthogonal and biases zero. The small gain of the last layer makes the first policy
    nearly the same at every observation, from which on-policy methods learn better
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
            with which the agents' first policies differ more. Defaults to ``"orthogonal"``.
        observation_key (NestedKey or list of NestedKey): name of the observation in the group; a
            tuple if it is nested, such as ``("observation", "observation")``, and a list for
            several entries. A dict of entries counts as all of them but the mask.
            Defaults to ``"observation"``.
        mask_key (NestedKey, optional): name of the mask of available actions in the group or
            beside a nested observation, which is used where the environment has one. ``None``
            ignores masks. Defaults to ``"action_mask"``.
        recurrent (str, optional): memory of the policies, ``"gru"`` or ``"lstm"``: hidden layers
            of ``num_cells``, the memory, and a linear layer. The environment must keep its state
            (:func:`memory_transforms`). Defaults to ``None``: no memory.
        hidden_size (int): size of the memory. Defaults to ``128``.
        device (torch.device or str, optional): device of the parameters. Defaults to the
            environment's.

    Returns:
        the actor of the only group or of the one asked for; for several groups, a dict of one
        actor for each by name. With memory, the actor of a group with an agent dimension is an
        :class:`~torchrl_happo.ActorList`. An actor reads ``(group, observation_key)``, of shape
        ``[*B, n, *shape]`` for a group of ``n`` agents and ``[*B, *shape]`` for a group without an
        agent dimension, and writes ``(group, "action")`` and ``(group, "action_log_prob")``.

    Raises:
        KeyError: if the environment lacks the group or its observation.
        ValueError: if a network cannot read an observation, the agents of a group have unlike
            spaces, the action spec has no distribution in the table or a mask of another size,
            agents with memory are to share parameters, or the first standard deviation is not
            below ``max_std``.

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
    check_recurrent("make_actor", recurrent, CELLS, share_params)
    if init not in ("orthogonal", "torch"):
        raise ValueError(f'init must be "orthogonal" or "torch", got {init!r}.')
    groups = read_groups(env, observation_key, mask_key)
    device = env.device if device is None else device
    architecture = Architecture(num_cells, activation_class, layer_norm, device, init)
    std = NormalStd(state_dependent_std, scale_mapping, max_std)
    build = partial(_make_group_actor, share_params=share_params)
    if recurrent is not None:
        build = partial(make_recurrent_actor, cell=recurrent, hidden_size=hidden_size)
    actors = {
        each.name: build(read_head(env, each, mask_key, std), architecture, output_gain=output_gain)
        for each in select_groups(groups, None if group is None else [group])
    }
    return actors if len(actors) > 1 else next(iter(actors.values()))


def joint_policy(
    actors: TensorDictModuleBase | Mapping[str, TensorDictModuleBase],
    critic: TensorDictModuleBase | None = None,
) -> TensorDictModuleBase:
    """Return the one policy that a collector rolls out, from the actors of all groups.

    Args:
        actors (TensorDictModule or mapping of str to it): what :func:`make_actor` returns.
        critic (TensorDictModule, optional): a critic with memory, whose hidden state is then kept
            from one batch to the next; see :func:`make_critic`. Defaults to ``None``.

    Returns:
        the actor itself if it is the only one; otherwise a module that calls the actors one after
        the other and shares their parameters.

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


def _make_group_actor(
    head: PolicyHead, architecture: Architecture, *, output_gain: float, share_params: bool
) -> ProbabilisticActor:
    """Build the joint actor of a group: a stack of one network for each agent."""
    group, device = head.group, architecture.device
    agents: dict[str, Any] = {"n_agents": group.n_agents, "share_params": share_params}
    encoder = ObservationEncoder(group.entries, architecture, **agents)
    net = architecture.mlp(encoder.n_features, head.n_outputs, **agents)
    architecture.initialize(net, output_gain)
    rows = () if group.n_agents is None or share_params else (group.n_agents,)
    net = encode_inputs(head.parametrize(net, rows, device), [encoder])
    return head.actor(TensorDictModule(net, in_keys=group.in_keys, out_keys=head.keys), device)
