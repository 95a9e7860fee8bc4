"""Heterogeneous-agent trust region policy optimisation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor
from torch.distributions import Distribution
from torchrl.modules import ValueNorm
from torchrl.objectives import PPOLoss

from torchrl_happo.arguments import check_counts, check_critic, check_numbers
from torchrl_happo.masked import masked, masked_mean
from torchrl_happo.objectives.base import (
    ADVANTAGE,
    OLD_LOG_PROB,
    VALID,
    Actors,
    SequentialLossMixin,
)
from torchrl_happo.objectives.surrogate import surrogate
from torchrl_happo.policy.distributions import kl_divergence
from torchrl_happo.steps.first_order import FirstOrder
from torchrl_happo.steps.step import Problem
from torchrl_happo.steps.trust_region.step import TrustRegion
from torchrl_happo.team.agents import Agent
from torchrl_happo.team.construction import check_networks

__all__ = ["HATRPOLoss"]


class HATRPOLoss(SequentialLossMixin, PPOLoss):
    r"""Heterogeneous-agent TRPO loss (Kuba et al., 2022).

    Agents are updated one after the other. Agent :math:`i_m` solves (eq. 11 of
    https://arxiv.org/abs/2109.11251)

    .. math::
        \max_\theta \mathbb{E}[r M] \quad \text{such that} \quad
        \mathbb{E}[D_{KL}(\pi_\text{old} \| \pi_\theta)] \le \delta,

    with its ratio :math:`r` and :math:`M`, the joint advantage times the factor (see
    :class:`HAPPOLoss`). Both averages run over the valid entries only. The divergence is exact; of
    TorchRL's stochastic policies over continuous and discrete actions only
    :class:`~torchrl.modules.TruncatedNormal` has none, with which the first update is refused.

    :class:`~torchrl_happo.SequentialUpdater` takes the step by conjugate gradient and a
    backtracking line search (see :mod:`torchrl_happo.steps.trust_region.solve`). Its optimiser,
    epochs and minibatches are then the critic's.

    ``forward`` gives the unclipped surrogate as ``loss_objective`` and, where the data holds the
    parameters of the old distribution, the mean divergence as ``kl``.

    Args:
        actor_network (ProbabilisticTensorDictSequential or mapping of str to it): as for
            :class:`HAPPOLoss`.
        critic_network (TensorDictModule): as for :class:`HAPPOLoss`.

    Keyword Args:
        max_kl (float): bound :math:`\delta` of each agent's mean divergence, in nats.
            Defaults to ``0.01``.
        kl_split (str or callable, optional): ``None``: each agent has ``max_kl`` to itself, as in
            the paper; ``"equal"``: the team has it and each agent an equal share; a callable from
            the agents to their shares splits it otherwise. Defaults to ``None``.
        damping (float): added to the diagonal of the Fisher matrix. Defaults to ``0.1``.
        cg_iterations (int): iterations of conjugate gradient. Defaults to ``10``.
        cg_tolerance (float): squared norm of the residual at which they stop.
            Defaults to ``1e-10``.
        backtrack_factor (float): factor between two tries of the line search. Defaults to ``0.8``.
        max_backtracks (int): number of tries. Defaults to ``10``.
        accept_ratio (float): least accepted ratio of actual to expected improvement.
            Defaults to ``0.5``.
        fisher_fraction (float): share of the samples in the Fisher matrix. Defaults to ``1.0``.
        line_search (str, optional): ``"sequential"`` or ``"batched"`` (nothing is read back from
            the device). Defaults to ``None``: batched on accelerators, sequential on the CPU.
        critic_coeff, loss_critic_type, clip_value, normalize_advantage,
            normalize_advantage_exclude_dims, reduction, log_explained_variance, value_norm,
            popart, blocks, device: as
            for :class:`HAPPOLoss`.

    Raises:
        ValueError: if an argument is out of range, or as :class:`HAPPOLoss` does.

    Example:
        >>> from torchrl_happo import HATRPOLoss, SequentialUpdater, make_actor, make_critic
        >>> from torchrl_happo.envs import MatrixGame
        >>> env = MatrixGame(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), num_envs=64)
        >>> actor, critic = make_actor(env), make_critic(env)
        >>> updater = SequentialUpdater(HATRPOLoss(actor, critic, max_kl=0.01), num_epochs=1)
        >>> from torchrl.collectors import Collector
        >>> batch = next(iter(Collector(env, actor, frames_per_batch=64, total_frames=64)))
        >>> metrics = updater(batch)
        >>> bool(metrics["agents_0", "kl"] <= 0.01)
        True
    """

    def __init__(
        self,
        actor_network: Actors,
        critic_network: TensorDictModule | None = None,
        *,
        max_kl: float = 0.01,
        kl_split: Literal["equal"] | Callable[[Sequence[Agent]], Sequence[float]] | None = None,
        damping: float = 0.1,
        cg_iterations: int = 10,
        cg_tolerance: float = 1e-10,
        backtrack_factor: float = 0.8,
        max_backtracks: int = 10,
        accept_ratio: float = 0.5,
        fisher_fraction: float = 1.0,
        line_search: Literal["sequential", "batched"] | None = None,
        critic_coeff: float | None = None,
        loss_critic_type: str = "smooth_l1",
        clip_value: float | None = None,
        normalize_advantage: bool = False,
        normalize_advantage_exclude_dims: tuple[int, ...] = (),
        reduction: str = "mean",
        log_explained_variance: bool = True,
        value_norm: ValueNorm | None = None,
        popart: bool = False,
        blocks: Collection[str] = (),
        device: torch.device | None = None,
    ) -> None:
        check_networks(actor_network, critic_network, blocks)
        check_critic(critic_network, critic_coeff, loss_critic_type, clip_value, reduction)
        check_numbers(
            max_kl=max_kl,
            damping=damping,
            cg_tolerance=cg_tolerance,
            backtrack_factor=backtrack_factor,
            accept_ratio=accept_ratio,
            fisher_fraction=fisher_fraction,
        )
        check_counts(cg_iterations=cg_iterations, max_backtracks=max_backtracks)
        super().__init__(
            self._joint_network(actor_network),
            critic_network,
            entropy_bonus=False,
            critic_coeff=critic_coeff,
            loss_critic_type=loss_critic_type,
            clip_value=clip_value,
            normalize_advantage=normalize_advantage,
            normalize_advantage_exclude_dims=normalize_advantage_exclude_dims,
            reduction=reduction,
            log_explained_variance=log_explained_variance,
            device=device,
            functional=False,
        )
        self._init_team(actor_network, blocks, value_norm, popart)
        self.max_kl = max_kl
        shares = _shares(kl_split, self.agents)
        self._shares = {a.name: share for a, share in zip(self.agents, shares, strict=True)}
        trust_region = TrustRegion(
            max_kl=max_kl,
            damping=damping,
            cg_iterations=cg_iterations,
            cg_tolerance=cg_tolerance,
            backtrack_factor=backtrack_factor,
            max_backtracks=max_backtracks,
            accept_ratio=accept_ratio,
            fisher_fraction=fisher_fraction,
            line_search=line_search,
        )
        # Asked anew for each batch, so that a schedule may set max_kl.
        self.trust_region = replace(trust_region, max_kl=self._radius)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The unclipped surrogate of the whole team, and the mean divergence from the old one."""
        kl = self._team_kl(tensordict)
        output = super().forward(tensordict)
        if kl is not None:
            output.set("kl", kl.view_as(output.get("loss_objective")))
        return output

    def _team_kl(self, tensordict: TensorDictBase) -> Tensor | None:
        divergences = []
        for unit in self._units:
            data = unit.view(tensordict, self.agent_keys(unit))
            stored = unit.policy.stored_parameters(data)
            if stored is None:
                return None
            old = unit.policy.distribution(stored)
            new = unit.policy.distribution(unit.policy.parameters(data))
            batch_ndim = len(unit.sample_shape(data))
            kl = kl_divergence(old, new, batch_ndim=batch_ndim)
            divergences.append(self._line_up(kl, tensordict))
        return self._reduce_loss(torch.cat(divergences, -1).unsqueeze(-1), tensordict)

    def agent_distribution(
        self, agent: Agent, parameters: Mapping[str, Tensor], data: TensorDictBase
    ) -> Distribution:
        """The policy of one agent with other parameters, at the observations of ``data``."""
        return agent.policy.scored(agent.policy.parameters(data, parameters), data)

    def agent_surrogate(self, agent: Agent, dist: Distribution, data: TensorDictBase) -> Tensor:
        """Mean of the ratio times the factor times the advantage, over the valid entries.

        Args:
            agent (Agent): the agent whose turn it is.
            dist (Distribution): its policy (see :meth:`agent_distribution`).
            data (TensorDictBase): its view of the batch, with ``OLD_LOG_PROB``, ``ADVANTAGE`` and
                perhaps ``VALID``.

        Returns:
            a scalar.
        """
        log_prob = agent.joint_log_prob(agent.policy.scored_log_prob(dist, data), data)
        valid = data.get(VALID, None)
        log_ratio = masked(log_prob - data.get(OLD_LOG_PROB), valid)
        return masked_mean(surrogate(log_ratio, data.get(ADVANTAGE)), valid)

    def agent_loss(self, agent: Agent, data: TensorDictBase) -> Tensor:
        """Return minus the surrogate of one agent at its present parameters."""
        dist = self.agent_distribution(agent, dict(agent.named_parameters()), data)
        return -self.agent_surrogate(agent, dist, data)

    def agent_problem(self, agent: Agent, **kwargs: Any) -> Problem:
        """Maximise :meth:`agent_surrogate` (see :class:`SequentialLossMixin`)."""
        # Each agent draws the rows of its own Fisher matrix.
        generator = torch.Generator(agent.parameters()[0].device)
        generator.manual_seed(agent.position.start)
        return Problem(
            agent.name,
            loss=partial(self.agent_loss, agent),
            named_parameters=agent.named_parameters,
            group=agent.group,
            weight=partial(self.agent_weight, agent),
            distribution=partial(self.agent_distribution, agent),
            surrogate=partial(self.agent_surrogate, agent),
            sample_shape=agent.sample_shape,
            **{**kwargs, "generator": generator},
        )

    def agent_factory(self, agent: Agent, first_order: FirstOrder) -> TrustRegion:
        """Return the trust region; minibatches and epochs are the critic's."""
        if first_order.target_kl is not None:
            raise ValueError(
                f"target_kl={first_order.target_kl} stops first-order epochs early, but HATRPO "
                "takes one step whose divergence is bounded by max_kl; leave target_kl out."
            )
        # torch cannot map over a stack that already is mapped over agents.
        if agent.policy.is_stacked:
            return replace(self.trust_region, line_search="sequential")
        return self.trust_region

    def _radius(self, name: str) -> float:
        """Return an agent's share of ``max_kl`` as it is now."""
        return self.max_kl * self._shares[name]


def _shares(
    split: Literal["equal"] | Callable[[Sequence[Agent]], Sequence[float]] | None,
    agents: Sequence[Agent],
) -> list[float]:
    """Each agent's part of ``max_kl``."""
    if split is None:
        return [1.0] * len(agents)
    if split == "equal":
        return [1.0 / len(agents)] * len(agents)
    if not callable(split):
        raise ValueError(
            f'kl_split must be None, "equal" or a callable from the agents to their shares, got '
            f"{split!r}."
        )
    shares = split(agents)
    try:
        usable = len(shares) == len(agents) and min(shares) > 0 and abs(sum(shares) - 1) <= 1e-6
    except TypeError:
        usable = False
    if not usable:
        raise ValueError(
            f"kl_split returned {shares!r}; it must return {len(agents)} positive shares that sum "
            "to 1."
        )
    return [float(share) for share in shares]
