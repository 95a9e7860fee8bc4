r"""Heterogeneous-agent proximal policy optimisation (HAPPO).

Agents are updated one after the other in an order :math:`i_1, \dots, i_n`. Agent :math:`i_m`
maximises the clipped surrogate (eq. 13 of https://arxiv.org/abs/2109.11251)

.. math::
    \mathbb{E}\left[\min\left(r M, \mathrm{clip}(r, 1 - \epsilon, 1 + \epsilon) M\right)\right],
    \qquad r = \frac{\pi_\theta(a^{i_m} | o^{i_m})}{\pi_\text{old}(a^{i_m} | o^{i_m})},
    \qquad M = A \prod_{j < m} \frac{\pi_\text{new}(a^{i_j} | o^{i_j})}
    {\pi_\text{old}(a^{i_j} | o^{i_j})}.

The product is the *factor*: what the updates of the agents before have done to the probability of
the joint action. It is neither clipped nor standardised.

**Keys**, in TorchRL's multi-agent layout (``agents`` stands for any group). Read are
``("agents", "observation")`` ``[*B, n_agents, obs_dim]``, ``("agents", "action")``
``[*B, n_agents, action_dim]``, ``("agents", "action_log_prob")`` ``[*B, n_agents]``, and the
team's ``("next", "reward")``, ``("next", "done")``, ``("next", "terminated")``, ``[*B, 1]``.
Optional are ``"advantage"`` with ``"value_target"``, ``"factor"``, each ``[*B, 1]`` or
``[*B, n_agents, 1]``, and ``("agents", "active")``, bool ``[*B, n_agents]``. An update writes
nothing into the batch.

**Defaults.** ``clip_epsilon=0.2``, ``entropy_coeff=0.01``; GAE with 0.99 and 0.95.

**When to use it.** First, for unlike agents. For agents that are alike MAPPO may learn faster.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, is_tensor_collection
from tensordict.nn import CompositeDistribution, TensorDictModule, dispatch
from torch import Tensor
from torch.distributions import Distribution
from torchrl.objectives import ClipPPOLoss

from torchrl_happo.arguments import check_counts, check_critic, check_entropy_coeff
from torchrl_happo.masked import masked_mean
from torchrl_happo.objectives.base import Actors, SequentialLoss
from torchrl_happo.objectives.clipping import (
    bounds_of_unit,
    check_clipping,
    set_bounds,
    spread_bounds,
)
from torchrl_happo.objectives.entropy import mean_entropies, weigh_heads
from torchrl_happo.objectives.foreign import refuse_arguments
from torchrl_happo.objectives.joint import JointTerms
from torchrl_happo.objectives.surrogate import clipped_surrogate, corrected_advantage
from torchrl_happo.steps.first_order import FirstOrder
from torchrl_happo.steps.step import StepFactory
from torchrl_happo.team.agent import Agent
from torchrl_happo.team.construction import check_networks
from torchrl_happo.versions import ValueNorm, entropy_of, has_analytic_entropy, weighted_entropy

__all__ = ["HAPPOLoss"]


class HAPPOLoss(SequentialLoss, ClipPPOLoss):
    r"""Heterogeneous-agent PPO loss (Kuba et al., 2022).

    Agents are updated one after the other, each by its clipped surrogate of the joint advantage
    times the *factor*; :mod:`torchrl_happo.objectives.happo` has the equation.

    The loss is :class:`~torchrl.objectives.ClipPPOLoss` for a whole team. The differences:

    - it takes the joint actor of one group, or a mapping from group to actor for unlike agents;
    - if the tensordict has an entry ``"factor"``, the advantage is multiplied by it. Without one,
      the loss equals TorchRL's on the same networks;
    - :meth:`agent_loss` is the loss of one agent, whose parameters are a row of the stack;
    - the joint advantage ``[*B, 1]`` serves all agents. An advantage per agent
      ``[*B, n_agents, 1]`` is used where the critic gives one;
    - the networks are held as they are (``functional=False``): the actor that is passed is the
      one that is trained.

    :class:`~torchrl_happo.SequentialUpdater` does the rest: the order, the factor, the critic.

    Args:
        actor_network (ProbabilisticTensorDictSequential or mapping of str to it): the joint actor
            of the only group, with one network per agent
            (:class:`~torchrl.modules.MultiAgentMLP` with ``share_params=False``), or an actor for
            each group.
        critic_network (TensorDictModule): the centralised critic. It writes one state value
            ``[*B, 1]``, or one for each agent ``[*B, n_agents, 1]``.

    Keyword Args:
        clip_epsilon (float, tuple of float or mapping): clipping threshold, or the pair (low,
            high); a mapping has one for each agent, or group, by name. May be set anew between
            updates, as by a schedule. Defaults to ``0.2``.
        entropy_bonus (bool, optional): whether to add the entropy bonus. Defaults to ``None``:
            yes, unless ``entropy_coeff`` is 0.
        samples_mc_entropy (int): samples of the Monte-Carlo estimate, where the entropy has no
            closed form. Defaults to ``1``.
        entropy_coeff (float or mapping): weight of the entropy (schedulable), or one for each head
            of each group by the key of its log-probability, as in
            ``{("agents", "action_log_prob"): 0.01}``. Defaults to ``0.01``.
        critic_coeff (float, optional): weight of the critic's loss; 0 leaves the critic as it is.
            Defaults to ``None``: 1, if there is a critic.
        loss_critic_type (str): ``"l1"``, ``"l2"`` or ``"smooth_l1"``. Defaults to
            ``"smooth_l1"``.
        clip_value (bool or float, optional): bounds how far a fit may move the value from the one
            in the data, or with a ``value_norm`` the critic's prediction from the one of then.
            ``True`` takes ``clip_epsilon``. Defaults to ``None``.
        normalize_advantage (bool, optional): whether to standardise the advantage, before the
            factor: ``forward`` of the tensordict it is given, the updater once per batch. Defaults
            to ``None``: only the updater.
        normalize_advantage_exclude_dims (tuple of int): dimensions left out of it; ``(-2,)``, the
            agents, standardises the advantage of each for itself, in an update as well, which takes
            no other. Defaults to ``()``.
        reduction (str): ``"mean"``, ``"sum"`` or ``"none"``. Defaults to ``"mean"``.
        log_explained_variance (bool): whether ``forward`` reports the critic's explained
            variance. Defaults to ``True``.
        value_norm (ValueNorm, optional): normalises the critic's targets. The critic then
            predicts normalised values; the advantage sees real ones. The updater takes each
            batch's returns into the statistics once. Defaults to ``None``.
        popart (bool): whether to rescale the critic's last layer when the statistics move, so
            that its values do not jump. Defaults to ``False``.
        blocks (collection of str): groups whose agents are updated together as one unit; they may
            share parameters. Defaults to ``()``.
        device (torch.device, optional): device of the buffers. Defaults to the networks'.
        **foreign: other arguments, such as those that only TorchRL's losses have. Each is refused
            by a sentence that says what to write instead.

    Raises:
        TypeError: if an actor is not probabilistic, or for an argument that the loss has not.
        ValueError: if agents share parameters without being a block, if actor and critic share
            parameters, if ``clip_epsilon`` is not in (0, 1), or if ``entropy_coeff`` names other
            heads than the actors have.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import NormalParamExtractor, TensorDictModule
        >>> from torchrl.modules import IndependentNormal, MultiAgentMLP, ProbabilisticActor
        >>> from torchrl_happo import HAPPOLoss
        >>> actor = ProbabilisticActor(
        ...     TensorDictModule(
        ...         torch.nn.Sequential(
        ...             MultiAgentMLP(
        ...                 n_agent_inputs=5,
        ...                 n_agent_outputs=4,
        ...                 n_agents=3,
        ...                 centralized=False,
        ...                 share_params=False,
        ...             ),
        ...             NormalParamExtractor(),
        ...         ),
        ...         in_keys=[("agents", "observation")],
        ...         out_keys=[("agents", "loc"), ("agents", "scale")],
        ...     ),
        ...     in_keys=[("agents", "loc"), ("agents", "scale")],
        ...     out_keys=[("agents", "action")],
        ...     distribution_class=IndependentNormal,
        ...     return_log_prob=True,
        ... )
        >>> critic = TensorDictModule(
        ...     MultiAgentMLP(5, 1, n_agents=3, centralized=True, share_params=True),
        ...     in_keys=[("agents", "observation")],
        ...     out_keys=[("agents", "state_value")],
        ... )
        >>> loss = HAPPOLoss(actor, critic, clip_epsilon=0.2, entropy_coeff=0.0)
        >>> data = TensorDict(
        ...     {
        ...         "agents": {"observation": torch.randn(4, 10, 3, 5)},
        ...         "next": {
        ...             "agents": {"observation": torch.randn(4, 10, 3, 5)},
        ...             "reward": torch.randn(4, 10, 1),
        ...             "done": torch.zeros(4, 10, 1, dtype=torch.bool),
        ...             "terminated": torch.zeros(4, 10, 1, dtype=torch.bool),
        ...         },
        ...     },
        ...     batch_size=[4, 10],
        ... )
        >>> with torch.no_grad():
        ...     data = actor(data)
        >>> losses = loss(data)
        >>> (losses["loss_objective"] + losses["loss_critic"]).backward()
        >>> [agent.name for agent in loss.agents]
        ['agents_0', 'agents_1', 'agents_2']
    """

    def __init__(
        self,
        actor_network: Actors,
        critic_network: TensorDictModule | None = None,
        *,
        clip_epsilon: float | tuple[float, float] | Mapping[str, Any] = 0.2,
        entropy_bonus: bool | None = None,
        samples_mc_entropy: int = 1,
        entropy_coeff: float | Mapping[NestedKey, float] = 0.01,
        critic_coeff: float | None = None,
        loss_critic_type: str = "smooth_l1",
        clip_value: bool | float | None = None,
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
        check_clipping(clip_epsilon, clip_value)
        check_entropy_coeff(entropy_coeff)
        check_counts(samples_mc_entropy=samples_mc_entropy)
        check_critic(critic_network, critic_coeff, loss_critic_type, clip_value, reduction)
        follows_coefficient = entropy_bonus is None
        if entropy_bonus is None:
            entropy_bonus = isinstance(entropy_coeff, Mapping) or float(entropy_coeff) != 0.0
        super().__init__(
            self._joint_network(actor_network),
            critic_network,
            clip_epsilon=clip_epsilon if isinstance(clip_epsilon, (int, float)) else 0.2,
            entropy_bonus=entropy_bonus,
            samples_mc_entropy=samples_mc_entropy,
            entropy_coeff=entropy_coeff,
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
        if isinstance(clip_epsilon, (tuple, list, Mapping)):
            spread_bounds(self, clip_epsilon, self._agents)
        policies = [unit.policy for unit in self._units]
        self._weighs_heads = weigh_heads(self, entropy_coeff, policies)
        self._bonus_follows_coefficient = follows_coefficient

    entropy_bonus: bool

    @property
    def has_settings_by_agent(self) -> bool:  # type: ignore[override]
        """Whether each agent has a clipping range of its own."""
        return self._log_range[0].ndim > 0

    @property
    def _log_range(self) -> tuple[Tensor, Tensor]:
        both, own = self._buffers.get("clip_epsilon"), self._buffers
        low, high = own.get("clip_epsilon_low", both), own.get("clip_epsilon_high", both)
        return (-low).log1p(), high.log1p()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "clip_epsilon" and set_bounds(self, value, self._agents):
            return
        super().__setattr__(name, value)
        if name == "entropy_coeff":
            self._follow_coefficient(value)

    def _bounds(self, unit: Agent | None = None) -> list[Tensor]:
        """Return the bounds of the log-ratio, of a unit's members or of the whole team's."""
        bounds = self._log_range
        if bounds[0].ndim == 0:
            return list(bounds)
        return [bounds_of_unit(bound, unit, self._agents) for bound in bounds]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._follow_coefficient(self.entropy_coeff)

    def _follow_coefficient(self, value: float | Tensor) -> None:
        """A schedule may start the bonus after the loss was built without one."""
        follows = getattr(self, "_bonus_follows_coefficient", False)
        if follows and not self.entropy_bonus and bool(value != 0):
            self.entropy_bonus = True

    def agent_terms(self, agent: Agent, data: TensorDictBase) -> dict[str, Any]:
        """Return the clipped surrogate and the entropy bonus, element by element."""
        parameters = agent.policy.parameters(data)
        log_ratio = agent.log_ratio(parameters, data)
        gain = self.agent_gain(agent, log_ratio, data)
        terms: dict[str, Any] = {"loss_objective": -gain, "log_ratio": log_ratio}
        if self.entropy_bonus:
            dist = agent.policy.distribution(parameters)
            terms["entropy"] = self._by_head(agent, self._agent_entropy(dist, data.batch_size))
            loss_entropy = weighted_entropy(self, terms["entropy"])
            terms["loss_entropy"] = agent.joint_log_prob(loss_entropy.squeeze(-1), data)
        return terms

    def agent_gain(self, agent: Agent, log_ratio: Tensor, data: TensorDictBase) -> Tensor:
        """Return the surrogate that the agent maximises, element by element."""
        advantage = corrected_advantage(data, self.tensor_keys)
        return clipped_surrogate(log_ratio, advantage, *self._bounds(agent))

    def _agent_entropy(self, dist: Distribution, batch_size: torch.Size) -> Tensor | TensorDictBase:
        """Return TorchRL's entropy, but read one in closed form not back from the device.

        TorchRL looks whether it is finite, to estimate it from samples otherwise.
        """
        if not isinstance(dist, CompositeDistribution) and has_analytic_entropy(dist):
            return dist.entropy().unsqueeze(-1)
        return entropy_of(self, dist, batch_size)

    def _by_head(self, unit: Agent, entropy: Tensor | TensorDictBase) -> Tensor | TensorDictBase:
        """Files the entropy of a single head under its name, if each head has a weight."""
        if not self._weighs_heads or is_tensor_collection(entropy):
            return entropy
        return TensorDict({unit.policy.log_prob_keys[0]: entropy}, batch_size=entropy.shape)

    def step_factory(self, first_order: FirstOrder) -> StepFactory:
        """Return epochs of the agent's own optimiser on :meth:`agent_loss`."""
        return first_order

    def agent_report(
        self, agent: Agent, log_ratio: Tensor, valid: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the share of the valid decisions whose ratio lies outside the clipping range."""
        return {"clip_fraction": self._clip_fraction(log_ratio, valid, *self._bounds(agent))}

    @staticmethod
    def _clip_fraction(
        log_ratio: Tensor, valid: Tensor | None, low: Tensor, high: Tensor
    ) -> Tensor:
        outside = (log_ratio < low) | (log_ratio > high)
        return masked_mean(outside.to(log_ratio.dtype), valid)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the losses of the whole team, as :class:`~torchrl.objectives.ClipPPOLoss` does."""
        return SequentialLoss.forward(self, tensordict)

    def _summary(self, terms: JointTerms) -> TensorDict:
        """Return kl_approx, clip_fraction, entropy, effective sample size and ratios."""
        output = super()._summary(terms)
        log_ratio = terms["log_ratio"].detach()
        ratio = log_ratio.exp()
        log_ess = 2 * log_ratio.logsumexp(0) - (2 * log_ratio).logsumexp(0)
        output.update(
            {
                "clip_fraction": self._clip_fraction(log_ratio, terms.valid, *self._bounds()),
                "ESS": log_ess.exp() / len(log_ratio),
                "max_ratio": ratio.max(),
                "mean_ratio": masked_mean(ratio, terms.valid),
            }
        )
        entropies = terms.of_each("entropy")
        return output.update(mean_entropies(entropies)) if entropies else output
