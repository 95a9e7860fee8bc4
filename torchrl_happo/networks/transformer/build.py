"""A transformer for the team of an environment, built from its specs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.envs import EnvBase

from torchrl_happo.arguments import check_counts
from torchrl_happo.networks.checks import check_builder, check_scale_mapping, check_std
from torchrl_happo.networks.heads import NormalStd, read_head
from torchrl_happo.networks.observations import read_entry
from torchrl_happo.networks.specs import Group, agent_specs, read_groups
from torchrl_happo.networks.transformer.actor import TransformerActor
from torchrl_happo.networks.transformer.heads import team_head
from torchrl_happo.networks.transformer.model import MultiAgentTransformer
from torchrl_happo.networks.transformer.parts import Size, TeamPart

__all__ = ["TransformerValues", "make_transformer"]


class TransformerValues(nn.Module):
    """The values of a transformer, whose encoder the policies share.

    Args:
        transformer (MultiAgentTransformer): the network.
    """

    def __init__(self, transformer: MultiAgentTransformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the value of each agent, ``[*B, n_agents, 1]``.

        Args:
            *inputs (Tensor): the observations of all groups, and their actions where the values
                are those of prefixes.
        """
        net = self.transformer
        features = net.encode(net.read(*inputs))
        if net.prefix_values:
            features = net.decode(features, inputs[-len(net.team) :])
        value = net.value(features)
        one = len(net.team) == 1 and net.team[0].head.group.n_agents is None
        return value.squeeze(-2) if one else value


def make_transformer(
    env: EnvBase,
    *,
    size: int = 64,
    num_heads: int = 1,
    num_blocks: int = 1,
    agent_embedding: bool = True,
    decentralized: bool = False,
    share_params: bool = False,
    prefix_values: bool = False,
    order: Sequence[int] | None = None,
    state_dependent_std: bool = False,
    scale_mapping: str = "biased_softplus_1.0",
    max_std: float | None = None,
    output_gain: float = 0.01,
    observation_key: NestedKey | list[NestedKey] = "observation",
    mask_key: NestedKey | None = "action_mask",
    device: torch.device | str | None = None,
) -> tuple[TransformerActor, TensorDictModule]:
    r"""Build a multi-agent transformer: a policy for the whole team, and its critic.

    The agents choose one after the other (Wen et al., 2022, https://arxiv.org/abs/2205.14953): the
    policy is :math:`\prod_k \pi(a^k | o, a^{1:k-1})`, and the critic is a value of each agent on
    the same encoder. Both go into :class:`~torchrl_happo.MATLoss`, whose one optimiser trains
    them together, or into TorchRL's :class:`~torchrl.objectives.ClipPPOLoss`. Distributions and
    observations are those of :func:`~torchrl_happo.make_actor`. Groups of unlike agents have
    projections of their own.

    Args:
        env (EnvBase): the environment, transforms included.

    Keyword Args:
        size (int): size of every token. Defaults to ``64``.
        num_heads (int): heads of every attention, which divide ``size``. Defaults to ``1``.
        num_blocks (int): blocks of the encoder and of the decoder. Defaults to ``1``.
        agent_embedding (bool): whether agents are told apart by a learned vector each. Defaults to
            ``True``; the authors' code has none, and relies on identities in the observations.
        decentralized (bool): whether each policy is an MLP on the agent's own observation in place
            of the decoder, for decentralised execution (MAT-Dec). Defaults to ``False``.
        share_params (bool): whether these MLPs are one for the agents of a group. Defaults to
            ``False``.
        prefix_values (bool): whether the values are those of the observations and of the actions
            of the agents before, for :class:`~torchrl_happo.TPPOLoss`. Defaults to ``False``.
        order (sequence of int, optional): the positions of all agents in the order in which they
            choose. It is part of the state, and a state of another order is refused. Defaults to
            ``None``: as the groups name them.
        state_dependent_std (bool): whether the network outputs the standard deviation of a
            continuous action; otherwise it is a parameter of each dimension, which all agents of
            a group share. Defaults to ``False``.
        scale_mapping (str): as for :func:`~torchrl_happo.make_actor`.
        max_std (float, optional): likewise.
        output_gain (float): gain of the last layers' initialisation. Defaults to ``0.01``.
        observation_key (NestedKey or list of NestedKey): as for :func:`~torchrl_happo.make_actor`.
        mask_key (NestedKey, optional): likewise.
        device (torch.device or str, optional): device of the parameters. Defaults to the
            environment's.

    Returns:
        the policy, which writes actions and log-probabilities ``[*B, n]`` of each group, and the
        critic, which writes ``(group, "state_value")`` ``[*B, n, 1]``, or ``"state_value"`` where
        there are several groups.

    Raises:
        KeyError: if the environment lacks an observation.
        ValueError: if a network cannot read an observation, an action has no distribution, the
            heads do not divide the size, or the order does not name every agent once.

    Example:
        >>> from torchrl_happo.envs import MatrixGame, climbing_payoff
        >>> env = MatrixGame(climbing_payoff(), num_envs=4)
        >>> actor, critic = make_transformer(env)
        >>> data = critic(env.rollout(1, actor))
        >>> data["agents", "action_log_prob"].shape, data["agents", "state_value"].shape
        (torch.Size([4, 1, 2]), torch.Size([4, 1, 2, 1]))
    """
    check_builder(
        env,
        num_cells=(size,),
        activation_class=nn.GELU,
        output_gain=output_gain,
        observation_key=observation_key,
    )
    check_counts(num_heads=num_heads, num_blocks=num_blocks)
    if size % num_heads:
        raise ValueError(
            f"num_heads={num_heads} does not divide size={size}; choose a divisor, such as 1."
        )
    if decentralized and (prefix_values or order is not None):
        other = "prefix_values" if prefix_values else "order"
        raise ValueError(
            f"make_transformer got decentralized=True and {other}, but agents that act alone have "
            f"none before them; leave {other} out."
        )
    check_scale_mapping(scale_mapping)
    check_std(max_std, scale_mapping, state_dependent_std)
    device = env.device if device is None else device
    std = NormalStd(state_dependent_std, scale_mapping, max_std)
    team = []
    for group in read_groups(env, observation_key, mask_key):
        spec = env.full_action_spec[group.action]
        own = agent_specs(
            env, group.action, spec, group.n_agents is not None, "unlike action spaces"
        )
        head = read_head(env, group, mask_key, std)
        team.append(TeamPart(head, read_entry(group.action, own[0])))
    _check_order(order, sum(part.n_agents for part in team))
    net = MultiAgentTransformer(
        team,
        Size(size, num_heads, num_blocks),
        agent_embedding=agent_embedding,
        decentralized=decentralized,
        share_params=share_params,
        prefix_values=prefix_values,
        order=order,
        output_gain=output_gain,
        device=device,
    )
    groups: list[Group] = [part.head.group for part in team]
    observed = [key for group in groups for key in group.in_keys]
    chosen = [group.action for group in groups]
    parameters = [key for part in team for key in part.head.keys]
    seen = observed if decentralized else [*observed, *chosen]
    network = TensorDictModule(net, in_keys=seen, out_keys=parameters)
    actor = TransformerActor(network, team_head(network, team, device))
    value = groups[0].key("state_value") if len(groups) == 1 else "state_value"
    reads = [*observed, *chosen] if prefix_values else observed
    critic = TensorDictModule(TransformerValues(net), in_keys=reads, out_keys=[value])
    return actor, critic


def _check_order(order: Any, n_agents: int) -> None:
    """Raise unless an order names every agent of the team once."""
    if order is not None and sorted(order) != list(range(n_agents)):
        raise ValueError(
            f"order must name each of the positions 0 to {n_agents - 1} once, got {list(order)}."
        )
