"""The schemas of the tasks, by name: ``conf/task/<name>.yaml`` holds the values of each."""

from __future__ import annotations

import re
from types import ModuleType

from torchrl_happo.recipe.config import ForagingTask, MujocoTask, TaskConfig
from torchrl_happo.recipe.tasks import pettingzoo, vmas, vmas_extra

# The tasks of these two differ in their values alone.
FORAGING = ("10x10_3p_3f", "8x8_2p_2f_coop", "8x8_2p_3f")
MUJOCO = (
    "ant_2x4",
    "ant_4x2",
    "halfcheetah_2x3",
    "halfcheetah_6x1",
    "hopper_3x1",
    "humanoid_17x1",
    "humanoid_9_8",
    "reacher_2x1",
    "swimmer_2x1",
    "walker2d_2x3",
    "walker2d_6x1",
)


def _schemas(family: str, module: ModuleType) -> dict[str, type[TaskConfig]]:
    """The dataclasses that ``module`` defines, each under the name of its YAML file."""
    return {
        f"{family}/{re.sub('(?<!^)(?=[A-Z])', '_', name).lower()}": schema
        for name, schema in vars(module).items()
        if isinstance(schema, type) and schema.__module__ == module.__name__
    }


TASKS: dict[str, type[TaskConfig]] = {
    **{f"lbforaging/{name}": ForagingTask for name in FORAGING},
    **{f"mujoco/{name}": MujocoTask for name in MUJOCO},
    **_schemas("pettingzoo", pettingzoo),
    **_schemas("vmas", vmas),
    **_schemas("vmas", vmas_extra),
}
