"""A team out of one body: each agent moves some of the joints."""

from __future__ import annotations

from collections.abc import ItemsView, Sequence
from typing import cast

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.data import Bounded, Composite, TensorSpec, Unbounded
from torchrl.envs import MarlGroupMapType, Transform

from torchrl_happo.envs.partition import check_observations, check_partition, group_agents

__all__ = ["AgentSplit"]

# Keeps a vector of equal entries finite; far below what changes any other result.
_EPS = 1e-20


class AgentSplit(Transform):
    r"""Turn an environment with one agent and a vector action into one with a team.

    Each agent chooses some of the entries of the action (as in multi-agent MuJoCo,
    `Peng et al., 2021 <https://arxiv.org/abs/2003.06709>`_, where it moves some of the joints),
    and observes the state, or part of it, and its identity (one-hot). The reward and the end of an
    episode concern the team; they stay at the root. It works with any environment whose
    observation is a vector and whose action is a continuous one, batched or not, on any device.

    With ``standardize=True`` each vector has mean 0 and standard deviation 1 over *its own*
    entries, independently of all other steps:

    .. math::
        o \leftarrow \frac{o - \bar o}{\sqrt{\frac{1}{d} \sum_{k=1}^{d} (o_k - \bar o)^2}},
        \qquad \bar o = \frac{1}{d} \sum_{k=1}^{d} o_k .

    That is the setting of the reference implementation of HAPPO in multi-agent MuJoCo: an agent's
    vector is the state followed by its one-hot identity, and the critic's is the state alone.

    ==============================  ==================  ============================================
    key                             shape               content
    ==============================  ==================  ============================================
    ``("agents", "action")``        ``[*B, n, a]``      entry ``k`` of agent ``i`` is entry
                                                        ``partition[i][k]`` of the joint action
    ``("agents", "observation")``   ``[*B, n, d]``      observation of each agent
    ``"state"``                     ``[*B, s]``         the observation of the environment, for the
                                                        critic; it takes its place at the root
    ==============================  ==================  ============================================

    Where agents differ in the size of their action or observation, each is a group of its own:
    ``("agent_0", "action")`` of shape ``[*B, 1, a_0]``, and so on.

    Args:
        partition (sequence of sequence of int): for each agent, the entries of the joint action
            that it chooses. Each entry belongs to exactly one agent.

    Keyword Args:
        observations (sequence of sequence of int, optional): for each agent, the entries of the
            state that it observes, in this order. Defaults to ``None``: all of them.
        identity (bool): whether an agent observes its one-hot identity, after the state.
            Defaults to ``True``.
        standardize (bool): whether the agents' observations and the state are standardised as
            above. Defaults to ``False``.
        bounded_actions (bool): whether the agents' actions have the bounds of the joint action.
            Without bounds a policy is Gaussian, and actions outside the bounds of the environment
            are passed on unchanged: MuJoCo then clamps the forces that it applies to the joints,
            while the cost of control is that of the action itself. Defaults to ``True``.
        group_map (MarlGroupMapType, optional): ``ALL_IN_ONE_GROUP`` or ``ONE_GROUP_PER_AGENT``.
            Defaults to ``None``: one group where the agents' sizes allow it.
        observation_key (NestedKey): key of the environment's observation, a vector.
            Defaults to ``"observation"``.
        action_key (NestedKey): key of the joint action. Defaults to ``"action"``.
        state_key (NestedKey, optional): key of the state; ``None`` drops it.
            Defaults to ``"state"``.

    Raises:
        TypeError: if there is no list of whole numbers for each agent.
        ValueError: if an agent is without action or observation, an entry of the action belongs to
            no agent or to several, or the agents of one group differ in size; at the first use, if
            action or observation are no vectors or have other sizes.

    Examples:
        >>> from torchrl.envs import GymEnv, TransformedEnv
        >>> env = TransformedEnv(
        ...     GymEnv("Pendulum-v1"), AgentSplit([[0]], standardize=True)
        ... )  # a team of one
        >>> rollout = env.rollout(3)
        >>> rollout["agents", "observation"].shape, rollout["agents", "action"].shape
        (torch.Size([3, 1, 4]), torch.Size([3, 1, 1]))
        >>> rollout["state"].shape, rollout["next", "reward"].shape
        (torch.Size([3, 3]), torch.Size([3, 1]))
    """

    invertible = True
    _members: nn.ModuleDict
    _to_joint: Tensor

    def __init__(
        self,
        partition: Sequence[Sequence[int]],
        *,
        observations: Sequence[Sequence[int]] | None = None,
        identity: bool = True,
        standardize: bool = False,
        bounded_actions: bool = True,
        group_map: MarlGroupMapType | None = None,
        observation_key: NestedKey = "observation",
        action_key: NestedKey = "action",
        state_key: NestedKey | None = "state",
    ) -> None:
        partition = check_partition(partition)
        if observations is not None:
            observations = check_observations(observations, len(partition))
        groups = group_agents(partition, observations, group_map)
        super().__init__(
            in_keys=[observation_key],
            out_keys=[(name, "observation") for name in groups],
            in_keys_inv=[action_key],
            out_keys_inv=[(name, "action") for name in groups],
        )
        if state_key is not None:
            self.out_keys.append(state_key)
        self.partition = partition
        self.group_map = {
            name: [f"agent_{agent}" for agent in agents] for name, agents in groups.items()
        }
        self.standardize = standardize
        self.bounded_actions = bounded_actions
        self.observation_key, self.action_key = observation_key, action_key
        self.state_key = state_key
        who = torch.eye(len(partition)) if identity else torch.empty(len(partition), 0)
        self._members = nn.ModuleDict(
            {
                name: _Members(
                    [self.partition[agent] for agent in agents],
                    None if observations is None else [observations[i] for i in agents],
                    who[agents],
                )
                for name, agents in groups.items()
            }
        )
        chosen = torch.cat([members.actions.flatten() for _, members in self._groups()])
        self.register_buffer("_to_joint", chosen.argsort())
        self._is_in_order = bool((self._to_joint.diff() == 1).all())

    def _groups(self) -> ItemsView[str, _Members]:
        return cast("ItemsView[str, _Members]", self._members.items())

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Replace the observation of a batch by those of the agents and the state, in place.

        All other entries stay: those of a group, such as its actions; the joint action; and
        ``"next"``, whose own observation is replaced by a call on ``tensordict["next"]``.
        """
        seen = tensordict.select(self.observation_key, strict=False)
        names, seen.names = seen.names, None  # groups without names do not fit among named ones
        self._call(seen)
        seen.names = names
        del tensordict[self.observation_key]
        return tensordict.update(seen)

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        state = next_tensordict.pop(self.observation_key, None)
        if state is None:
            raise KeyError(
                f"AgentSplit finds no observation {self.observation_key!r}; set observation_key."
            )
        for name, members in self._groups():
            observation = members.observe(state)
            shape = (*next_tensordict.batch_size, members.size)
            group = {"observation": self._scaled(observation)}
            next_tensordict.set(name, TensorDict(group, shape, device=next_tensordict.device))
        if self.state_key is not None:
            next_tensordict.set(self.state_key, self._scaled(state))
        return next_tensordict

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        return self._call(tensordict_reset)

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        actions = [tensordict.get(key, None) for key in self.out_keys_inv]
        missing = [
            key for key, action in zip(self.out_keys_inv, actions, strict=True) if action is None
        ]
        if not missing:
            joint = torch.cat([action.flatten(-2) for action in actions], dim=-1)
            joint = joint if self._is_in_order else joint[..., self._to_joint]
            return tensordict.set(self.action_key, joint)
        if self.missing_tolerance:
            return tensordict
        raise KeyError(f"AgentSplit finds no action {missing[0]!r}; the policy has to write it.")

    def _scaled(self, vector: Tensor) -> Tensor:
        if not self.standardize:
            return vector
        return nn.functional.layer_norm(vector, vector.shape[-1:], eps=_EPS)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Replace the environment's observation by those of the agents and the state."""
        known = list(observation_spec.keys(True, True))
        if self.observation_key not in known:
            raise ValueError(
                f"AgentSplit finds no observation {self.observation_key!r}; choose observation_key "
                f"among {known}."
            )
        state = observation_spec[self.observation_key]
        if state.ndim != observation_spec.ndim + 1:
            raise ValueError(
                f"AgentSplit got the observation {self.observation_key!r} of shape "
                f"{tuple(state.shape)}, but it splits a vector [*B, s]; flatten it first."
            )
        del observation_spec[self.observation_key]
        for name, members in self._groups():
            members.check(state.shape[-1])
            n_inputs = members.n_inputs(state.shape[-1])
            observation_spec[name] = _group_spec(
                observation_spec,
                members.size,
                observation=_unbounded(state, (*state.shape[:-1], members.size, n_inputs)),
            )
        if self.state_key is not None:
            observation_spec[self.state_key] = _unbounded(state, state.shape)
        return observation_spec

    def transform_input_spec(self, input_spec: Composite) -> Composite:
        """Replace the joint action by those of the agents."""
        input_spec = input_spec.clone()
        actions = input_spec["full_action_spec"]
        joint = actions.get(self.action_key, None)
        if joint is None:
            raise ValueError(
                f"AgentSplit finds no action {self.action_key!r}; choose action_key among "
                f"{list(actions.keys(True, True))}."
            )
        self._check_action(joint, actions.ndim)
        del actions[self.action_key]
        for name, members in self._groups():
            actions[name] = _group_spec(
                actions, members.size, action=self._action_spec(joint, members.actions)
            )
        return input_spec

    def _check_action(self, joint: TensorSpec, batch_dims: int) -> None:
        size = sum(map(len, self.partition))
        if joint.domain != "continuous" or joint.ndim != batch_dims + 1:
            raise ValueError(
                f"AgentSplit got the action {self.action_key!r}, a {type(joint).__name__} of shape "
                f"{tuple(joint.shape)}, but it splits a continuous vector [*B, a]."
            )
        if joint.shape[-1] != size:
            raise ValueError(
                f"The partition of AgentSplit has {size} entries, but the action "
                f"{self.action_key!r} has {joint.shape[-1]}; give each to one agent."
            )

    def _action_spec(self, joint: TensorSpec, entries: Tensor) -> TensorSpec:
        shape = (*joint.shape[:-1], *entries.shape)
        if not self.bounded_actions or isinstance(joint, Unbounded):
            return _unbounded(joint, shape)
        entries = entries.to(joint.space.low.device)
        return Bounded(
            joint.space.low[..., entries],
            joint.space.high[..., entries],
            shape=shape,
            dtype=joint.dtype,
            device=joint.device,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(partition={self.partition}, groups={self.group_map})"


class _Members(nn.Module):
    """The agents of one group: their entries of the action and of the state."""

    actions: Tensor
    entries: Tensor | None
    identity: Tensor
    size: int

    def __init__(
        self, actions: list[list[int]], entries: list[list[int]] | None, identity: Tensor
    ) -> None:
        super().__init__()
        self.size = len(actions)
        self.register_buffer("actions", torch.tensor(actions))
        self.register_buffer("entries", None if entries is None else torch.tensor(entries))
        self.register_buffer("identity", identity)

    def observe(self, state: Tensor) -> Tensor:
        """Return the agents' observations ``[*B, n, d]`` of a state ``[*B, s]``."""
        if self.entries is None:
            seen = state.unsqueeze(-2).expand(*state.shape[:-1], self.size, -1)
        else:
            seen = state[..., self.entries]
        who = self.identity.to(state.dtype).expand(*state.shape[:-1], -1, -1)
        return torch.cat([seen, who], dim=-1)

    def n_inputs(self, n_states: int) -> int:
        """Return the size of an agent's observation."""
        seen = n_states if self.entries is None else self.entries.shape[-1]
        return seen + self.identity.shape[-1]

    def check(self, n_states: int) -> None:
        """Refuse observed entries that the state lacks."""
        if self.entries is not None and not bool((self.entries < n_states).all()):
            raise ValueError(
                f"The observations of AgentSplit name entry {int(self.entries.max())} of the "
                f"state, but it has {n_states} entries, counted from 0."
            )


def _unbounded(like: TensorSpec, shape: Sequence[int]) -> Unbounded:
    return Unbounded(torch.Size(shape), dtype=like.dtype, device=like.device)


def _group_spec(parent: Composite, size: int, **leaves: TensorSpec) -> Composite:
    return Composite(**leaves, shape=(*parent.shape, size), device=parent.device)
