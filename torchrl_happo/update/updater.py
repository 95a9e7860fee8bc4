"""The sequential update, read from top to bottom: batch, agents in order, critics."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict, TensorDictBase
from torchrl.data import ReplayBuffer
from torchrl.modules import set_recurrent_mode

from torchrl_happo.arguments import check_callables, check_counts, check_seed
from torchrl_happo.distributed import Learners
from torchrl_happo.objectives.base import SequentialLoss
from torchrl_happo.policy.memory import has_memory
from torchrl_happo.steps.first_order import FirstOrder
from torchrl_happo.steps.optimizers import OptimizerFactory, SchedulerFactory
from torchrl_happo.steps.step import ByName, Step, StepFactory
from torchrl_happo.team.agent import Agent
from torchrl_happo.team.construction import check_loss, check_unfrozen
from torchrl_happo.transaction import Transaction, global_generators, kept_slots, recording
from torchrl_happo.update.assembly import Assembly, with_own
from torchrl_happo.update.batch import TeamBatch
from torchrl_happo.update.budget import make_budget
from torchrl_happo.update.correction import Correction, CorrectionFactory
from torchrl_happo.update.corrections import correction_of
from torchrl_happo.update.order import OrderLike, Turns
from torchrl_happo.update.rows import Idle
from torchrl_happo.update.state import loss_state, restore, state_of

__all__ = ["SequentialUpdater"]

logger = logging.getLogger(__name__)


class SequentialUpdater:
    r"""Updates the agents of a team one after the other, then the critics.

    For each batch (algorithm 4 of Kuba et al., 2022, https://arxiv.org/abs/2109.11251):

    1. the joint advantage :math:`A` is estimated, if the batch has none, and standardised, for
       each agent over its own valid decisions;
    2. the order gives the next agent, at random by default, and the factor starts at 1;
    3. the agent maximises its surrogate of the factor times :math:`A` with its own optimiser; then
       the factor is multiplied by its ratio :math:`\pi_\text{new} / \pi_\text{old}` at the stored
       actions, policy just after against policy just before its own update;
    4. when all agents have moved, the critics are fitted.

    A step at which an agent was not active contributes ratio 1 to the factor. The ratios of a
    recurrent actor come from one evaluation over chunks of the batch (``sequence_length``).

    An update is all or nothing: a refused batch, an error or an interrupt leaves parameters and
    optimisers as they were.

    Args:
        loss (SequentialLoss): the team's loss, which owns the networks.

    Keyword Args:
        step (callable, optional): builds the step of each agent
            (:class:`~torchrl_happo.steps.step.StepFactory`). Defaults to ``None``: the loss's own,
            with the settings of first-order steps below.
        critic_step (callable, optional): that of each critic. Defaults to ``None``: first order.
        correction (callable, optional): builds what the agents that have moved change for the next
            one. Defaults to ``None``: the loss's own, for HAPPO and HATRPO the factor.
        order (str, sequence, callable or Order): ``"random"``, ``"fixed"``, ``"semi_greedy"``,
            positions or names, a callable to these, or an Order. Defaults to ``"random"``.
        optimizer (callable): from parameters to an optimiser; called once per agent, so that no
            agent's momentum moves another. This setting and those of the agents' steps below may
            be mappings from names of agents, or of groups, to values. Defaults to
            ``partial(torch.optim.Adam, lr=3e-4)``.
        num_epochs (int): passes over the batch for each agent. Defaults to ``10``.
        minibatch_size (int, optional): environment steps in a minibatch. ``None``: the whole
            batch. Defaults to ``None``.
        critic_optimizer, critic_epochs, critic_minibatch_size (optional): the critic's. Default to
            ``optimizer``, ``num_epochs`` and ``minibatch_size``.
        max_grad_norm (float, optional): the gradient of each agent, and of the critic, is scaled
            down to this norm. Defaults to ``None``: no clipping.
        scheduler (callable, optional): from an optimiser to its learning-rate scheduler, which
            steps once per batch, whether or not the agent acts. Defaults to ``None``.
        target_kl (float, optional): an agent stops after the epoch in which its mean divergence
            from the policy that acted passes this. Reads a number back after each epoch. Defaults
            to ``None``.
        sequence_length (int, optional): minibatches hold chunks of this many consecutive steps.
            Defaults to ``None``: single steps, but the whole length for recurrent networks.
        replay_buffer (ReplayBuffer, optional): draws the minibatches with its own sampler; its
            generator is not in the state. Defaults to ``None``.
        standardize_advantage (bool, optional): whether to standardise the advantage over the
            batch. Defaults to ``None``: as the loss's ``normalize_advantage``, else ``True``.
        check_finite (bool, optional): whether to look for NaN, infinite numbers and unlike rewards
            in each batch (``False``: the first), and for a non-finite gradient, which waits for
            the device (``False``: :mod:`torchrl_happo.update.batch` lists what does). Defaults to
            ``None``: ``True`` on the CPU alone.
        compile (bool or mapping): whether to compile the agents' steps and passes and the critic's
            steps, once for all agents of one architecture; or keyword arguments of
            :func:`torch.compile`. Defaults to ``False``.
        cudagraphs (bool): whether to replay the steps from CUDA graphs, compiled or not; without a
            CUDA device they run as they are, with one warning. Defaults to ``False``.
        seed (int): seed of the order and of the minibatches. Defaults to ``0``.
        process_group (ProcessGroup, optional): the processes that train this team together, each
            on batches of its own, such as ``torch.distributed.group.WORLD``: the result is that of
            one process with the whole batch. ``minibatch_size`` is that of each process. Reads two
            numbers back for each agent. Defaults to ``None``: this process alone.

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
        >>> loss = HAPPOLoss(actor, critic, entropy_coeff=0.0)
        >>> updater = SequentialUpdater(loss, optimizer=partial(torch.optim.Adam, lr=1e-3))
        >>> for batch in Collector(env, actor, frames_per_batch=64, total_frames=128):
        ...     metrics = updater(batch)
        >>> sorted(metrics.keys())
        ['agents_0', 'agents_1', 'critic']
    """

    def __init__(
        self,
        loss: SequentialLoss,
        *,
        step: StepFactory | None = None,
        critic_step: StepFactory | None = None,
        correction: CorrectionFactory | None = None,
        order: OrderLike = "random",
        optimizer: ByName[OptimizerFactory] = FirstOrder.optimizer,
        critic_optimizer: OptimizerFactory | None = None,
        num_epochs: ByName[int] = FirstOrder.num_epochs,
        critic_epochs: int | None = None,
        minibatch_size: ByName[int | None] = FirstOrder.minibatch_size,
        critic_minibatch_size: int | None = None,
        max_grad_norm: ByName[float | None] = FirstOrder.max_grad_norm,
        scheduler: ByName[SchedulerFactory | None] = FirstOrder.scheduler,
        target_kl: ByName[float | None] = FirstOrder.target_kl,
        sequence_length: int | None = None,
        replay_buffer: ReplayBuffer | None = None,
        standardize_advantage: bool | None = None,
        check_finite: bool | None = None,
        compile: bool | Mapping[str, Any] = False,
        cudagraphs: bool = False,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_loss(loss)
        check_callables(optional=True, critic_optimizer=critic_optimizer)
        check_counts(
            optional=True,
            critic_epochs=critic_epochs,
            critic_minibatch_size=critic_minibatch_size,
            sequence_length=sequence_length,
        )
        check_seed(seed)
        self.loss = loss
        self.correction = correction_of(loss) if correction is None else correction
        self.sequence_length = sequence_length
        given = standardize_advantage
        self.standardize_advantage = loss.standardizes if given is None else given
        self.num_updates = 0
        self._frozen = [p for p in loss.parameters() if not p.requires_grad]
        self.learners = Learners(process_group)
        self.learners.follow_first(loss_state(loss).values())
        device = loss.agents[0].parameters()[0].device
        self.check_finite = device.type == "cpu" if check_finite is None else check_finite
        self._order_generator = torch.Generator().manual_seed(seed)
        self._minibatch_generator = torch.Generator(device).manual_seed(seed)
        first_order = FirstOrder(
            optimizer=optimizer,
            num_epochs=num_epochs,
            minibatch_size=minibatch_size,
            max_grad_norm=max_grad_norm,
            scheduler=scheduler,
            target_kl=target_kl,
            replay_buffer=replay_buffer,
        )
        networks = [loss.actor_network, *(critic.network for critic in loss.critics.values())]
        self._has_memory = any(map(has_memory, networks))
        workshop = Assembly(loss, compile, cudagraphs, self.learners, self._minibatch_generator)
        agent_step = loss.step_factory(first_order) if step is None else step
        own = with_own(first_order, critic_optimizer, critic_epochs, critic_minibatch_size)
        self._has_graphs = workshop.compiler is not None and workshop.compiler.pool is not None
        self._passes = {agent.name: workshop.passes(agent) for agent in loss.agents}
        self.steps: dict[str, Step] = workshop.steps(agent_step, critic_step or own)
        self.budget = make_budget(loss, self._passes, self.steps)
        order = self.budget.order(order)
        self._turns = Turns(order, loss.agents, self._order_generator, self.learners)

    def __call__(self, batch: TensorDictBase) -> TensorDict:
        """Update every agent in turn, then the critics, with one batch, in any mode of torch.

        Args:
            batch (TensorDictBase): joint data ``[*B]`` of a collector, time last; not modified.

        Returns:
            scalars that have not been read back from the device. Under each agent's name:
            ``surrogate_before``, ``surrogate``, ``ratio_mean``, ``ratio_max``, ``ratio_min``,
            ``kl``, ``entropy`` (estimated where they have no closed form), ``factor_mean``,
            ``factor_max``, ``factor_ess``, ``position`` and (unless it acts nowhere) the report of
            its step. Under ``"critic"``: that of its step and ``explained_variance`` before it.

        Raises:
            KeyError, ValueError: if an entry is missing, does not fit, or is not finite.
        """
        self._follow()
        with (
            # Entropies without a closed form are estimated by draws from the global generators.
            Transaction([*self.generators, *global_generators()]) as transaction,
            recording(),
            kept_slots([self.loss, *(agent.actor for agent in self.loss.agents)]),
            # TorchRL's mode is the whole process's: a collector in a thread would see it.
            set_recurrent_mode(True) if self._has_memory else nullcontext(),
        ):
            metrics = self._update(batch, transaction)
        self.num_updates += 1
        return metrics

    def _follow(self) -> None:
        """Follow networks that were moved, copied or reloaded since the last update."""
        if any(p.requires_grad for p in self._frozen):
            check_unfrozen(self.loss.agents, self.loss.critic_apart)
        for agent in self.loss.agents:
            agent.tie()
            # As torchrl_happo.update.rows explains.
            self._pads = self._has_graphs or agent.parameters()[0].device.type != "cpu"
        for step in self.steps.values():
            step.follow()

    def _update(self, batch: TensorDictBase, transaction: Transaction) -> TensorDict:
        team, critics = self.loss.team, self.loss.critics
        with self.learners.agreement():
            data = TeamBatch(
                team,
                critics,
                batch,
                standardize_advantage=self.standardize_advantage,
                each_for_itself=bool(self.loss.normalize_advantage_exclude_dims),
                sequence_length=self.sequence_length,
                read_values=self.check_finite or self.num_updates == 0,
                learners=self.learners,
                pads=self._pads,
            )
        self._draw_alike()
        metrics = TensorDict()
        for name in [name for name, c in critics.items() if c.is_owned and c.is_fitted]:
            transaction.add(data.renormalize(name, data.critic_batches[name]))
        correction = self.correction(data)
        remaining = list(team.agents)
        self.budget.begin()
        while remaining:
            self.budget.look(remaining, data, correction)
            agents = self._turns.next(remaining, data, correction)
            place = float(len(team.agents) - len(remaining))
            for name, report in self._take_turn(agents, data, correction, transaction).items():
                metrics[name] = report.set("position", torch.tensor(place))
            remaining = [agent for agent in remaining if agent.name not in metrics.keys()]
        for name in critics:
            if name in self.steps or critics[name].is_owned:
                metrics[name] = self._fit(name, data, transaction)
        for step in self.steps.values():
            transaction.remember_once(step)
            step.end_batch()
        correction.end_batch()
        return metrics

    def _take_turn(
        self,
        agents: Sequence[Agent],
        data: TeamBatch,
        correction: Correction,
        transaction: Transaction,
    ) -> dict[str, TensorDict]:
        """Move the agents whose turn it is, all by one correction; then correct by their ratios."""
        reports = {agent.name: correction.report(agent) for agent in agents}
        moving = [
            (agent, self._passes[agent.name].ready(data, correction, read_values=self.check_finite))
            for agent in agents
            if data.acts(agent)
        ]
        for agent, own in moving:
            seen, radius = self._passes[agent.name].step_data(own), self.budget.radius(agent)
            reports[agent.name].update(self._move(agent.name, seen, transaction, radius))
        for agent, own in moving:
            log_ratio, report = self._passes[agent.name].after(own)
            correction.include(agent, log_ratio)
            self.budget.spend(report["kl"])
            reports[agent.name].update(report)
        return reports

    def _move(
        self, name: str, data: TensorDictBase, transaction: Transaction, max_kl: float | None = None
    ) -> TensorDict:
        """Let a step move its parameters; roll it back if its gradient is not finite."""
        step = self.steps[name]
        rollback = transaction.remember(step)
        idle = Idle(step, data, rollback) if self._pads else None
        report = step.propose(data).apply(max_kl)
        report = idle.undo(report) if idle else report
        if self.check_finite and not report["grad_norm"].isfinite():
            rollback()
            logger.warning("The gradient of %s was not finite; its update was taken back.", name)
        return report

    def _fit(self, name: str, data: TeamBatch, transaction: Transaction) -> TensorDict:
        """Fit a critic that has a step of its own, and the statistics of its values."""
        report = TensorDict()
        if name in self.steps and data.has_values(name):
            own = data.critic_data(name)
            transaction.add(data.renormalize(name, own))
            report = self._move(name, own, transaction)
        return report.set("explained_variance", data.explained_variance(name))

    # -- state ---------------------------------------------------------------------------------

    @property
    def generators(self) -> list[torch.Generator]:
        """The generators of the order and of the minibatches."""
        return [self._order_generator, self._minibatch_generator]

    def _draw_alike(self) -> None:
        """Give every learner the first one's generators."""
        own = [getattr(step, "generator", None) for step in self.steps.values()]
        self.learners.draw_as_first([*self.generators, *filter(None, own)])

    def state_dict(self) -> dict[str, Any]:
        """Return everything the next update depends on, but the batch and global generators.

        A file that holds it loads with ``torch.load(path, weights_only=True)``.
        """
        return state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`, bit for bit on the same kind of device.

        Args:
            state (dict): what :meth:`state_dict` returned, for the same team and networks.

        Raises:
            ValueError: if the state is from another version or architecture; nothing is changed.
        """
        self._follow()
        restore(self, state)
