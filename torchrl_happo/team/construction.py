"""What networks and losses a team can be trained with."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from tensordict import NestedKey
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import unravel_key
from torch import nn
from torch.nn.parameter import is_lazy

from torchrl_happo.arguments import kind_of
from torchrl_happo.policy.rows import num_agents, shared_part
from torchrl_happo.team.agent import Agent
from torchrl_happo.versions import needed

__all__ = [
    "check_initialized",
    "check_loss",
    "check_networks",
    "check_policy_keys",
    "check_separate",
    "check_unfrozen",
    "check_value_key",
    "check_value_norm",
]


def check_networks(actors: object, critic: object, blocks: object) -> None:
    """Refuse networks that no loss can be built of.

    Args:
        actors (object): should be the joint actor of a group, or a mapping from group to actor.
        critic (object): should be a tensordict module, or ``None``.
        blocks (object): should be a collection of groups.

    Raises:
        TypeError: if one of them is of another kind.
        ValueError: if an actor, which is to be cut into agents, is not initialised yet.
    """
    groups = actors if isinstance(actors, Mapping) else {None: actors}
    for group, actor in groups.items():
        whose = "The actor" if group is None else f"The actor of group {group!r}"
        if group is not None and not isinstance(group, str):
            raise TypeError(f"The groups of the actors must be named by strings, got {group!r}.")
        if not isinstance(actor, TensorDictModuleBase):
            raise TypeError(f"{whose} is {kind_of(actor)}; pass a ProbabilisticActor.")
        check_initialized(actor, whose)
    if isinstance(critic, Mapping):
        raise TypeError(
            f"The critic is {kind_of(critic)} of {sorted(map(str, critic))}, but the team has one: "
            "pass a critic that reads all groups, such as make_critic(env)."
        )
    if critic is not None and not isinstance(critic, TensorDictModuleBase):
        raise TypeError(
            f"The critic is {kind_of(critic)}; wrap it as TensorDictModule(critic, in_keys=[...], "
            'out_keys=["state_value"]).'
        )
    if isinstance(blocks, str) or not isinstance(blocks, Collection):
        raise TypeError(
            f"blocks must be a collection of groups, such as ['agents'], got {blocks!r}."
        )


def check_initialized(network: nn.Module, whose: str) -> None:
    """Refuse a network with lazy modules that have not seen data yet."""
    for name, parameter in network.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"{whose} has the uninitialised lazy parameter {name!r}; run it once on data of "
                "the environment, e.g. env.reset(), before it is used here."
            )


def check_separate(agents: Iterable[Agent], critic: nn.Module | None) -> None:
    """Refuse a parameter that would move in two turns: of two agents, or an agent and the critic.

    Args:
        agents (iterable of Agent): the agents of all groups.
        critic (nn.Module, optional): the critic.

    Raises:
        ValueError: naming the parameter and those who share it.
    """
    owners: dict[int, Agent] = {}
    for agent in agents:
        for name, parameter in agent.source.named_parameters():
            if not parameter.requires_grad:
                continue  # frozen: nobody moves it
            owner = owners.setdefault(id(parameter), agent)
            if owner is not agent and not owner.is_another_row_of(agent):
                raise ValueError(
                    f"The agents {owner.name!r} and {agent.name!r} share the parameter {name!r}, "
                    "so that the update of one would move the policy of the other; give each an "
                    "actor of its own."
                )
    for name, parameter in [] if critic is None else critic.named_parameters():
        if id(parameter) in owners:
            raise ValueError(
                f"Actor and critic share the parameter {name!r}, so that fitting the critic "
                "would move a policy whose turn is over; give the critic its own network, in a "
                "module that does not hold the actor as well."
            )


def check_unfrozen(agents: Iterable[Agent], critic: nn.Module | None) -> None:
    """Refuse what is shared and was frozen when the updater was built, but is trained now.

    Args:
        agents (iterable of Agent): the agents of all groups.
        critic (nn.Module, optional): the critic.

    Raises:
        ValueError: naming what is shared.
    """
    agents = list(agents)
    check_separate(agents, critic)
    for agent in agents:
        size = num_agents(agent.source, agent.group_name) if agent.index is not None else None
        shared = None if size is None else shared_part(agent.source, size)
        if shared is not None:
            raise ValueError(
                f"The actor of group {agent.group_name!r} has {shared}, which is no longer frozen, "
                "so that the update of one agent would move the policies of all; freeze it with "
                "requires_grad_(False), or build the loss with blocks=["
                f"{agent.group_name!r}]."
            )


def check_value_key(key: NestedKey, critic: TensorDictModuleBase) -> None:
    """Refuse to read the state value where the critic does not write it.

    Raises:
        KeyError: naming both keys.
    """
    if unravel_key(key) not in [unravel_key(written) for written in critic.out_keys]:
        raise KeyError(
            f"The critic writes {list(critic.out_keys)}, but the loss reads the state value "
            f"from {key!r}; call loss.set_keys(value=...) with a key that it writes."
        )


def check_value_norm(value_norm: Any) -> None:
    """Refuse statistics of anything but single values.

    Raises:
        ImportError: if TorchRL is too old for a value norm.
        ValueError: naming the shape.
    """
    if value_norm is None:
        return
    if (sentence := needed("value_norm", "0.14")) is not None:
        raise ImportError(sentence)
    if tuple(value_norm.shape) != (1,):
        raise ValueError(
            f"value_norm is a {type(value_norm).__name__} of shape {tuple(value_norm.shape)}, but "
            "its statistics are over the values of all agents, one number each; build it with "
            "shape=1."
        )


def check_policy_keys(name: str, keys: Any, written: Collection[NestedKey]) -> None:
    """Refuse to read actions or log-probabilities where the actors do not write them.

    Args:
        name (str): ``"action"`` or ``"sample_log_prob"``.
        keys (NestedKey or list of NestedKey): where to read them.
        written (collection of NestedKey): where the actors write them.

    Raises:
        KeyError: naming both.
    """
    for key in keys if isinstance(keys, list) else [keys]:
        if unravel_key(key) not in written:
            raise KeyError(
                f"The actors write {list(written)}, but the loss would read {name} from {key!r}; "
                f"leave set_keys({name}=...) out, or build the actor with that key."
            )


def check_loss(loss: Any) -> None:
    """Refuse a loss that cannot be updated agent by agent.

    Raises:
        TypeError: if it is not the loss of a team.
        ValueError: if no agent, or the critic, has anything to train, or the loss is no mean.
    """
    if not hasattr(loss, "agent_problem"):
        raise TypeError(
            f"A SequentialUpdater updates a HAPPOLoss or a HATRPOLoss, got {kind_of(loss)}; build "
            "one of the same networks."
        )
    if loss.reduction != "mean":
        raise ValueError(
            f"The loss has reduction={loss.reduction!r}, but the steps of a SequentialUpdater "
            "follow means over the entries that count; build it with reduction='mean'."
        )
    if (dims := tuple(loss.normalize_advantage_exclude_dims)) not in ((), (-2,)):
        raise ValueError(
            f"The loss has normalize_advantage_exclude_dims={dims}, but a SequentialUpdater "
            "standardises over all steps of a batch; leave it out, or pass (-2,) for the advantage "
            "of each agent by itself."
        )
    for agent in loss.agents:
        if agent.name == "critic":
            raise ValueError(
                "An agent has the name 'critic', under which the critic's metrics and state are "
                "filed; rename its group."
            )
    if any(parameter.is_inference() for parameter in loss.parameters()):
        raise ValueError(
            "The networks were built under torch.inference_mode(), so that no gradient reaches "
            "them; build them outside of it."
        )
    # A frozen agent acts on and is left as it is; someone must be trained.
    if not any(p.requires_grad for agent in loss.agents for p in agent.parameters()):
        raise ValueError(
            f"The actor of agent {loss.agents[0].name!r} has no parameter that requires a "
            "gradient, nor has that of any other agent; unfreeze those that are to be trained."
        )
    for name, critic in loss.critics.items():
        check_value_key(critic.keys.value, critic.network)
        check_initialized(critic.network, "The critic")
        trained = any(parameter.requires_grad for parameter in critic.network.parameters())
        if critic.is_fitted and not trained:
            raise ValueError(
                f"The {name} has no parameter that requires a gradient; unfreeze it, or build the "
                "loss with critic_coeff=0 to keep it as it is."
            )
