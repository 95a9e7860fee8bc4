"""The team's one reward, and its one cost, reduced from those of its agents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from tensordict import NestedKey, TensorDictBase
from torchrl.data import Composite
from torchrl.envs import EnvBase

from torchrl_happo.envs.team_total import TeamTotal, written_keys

__all__ = ["TeamCost", "TeamReward", "UnlikeCostsError", "UnlikeRewardsError"]


class UnlikeRewardsError(ValueError):
    """The rewards of a team's agents differ, contrary to ``TeamReward(None)``."""


class UnlikeCostsError(ValueError):
    """The costs of a team's agents differ, contrary to ``TeamCost(None)``."""


class TeamReward(TeamTotal):
    r"""Write the one reward that a team of agents shares.

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
            paid the same already: their reward is then used as it is, and a step at which it
            differs between agents is refused. On a CUDA device only the first step is
            verified, because the comparison waits for the device. Defaults to ``"mean"``.

    Keyword Args:
        in_keys (sequence of NestedKey, optional): the rewards of the team's agents, each of shape
            ``[*B, n, 1]`` (a group of ``n`` agents) or ``[*B, 1]`` (a single agent). Defaults to
            all the rewards of the environment but those that other ``TeamReward`` write, and but
            costs. Name them where two teams play each other.
        out_key (NestedKey, optional): key of the team's reward, at the root or under a name
            that is no group with an agent dimension. Defaults to ``"reward"``.
        in_place (bool, optional): whether the team's reward replaces the reward of each agent, at
            its key and in its shape, instead of standing beside it. A script goes on to read
            ``env.reward_key``, which TorchRL only has where there is one. Defaults to ``False``.

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

        A script that reads ``env.reward_key`` keeps it, and every agent is paid the same:

        >>> env = TransformedEnv(
        ...     VmasEnv("navigation", num_envs=4, max_steps=100),
        ...     TeamReward("mean", in_place=True),
        ... )
        >>> env.reward_key
        ('agents', 'reward')
        >>> env.rollout(3)["next", "agents", "reward"].std(-2).max()
        tensor(0.)

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

    entry = "reward"
    unlike_error = UnlikeRewardsError

    def __init__(
        self,
        reduction: Literal["mean", "sum"] | None = "mean",
        *,
        in_keys: Sequence[NestedKey] | None = None,
        out_key: NestedKey = "reward",
        in_place: bool = False,
    ) -> None:
        super().__init__(reduction, in_keys, out_key, in_place)

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        """Add the team's reward to the specs of the agents' rewards."""
        return self._add_spec(reward_spec)

    def _entries(self, env: EnvBase) -> list[NestedKey]:
        rewards = [key for key in env.reward_keys if not _is_cost(key)]
        teams = written_keys(env, TeamReward)
        # If none are left, the environment had the team's reward already.
        return [key for key in rewards if key not in teams] or rewards


class TeamCost(TeamTotal):
    r"""Write the one cost that a team of agents shares, the constraint of safe learning.

    After this transform ``("next", "cost")`` is the mean or the sum of the agents' costs, of shape
    ``[*B, 1]``; see :class:`TeamReward`, which it resembles in all else. Costs are found among the
    observations (most simulators report them in their info) or, failing that, among the rewards.
    Costs that are observations are reduced at resets as well.

    Args:
        reduction (str, optional): ``"mean"`` or ``"sum"`` over the agents, or ``None`` if their
            costs are the same already. Defaults to ``"mean"``.

    Keyword Args:
        in_keys (sequence of NestedKey, optional): the costs of the team's agents, each of shape
            ``[*B, n, 1]`` (a group of ``n`` agents) or ``[*B, 1]`` (a single agent). Defaults to
            all entries named ``"cost"`` but those that other ``TeamCost`` write.
        out_key (NestedKey, optional): key of the team's cost, at the root or under a name that is
            no group with an agent dimension. Defaults to ``"cost"``.

    Raises:
        ValueError: as :class:`TeamReward`, with :class:`UnlikeCostsError` for costs that differ.

    Example:
        >>> from tensordict import TensorDict
        >>> import torch
        >>> agents = TensorDict({"cost": torch.tensor([[1.0], [0.0]])}, [2])
        >>> batch = TensorDict({"next": {"agents": agents}})
        >>> TeamCost("sum", in_keys=[("agents", "cost")])(batch)["next", "cost"]
        tensor([1.])
    """

    entry = "cost"
    unlike_error = UnlikeCostsError

    def __init__(
        self,
        reduction: Literal["mean", "sum"] | None = "mean",
        *,
        in_keys: Sequence[NestedKey] | None = None,
        out_key: NestedKey = "cost",
    ) -> None:
        super().__init__(reduction, in_keys, out_key)
        self._is_checked = False

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Add the team's cost to the specs of the agents' costs, if they are observations."""
        return observation_spec if self._are_rewards() else self._add_spec(observation_spec)

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        """Add the team's cost to the specs of the agents' costs, if they are rewards."""
        return self._add_spec(reward_spec) if self._are_rewards() else reward_spec

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        if self._are_rewards():
            return tensordict_reset
        if not self._is_checked:
            # The first reset comes before the specs are made, which check the keys as well.
            self._check_keys(self.parent.full_observation_spec)
            self._is_checked = True
        return self._call(tensordict_reset)

    def _are_rewards(self) -> bool:
        parent = self.parent
        return (
            parent is not None
            and bool(self.in_keys)
            and set(self.in_keys) <= set(parent.reward_keys)
        )

    def _entries(self, env: EnvBase) -> list[NestedKey]:
        observed = list(env.full_observation_spec.keys(True, True))
        costs = [key for key in [*observed, *env.reward_keys] if _is_cost(key)]
        teams = written_keys(env, TeamCost)
        return [key for key in costs if key not in teams] or costs


def _is_cost(key: NestedKey) -> bool:
    return (key[-1] if isinstance(key, tuple) else key) == "cost"
