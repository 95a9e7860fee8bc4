"""What a batch must hold before it may touch a parameter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from torchrl_happo.agents import Agent, group_of

if TYPE_CHECKING:
    from torchrl_happo.objectives.common import SequentialLossMixin

__all__ = ["check_batch", "check_finite"]


def check_batch(loss: SequentialLossMixin, batch: TensorDictBase) -> None:
    """Refuses a batch whose keys, shapes or device do not fit the loss.

    Nothing here reads a tensor's values, so it costs no synchronisation.

    Args:
        loss (HAPPOLoss or HATRPOLoss): the loss the batch is for.
        batch (TensorDictBase): joint data of batch size ``[*B]``.

    Raises:
        TypeError: if ``batch`` is not a tensordict.
        KeyError: if an entry is missing.
        ValueError: if a shape or the device does not fit.
    """
    if not isinstance(batch, TensorDictBase):
        raise TypeError(f"The batch must be a TensorDict, got a {type(batch).__name__}.")
    if batch.batch_dims < 1 or batch.numel() == 0:
        raise ValueError(
            f"The batch has batch size {list(batch.batch_size)}; pass the tensordict of a "
            "collector, e.g. of batch size [num_envs, time], with at least one step."
        )
    for agent in loss.agents:
        for key in (*agent.actor.in_keys, *agent.policy.action_keys):
            _require(batch, key, f"agent {agent.name!r}", "collect with the loss's own actor")
        for key in agent.policy.log_prob_keys:
            _require(
                batch,
                key,
                f"agent {agent.name!r}",
                "build its actor with return_log_prob=True and collect with it",
            )
        _check_log_prob_shape(agent, batch)
    _check_value_keys(loss, batch)
    _check_device(loss, batch)


def _require(batch: TensorDictBase, key: NestedKey, whose: str, remedy: str) -> None:
    if key not in batch.keys(include_nested=True):
        raise KeyError(f"The batch has no entry {key!r}, which {whose} needs; {remedy}.")


def _check_log_prob_shape(agent: Agent, batch: TensorDictBase) -> None:
    data = agent.view(batch, [*agent.policy.action_keys, *agent.policy.log_prob_keys])
    shape = tuple(agent.stored_log_prob(data).shape)
    wanted = tuple(batch.batch_size)
    if shape == wanted:
        return
    if len(shape) == len(wanted) + 1 and shape[:-1] == wanted:
        if shape[-1] == agent.num_members:
            return
        if agent.index is None:
            raise ValueError(
                f"The log-probability {agent.policy.log_prob_keys[0]!r} has shape {list(shape)}, "
                f"so group {agent.group!r} has {shape[-1]} agents, but its actor is one network "
                "that all of them share; build it with MultiAgentMLP(share_params=False), or pass "
                f"blocks=[{agent.name!r}] to update them as one."
            )
    raise ValueError(
        f"The log-probability {agent.policy.log_prob_keys[0]!r} of agent {agent.name!r} has shape "
        f"{list(shape)}, but the batch size is {list(wanted)}; collect with the loss's own actor."
    )


def _check_value_keys(loss: SequentialLossMixin, batch: TensorDictBase) -> None:
    keys = loss.tensor_keys
    critic = loss.critic_network
    has_advantage = keys.advantage in batch.keys(include_nested=True)
    if critic is None:
        if not has_advantage:
            raise KeyError(
                f"The batch has no {keys.advantage!r} and the loss no critic to estimate it with; "
                "pass a critic network or write the advantage."
            )
    else:
        if keys.value not in critic.out_keys:
            raise KeyError(
                f"The critic writes {list(critic.out_keys)}, but the loss reads the state value "
                f"from {keys.value!r}; call loss.set_keys(value=...)."
            )
        for key in critic.in_keys:
            _require(batch, key, "the critic", "collect it or change the critic's in_keys")
        if has_advantage:
            _require(batch, keys.value_target, "the critic", "write it beside the advantage")
    if has_advantage:
        _check_advantage_shape(loss, batch)
        return
    _require(
        batch,
        ("next", *_as_tuple(keys.reward)),
        "the advantage",
        'append TeamReward("mean") to the environment\'s transforms or call '
        "loss.set_keys(reward=...)",
    )
    for name in ("done", "terminated"):
        _require(
            batch,
            ("next", *_as_tuple(getattr(keys, name))),
            "the advantage",
            f"call loss.set_keys({name}=...)",
        )


def _as_tuple(key: NestedKey) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else tuple(key)


def _check_advantage_shape(loss: SequentialLossMixin, batch: TensorDictBase) -> None:
    key = loss.tensor_keys.advantage
    shape, wanted = tuple(batch.get(key).shape), tuple(batch.batch_size)
    if shape not in ((*wanted, 1), (*wanted, loss.num_agents, 1)):
        raise ValueError(
            f"The advantage {key!r} has shape {list(shape)}; it must be {[*wanted, 1]} for the "
            f"team or {[*wanted, loss.num_agents, 1]} for each agent."
        )


def _check_device(loss: SequentialLossMixin, batch: TensorDictBase) -> None:
    parameter = loss.agents[0].parameters()[0]
    key = loss.agents[0].actor.in_keys[0]
    data = loss.agents[0].view(batch, [key])
    if data.get(key).device != parameter.device:
        raise ValueError(
            f"The batch lies on {data.get(key).device}, but the networks lie on "
            f"{parameter.device}; move one of them with .to(...)."
        )


def check_finite(loss: SequentialLossMixin, batch: TensorDictBase) -> None:
    """Refuses non-finite numbers, and rewards that differ between the agents of a team.

    Reads the values, and so synchronises with the device, once.

    Args:
        loss (HAPPOLoss or HATRPOLoss): the loss the batch is for.
        batch (TensorDictBase): a batch that passed :func:`check_batch`.

    Raises:
        ValueError: naming the entry that is not finite, or the rewards that differ.
    """
    names, verdicts = [], []
    for key, value in _entries_to_check(loss, batch):
        names.append(key)
        verdicts.append(value.isfinite().all())
    reward_key = ("next", *_as_tuple(loss.tensor_keys.reward))
    reward = batch.get(reward_key, None)
    per_agent = reward is not None and group_of(loss.tensor_keys.reward) is not None
    if per_agent:
        names.append(reward_key)
        verdicts.append(
            (reward == reward.select(batch.batch_dims, 0).unsqueeze(batch.batch_dims)).all()
        )
    good = torch.stack(verdicts).tolist()
    if per_agent and not good.pop():
        raise ValueError(
            f"The rewards {reward_key!r} differ between the agents of the team, but HAPPO "
            'maximises one shared reward; append TeamReward("mean") or TeamReward("sum") to the '
            'environment\'s transforms and call loss.set_keys(reward="reward").'
        )
    for name, is_good in zip(names, good, strict=False):
        if not is_good:
            raise ValueError(
                f"The entry {name!r} of the batch holds NaN or infinite numbers; nothing was "
                "updated."
            )


def _entries_to_check(
    loss: SequentialLossMixin, batch: TensorDictBase
) -> Iterator[tuple[NestedKey, Tensor]]:
    keys = loss.tensor_keys
    wanted: list[NestedKey] = []
    for agent in loss.agents:
        wanted += [*agent.actor.in_keys, *agent.policy.action_keys, *agent.policy.log_prob_keys]
    if loss.critic_network is not None:
        wanted += [*loss.critic_network.in_keys]
    if keys.advantage in batch.keys(include_nested=True):
        wanted += [keys.advantage, keys.value_target]
    else:
        wanted += [("next", *_as_tuple(keys.reward))]
        if loss.critic_network is not None:
            wanted += [("next", *_as_tuple(key)) for key in loss.critic_network.in_keys]
    for key in dict.fromkeys(wanted):
        for value in _leaves(batch, key):
            if value.is_floating_point():
                yield key, value


def _leaves(batch: TensorDictBase, key: NestedKey) -> list[Tensor]:
    """The tensors under a key; several where a group stacks agents of unlike shapes."""
    group = batch.get(group_of(key)) if group_of(key) not in (None, "next") else None
    if group is not None and group.batch_dims > batch.batch_dims:
        rows = group.unbind(batch.batch_dims)
        if len({row.get(key[1:]).shape for row in rows if row.get(key[1:], None) is not None}) > 1:
            return [row.get(key[1:]) for row in rows]
    value = batch.get(key, None)
    if isinstance(value, TensorDictBase):
        return list(value.values(include_nested=True, leaves_only=True))
    return [] if value is None else [value]
