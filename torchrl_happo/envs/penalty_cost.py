"""A penalty that a reward contains, as a cost beside it."""

from __future__ import annotations

from collections.abc import Mapping

from tensordict import NestedKey, TensorDictBase
from tensordict.utils import unravel_key
from torchrl.data import Composite, Unbounded
from torchrl.envs import Transform

__all__ = ["PenaltyCost"]


class PenaltyCost(Transform):
    r"""Take a penalty out of each reward, and write it as a cost.

    Many simulators pay :math:`r + p` with a penalty :math:`p \le 0`, and report :math:`p` in their
    info. After this transform the reward is :math:`r`, and beside it stands the cost :math:`-p`,
    which safe teams (:class:`~torchrl_happo.HAPPOLagrangianLoss`,
    :class:`~torchrl_happo.MACPOLoss`) keep below a bound instead of paying a fixed price for it. A
    :class:`TeamReward` and a :class:`TeamCost` placed after it reduce both.

    Args:
        penalties (mapping of NestedKey to NestedKey): the penalty that each reward contains, both
            under ``"next"`` and of one shape. The cost is written beside the reward, under the
            name ``"cost"``.

    Raises:
        ValueError: if ``penalties`` is empty; at the first use, if one of its keys is no reward or
            nothing that the environment reports, or the shapes differ.

    Example:
        >>> from torchrl.envs import TransformedEnv, VmasEnv
        >>> env = TransformedEnv(
        ...     VmasEnv("navigation", num_envs=4, max_steps=100),
        ...     PenaltyCost({("agents", "reward"): ("agents", "info", "agent_collisions")}),
        ... )
        >>> env.rollout(3)["next", "agents", "cost"].shape
        torch.Size([4, 3, 4, 1])
    """

    def __init__(self, penalties: Mapping[NestedKey, NestedKey]) -> None:
        if not penalties:
            raise ValueError(
                "PenaltyCost got no penalties; name the penalty of each reward, such as "
                "{('agents', 'reward'): ('agents', 'info', 'agent_collisions')}."
            )
        self.penalties = {unravel_key(key): unravel_key(p) for key, p in penalties.items()}
        rewards = list(self.penalties)
        super().__init__(in_keys=rewards, out_keys=[*rewards, *map(_cost_key, rewards)])

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        for key, place in self.penalties.items():
            penalty = next_tensordict.get(place)
            next_tensordict.set(key, next_tensordict.get(key) - penalty)
            next_tensordict.set(_cost_key(key), 0 - penalty)  # no negative zero
        return next_tensordict

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Move the penalties of a batch that was collected without this transform.

        Args:
            tensordict (TensorDictBase): a batch with rewards and penalties under ``"next"``, or
                the content of its ``"next"`` itself.
        """
        self._call(tensordict.get("next", default=tensordict))
        return tensordict

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        """Add the costs to the specs of the rewards, which may leave their bounds."""
        reported = self.parent.full_observation_spec
        for key, place in self.penalties.items():
            for wanted, there, spec in (
                (key, "rewards", reward_spec),
                (place, "reports", reported),
            ):
                if wanted not in spec.keys(True, True):
                    raise ValueError(
                        f"PenaltyCost got the key {wanted!r}, which is none of the {there} of this "
                        f"environment; choose among {list(spec.keys(True, True))}."
                    )
            reward, penalty = reward_spec[key], reported[place]
            if reward.shape != penalty.shape:
                raise ValueError(
                    f"PenaltyCost got the reward {key!r} of shape {tuple(reward.shape)} and the "
                    f"penalty {place!r} of shape {tuple(penalty.shape)}; name a penalty of the "
                    "reward's shape."
                )
            paid = Unbounded(reward.shape, dtype=reward.dtype, device=reward.device)
            reward_spec[key], reward_spec[_cost_key(key)] = paid, paid.clone()
        return reward_spec


def _cost_key(reward: NestedKey) -> NestedKey:
    return (*reward[:-1], "cost") if isinstance(reward, tuple) else "cost"
