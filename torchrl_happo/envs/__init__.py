"""Transforms for teams, simulators in batches, and exact games."""

from __future__ import annotations

from typing import Any

from torchrl_happo.envs.games.bridge import BridgeGame
from torchrl_happo.envs.games.matrix import DifferentialGame, MatrixGame
from torchrl_happo.envs.games.payoffs import (
    climbing_payoff,
    penalty_payoff,
    permutation_payoff,
    xor_payoff,
)
from torchrl_happo.envs.games.tabular import TabularGame, TabularGameEnv
from torchrl_happo.envs.penalty_cost import PenaltyCost
from torchrl_happo.envs.simulators.envpool import EnvPoolEnv
from torchrl_happo.envs.simulators.lle import LLEEnv
from torchrl_happo.envs.simulators.mujoco import make_mujoco
from torchrl_happo.envs.simulators.pettingzoo import BatchedPettingZooEnv
from torchrl_happo.envs.simulators.rounds import Rounds
from torchrl_happo.envs.simulators.smax import SMAXEnv
from torchrl_happo.envs.simulators.vmas import BatchedResetVmasEnv
from torchrl_happo.envs.split import AgentSplit
from torchrl_happo.envs.team_reward import TeamCost, TeamReward

__all__ = [
    "AgentSplit",
    "BatchedPettingZooEnv",
    "BatchedResetVmasEnv",
    "BridgeGame",
    "DifferentialGame",
    "EnvPoolEnv",
    "LLEEnv",
    "MatrixGame",
    "PenaltyCost",
    "Rounds",
    "SMAXEnv",
    "SeededForagingEnv",
    "TabularGame",
    "TabularGameEnv",
    "TeamCost",
    "TeamReward",
    "climbing_payoff",
    "make_mujoco",
    "penalty_payoff",
    "permutation_payoff",
    "xor_payoff",
]


def __getattr__(name: str) -> Any:
    # TorchRL has level-based foraging from 0.14 on; with older versions all else still works.
    if name == "SeededForagingEnv":
        from torchrl_happo.envs.simulators.foraging import SeededForagingEnv

        return SeededForagingEnv
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
