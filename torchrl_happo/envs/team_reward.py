"""The team's one reward, reduced from the rewards of its agents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.data import Composite, Unbounded
from torchrl.envs import EnvBase, Transform, TransformedEnv

__all__ = ["TeamReward", "UnlikeRewardsError"]

_REDUCTIONS = ("mean", "sum", None)
_AGENTS = "_rewards_of_agents"


class UnlikeRewardsError(ValueError):
    """The agents of a team are not paid the same, as ``TeamReward(None)`` takes them to be."""


class TeamReward(Transform):
    r"""Writes the one reward that a team of agents shares.

    The joint advantage of HAPPO and HATRPO (`Kuba et al., 2022 <https://arxiv.org/abs/2109.11251>`_)
    is about *one* return, whereas most environments reward each agent. After this transform
    ``("next", "reward")`` is that one reward, of shape ``[*B, 1]``:

    .. math::
        r = \frac{1}{n} \sum_{i=1}^{n} r^i \quad \text{("mean")}
        \qquad \text{or} \qquad
        r = \sum_{i=1}^{n} r^i \quad \text{("sum")},

    where :math:`i` runs over the agents of all groups, so that each agent weighs the same
    whatever the size of its group. The agents' own rewards stay where they are, for loggers.
    A :class:`~torchrl.envs.RewardSum` placed after it finds the new reward and writes a root
    ``"episode_reward"``. An environment with nothing but a reward ``[*B, 1]`` under ``out_key``
    has the team's reward already, and keeps it.

    Args:
        reduction (str, optional): ``"mean"`` or ``"sum"`` over the agents, or ``None`` if they are
            paid the same already: then their reward is taken as it is, and a step at which it
            differs between agents is refused. On a CUDA device only the first step is
            verified, because the comparison waits for the device. Defaults to ``"mean"``.

    Keyword Args:
        in_keys (sequence of NestedKey, optional): the rewards of the team's agents, each of shape
            ``[*B, n, 1]`` (a group of ``n`` agents) or ``[*B, 1]`` (a single agent). Defaults to
            all the rewards of the environment but those that other ``TeamReward`` write. Name them
            where two teams play each other.
        out_key (NestedKey, optional): where the team's reward goes, at the root or under a name
            that is no group with an agent dimension. Defaults to ``"reward"``.

    Raises:
        ValueError: if the reduction is none of the above; at the first use, if ``in_keys`` are
            no rewards of the environment, ``out_key`` holds a reward already or lies inside
            a group; at any step (:class:`UnlikeRewardsError`), if ``reduction=None`` and the
            agents' rewards differ.

    Examples:
        >>> from torchrl.envs import Compose, RewardSum, StepCounter, TransformedEnv, VmasEnv
        >>> env = TransformedEnv(
        ...     VmasEnv("navigation", num_envs=4, max_steps=None),
        ...     Compose(StepCounter(100), TeamReward("mean"), RewardSum()),
        ... )
        >>> rollout = env.rollout(3)
        >>> rollout["next", "agents", "reward"].shape
        torch.Size([4, 3, 4, 1])
        >>> rollout["next", "reward"].shape
        torch.Size([4, 3, 1])
        >>> rollout["next", "episode_reward"].shape
        torch.Size([4, 3, 1])

        Two teams that play each other have a reward each:

        >>> env = TransformedEnv(
        ...     VmasEnv("simple_tag", num_envs=4, max_steps=None),
        ...     Compose(
        ...         TeamReward(in_keys=[("adversary", "reward")], out_key=("predators", "reward")),
        ...         TeamReward(in_keys=[("agent", "reward")], out_key=("prey", "reward")),
        ...     ),
        ... )
        >>> env.rollout(3)["next", "predators", "reward"].shape
        torch.Size([4, 3, 1])
    """

    def __init__(
        self,
        reduction: Literal["mean", "sum"] | None = "mean",
        *,
        in_keys: Sequence[NestedKey] | None = None,
        out_key: NestedKey = "reward",
    ) -> None:
        if reduction not in _REDUCTIONS:
            raise ValueError(
                f"TeamReward got reduction={reduction!r}, but it is one of 'mean', 'sum' and None."
            )
        if in_keys is not None and not in_keys:
            raise ValueError(
                "TeamReward got empty in_keys; name a reward of each group of the team, or leave "
                "them out to take all the rewards of the environment."
            )
        super().__init__(in_keys=in_keys, out_keys=[out_key])
        self.reduction = reduction
        self._verified = False

    @property
    def out_key(self) -> NestedKey:
        """Where the team's reward is written."""
        return self.out_keys[0]

    @property
    def in_keys(self) -> Sequence[NestedKey]:
        """The rewards of the team's agents: those that were named, or all there are."""
        named = self.__dict__.get("_in_keys")
        if named is not None:
            return named
        parent = self.parent
        if parent is None:
            return []
        # Looked for once: TorchRL makes another parent whenever the environment changes.
        kept = parent.__dict__
        if _AGENTS not in kept:
            kept[_AGENTS] = _agents_rewards(parent)
        return kept[_AGENTS]

    @in_keys.setter
    def in_keys(self, value: Sequence[NestedKey]) -> None:
        Transform.in_keys.fset(self, value)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Adds the team's reward to a batch that was collected without it.

        Args:
            tensordict (TensorDictBase): a batch with the agents' rewards under ``"next"``,
                or the content of its ``"next"`` itself.

        Returns:
            The same tensordict, with the team's reward beside those of the agents.
        """
        self._call(tensordict.get("next", default=tensordict))
        return tensordict

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        if self._is_there(next_tensordict):
            return next_tensordict
        reward = self._team_reward(next_tensordict)
        if self.reduction is None:
            self._verify_shared(reward)
        return next_tensordict.set(self.out_key, self._reduce(reward))

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        """Adds the team's reward to the specs of the agents' rewards."""
        self._check_keys(reward_spec)
        reward = self._reduce(self._team_reward(reward_spec.zero()))
        reward_spec[self.out_key] = Unbounded(
            shape=reward.shape, dtype=reward.dtype, device=reward.device
        )
        return reward_spec

    def _team_reward(self, tensordict: TensorDictBase) -> torch.Tensor:
        """The rewards of all agents of the team, in one tensor of shape ``[*B, n, 1]``."""
        if not self.in_keys:
            raise ValueError(
                "TeamReward has no environment to find the agents' rewards in; "
                "pass in_keys, such as in_keys=[('agents', 'reward')]."
            )
        rewards = [self._group_reward(key, tensordict) for key in self.in_keys]
        return rewards[0] if len(rewards) == 1 else torch.cat(rewards, dim=-2)

    @staticmethod
    def _group_reward(key: NestedKey, tensordict: TensorDictBase) -> torch.Tensor:
        """The rewards of one group, of shape ``[*B, n, 1]``, or ``n = 1`` for a single agent."""
        reward = tensordict.get(key, default=None)
        if reward is None:
            raise KeyError(
                f"TeamReward finds no reward {key!r} to reduce; name by in_keys those that exist."
            )
        event_shape = reward.shape[tensordict.batch_dims :]
        if len(event_shape) not in (1, 2) or event_shape[-1] != 1:
            raise ValueError(
                f"TeamReward got the reward {key!r} of shape {tuple(reward.shape)} in a batch of "
                f"shape {tuple(tensordict.batch_size)}, but it reduces rewards of shape [*B, 1] "
                "(a single agent) or [*B, n, 1] (a group); reshape it first."
            )
        return reward.unsqueeze(-2) if len(event_shape) == 1 else reward

    def _is_there(self, tensordict: TensorDictBase) -> bool:
        """Whether the only reward is the team's already, ``[*B, 1]`` under its key."""
        if list(self.in_keys) != self.out_keys:
            return False
        reward = tensordict.get(self.out_key, default=None)
        return reward is not None and reward.shape == (*tensordict.batch_size, 1)

    def _reduce(self, reward: torch.Tensor) -> torch.Tensor:
        if self.reduction == "sum":
            return reward.sum(-2)
        if self.reduction == "mean":
            return reward.mean(-2)
        return reward[..., 0, :]

    def _verify_shared(self, reward: torch.Tensor) -> None:
        if reward.shape[-2] == 1 or (reward.is_cuda and self._verified):
            return  # nothing to compare, or it would wait for the device at every step
        if not torch.allclose(reward, reward[..., :1, :].expand_as(reward), equal_nan=True):
            raise UnlikeRewardsError(
                f"TeamReward(None) takes the reward that the agents share, but {self.in_keys} "
                "differ between agents; choose reduction='mean' or reduction='sum'."
            )
        self._verified = True

    def _check_keys(self, reward_spec: Composite) -> None:
        """Refuses keys that the environment lacks, and to write over what it has."""
        in_keys, out_key = list(self.in_keys), self.out_key
        existing = list(reward_spec.keys(True, True))
        unknown = [key for key in in_keys if key not in existing]
        if unknown:
            raise ValueError(
                f"TeamReward got in_keys {unknown}, which are no rewards of this environment; "
                f"choose among {existing}."
            )
        if out_key in existing:
            if in_keys == [out_key] and reward_spec[out_key].ndim == reward_spec.ndim + 1:
                return  # it is the team's reward already
            raise ValueError(
                f"TeamReward would write over the reward {out_key!r} of this environment; choose "
                "another out_key, or leave TeamReward out if that is the team's reward already."
            )
        group = out_key[0] if isinstance(out_key, tuple) else out_key
        spec = reward_spec.get(group, None)
        if spec is not None and (group == out_key or spec.ndim != reward_spec.ndim):
            raise ValueError(
                f"TeamReward got the out_key {out_key!r}, but {group!r} is a group with an agent "
                "dimension and the team's reward has none; choose a key at the root, or one under "
                "a name of its own."
            )


def _agents_rewards(env: EnvBase) -> list[NestedKey]:
    """The rewards of an environment without those that a ``TeamReward`` adds to them."""
    teams, inner = [], env
    while isinstance(inner, TransformedEnv):
        transforms = inner.transform.modules()
        teams += [each.out_key for each in transforms if isinstance(each, TeamReward)]
        inner = inner.base_env
    # Where none are left the environment had the team's reward already.
    return [key for key in env.reward_keys if key not in teams] or env.reward_keys
