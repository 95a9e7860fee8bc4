"""The entries of a batch that an update reads, and the tensors under them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tensordict import NestedKey, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor

from torchrl_happo.team.agents import Agent
from torchrl_happo.team.masks import leaves

if TYPE_CHECKING:
    from torchrl_happo.objectives.base import SequentialLossMixin

__all__ = ["agent_keys", "entries_read", "has", "next_key", "tensors_of"]


def entries_read(loss: SequentialLossMixin, batch: TensorDictBase) -> list[NestedKey]:
    """The entries of a batch whose numbers enter the update."""
    keys = loss.tensor_keys
    read: list[NestedKey] = []
    for agent in loss.agents:
        read += agent_keys(agent)
        if agent.policy.may_saturate and not agent.policy.is_composite:
            # They score actions at the bounds again. (Of a composite some may be infinite rightly:
            # the logits of a masked head.)
            read += agent.policy.parameter_keys
    critic_keys = [] if loss.critic_network is None else list(loss.critic_network.in_keys)
    read += critic_keys
    if has(batch, keys.advantage):
        read += [keys.advantage, keys.value_target]
    else:
        read += [next_key(keys.reward), *(next_key(key) for key in critic_keys)]
    return list(dict.fromkeys(unravel_key(key) for key in read))


def agent_keys(agent: Agent) -> list[NestedKey]:
    """The entries that every update of an agent reads, the joint tensordict's keys."""
    policy = agent.policy
    keys = [*agent.actor.in_keys, *policy.action_keys, *policy.log_prob_keys]
    return [unravel_key(key) for key in keys]


def next_key(key: NestedKey) -> tuple[str, ...]:
    """Where the same entry of the next step lies."""
    return ("next", key) if isinstance(key, str) else ("next", *key)


def has(batch: TensorDictBase, key: NestedKey) -> bool:
    """Whether a batch has an entry."""
    return key in batch.keys(include_nested=True)


def tensors_of(batch: TensorDictBase, key: NestedKey) -> Iterator[Tensor]:
    """The tensors under a key: one, one for each agent of unlike shapes, or none."""
    for _, holder, name in leaves(batch, key):
        yield holder.get(name)
