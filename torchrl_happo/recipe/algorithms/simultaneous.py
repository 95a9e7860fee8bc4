"""MAPPO and IPPO by TorchRL's own losses: the comparison for every claim.

The loop is that of TorchRL's multi-agent PPO script (advantages of the whole batch, one Adam over
actor and critic, minibatches without replacement, one gradient norm for both networks), with what
its example gets wrong put right: the keys, and the time limit, which is bootstrapped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.envs import EnvBase
from torchrl.modules import MultiAgentMLP
from torchrl.objectives import ClipPPOLoss, ValueEstimators

from torchrl_happo.networks.layer_norm import MultiAgentLayerNormMLP
from torchrl_happo.networks.specs import Group, read_groups, read_state
from torchrl_happo.objectives.value_norm import RealValues
from torchrl_happo.recipe.algorithms.parts import (
    critic_settings,
    make_actors,
    network_settings,
    optimizer_settings,
    policy_of,
    state_key,
)
from torchrl_happo.recipe.config import (
    AlgorithmConfig,
    ConfigError,
    RecurrentModel,
    TrainConfig,
    default_of,
    number,
)
from torchrl_happo.recipe.learner import Learner
from torchrl_happo.steps.optimizers import OptimizerFactory, SchedulerFactory
from torchrl_happo.versions import MAPPOLoss


@dataclass
class SimultaneousConfig(AlgorithmConfig):
    """What MAPPO and IPPO share: TorchRL's loss for each group, one Adam over actor and critic."""

    min_torchrl: ClassVar[str] = "0.13"
    loss_class: ClassVar[type[MAPPOLoss]]
    centralized: ClassVar[bool]

    clip_epsilon: float = number(default_of(ClipPPOLoss, "clip_epsilon"), above=0, below=1)
    """How far a ratio may go from 1 and still gain by it."""
    entropy_coeff: float = number(0.01, at_least=0)  # as MAPPOLoss
    """Weight of the entropy bonus."""
    share_params: bool = True
    """One network for a group, as the papers do; false: one for each agent, as HAPPO."""

    def check(self, config: TrainConfig) -> None:
        """Refuse minibatches of one frame, memory, and inputs of the other algorithms' critic."""
        if self.minibatch_size == 1:
            raise ConfigError(
                f"algorithm.minibatch_size is 1, but {self.name} standardises the advantage over "
                "a minibatch: take at least 2."
            )
        if isinstance(config.model, RecurrentModel):
            raise ConfigError(
                f"model={config.model.name} is for happo and hatrpo: take model=mlp with "
                f"{self.name}."
            )
        critic = config.critic
        others = {"input": critic.input != "auto", "model": critic.model != "mlp"}
        others["make_critic"] = critic.make_critic is not None
        for name, is_set in others.items():
            if is_set:
                raise ConfigError(
                    f"critic.{name} is for happo and hatrpo: leave it out with {self.name}."
                )

    def make_learner(
        self, config: TrainConfig, env: EnvBase, process_group: dist.ProcessGroup | None
    ) -> Learner:
        """Build a network, a loss and an optimiser for each group of an environment."""
        actors = make_actors(config, env, share_params=self.share_params)
        losses = {
            group.name: self._make_loss(config, env, group, actors[group.name])
            for group in read_groups(env, "observation")
        }
        updater = SimultaneousUpdater(
            losses,
            **optimizer_settings(config),
            num_epochs=self.num_epochs,
            minibatch_size=self.minibatch_size or config.frames_per_batch,
            max_grad_norm=self.max_grad_norm,
        )
        return Learner(policy_of(actors), updater, actors)

    def _make_loss(self, config: TrainConfig, env: EnvBase, group: Group, actor: Any) -> MAPPOLoss:
        critic: TensorDictModuleBase = make_group_critic(
            env,
            group,
            centralized=self.centralized,
            state_key=state_key(env),
            share_params=self.share_params,
            device=env.device,
            **network_settings(config.model),
        )
        settings = critic_settings(self, env)
        if settings["value_norm"] is not None:
            # TorchRL's losses normalise real values; the network predicts normalised ones.
            critic = RealValues(critic, settings["value_norm"], group.key("state_value"))
        loss = self.loss_class(
            actor,
            critic,
            clip_epsilon=self.clip_epsilon,
            entropy_coeff=self.entropy_coeff,
            # TanhNormal has no closed-form entropy: unused, it would only cost time.
            entropy_bonus=self.entropy_coeff > 0,
            functional=False,
            **settings,
        )
        loss.set_keys(
            action=group.action,
            sample_log_prob=group.key("action_log_prob"),
            value=group.key("state_value"),
            advantage=group.key("advantage"),
            value_target=group.key("value_target"),
        )
        loss.make_value_estimator(ValueEstimators.MAGAE, gamma=self.gamma, lmbda=self.lmbda)
        return loss


class SimultaneousUpdater:
    """Updates all agents of all groups at once; the interface of ``SequentialUpdater``.

    Args:
        losses (dict of str to MAPPOLoss): the loss of each group.

    Keyword Args:
        optimizer (callable): from parameters to an optimiser; called once per group.
        num_epochs (int): passes over the batch.
        minibatch_size (int): frames of a minibatch, at least 2; the last one of an epoch may be
            smaller, and is left out if it would be a single frame.
        max_grad_norm (float, optional): the gradient of actor and critic together is scaled down
            to this norm. Defaults to ``None``: no clipping.
        scheduler (callable, optional): from an optimiser to its learning-rate scheduler, which
            steps once per batch. Defaults to ``None``.
    """

    def __init__(
        self,
        losses: dict[str, MAPPOLoss],
        *,
        optimizer: OptimizerFactory,
        num_epochs: int,
        minibatch_size: int,
        max_grad_norm: float | None = None,
        scheduler: SchedulerFactory | None = None,
    ) -> None:
        self.losses = losses
        self.optimizers = {name: optimizer(loss.parameters()) for name, loss in losses.items()}
        self.schedulers = (
            {name: scheduler(own) for name, own in self.optimizers.items()} if scheduler else {}
        )
        self.num_epochs = num_epochs
        self.minibatch_size = minibatch_size
        self.max_grad_norm = math.inf if max_grad_norm is None else max_grad_norm
        self._buffer: ReplayBuffer | None = None

    def __call__(self, batch: TensorDictBase) -> TensorDict:
        """Updates every group with a batch of shape ``[num_envs, steps]``.

        Returns:
            for each group the means over its optimiser steps of what the loss reports.
        """
        return TensorDict({name: self._update(name, batch.copy()) for name in self.losses})

    def _update(self, name: str, batch: TensorDictBase) -> TensorDict:
        loss = self.losses[name]
        with torch.no_grad():
            loss.value_estimator(batch)
        # What lies under "next" has been used by now; without it minibatches are quick to gather.
        minibatches = self._shuffled(batch.exclude("next").reshape(-1))
        reports = [
            self._step(name, minibatch) for _ in range(self.num_epochs) for minibatch in minibatches
        ]
        if self.schedulers:
            self.schedulers[name].step()
        stacked = TensorDict.maybe_dense_stack(reports)
        return stacked.apply(lambda value: value.mean(), batch_size=[])

    def _shuffled(self, data: TensorDictBase) -> ReplayBuffer:
        """A buffer that holds ``data`` alone, and yields it in a new order at each iteration."""
        if self._buffer is None or self._buffer.storage.max_size != len(data):
            self._buffer = ReplayBuffer(
                storage=LazyTensorStorage(len(data)),
                # The loss standardises the advantage, of which one frame has no deviation.
                sampler=SamplerWithoutReplacement(drop_last=len(data) % self.minibatch_size == 1),
                batch_size=self.minibatch_size,
            )
        self._buffer.empty()  # also the permutation that is drawn ahead for the next epoch
        self._buffer.extend(data)
        return self._buffer

    def _step(self, name: str, minibatch: TensorDictBase) -> TensorDict:
        loss, optimizer = self.losses[name], self.optimizers[name]
        report = loss(minibatch)
        total = sum(value for key, value in report.items() if key.startswith("loss_"))
        optimizer.zero_grad()
        total.backward()
        norm = nn.utils.clip_grad_norm_(loss.parameters(), self.max_grad_norm)
        optimizer.step()
        return report.detach().set("grad_norm", norm)

    def state_dict(self) -> dict[str, Any]:
        """Networks and optimisers; minibatches are drawn from torch's global generator."""
        return {
            name: {
                "loss": loss.state_dict(),
                "optimizer": self.optimizers[name].state_dict(),
                "scheduler": self.schedulers[name].state_dict() if self.schedulers else None,
            }
            for name, loss in self.losses.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`.

        Raises:
            ValueError: if it is from other networks; nothing is changed then.
        """
        if state.keys() != self.losses.keys():
            raise ValueError(
                f"the state has the groups {sorted(state)}, the team has {sorted(self.losses)}"
            )
        for name, loss in self.losses.items():
            own, other = loss.state_dict(), state[name]["loss"]
            for key in sorted(own.keys() | other.keys()):
                if key not in own or key not in other or own[key].shape != other[key].shape:
                    raise ValueError(f"its networks differ from these at {name}.{key}")
        for name, loss in self.losses.items():
            loss.load_state_dict(state[name]["loss"])
            self.optimizers[name].load_state_dict(state[name]["optimizer"])
            if self.schedulers:
                self.schedulers[name].load_state_dict(state[name]["scheduler"])


class TeamStateCritic(nn.Module):
    """A value for each agent of a group from the state, or the observations of all agents.

    Args:
        n_inputs (int): size of all inputs together.
        n_agents (int): agents of the group.

    Keyword Args:
        event_dims (int): dimensions of an input after those of the batch: 1 for a state, 2 for
            the observations of a group. Defaults to ``2``.
        share_params (bool): one network, whose value all agents share, or one for each agent.
        layer_norm (bool): whether the input and the output of each hidden layer are normalised.
            Defaults to ``False``.
        **kwargs: of :class:`~torchrl.modules.MultiAgentMLP`.
    """

    def __init__(
        self,
        n_inputs: int,
        n_agents: int,
        *,
        share_params: bool,
        event_dims: int = 2,
        layer_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.event_dims = event_dims
        self.n_agents = n_agents
        self.n_networks = 1 if share_params else n_agents
        stack = MultiAgentLayerNormMLP if layer_norm else MultiAgentMLP
        self.net = stack(
            n_inputs, 1, self.n_networks, centralized=False, share_params=share_params, **kwargs
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        """Values ``[*B, n_agents, 1]`` from a state ``[*B, s]`` or each group's ``[*B, n, d]``."""
        flat = [tensor.flatten(-self.event_dims) for tensor in inputs]
        state = torch.cat(flat, -1).unsqueeze(-2)
        views = state.expand(*state.shape[:-2], self.n_networks, -1)
        return self.net(views).expand(*state.shape[:-2], self.n_agents, 1)


def make_group_critic(
    env: EnvBase,
    group: Group,
    *,
    centralized: bool,
    share_params: bool,
    state_key: str | None = None,
    layer_norm: bool = False,
    **kwargs: Any,
) -> TensorDictModule:
    """The critic of a group: over what the whole team knows, or over each agent's observation.

    Args:
        env (EnvBase): the environment.
        group (Group): the group; it writes ``(group, "state_value")``, ``[*B, n_agents, 1]``.

    Keyword Args:
        centralized (bool): MAPPO's critic, otherwise IPPO's.
        share_params (bool): one network for the group or one for each agent.
        state_key (str, optional): the environment's own state, which MAPPO's critic then sees.
            Defaults to ``None``: it sees the observations of all agents.
        layer_norm (bool): whether the input and the output of each hidden layer are normalised.
            Defaults to ``False``.
        **kwargs: of :class:`~torchrl.modules.MultiAgentMLP`.
    """
    team = read_groups(env, "observation") if centralized else [group]
    in_keys = [member.observation for member in team]
    sizes = [_size(member) for member in team]
    net: nn.Module
    if not centralized:
        stack = MultiAgentLayerNormMLP if layer_norm else MultiAgentMLP
        net = stack(
            group.n_inputs, 1, *sizes, centralized=False, share_params=share_params, **kwargs
        )
    else:
        event_dims, n_inputs = 2, sum(n * m.n_inputs for n, m in zip(sizes, team, strict=True))
        if state_key is not None:
            in_keys, event_dims, n_inputs = [state_key], 1, read_state(env, state_key).size
        net = TeamStateCritic(
            n_inputs,
            _size(group),
            share_params=share_params,
            event_dims=event_dims,
            layer_norm=layer_norm,
            **kwargs,
        )
    return TensorDictModule(net, in_keys=in_keys, out_keys=[group.key("state_value")])


def _size(group: Group) -> int:
    if group.n_agents is None:
        raise ConfigError(
            f"The group {group.name!r} has no agent dimension, which MAPPO and IPPO of TorchRL "
            "need: take algorithm=happo."
        )
    return group.n_agents
