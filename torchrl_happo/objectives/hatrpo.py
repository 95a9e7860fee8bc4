r"""Heterogeneous-agent trust region policy optimisation (HATRPO).

With the factor of :mod:`torchrl_happo.objectives.happo` each agent in turn solves
:math:`\max \mathbb{E}[r M]` inside a ball of radius :math:`\delta` around its old policy:

1. :math:`g` is the gradient of :math:`\mathbb{E}[r M]` at the old parameters.
2. The Fisher matrix is :math:`F = \mathbb{E}[J^\top \mathcal{M} J]`, with the network's Jacobian
   :math:`J` and the distribution's own Fisher matrix :math:`\mathcal{M}` in its parameters. The
   network is linearised once; a product :math:`F v` costs two passes.
3. Conjugate gradient solves :math:`(F + \lambda I) x = g`.
4. The full step is :math:`\sqrt{2 \delta / x^\top (F + \lambda I) x} \; x`.
5. It is shortened by ``backtrack_factor`` until the true divergence is below :math:`\delta` and the
   surrogate has risen by at least ``accept_ratio`` of what :math:`g` promised. If that never
   happens, the parameters are as before, bit for bit.

**Keys.** The keys of HAPPO.

**Defaults.** ``max_kl=0.01``, ``damping=0.1``, ten iterations, ten tries, ``accept_ratio=0.5``.

**When to use it.** When a step must be safe whatever the learning rate, when there is no time to
tune, and where agents are few and batches large: it takes one step a batch. With many small batches
HAPPO uses each of them longer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, dispatch
from torchrl.objectives import PPOLoss

from torchrl_happo.arguments import check_counts, check_critic, check_numbers, check_positive
from torchrl_happo.objectives.base import Actors, SequentialLoss
from torchrl_happo.objectives.clipping import check_names, value_of
from torchrl_happo.objectives.foreign import refuse_arguments
from torchrl_happo.objectives.joint import JointTerms
from torchrl_happo.objectives.surrogate import corrected_advantage, surrogate
from torchrl_happo.policy.distributions import kl_divergence
from torchrl_happo.steps.first_order import FirstOrder
from torchrl_happo.steps.step import Problem, Step, StepFactory
from torchrl_happo.steps.trust_region.step import TrustRegion
from torchrl_happo.team.agent import Agent
from torchrl_happo.team.construction import check_networks
from torchrl_happo.versions import ValueNorm

__all__ = ["HATRPOLoss"]

Split: TypeAlias = Literal["equal", "weighted", "greedy"]

#: Settings of the trust region that are fixed when the loss is built.
_SETTINGS = {entry.name for entry in fields(TrustRegion)} - {"max_kl"}

#: What to write instead of arguments of losses that clip ratios or penalise divergences.
_INSTEAD = {
    **dict.fromkeys(
        ("clip_epsilon", "max_importance_ratio", "dtarg", "beta", "increment", "decrement"),
        "pass max_kl, which bounds the step",
    ),
    "samples_mc_kl": "leave it out, as the divergence is exact",
    **dict.fromkeys(
        ("entropy_bonus", "entropy_coeff", "samples_mc_entropy", "entropy_coef"),
        "leave it out, as a trust region has no entropy bonus, or take HAPPOLoss",
    ),
}


class HATRPOLoss(SequentialLoss, PPOLoss):
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
        max_kl (float or mapping): bound :math:`\delta` of each agent's mean divergence, in nats;
            a mapping has one for each agent, or group, by name. May be set anew between updates,
            as by a schedule. Defaults to ``0.01``.
        kl_split (str or callable, optional): ``None``: each agent has ``max_kl`` to itself, as in
            the paper; otherwise the team has it. ``"equal"``: each agent has an equal share; a
            callable from the agents to their shares splits it otherwise; ``"weighted"``: shares in
            proportion to the squared gains, divided anew before each turn; ``"greedy"``: the
            largest gain per divergence first, within what is left
            (:mod:`torchrl_happo.update.budget`). Defaults to ``None``.
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
        **foreign: as for :class:`HAPPOLoss`.

    Raises:
        TypeError: for an argument that the loss has not.
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

    _instead: ClassVar[Mapping[str, str]] = _INSTEAD

    def __init__(
        self,
        actor_network: Actors,
        critic_network: TensorDictModule | None = None,
        *,
        max_kl: float | Mapping[str, float] = 0.01,
        kl_split: Split | Callable[[Sequence[Agent]], Sequence[float]] | None = None,
        damping: float = TrustRegion.damping,
        cg_iterations: int = TrustRegion.cg_iterations,
        cg_tolerance: float = TrustRegion.cg_tolerance,
        backtrack_factor: float = TrustRegion.backtrack_factor,
        max_backtracks: int = TrustRegion.max_backtracks,
        accept_ratio: float = TrustRegion.accept_ratio,
        fisher_fraction: float = TrustRegion.fisher_fraction,
        line_search: Literal["sequential", "batched"] | None = None,
        critic_coeff: float | None = None,
        loss_critic_type: str = "smooth_l1",
        clip_value: float | None = None,
        normalize_advantage: bool | None = None,
        normalize_advantage_exclude_dims: tuple[int, ...] = (),
        reduction: str = "mean",
        log_explained_variance: bool = True,
        value_norm: ValueNorm | None = None,
        popart: bool = False,
        blocks: Collection[str] = (),
        device: torch.device | None = None,
        **foreign: Any,
    ) -> None:
        refuse_arguments(type(self), foreign, self._instead)
        check_networks(actor_network, critic_network, blocks)
        check_critic(critic_network, critic_coeff, loss_critic_type, clip_value, reduction)
        check_numbers(
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
            normalize_advantage=bool(normalize_advantage),
            normalize_advantage_exclude_dims=normalize_advantage_exclude_dims,
            reduction=reduction,
            log_explained_variance=log_explained_variance,
            device=device,
            functional=False,
        )
        self._init_team(actor_network, blocks, value_norm, popart)
        self.standardizes = normalize_advantage is not False
        #: How ``max_kl`` is split; fixed, as an updater reads it once.
        self._split = kl_split
        self.max_kl = max_kl
        self._shares = dict(
            zip([agent.name for agent in self.agents], _shares(kl_split, self.agents), strict=True)
        )
        self.trust_region = TrustRegion(
            max_kl=self.radius,
            damping=damping,
            cg_iterations=cg_iterations,
            cg_tolerance=cg_tolerance,
            backtrack_factor=backtrack_factor,
            max_backtracks=max_backtracks,
            accept_ratio=accept_ratio,
            fisher_fraction=fisher_fraction,
            line_search=line_search,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """Check a new radius; refuse other settings of the trust region, which would not act."""
        if name == "max_kl":
            check_radii(value, self.agents)
            if self.kl_split in ("weighted", "greedy") and isinstance(value, Mapping):
                raise ValueError(
                    f"kl_split={self.kl_split!r} divides one max_kl among the agents; pass a "
                    f"number in place of {value!r}."
                )
        elif name in _SETTINGS:
            raise AttributeError(
                f"Of the trust region only max_kl follows a schedule; build the loss with {name}="
                f"{value!r}."
            )
        super().__setattr__(name, value)

    @property
    def kl_split(self) -> Split | Callable[[Sequence[Agent]], Sequence[float]] | None:
        """How ``max_kl`` is split among the agents."""
        return self._split

    def radius(self, name: str) -> float:
        """Return the bound of an agent's divergence in the next update, in nats.

        Args:
            name (str): the agent's name.
        """
        agent = next(agent for agent in self.agents if agent.name == name)
        max_kl = self.max_kl
        if isinstance(max_kl, Mapping):
            max_kl = value_of(max_kl, agent)
        return float(max_kl) * self._shares[name]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the unclipped surrogate of the team and the mean divergence from the old one."""
        return SequentialLoss.forward(self, tensordict)

    def _summary(self, terms: JointTerms) -> TensorDict:
        """Return kl_approx and, where the old parameters are stored, the exact divergence."""
        output = super()._summary(terms)
        if terms.of_each("kl"):
            output.set("kl", self._reduced(terms["kl"], terms.valid))
        return output

    def agent_terms(self, agent: Agent, data: TensorDictBase) -> dict[str, Any]:
        """Return the surrogate and, where the old parameters are stored, the divergence."""
        policy = agent.policy
        parameters = policy.parameters(data)
        log_ratio = agent.log_ratio(parameters, data)
        gain = surrogate(log_ratio, corrected_advantage(data, self.tensor_keys))
        terms: dict[str, Any] = {"loss_objective": -gain, "log_ratio": log_ratio}
        stored = policy.stored_parameters(data)
        if stored is not None:
            dists = policy.distribution(stored), policy.distribution(parameters)
            terms["kl"] = kl_divergence(*dists, batch_ndim=log_ratio.ndim)
        return terms

    def agent_problem(self, agent: Agent, **kwargs: Any) -> Problem:
        """Return what an agent's step is to solve; it draws the rows of its own Fisher matrix."""
        generator = torch.Generator(agent.parameters()[0].device)
        generator.manual_seed(agent.position.start)
        own = {"generator": generator, "module": agent.source}
        return super().agent_problem(agent, **{**kwargs, **own})

    def step_factory(self, first_order: FirstOrder) -> StepFactory:
        """Return one trust-region step on the whole batch."""
        if first_order.target_kl is not None:
            raise ValueError(
                f"target_kl={first_order.target_kl} stops first-order epochs early, but HATRPO "
                "takes one step whose divergence is bounded by max_kl; leave target_kl out."
            )
        stacked = {agent.name for agent in self.agents if agent.policy.is_stacked}

        def build(problem: Problem) -> Step:
            # torch cannot map over candidates a stack that already is mapped over agents.
            settings = self.trust_region
            if problem.name in stacked:
                settings = replace(settings, line_search="sequential")
            return settings(problem)

        return build


def check_radii(max_kl: object, agents: Sequence[Agent]) -> None:
    """Refuse a radius that is not positive, or a mapping that does not fit the agents."""
    if not isinstance(max_kl, Mapping):
        check_positive(max_kl=max_kl)
        return
    for name, radius in max_kl.items():
        check_positive(**{f"max_kl[{name!r}]": radius})
    check_names("max_kl", max_kl, agents)


def _shares(
    split: Split | Callable[[Sequence[Agent]], Sequence[float]] | None,
    agents: Sequence[Agent],
) -> list[float]:
    """Return each agent's part of ``max_kl``."""
    if split in (None, "weighted", "greedy"):  # of the last two, what an agent may have at most
        return [1.0] * len(agents)
    if split == "equal":
        return [1.0 / len(agents)] * len(agents)
    if not callable(split):
        raise ValueError(
            'kl_split must be None, "equal", "weighted", "greedy" or a callable from the agents to '
            f"their shares, got {split!r}."
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
