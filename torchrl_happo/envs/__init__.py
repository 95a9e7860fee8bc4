"""What stands between an environment and the team's loss, and small exact games."""

from __future__ import annotations

from torchrl_happo.envs.matrix import (
    DifferentialGame,
    MatrixGame,
    climbing_payoff,
    penalty_payoff,
    permutation_payoff,
    xor_payoff,
)
from torchrl_happo.envs.tabular import TabularGame, TabularGameEnv
from torchrl_happo.envs.transforms import TeamReward

__all__ = [
    "DifferentialGame",
    "MatrixGame",
    "TabularGame",
    "TabularGameEnv",
    "TeamReward",
    "climbing_payoff",
    "penalty_payoff",
    "permutation_payoff",
    "xor_payoff",
]
