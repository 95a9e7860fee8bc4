"""The algorithms of the recipe: a file and a line here, and a file in ``conf/algorithm``."""

from __future__ import annotations

import torch.distributed as dist
from torchrl.envs import EnvBase

from torchrl_happo.recipe.algorithms.a2po import A2po
from torchrl_happo.recipe.algorithms.coppo import Coppo
from torchrl_happo.recipe.algorithms.haa2c import Haa2c
from torchrl_happo.recipe.algorithms.happo import Happo
from torchrl_happo.recipe.algorithms.happo_lagrangian import HappoLagrangian
from torchrl_happo.recipe.algorithms.hatrpo import Hatrpo
from torchrl_happo.recipe.algorithms.ippo import Ippo
from torchrl_happo.recipe.algorithms.macpo import Macpo
from torchrl_happo.recipe.algorithms.mappo import Mappo
from torchrl_happo.recipe.algorithms.mat import Mat
from torchrl_happo.recipe.algorithms.mat_dec import MatDec
from torchrl_happo.recipe.algorithms.tppo import Tppo
from torchrl_happo.recipe.config import AlgorithmConfig, TrainConfig
from torchrl_happo.recipe.learner import Learner

ALGORITHMS: dict[str, type[AlgorithmConfig]] = {
    "a2po": A2po,
    "coppo": Coppo,
    "haa2c": Haa2c,
    "happo": Happo,
    "happo_lagrangian": HappoLagrangian,
    "hatrpo": Hatrpo,
    "ippo": Ippo,
    "macpo": Macpo,
    "mappo": Mappo,
    "mat": Mat,
    "mat_dec": MatDec,
    "tppo": Tppo,
}


def make_learner(
    config: TrainConfig, env: EnvBase, process_group: dist.ProcessGroup | None = None
) -> Learner:
    """Build networks, loss and updater of a run for an environment.

    Args:
        config (TrainConfig): the run.
        env (EnvBase): any environment of the task, for its specs.
        process_group (ProcessGroup, optional): of several learners. Defaults to ``None``: alone.
    """
    return config.algorithm.make_learner(config, env, process_group)
