"""From a coordinated policy to one network of each agent, for decentralised execution."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential
from tensordict.utils import unravel_key
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_happo.arguments import check_choice, check_seed
from torchrl_happo.masked import VALID, masked_mean
from torchrl_happo.objectives.base import Actors
from torchrl_happo.policy.distributions import kl_divergence
from torchrl_happo.steps.first_order import FirstOrder
from torchrl_happo.steps.optimizers import OptimizerFactory
from torchrl_happo.steps.step import Problem
from torchrl_happo.team.agent import Agent
from torchrl_happo.team.agreement import check_agreement
from torchrl_happo.team.entries import path_of
from torchrl_happo.team.split import split_team
from torchrl_happo.transaction import Transaction

__all__ = ["Distillation"]

#: Entry of an agent's data: the parameters of the coordinated policy, or its greedy actions.
TARGET = "target"


class Distillation:
    r"""Teaches a coordinated policy to agents that act alone (Ye et al., 2022).

    With ``target="full"`` it minimises, at the states of a batch,

    .. math::
        \sum_i D_{KL}\bigl(\pi(a^i | o, a^{1:i-1}) \,\|\, \pi_i(a^i | o^i)\bigr),

    the part of the divergence of the coordinated policy from the product
    :math:`\prod_i \pi_i` that the product can change, exact in :math:`a^i` and sampled in the
    prefixes. It tends to 0 if and only if the coordinated policy is a product itself, as a
    deterministic one is. With ``target="greedy"`` it minimises :math:`-\log \pi_i` of the most
    likely joint actions, as behaviour cloning does: of several modes one is learned, then.

    Each agent has an optimiser of its own, and a network that sees its own observation alone:
    at the first batch they are compared with the joint actor, as those of HAPPO are.

    Args:
        teacher (ProbabilisticTensorDictSequential): the coordinated policy, such as the first that
            :func:`~torchrl_happo.make_transformer` returns. It is not changed.
        students (ProbabilisticTensorDictSequential or mapping of str to it): the actor of each
            group, such as :func:`~torchrl_happo.make_actor` returns.

    Keyword Args:
        target (str): ``"full"`` or ``"greedy"``. Defaults to ``"full"``.
        optimizer (callable): from parameters to an optimiser. Defaults to Adam with 3e-4.
        num_epochs (int): passes over a batch. Defaults to ``10``.
        minibatch_size (int, optional): environment steps in a minibatch. Defaults to ``None``: the
            whole batch.
        max_grad_norm (float, optional): bound of each agent's gradient. Defaults to ``None``.
        seed (int): seed of the minibatches. Defaults to ``0``.

    Raises:
        ValueError: if agents share parameters, or their distributions have other parameters than
            those of the teacher.

    Example:
        >>> from torchrl_happo import make_actor, make_transformer
        >>> from torchrl_happo.envs import MatrixGame, climbing_payoff
        >>> env = MatrixGame(climbing_payoff(), num_envs=16)
        >>> teacher, _ = make_transformer(env, size=16)
        >>> distil = Distillation(teacher, make_actor(env), num_epochs=2)
        >>> with torch.no_grad():
        ...     batch = env.rollout(1, teacher)
        >>> sorted(distil(batch).keys())
        ['agents_0', 'agents_1']
    """

    def __init__(
        self,
        teacher: ProbabilisticTensorDictSequential,
        students: Actors,
        *,
        target: Literal["full", "greedy"] = "full",
        optimizer: OptimizerFactory = FirstOrder.optimizer,  # type: ignore[assignment]
        num_epochs: int = FirstOrder.num_epochs,  # type: ignore[assignment]
        minibatch_size: int | None = None,
        max_grad_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        check_choice("target", target, ("full", "greedy"))
        check_seed(seed)
        self.teacher = teacher
        self.agents = split_team(students)
        self.target = target
        self._check_parameters()
        device = self.agents[0].parameters()[0].device
        self._generator = torch.Generator(device).manual_seed(seed)
        settings = FirstOrder(
            optimizer=optimizer,
            num_epochs=num_epochs,
            minibatch_size=minibatch_size,
            max_grad_norm=max_grad_norm,
        )
        self.steps = {
            agent.name: settings(
                Problem(
                    name=agent.name,
                    group=agent.group_name,
                    loss=partial(self._loss, agent),
                    named_parameters=agent.named_parameters,
                    generator=self._generator,
                )
            )
            for agent in self.agents
        }

    def __call__(self, batch: TensorDictBase) -> TensorDict:
        """Teach the agents what the coordinated policy does at the states of a batch.

        Args:
            batch (TensorDictBase): joint data ``[*B]`` of a collector; not modified.

        Returns:
            under each agent's name its ``loss``, ``grad_norm`` and number of ``epochs``.
        """
        for agent in self.agents:
            agent.tie()
        if not all(agent.is_checked for agent in self.agents):
            check_agreement(self.agents, batch)
        shown = self._shown(batch)
        metrics = TensorDict()
        with Transaction([self._generator]) as transaction:
            for agent in self.agents:
                step = self.steps[agent.name]
                step.follow()
                transaction.remember(step)
                metrics[agent.name] = step.propose(self._data(agent, batch, shown)).apply()
        return metrics

    def _check_parameters(self) -> None:
        written = {unravel_key(key) for key in self.teacher.out_keys}
        for agent in self.agents:
            policy = agent.policy
            wanted = policy.written_keys if self.target == "full" else policy.action_keys
            if missing := [key for key in wanted if key not in written]:
                raise ValueError(
                    f"The policy of agent {agent.name!r} has the parameter {missing[0]!r}, which "
                    "the coordinated policy does not write; build both of the same environment, "
                    "the agents by make_actor."
                )

    @torch.no_grad()
    def _shown(self, batch: TensorDictBase) -> TensorDictBase:
        """Return the coordinated policy's parameters or, for the target "greedy", its actions."""
        if self.target == "full":
            return self.teacher.get_dist_params(batch.copy())
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            return self.teacher(batch.select(*self.teacher.in_keys, strict=False))

    def _data(self, agent: Agent, batch: TensorDictBase, shown: TensorDictBase) -> TensorDictBase:
        """Return an agent's observations, and what it is to do, as items."""
        policy = agent.policy
        data = agent.view(batch, agent.actor.in_keys)
        if self.target == "full":
            rows = agent.view(shown, policy.written_keys)
            target: Any = {path_of(key)[-1]: rows.get(key) for key in policy.written_keys}
            data.set(TARGET, TensorDict(target, batch.batch_size))
        else:
            data.set(TARGET, agent.view(shown, policy.action_keys).get(policy.action_keys[0]))
        group = () if agent.group is None else path_of(agent.group)
        active = agent.view(batch, [unravel_key((*group, "active"))])
        for mask in active.values(True, True):
            data.set(VALID, mask.reshape(batch.batch_size))
        return data.reshape(-1)

    def _loss(self, agent: Agent, data: TensorDictBase) -> Tensor:
        """Return the mean divergence, or minus the mean log-probability, of one agent."""
        policy = agent.policy
        parameters, target = policy.parameters(data), data.get(TARGET)
        own = policy.distribution(parameters)
        if self.target == "full":
            loss = kl_divergence(policy.distribution({**parameters, **target}), own)
        else:
            loss = -agent.joint_log_prob(own.log_prob(target), data)
        return masked_mean(loss, data.get(VALID, None))

    def state_dict(self) -> dict[str, Any]:
        """Return networks and optimisers of the students, and the generator of the minibatches."""
        return {
            "agents": {
                agent.name: {k: v.detach().clone() for k, v in agent.named_parameters()}
                for agent in self.agents
            },
            "steps": {name: copy.deepcopy(step.state_dict()) for name, step in self.steps.items()},
            "generator": self._generator.get_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`.

        Raises:
            ValueError: if it is of other students; nothing is changed then.
        """
        for agent in self.agents:
            own, given = dict(agent.named_parameters()), state["agents"].get(agent.name, {})
            shapes = [{k: v.shape for k, v in tensors.items()} for tensors in (own, given)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"The state does not have the network of the student {agent.name!r}; load it "
                    "into a distillation with the same students."
                )
        for agent in self.agents:
            for name, parameter in agent.named_parameters():
                parameter.copy_(state["agents"][agent.name][name])
            self.steps[agent.name].load_state_dict(state["steps"][agent.name])
        self._generator.set_state(state["generator"])
