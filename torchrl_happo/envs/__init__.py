"""What stands between an environment and the team's loss, batched simulators, exact games."""

from __future__ import annotations

from torchrl_happo.envs.games.matrix import (
    DifferentialGame,
    MatrixGame,
    climbing_payoff,
    penalty_payoff,
    permutation_payoff,
    xor_payoff,
)
from torchrl_happo.envs.games.tabular import TabularGame, TabularGameEnv
from torchrl_happo.envs.simulators.envpool import EnvPoolEnv
from torchrl_happo.envs.simulators.foraging import SeededForagingEnv
from torchrl_happo.envs.simulators.mujoco import make_mujoco
from torchrl_happo.envs.simulators.pettingzoo import BatchedPettingZooEnv
from torchrl_happo.envs.simulators.rounds import Rounds
from torchrl_happo.envs.split import AgentSplit
from torchrl_happo.envs.team_reward import TeamCost, TeamReward

__all__ = [
    "AgentSplit",
    "BatchedPettingZooEnv",
    "DifferentialGame",
    "EnvPoolEnv",
    "MatrixGame",
    "Rounds",
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
