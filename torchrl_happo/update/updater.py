"""The ordered multi-agent update: order, factor, critic, metrics, state."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode

from torchrl_happo.arguments import check_callables, check_counts, check_seed, first_line
from torchrl_happo.distributed import Learners
from torchrl_happo.objectives.base import SequentialLossMixin
from torchrl_happo.objectives.value_norm import last_linear
from torchrl_happo.steps.autocast import uncached_autocast
from torchrl_happo.steps.compile.code import make_compiler
from torchrl_happo.steps.first_order import FirstOrder
from torchrl_happo.steps.optimizers import OptimizerFactory, SchedulerFactory
from torchrl_happo.steps.step import ByName, Problem, Step
from torchrl_happo.team.agents import Agent
from torchrl_happo.team.checks import check_batch
from torchrl_happo.team.construction import check_loss
from torchrl_happo.team.values import check_finite
from torchrl_happo.transaction import (
    Transaction,
    global_generators,
    kept_slots,
    load_generator_state,
)
from torchrl_happo.update.batch import TeamBatch
from torchrl_happo.update.metrics import factor_metrics
from torchrl_happo.update.order import LineUp, Order
from torchrl_happo.update.state import check_state
from torchrl_happo.update.turn import Turn

__all__ = ["SequentialUpdater"]

logger = logging.getLogger(__name__)
STATE_VERSION = 1


class SequentialUpdater:
    r"""Updates the agents of a team one after the other, then the critic.

    For each batch (algorithm 4 of Kuba et al., 2022, https://arxiv.org/abs/2109.11251):

    1. the joint advantage :math:`A` is estimated, if the batch has none, and standardised once;
    2. the agents are lined up, in a new random order by default, and the factor is set to 1;
    3. each agent in turn maximises its surrogate of the factor times :math:`A` with its own
       optimiser; then the factor takes in its ratio :math:`\pi_\text{new} / \pi_\text{old}` at
       the stored actions, policy just after against policy just before its own update;
    4. the critic is fitted.

    The factor lives in log space. A step at which an agent was not active contributes ratio 1.
    The ratios of a recurrent actor, those of its loss and those of the factor, come from the same
    evaluation: over chunks of the batch (``sequence_length``), each from the state that the
    collector stored at its first step, with resets where ``"is_init"`` says so.

    An update is all or nothing: a batch that is refused changes nothing, and an error or an
    interrupt in the middle of an update puts parameters and optimisers back to where they were.

    Args:
        loss (HAPPOLoss or HATRPOLoss): the team's loss. It owns the networks and says what one
            agent's step is.

    Keyword Args:
        optimizer (callable): from parameters to an optimiser; called once per agent, so that no
            agent's momentum moves another. Defaults to ``partial(torch.optim.Adam, lr=3e-4)``.
            This and ``num_epochs``, ``minibatch_size``, ``max_grad_norm``, ``scheduler`` and
            ``target_kl`` may be mappings by name of agent or group
            (see :class:`~torchrl_happo.steps.FirstOrder`).
        critic_optimizer (callable, optional): the critic's. Defaults to ``optimizer``.
        num_epochs (int): passes over the batch for each agent. Defaults to ``10``.
        critic_epochs (int, optional): the critic's. Defaults to ``num_epochs``.
        minibatch_size (int, optional): environment steps in a minibatch. ``None``: the whole
            batch. Defaults to ``None``.
        critic_minibatch_size (int, optional): the critic's. Defaults to ``minibatch_size``.
        max_grad_norm (float, optional): the gradient of each agent, and of the critic, is scaled
            down to this norm. Defaults to ``None``: no clipping.
        order (str, sequence or callable): ``"random"``, ``"fixed"``, a sequence of positions or
            names, or a callable that is handed the batch. Defaults to ``"random"``.
        scheduler (callable, optional): from an optimiser to its learning-rate scheduler, which
            steps once per batch, also of an agent that does not act in it. Defaults to ``None``.
        target_kl (float, optional): an agent stops after the epoch in which its mean KL
            divergence from the policy that acted, estimated by :math:`r - 1 - \log r`, passes
            this. Reads a number back after each epoch. Defaults to ``None``: no early stop.
        sequence_length (int, optional): minibatches hold whole chunks of this many consecutive
            steps. Defaults to ``None``: single steps, but the whole length of the batch for the
            agents if an actor is recurrent, and for the critic if it is.
        replay_buffer (ReplayBuffer, optional): draws the minibatches with its own sampler, in
            place of ``minibatch_size``; its generator is not in the state. Defaults to ``None``.
        standardize_advantage (bool): whether to standardise the advantage over the batch.
            Defaults to ``True``.
        check_finite (bool, optional): whether to look for NaN, infinite numbers and unlike rewards
            in each batch (``False``: the first), and for a non-finite gradient, at the price of
            synchronising with the device. Defaults to ``None``: ``True`` on the CPU alone.
        compile (bool or mapping): whether to compile the agents' steps and passes and the critic's
            steps, once for all agents of one architecture; or keyword arguments of
            :func:`torch.compile`. Defaults to ``False``.
        cudagraphs (bool): whether to replay the inner steps from CUDA graphs, compiled or not.
            Without a CUDA device they run as they are, with one warning. Defaults to ``False``.
        seed (int): seed of the order and of the minibatches. Defaults to ``0``.
        process_group (ProcessGroup, optional): the processes that train this team together, each
            on batches of its own, e.g. ``torch.distributed.group.WORLD``. They begin with the first
            one's networks and take each step on the data of all: the result is that of one process
            with the whole batch. ``minibatch_size`` is each one's own. Whether all accept a batch
            is read back from the device twice an agent. Defaults to ``None``: this process alone.

    Raises:
        ValueError: if an argument is out of range, the optimiser is not over the parameters it was
            given, the loss is no mean, or PopArt finds no last layer of the critic to rescale.

    Example:
        >>> from functools import partial
        >>> from torchrl.collectors import Collector
        >>> from torchrl_happo import HAPPOLoss, SequentialUpdater, make_actor, make_critic
        >>> from torchrl_happo.envs import MatrixGame
        >>> env = MatrixGame(torch.tensor([[8.0, -12.0], [-12.0, 4.0]]), num_envs=16)
        >>> actor, critic = make_actor(env), make_critic(env)
        >>> updater = SequentialUpdater(
        ...     HAPPOLoss(actor, critic, entropy_coeff=0.0),
        ...     optimizer=partial(torch.optim.Adam, lr=1e-3),
        ...     num_epochs=2,
        ...     minibatch_size=32,
        ... )
        >>> for batch in Collector(env, actor, frames_per_batch=64, total_frames=128):
        ...     metrics = updater(batch)
        >>> sorted(metrics.keys())
        ['agents_0', 'agents_1', 'critic']
    """

    def __init__(
        self,
        loss: SequentialLossMixin,
        *,
        optimizer: ByName[OptimizerFactory] = FirstOrder.optimizer,
        critic_optimizer: OptimizerFactory | None = None,
        num_epochs: ByName[int] = FirstOrder.num_epochs,
        critic_epochs: int | None = None,
        minibatch_size: ByName[int | None] = None,
        critic_minibatch_size: int | None = None,
        max_grad_norm: ByName[float | None] = None,
        order: str | Sequence[int | str] | Order = "random",
        scheduler: ByName[SchedulerFactory | None] = None,
        target_kl: ByName[float | None] = None,
        sequence_length: int | None = None,
        replay_buffer: ReplayBuffer | None = None,
        standardize_advantage: bool = True,
        check_finite: bool | None = None,
        compile: bool | Mapping[str, Any] = False,
        cudagraphs: bool = False,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_loss(loss)
        check_counts(
            optional=True,
            critic_epochs=critic_epochs,
            critic_minibatch_size=critic_minibatch_size,
            sequence_length=sequence_length,
        )
        check_callables(optional=True, critic_optimizer=critic_optimizer)
        first_order = FirstOrder(
            optimizer=optimizer,
            num_epochs=num_epochs,
            minibatch_size=minibatch_size,
            max_grad_norm=max_grad_norm,
            scheduler=scheduler,
            target_kl=target_kl,
            replay_buffer=replay_buffer,
        )
        own: dict[str, Any] = {
            "optimizer": critic_optimizer,
            "num_epochs": critic_epochs,
            "minibatch_size": critic_minibatch_size,
        }
        critics = replace(first_order, **{k: v for k, v in own.items() if v is not None})
        check_seed(seed)
        self.loss = loss
        self.sequence_length = sequence_length
        self.standardize_advantage = standardize_advantage
        self.num_updates = 0
        self.learners = Learners(process_group)
        self.learners.follow_first(self._loss_state().values())
        device = loss.agents[0].parameters()[0].device
        self.check_finite = device.type == "cpu" if check_finite is None else check_finite
        self._order_generator = torch.Generator().manual_seed(seed)
        self._minibatch_generator = torch.Generator(device).manual_seed(seed)
        self._line_up = LineUp(order, loss.agents, self._order_generator, self.learners)

        if loss.critic_network is not None:
            _ = loss.value_estimator  # its coefficients are part of the state from the start
            if loss.popart and loss.fits_critic:
                last_linear(loss.critic_network, most_outputs=loss.num_agents)

        compiler = make_compiler(compile, cudagraphs, device)

        groups = [agent.group for agent in loss.agents if agent.group is not None]
        common: dict[str, Any] = {
            "names": (*dict.fromkeys([*(a.name for a in loss.agents), *groups]), "critic"),
            "learners": self.learners,
        }
        generator = self._minibatch_generator
        self._agent_steps: dict[str, Step] = {}
        self._turns = {}
        for agent in loss.agents:
            # Two: what cannot be compiled of the one may yet be of the other.
            code, passes = (loss.agent_code(agent, compiler) for _ in range(2))
            self._turns[agent.name] = Turn(loss, agent, code=passes, learners=self.learners)
            problem = loss.agent_problem(agent, generator=generator, code=code, **common)
            self._agent_steps[agent.name] = loss.agent_factory(agent, first_order)(problem)
        self._critic_step = None
        if loss.fits_critic:
            self._critic_step = critics(
                Problem(
                    "critic",
                    loss=loss.critic_objective,
                    named_parameters=loss.critic_network.named_parameters,
                    weight=loss.critic_weight,
                    generator=generator,
                    code=loss.critic_code(compiler),
                    **common,
                )
            )

    @property
    def _steps(self) -> dict[str, Any]:
        critic = {} if self._critic_step is None else {"critic": self._critic_step}
        return {**self._agent_steps, **critic}

    def __call__(self, batch: TensorDictBase) -> TensorDict:
        """Updates every agent in turn, and the critic, with one batch.

        Args:
            batch (TensorDictBase): what a collector yields: joint data of batch size ``[*B]``,
                time last. It is not modified.

        Returns:
            scalars that have not been read back from the device. Under each agent's name:
            ``surrogate_before``, ``surrogate``, ``ratio_mean``, ``ratio_max``, ``ratio_min``,
            ``kl``, ``entropy`` (both estimated where they have no closed form), ``factor_mean``,
            ``factor_max``, ``factor_ess`` (of the factor it starts from, where it acts),
            ``position`` (its place in the order) and what its step reports (``loss``,
            ``grad_norm``, ``epochs``, ``clip_fraction``; a trust region's own); of one that acts
            nowhere ``factor_*`` and ``position``. Under ``"critic"``: ``loss``, ``grad_norm``,
            ``epochs``, ``explained_variance`` (before the fit).

        Raises:
            KeyError: if an entry is missing.
            ValueError: if an entry has the wrong shape or device, or is not finite, or the agents'
                rewards differ.
        """
        with self.learners.agreement():
            check_batch(self.loss, batch)
            if self.check_finite or self.num_updates == 0:
                check_finite(self.loss, batch)
        self._tie()
        # Entropies without a closed form are estimated by draws from torch's global generators.
        with (
            Transaction([*self._generators, *global_generators()]) as undo,
            uncached_autocast(),
            kept_slots([self.loss, *(agent.actor for agent in self.loss.agents)]),
            set_exploration_type(ExplorationType.DETERMINISTIC),
            set_recurrent_mode(True),
        ):
            metrics = self._update(batch, undo)
        self.num_updates += 1
        return metrics

    def _tie(self) -> None:
        """Follows networks that were moved, copied or reloaded since the last update."""
        for agent in self.loss.agents:
            agent.tie()
        for step in self._steps.values():
            step.follow()

    def _update(self, batch: TensorDictBase, undo: Transaction) -> TensorDict:
        with self.learners.agreement():
            team = TeamBatch(
                self.loss,
                batch,
                standardize_advantage=self.standardize_advantage,
                sequence_length=self.sequence_length,
                learners=self.learners,
            )
        metrics = TensorDict()
        own = [getattr(step, "generator", None) for step in self._steps.values()]
        self.learners.draw_as_first([*self._generators, *filter(None, own)])
        for position, agent in enumerate(self._line_up(batch)):
            report = self._update_agent(agent, team, undo)
            report["position"] = torch.tensor(float(position))
            metrics[agent.name] = report
        if self._critic_step is not None:
            metrics["critic"] = self._update_critic(self._critic_step, team, undo)
        for step in self._steps.values():
            # A schedule goes on whether or not its agent has moved.
            undo.remember_once(step)
            step.end_batch()
        return metrics

    def _update_critic(self, step: Step, team: TeamBatch, undo: Transaction) -> TensorDict:
        """The fit of the critic, and of the statistics of its values."""
        report = TensorDict()
        if team.has_values():
            data = team.critic_view()
            if self.loss.value_norm is not None:
                undo.add(self.loss.update_value_norm(team.valid_returns(), data))
            report = self._run("critic", step, data, undo)
        return report.set("explained_variance", team.explained_variance())

    def _update_agent(self, agent: Agent, team: TeamBatch, undo: Transaction) -> TensorDict:
        """One agent's turn; the factor takes in its ratio."""
        report = factor_metrics(*team.starts_from(agent), self.learners)
        if not team.acts(agent):
            return report
        turn, step = self._turns[agent.name], self._agent_steps[agent.name]
        with self.learners.agreement():
            data = turn.before(team.agent_view(agent), read_values=self.check_finite)
        report.update(self._run(agent.name, step, turn.step_view(data), undo))
        log_ratio, metrics = turn.after(data)
        team.include(agent, log_ratio)
        return report.update(metrics)

    def _run(self, name: str, step: Step, data: TensorDictBase, undo: Transaction) -> TensorDict:
        """Runs an inner step, and takes it back if its gradient was not finite."""
        take_back = undo.remember(step)
        report = step.propose(data).apply()
        if self.check_finite and not report["grad_norm"].isfinite():
            take_back()
            logger.warning("The gradient of %s was not finite; its update was taken back.", name)
        return report

    # -- state ---------------------------------------------------------------------------------

    @property
    def _generators(self) -> list[torch.Generator]:
        return [self._order_generator, self._minibatch_generator]

    def state_dict(self) -> dict[str, Any]:
        """Everything the next update depends on, but the batch and generators not its own.

        TorchRL estimates entropies without a closed form by draws from torch's global one.

        Returns:
            networks and coefficients of the loss, optimisers, schedulers, generators and counters;
            a file that holds it loads with ``torch.load(path, weights_only=True)``.
        """
        return {
            "version": STATE_VERSION,
            "num_updates": self.num_updates,
            "loss": self._loss_state(),
            "steps": {name: step.state_dict() for name, step in self._steps.items()},
            "generators": [generator.get_state() for generator in self._generators],
        }

    def _loss_state(self) -> dict[str, Tensor]:
        # The value estimator holds the critic a second time.
        state = self.loss.state_dict()
        return {k: v for k, v in state.items() if not k.startswith("_value_estimator.value_net")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`, bit for bit on the same kind of device.

        Args:
            state (dict): what :meth:`state_dict` returned, for the same team and networks.

        Raises:
            ValueError: if the state is from another version or architecture; nothing is changed.
        """
        self._tie()
        before = copy.deepcopy(self.state_dict())
        check_state(state, before)
        try:
            self._load(state)
        except Exception as error:
            self._load(before)
            raise ValueError(
                f"The state does not fit this updater, which is unchanged: {first_line(error)}."
            ) from error

    def _load(self, state: dict[str, Any]) -> None:
        self.loss.load_state_dict(state["loss"], strict=False)
        for name, step in self._steps.items():
            step.load_state_dict(state["steps"][name])
        for generator, value in zip(self._generators, state["generators"], strict=True):
            load_generator_state(generator, value)
        self.num_updates = state["num_updates"]
