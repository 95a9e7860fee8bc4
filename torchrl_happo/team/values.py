"""What the numbers of a batch must be before they may touch a parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import CompositeDistribution
from tensordict.utils import unravel_key
from torch import Tensor
from torch.distributions import Categorical, Distribution
from torchrl.modules import TanhNormal
from torchrl.modules.distributions import MaskedOneHotCategorical, OneHotCategorical

from torchrl_happo.arguments import first_line
from torchrl_happo.masked import VALID
from torchrl_happo.policy.policy import Parameters
from torchrl_happo.policy.side_by_side import SideBySide
from torchrl_happo.team.agent import Agent
from torchrl_happo.team.entries import has, leaves, next_key, path_of, tensors_of
from torchrl_happo.team.masks import Masks
from torchrl_happo.team.team import Team
from torchrl_happo.versions import set_filling

__all__ = [
    "check_actions",
    "check_finite",
    "check_log_prob",
    "explained",
    "fill_ends",
    "fill_next",
    "filling_in_place",
    "share_ends",
    "share_group",
]

_NOT_FINITE = "The entry {!r} of the batch holds NaN or infinite numbers; nothing was updated."
_DIFFERING = (
    "The rewards {!r} differ between the agents of the team, but HAPPO maximises one shared "
    'reward; append TeamReward("mean") to the environment\'s transforms and leave '
    'set_keys(reward=...) out, or keep it and append TeamReward("mean", in_place=True).'
)


def share_ends(team: Team, batch: TensorDictBase) -> TensorDictBase:
    """Return a batch with the ends of each agent, where only the environment's are there.

    An environment that is over is over for all of its agents: what ``set_keys(done=("agents",
    "done"))`` names is read from the root's ``"done"`` if the group has none.

    Args:
        team (Team): says where its critics read the ends.
        batch (TensorDictBase): joint data of batch size ``[*B]``. Not modified.
    """
    filled, steps = batch, tuple(batch.batch_size)
    for critic in team.critics.values():
        for key in (critic.done, critic.terminated):
            *group, name = path_of(key)
            rows = batch.get(("next", *group), None) if group else None
            if not isinstance(rows, TensorDictBase) or has(batch, next_key(key)):
                continue
            sizes = tuple(rows.batch_size[len(steps) :]) or (team.num_agents,)
            value = batch.get(next_key(name), None)
            if value is not None and value.shape == (*steps, 1) and len(sizes) == 1:
                filled = batch.copy() if filled is batch else filled
                filled.set(next_key(key), value.unsqueeze(-2).expand(*steps, *sizes, 1))
    return filled


def share_group(batch: TensorDictBase, key: NestedKey) -> TensorDictBase:
    """Return a batch whose next step has the group of an entry, perhaps with nothing in it.

    Estimators put a step and the next one side by side, which must have the same groups.

    Args:
        batch (TensorDictBase): joint data of batch size ``[*B]``. Not modified.
        key (NestedKey): the entry.
    """
    group = path_of(key)[:-1]
    rows = batch.get(group, None) if group else None
    if rows is None or has(batch, next_key(group)):
        return batch
    return batch.copy().set(next_key(group), TensorDict({}, rows.batch_size, device=rows.device))


def fill_ends(team: Team, batch: TensorDictBase) -> TensorDictBase:
    """Return a copy of a batch with zeros for NaN and infinity behind the end of an episode.

    Nothing follows a step that is terminated: its value is 0 whatever the next observation says,
    and some environments say NaN.

    Args:
        team (Team): says what the critics read, and where an episode terminates.
        batch (TensorDictBase): joint data of batch size ``[*B]``. Not modified.

    Returns:
        a tensordict that shares all other entries with ``batch``, or ``batch`` itself if no next
        observation is read.
    """
    filled, dims = batch, batch.batch_dims
    for critic in team.critics.values():
        keys = critic.observations if critic.needs_next else ()
        for key in () if has(batch, critic.advantage) else map(next_key, keys):
            filled = batch.copy() if filled is batch else filled
            over = batch.get(next_key(critic.terminated))
            for agent, holder, name in leaves(filled, key):
                value, ends = holder.get(name), over
                if not value.is_floating_point():
                    continue
                if agent is not None and ends.ndim > dims + 1:
                    ends = ends.select(dims, agent)
                ends = ends.squeeze(-1)
                if ends.shape != value.shape[: ends.ndim]:
                    ends = ends.all(dims)  # what a group shares ends with the last of it
                ends = ends.reshape(*ends.shape, *(1,) * (value.ndim - ends.ndim))
                holder.set(name, torch.where(ends, value.nan_to_num(0.0, 0.0, 0.0), value))
    return filled


@contextmanager
def filling_in_place(estimator: Any) -> Iterator[None]:
    """Let an estimator fill in missing next observations without looking whether any is missing.

    TorchRL puts the observation of a step in the place of a next one that is NaN, as a collector
    with ``compact_obs=True`` leaves it at the end of a trajectory. It reads back from the device
    whether there is one, and then works on a copy, in which its values get lost (TorchRL 0.14.1).
    """
    set_filling(estimator, fill_next)
    try:
        yield
    finally:
        set_filling(estimator, None)


def fill_next(data: TensorDictBase, keys: Sequence[NestedKey]) -> TensorDictBase:
    """Put the observation of a step in the place of a next one that is NaN, in place.

    Args:
        data (TensorDictBase): a batch with its next steps.
        keys (sequence of NestedKey): the observations.
    """
    for key in keys:
        now, after = data.get(key, None), data.get(next_key(key), None)
        if now is None or after is None or now.shape != after.shape:
            continue
        if now.is_floating_point():
            data.set(next_key(key), torch.where(after.isnan(), now, after))
    return data


def check_finite(team: Team, batch: TensorDictBase, masks: Masks | None) -> None:
    """Refuse non-finite numbers, and rewards that differ between the agents of a team.

    Where a mask says that an agent was not active, or that a step does not count, anything may
    stand. Reads the values, and so synchronises with the device, once.

    Args:
        team (Team): the agents and the keys that the batch holds.
        batch (TensorDictBase): a batch that passed :func:`check_batch`.
        masks (Masks, optional): the masks of the batch. ``None``: everything counts.

    Raises:
        ValueError: naming the entry that is not finite, or the rewards that differ.
    """
    complaints, verdicts = [], []
    for key in team.entries_read(batch):
        for verdict in _finite(batch, key) if masks is None else masks.finite(key):
            complaints.append(_NOT_FINITE.format(key))
            verdicts.append(verdict)
    for critic in team.critics.values():
        # Costs may differ: a critic has a value of each agent's for them.
        if critic.reward == team.keys.reward and not has(batch, critic.advantage):
            complaints.append(_DIFFERING.format(next_key(critic.reward)))
            verdicts.append(_is_shared(batch, next_key(critic.reward), masks))
    for complaint, is_good in zip(complaints, torch.stack(verdicts).tolist(), strict=True):
        if not is_good:
            raise ValueError(complaint)


def _finite(batch: TensorDictBase, key: NestedKey) -> Iterator[Tensor]:
    for value in tensors_of(batch, key):
        if value.is_floating_point():
            yield value.isfinite().all()


def _is_shared(batch: TensorDictBase, key: NestedKey, masks: Masks | None) -> Tensor:
    """Whether all agents that act at a step are paid the same for it."""
    reward = batch.get(key)
    if reward.ndim == batch.batch_dims + 1:
        return torch.ones((), dtype=torch.bool, device=reward.device)
    least, most = reward, reward
    mask = None if masks is None else masks.entry(key)
    if mask is not None:
        mask = mask.reshape(*mask.shape, *(1,) * (reward.ndim - mask.ndim))
        least = torch.where(mask, reward, torch.inf)
        most = torch.where(mask, reward, -torch.inf)
    return (most.amax(batch.batch_dims) <= least.amin(batch.batch_dims)).all()


def check_actions(
    agent: Agent,
    parameters: Parameters,
    data: TensorDictBase,
    *,
    valid: Tensor | None = None,
    read_values: bool = True,
) -> None:
    """Refuse actions that the agent's distribution cannot have drawn.

    Args:
        agent (Agent): the agent.
        parameters (dict of str to Tensor): of its distribution, at the observations of ``data``.
        data (TensorDictBase): its view of the batch.

    Keyword Args:
        valid (Tensor, optional): which actions count.
        read_values (bool): whether to look at the actions' values, which synchronises once.

    Raises:
        ValueError: naming the action, what was got and what is wanted.
    """
    key, dist = agent.policy.action_keys[0], agent.policy.distribution(parameters)
    if isinstance(dist, (CompositeDistribution, SideBySide)):
        return
    action = data.get(key)
    one_hot = isinstance(dist, (OneHotCategorical, MaskedOneHotCategorical))
    choices = dist.logits.shape[-1:] if isinstance(dist, Categorical) and one_hot else ()
    shape = (*dist.batch_shape, *dist.event_shape, *choices)
    drawn = f"{type(dist).__name__} of {agent.name!r}"
    if tuple(action.shape) != tuple(shape):
        raise ValueError(
            f"The action {key!r} has shape {list(action.shape)}, but the {drawn} draws actions of "
            f"shape {list(shape)}; collect with the loss's own actor."
        )
    if dist.has_rsample and not one_hot and not action.is_floating_point():
        raise ValueError(
            f"The action {key!r} is of {action.dtype}, but the {drawn} draws actions of a float "
            "type; collect with the loss's own actor."
        )
    if one_hot and action.dtype == torch.bool:
        raise ValueError(
            f"The action {key!r} is of torch.bool, but the {drawn} draws actions of whole numbers; "
            "write it as torch.int64."
        )
    bounds = _bounds(dist, one_hot) if read_values else None
    if bounds is not None:
        inside = (action >= bounds[0]) & (action <= bounds[1])
        if valid is not None:
            inside |= ~valid.reshape(*valid.shape, *(1,) * (inside.ndim - valid.ndim))
        if not bool(inside.all()):
            raise ValueError(
                f"The action {key!r} leaves the range of the {drawn}; collect with the loss's own "
                "actor, and let the environment rescale what it takes."
            )


def check_log_prob(agent: Agent, log_prob: Tensor, data: TensorDictBase) -> None:
    """Refuse actions that the agent's own policy gives no finite density, such as forbidden ones.

    Args:
        agent (Agent): the agent.
        log_prob (Tensor): log-probability of its stored actions, as items.
        data (TensorDictBase): its data, perhaps with ``"valid"``.

    Raises:
        ValueError: naming the action and its position among the agent's items.
    """
    bad = ~log_prob.isfinite()
    valid = data.get(VALID, None)
    if valid is not None:
        bad &= valid
    if bool(bad.any()):
        policy = agent.policy
        masks = [key for key in policy.parameter_keys if key not in policy.written_keys]
        why = f"the mask {masks[0]!r} forbids it" if masks else "it lies at a bound of its density"
        raise ValueError(
            f"The action {policy.action_keys[0]!r} of agent {agent.name!r} at item "
            f"{bad.nonzero()[0].tolist()} has log-probability {float(log_prob[bad][0])} under the "
            f"agent's policy: {why}; store the mask that the action was drawn with, or mark the "
            "step as inactive."
        )


def _bounds(dist: Distribution, one_hot: bool) -> tuple[Tensor | float, Tensor | float] | None:
    """Least and largest action, with room for rounding; ``None`` where there is no bound."""
    if isinstance(dist, Categorical):
        return 0, (1 if one_hot else dist.logits.shape[-1] - 1)
    if isinstance(dist, TanhNormal):
        room = 0.01 * (dist.high - dist.low)
        return dist.low - room, dist.high + room
    return None


@contextmanager
def explained(who: str, data: TensorDictBase, keys: Iterable[NestedKey]) -> Iterator[None]:
    """Says in one sentence what a network could not read, where it would raise a torch error.

    Args:
        who (str): whose network it is, the beginning of the sentence.
        data (TensorDictBase): what it reads.
        keys (iterable of NestedKey): where.

    Raises:
        ValueError: from whatever error the network raised.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        entries = ", ".join(
            f"{key!r} {list(value.shape)} of {value.dtype}"
            for key in dict.fromkeys(unravel_key(key) for key in keys)
            for value in tensors_of(data, key)
        )
        raise ValueError(
            f"{who} cannot read the batch ({entries}): {first_line(error)}; pass the shapes and "
            "types that it was built for."
        ) from error
