"""Settings of the algorithms in BenchMARL; the experiment's own settings hold besides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from benchmarl.algorithms.common import AlgorithmConfig
from benchmarl.algorithms.mappo import MappoConfig

from torchrl_happo.benchmarl.team import A2po, Coppo, Haa2c, Happo, Hatrpo, Team

__all__ = ["A2poConfig", "CoppoConfig", "Haa2cConfig", "HappoConfig", "HatrpoConfig"]


@dataclass
class TeamConfig(AlgorithmConfig):
    """Settings that the algorithms share, with the defaults of BenchMARL's MAPPO.

    Attributes:
        order (str): of the agents, as for :class:`~torchrl_happo.SequentialUpdater`.
        team_reward (str, optional): ``"mean"`` or ``"sum"`` over the agents, or ``None`` if they
            are paid the same.
        critic_coef, loss_critic_type, lmbda, scale_mapping, use_tanh_normal: as for MAPPO.
        compile (bool): whether to compile the update.
    """

    algorithm: ClassVar[type[Team]]

    order: str = "random"
    team_reward: str | None = "mean"
    critic_coef: float = 1.0
    loss_critic_type: str = "l2"
    lmbda: float = 0.9
    scale_mapping: str = "biased_softplus_1.0"
    use_tanh_normal: bool = True
    compile: bool = False

    @classmethod
    def associated_class(cls) -> type[Team]:
        """Return the algorithm."""
        return cls.algorithm

    @classmethod
    def get_from_yaml(cls, path: str | None = None) -> TeamConfig:
        """Read a configuration; without a path, take the defaults (BenchMARL has no file)."""
        return cls() if path is None else super().get_from_yaml(path)

    supports_continuous_actions = staticmethod(MappoConfig.supports_continuous_actions)
    supports_discrete_actions = staticmethod(MappoConfig.supports_discrete_actions)
    on_policy = staticmethod(MappoConfig.on_policy)
    has_centralized_critic = staticmethod(MappoConfig.has_centralized_critic)


@dataclass
class HappoConfig(TeamConfig):
    """HAPPO (:class:`~torchrl_happo.HAPPOLoss`)."""

    algorithm = Happo

    clip_epsilon: float = 0.2
    entropy_coef: float = 0.0


@dataclass
class HatrpoConfig(TeamConfig):
    """HATRPO (:class:`~torchrl_happo.HATRPOLoss`)."""

    algorithm = Hatrpo

    max_kl: float = 0.01


@dataclass
class Haa2cConfig(TeamConfig):
    """HAA2C (:class:`~torchrl_happo.HAA2CLoss`)."""

    algorithm = Haa2c

    entropy_coef: float = 0.0


@dataclass
class CoppoConfig(HappoConfig):
    """CoPPO (:class:`~torchrl_happo.CoPPOLoss`), for environments of one group."""

    algorithm = Coppo


@dataclass
class A2poConfig(HappoConfig):
    """A2PO (:class:`~torchrl_happo.A2POLoss`)."""

    algorithm = A2po

    order: str = "semi_greedy"
