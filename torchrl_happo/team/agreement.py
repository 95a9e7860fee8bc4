"""Each agent trains the policy that acted: its row is compared with the joint actor.

The comparison is made at the first batch, and again when modules have changed their mode or have
got a hook. An agent whose row alone computes something else is evaluated by the joint actor from
then on. That is right if agents do not mix: an agent's policy must not depend on the observations
of others, nor its parameters on the policies of others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from torchrl_happo.policy.joint_row import row_of
from torchrl_happo.policy.memory import has_memory
from torchrl_happo.policy.policy import Parameters, Policy
from torchrl_happo.team.agent import Agent
from torchrl_happo.team.values import explained

__all__ = ["check_agreement"]

_ROWS = 32
# Rounding: a batched product adds up in another order than a single one.
_CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@torch.no_grad()
def check_agreement(agents: Sequence[Agent], batch: TensorDictBase) -> None:
    """Compare agents with the joint actors that they were cut from, on some rows of a batch.

    Args:
        agents (sequence of Agent): the agents of a team.
        batch (TensorDictBase): joint data of batch size ``[*B]``.

    Raises:
        ValueError: if modules draw random numbers in training mode, or agents mix without being a
            block.
    """
    for agent in agents:
        _check_modes(agent)
    cut = [agent for agent in agents if agent.index is not None and agent.source is not agent.actor]
    # In full precision, whatever the user's autocast is: what is compared are functions.
    device = agents[0].parameters()[0].device.type
    with torch.autocast(device, enabled=False):
        for _, group in groupby(cut, key=lambda agent: id(agent.source)):
            members = list(group)
            if not has_memory(members[0].source):
                _check_group(members, batch.reshape(-1)[:_ROWS])
    for agent in agents:
        agent.is_checked = True


def _check_modes(agent: Agent) -> None:
    for name, module in agent.source.named_modules():
        if module.training and isinstance(
            module, (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
        ):
            raise ValueError(
                f"The actor of agent {agent.name!r} has the {type(module).__name__} {name!r} in "
                "training mode, so that its ratio to itself is not 1; call actor.eval() before "
                "collecting and training."
            )


def _check_group(members: list[Agent], rows: TensorDictBase) -> None:
    joint = Policy(members[0].source)
    keys = members[0].update_keys
    with explained(f"The actor of agent {members[0].name!r}", rows, joint.network_keys):
        whole = joint.parameters(rows.select(*keys, strict=False))
    for agent in members:
        alike = _same(_parameters(agent, rows), _row(whole, agent, rows))
        if alike and not _changes_gradients(agent.source):
            continue
        agent.evaluate_jointly()
        _check_independence(agent, joint, rows, whole)


def _changes_gradients(joint: nn.Module) -> bool:
    """Whether a hook may change gradients on their way back, which a row alone would not call."""
    return any(m._backward_hooks or m._backward_pre_hooks for m in joint.modules())


def _parameters(agent: Agent, rows: TensorDictBase) -> Parameters | None:
    """Return the parameters of an agent's policy; ``None`` if its row cannot compute them."""
    try:
        return agent.policy.parameters(agent.view(rows, agent.update_keys))
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError):
        return None


def _index(agent: Agent) -> int:
    assert agent.index is not None  # cut from a stack
    return agent.index


def _row(whole: Parameters, agent: Agent, rows: TensorDictBase) -> Parameters:
    return {name: row_of(value, _index(agent), rows.batch_dims) for name, value in whole.items()}


def _leaves(parameters: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of parameters, some of which may lie in a tensordict, head by head."""
    leaves: dict[str, Tensor] = {}
    for name, value in parameters.items():
        nested = isinstance(value, TensorDictBase)
        parts = value.flatten_keys(".").items() if nested else [("", value)]
        leaves.update({f"{name}.{part}": tensor for part, tensor in parts})
    return leaves


def _same(own: Parameters | None, wanted: Parameters) -> bool:
    mine = {} if own is None else _leaves(own)
    return own is not None and all(
        mine[name].shape == value.shape
        and torch.allclose(mine[name], value, equal_nan=True, **_CLOSE)
        for name, value in _leaves(wanted).items()
        if isinstance(value, Tensor)
    )


def _check_independence(
    agent: Agent, joint: Policy, rows: TensorDictBase, whole: Parameters
) -> None:
    """Refuse an agent that sees others, or whose parameters move the policies of others."""
    index, dims = _index(agent), rows.batch_dims
    mixed = rows.select(*agent.update_keys, strict=False).clone()
    for key in joint.network_keys:
        value = mixed.get(key)
        if agent.owns(key) and value.is_floating_point():
            others = torch.roll(value, 1, 0)
            others.select(dims, index).copy_(value.select(dims, index))
            mixed.set(key, others)
    if not _same(_row(joint.parameters(mixed), agent, rows), _row(whole, agent, rows)):
        raise ValueError(
            f"The policy of agent {agent.name!r} depends on the observations of other agents, by "
            f"{_culprit(agent)}; pass blocks=[{agent.group_name!r}] to update the group as one."
        )
    parameters = [p for p in agent.parameters() if p.requires_grad]
    before = [p.clone() for p in parameters]
    for parameter in parameters:
        parameter.add_(0.1)
    moved = joint.parameters(rows.select(*agent.update_keys, strict=False))
    for parameter, value in zip(parameters, before, strict=True):
        parameter.copy_(value)
    after = _leaves(moved)
    for name, value in _leaves(whole).items():
        companions = [i for i in range(value.shape[dims]) if i != index]
        kept = torch.tensor(companions, device=value.device, dtype=torch.long)
        one, two = (v.index_select(dims, kept) for v in (value, after[name]))
        if not torch.allclose(one, two, equal_nan=True, **_CLOSE):
            raise ValueError(
                f"Parameters of agent {agent.name!r} move the policies of other agents, by "
                f"{_culprit(agent)}; pass blocks=[{agent.group_name!r}] to update the group as one."
            )


def _culprit(agent: Agent) -> str:
    """Name the modules of a joint actor that are neither torch's nor TorchRL's."""
    own: Iterable[str] = (
        type(module).__name__
        for module in agent.source.modules()
        if type(module).__module__.split(".")[0] not in ("torch", "torchrl", "tensordict")
    )
    names = list(dict.fromkeys(own))
    return f"its module {' or '.join(names)}" if names else "one of its modules or hooks"
