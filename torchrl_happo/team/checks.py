"""What a batch must hold before it may touch a parameter: keys, shapes, types, devices."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from torchrl_happo.team.agent import Agent
from torchrl_happo.team.entries import has, next_key, path_of, tensors_of
from torchrl_happo.team.team import CriticKeys, Team

__all__ = ["check_agent_keys", "check_batch", "check_team_shape"]


def check_batch(team: Team, batch: TensorDictBase, networks: Iterable[nn.Module] = ()) -> None:
    """Refuse a batch whose keys, shapes, types or device do not fit the team.

    Nothing here reads a tensor's values, so it costs no synchronisation.

    Args:
        team (Team): the agents and the keys that the batch must hold.
        batch (TensorDictBase): joint data of batch size ``[*B]``.
        networks (iterable of nn.Module): the networks that will read the batch.

    Raises:
        TypeError: if ``batch`` is not a tensordict.
        KeyError: if an entry is missing.
        ValueError: if a shape, a type or the device does not fit.
    """
    if not isinstance(batch, TensorDictBase):
        raise TypeError(
            f"The batch must be a TensorDict, got a {type(batch).__name__}; pass what a collector "
            "yields."
        )
    if batch.batch_dims < 1 or batch.batch_size.numel() == 0:
        raise ValueError(
            f"The batch has batch size {list(batch.batch_size)}; pass the tensordict of a "
            "collector, e.g. of batch size [num_envs, time], with at least one step."
        )
    for agent in team.agents:
        check_agent_keys(agent, batch)
    _check_group_sizes(team, batch)
    for agent in team.agents:
        _check_log_prob_shape(agent, batch)
    _check_advantages(team, batch)
    _check_masks(team, batch)
    _check_devices(team, batch, networks)
    _check_detached(team, batch)


def _require(batch: TensorDictBase, key: NestedKey, whose: str, remedy: str) -> None:
    if not has(batch, key):
        raise KeyError(f"The batch has no entry {key!r}, which {whose} needs; {remedy}.")


def check_agent_keys(agent: Agent, batch: TensorDictBase) -> None:
    """Refuse a batch without an agent's observations, actions or log-probabilities."""
    whose = f"agent {agent.name!r}"
    for key in (*agent.actor.in_keys, *agent.policy.action_keys):
        remedy = "collect with the loss's own actor"
        if path_of(key)[-1].startswith("_"):
            remedy = "TorchRL's collectors drop names that begin with '_': rename it without"
        _require(batch, key, whose, remedy)
    for key in agent.policy.log_prob_keys:
        _require(batch, key, whose, "build its actor with return_log_prob=True and collect with it")


def _check_group_sizes(team: Team, batch: TensorDictBase) -> None:
    """Refuse entries that are not of as many agents as the group has networks."""
    members: dict[NestedKey, list[Agent]] = {}
    for agent in team.agents:
        if agent.group is not None:
            members.setdefault(agent.group, []).append(agent)
    for group, agents in members.items():
        wanted = sum(agent.num_members for agent in agents)
        if wanted == 1 and agents[0].index is None:
            continue  # one network for whatever there is
        for key in _entries_of_group(group, agents, batch):
            entry = batch.get(key)
            shape = tuple(entry.batch_size if isinstance(entry, TensorDictBase) else entry.shape)
            if shape[: batch.batch_dims + 1] != (*batch.batch_size, wanted):
                raise ValueError(
                    f"The entry {key!r} has shape {list(shape)}, but the actor of {group!r} has "
                    f"networks for {wanted} agents; collect with it, or build it for as many "
                    "agents as the environment has."
                )


def _entries_of_group(
    group: NestedKey, agents: list[Agent], batch: TensorDictBase
) -> list[NestedKey]:
    """What says how many agents there are: the group's batch size, or each entry's shape."""
    if batch.get(group).batch_dims > batch.batch_dims:
        return [group]
    keys = dict.fromkeys(key for agent in agents for key in agent.keys)
    return [key for key in keys if agents[0].owns(key)]


def _check_is_one_agent(agent: Agent, batch: TensorDictBase) -> None:
    """Refuse a network that several agents share, where it would pass for that of a single one.

    A group may lack the agent dimension in its batch size. Then its log-probabilities have one
    that observations and actions begin with as well; without agents it is one of the action.
    """
    key = agent.policy.log_prob_keys[0]
    log_prob = batch.get(key)
    if agent.index is not None or agent.num_members > 1 or not isinstance(log_prob, Tensor):
        return
    lead = log_prob.shape
    if len(lead) != batch.batch_dims + 1 or lead[-1] == 1:
        return
    # What lies outside the group, such as "is_init", says nothing of its agents.
    seen = [batch.get(key) for key in agent.actor.in_keys if agent.owns(key)]
    actions = [batch.get(key) for key in agent.policy.action_keys]
    begin_alike = all(entry.shape[: len(lead)] == lead for entry in (*seen, *actions))
    if seen and begin_alike and all(entry.ndim > len(lead) for entry in seen):
        raise _shared_network(agent, tuple(lead))


def _shared_network(agent: Agent, shape: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"The log-probability {agent.policy.log_prob_keys[0]!r} has shape {list(shape)}, "
        f"so group {agent.group_name!r} has {shape[-1]} agents, but its actor is one "
        "network that all of them share; pass an ActorList, or build it of a "
        "MultiAgentMLP, with share_params=False, or with share_params=True and blocks=["
        f"{agent.group_name!r}]."
    )


def _check_log_prob_shape(agent: Agent, batch: TensorDictBase) -> None:
    _check_is_one_agent(agent, batch)
    data = agent.view(batch, [*agent.policy.action_keys, *agent.policy.log_prob_keys])
    log_prob = agent.stored_log_prob(data)
    if not log_prob.is_floating_point():
        raise ValueError(
            f"The log-probability {agent.policy.log_prob_keys[0]!r} is of {log_prob.dtype}, but "
            "must be of a float type; collect with the loss's own actor."
        )
    shape = tuple(log_prob.shape)
    wanted = tuple(batch.batch_size)
    if shape == wanted:
        return
    if len(shape) == len(wanted) + 1 and shape[:-1] == wanted:
        if shape[-1] == agent.num_members:
            return
        if agent.index is None:
            raise _shared_network(agent, shape)
    raise ValueError(
        f"The log-probability {agent.policy.log_prob_keys[0]!r} of agent {agent.name!r} has shape "
        f"{list(shape)}, but the batch size is {list(wanted)}; collect with the loss's own actor."
    )


def _check_advantages(team: Team, batch: TensorDictBase) -> None:
    """Refuse a batch that neither holds the advantages nor what they are estimated from."""
    if not team.critics:
        key = team.keys.advantage
        if not has(batch, key):
            raise KeyError(
                f"The batch has no {key!r} and the loss no critic to estimate it with; "
                "pass a critic network or write the advantage."
            )
        check_team_shape(team, batch, key, team.num_agents)
    for critic in team.critics.values():
        if critic.init is not None:
            _require(
                batch, critic.init, "the critic's memory", "append InitTracker() to the transforms"
            )
        for key in critic.observations:
            _require(batch, key, "the critic", "collect it or change the critic's in_keys")
            _check_one_tensor(batch, key)
        if has(batch, critic.advantage):
            check_team_shape(team, batch, critic.advantage, team.num_agents)
            _require(batch, critic.value_target, "the critic", "write it beside the advantage")
            check_team_shape(team, batch, critic.value_target)
        else:
            _check_estimable(team, batch, critic)


def _check_one_tensor(batch: TensorDictBase, key: NestedKey) -> None:
    """Refuse an entry of agents of unlike sizes, which no critic can read at once."""
    sizes = list(dict.fromkeys(tuple(value.shape) for value in tensors_of(batch, key)))
    if len(sizes) > 1:
        raise ValueError(
            f"The critic reads {key!r}, but its agents have tensors of unlike sizes there, "
            f"{' and '.join(str(list(size)) for size in sizes)}; build the environment with "
            "group_map=MarlGroupMapType.ONE_GROUP_PER_AGENT, which gives each a key of its own."
        )


def _check_estimable(team: Team, batch: TensorDictBase, critic: CriticKeys) -> None:
    """Refuse a batch from which no advantage can be estimated."""
    is_reward = critic.reward == team.keys.reward
    kind = "Reward" if is_reward else "Cost"
    other = "call loss.set_keys(reward=...)" if is_reward else "name the cost by its key"
    _require(
        batch,
        next_key(critic.reward),
        "the advantage" if is_reward else "the advantage of a cost",
        f'append Team{kind}("mean") to the environment\'s transforms or {other}',
    )
    check_team_shape(team, batch, next_key(critic.reward))
    for name in ("done", "terminated"):
        key = next_key(getattr(critic, name))
        call = f"loss.set_keys({name}=...)"
        remedy = f"call {call}" if len(key) == 2 else f"leave {call} out"
        _require(batch, key, "the advantage", remedy)
        if batch.get(key).dtype != torch.bool:
            raise ValueError(
                f"The entry {key!r} is of {batch.get(key).dtype}, but it must say yes or no: write "
                "it as torch.bool."
            )
        check_team_shape(team, batch, key)
    for key in critic.observations if critic.needs_next else ():
        _require(batch, next_key(key), "the value of the next state", "collect it")
        pairs = zip(tensors_of(batch, key), tensors_of(batch, next_key(key)), strict=False)
        for now, after in pairs:
            if (now.shape, now.dtype) != (after.shape, after.dtype):
                raise ValueError(
                    f"The entry {next_key(key)!r} has shape {list(after.shape)} and {after.dtype}, "
                    f"but {key!r} has {list(now.shape)} and {now.dtype}; both are observations of "
                    "the same kind and must be alike."
                )


def check_team_shape(
    team: Team, batch: TensorDictBase, key: NestedKey, n_agents: int | None = None
) -> None:
    """Refuse what is neither one number for the team nor one for each agent."""
    value, dims = batch.get(key), batch.batch_dims
    shape, steps = tuple(value.shape), tuple(batch.batch_size)
    per_agent = len(shape) == dims + 2 and n_agents in (None, shape[dims])
    if not (shape[:dims] == steps and shape[-1] == 1 and (len(shape) == dims + 1 or per_agent)):
        raise ValueError(
            f"The entry {key!r} has shape {list(shape)}; it must be {[*steps, 1]} for the team or "
            f"{[*steps, team.num_agents, 1]} for each agent."
        )
    if value.dtype != torch.bool and not value.is_floating_point():
        raise ValueError(
            f"The entry {key!r} is of {value.dtype}, but must be of a float type; write it as "
            "torch.float32."
        )


def _check_masks(team: Team, batch: TensorDictBase) -> None:
    """Refuse masks that do not say yes or no of each step, or of each agent at each step."""
    steps = tuple(batch.batch_size)
    for key in team.mask_keys:
        mask = batch.get(key, None)
        if mask is not None and mask.numel() != batch.numel():
            raise ValueError(
                f"The mask {key!r} has shape {list(mask.shape)}; it must say of each step whether "
                f"it counts, {[*steps]} or {[*steps, 1]}."
            )
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(
                f"The mask {key!r} is of {mask.dtype}, but it must say yes or no: write it as "
                "torch.bool."
            )
    places = [key for agent in team.agents for key in team.active_keys(agent)]
    if team.keys.active not in ("active", "mask") and not any(has(batch, key) for key in places):
        raise KeyError(
            f"The batch has no entry {places[0]!r}, as set_keys(active={team.keys.active!r}) says, "
            "that tells who is active; name the entry of each group, or leave active out."
        )
    for agent in team.agents:
        if len(agent.groups) > 1:
            continue  # each of the block's groups says how many it has
        (key,) = team.active_keys(agent)
        mask = agent.view(batch, [key]).get(key, None)
        if mask is not None and mask.numel() != batch.numel() * agent.num_members:
            raise ValueError(
                f"The mask {key!r} has shape {list(batch.get(key).shape)}; it must say of each "
                f"agent at each step whether it acts, {[*steps, 'n_agents']}."
            )


def _check_devices(team: Team, batch: TensorDictBase, networks: Iterable[nn.Module]) -> None:
    parameters = [parameter for network in networks for parameter in network.parameters()]
    device = parameters[0].device if parameters else batch.device
    for parameter in parameters:
        if parameter.device.type == "meta":
            raise ValueError(
                "The networks lie on the meta device, which holds no numbers; load their "
                "parameters onto a real one."
            )
        if parameter.device != device:
            raise ValueError(
                f"The networks lie on {device} and {parameter.device}; move the loss to one device "
                "with loss.to(...)."
            )
    for key in team.entries_read(batch):
        for value in tensors_of(batch, key):
            if value.device != device:
                raise ValueError(
                    f"The entry {key!r} of the batch lies on {value.device}, but the networks lie "
                    f"on {device}; move one of them with .to(...)."
                )


def _check_detached(team: Team, batch: TensorDictBase) -> None:
    """Refuse what would carry gradients of the past into the update."""
    keys = [k for c in team.critics.values() for k in (c.advantage, c.value_target)]
    keys.append(team.keys.advantage)
    for agent in team.agents:
        keys += [*agent.policy.action_keys, *agent.policy.log_prob_keys]
    for key in dict.fromkeys(keys):
        if any(value.requires_grad for value in tensors_of(batch, key)):
            raise ValueError(
                f"The entry {key!r} of the batch requires grad; collect under torch.no_grad() or "
                "detach it."
            )
