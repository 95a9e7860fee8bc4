"""The schemas of the tasks, by name: ``conf/task/<name>.yaml`` holds the values of each."""

from __future__ import annotations

import re
from types import ModuleType

from torchrl_happo.recipe.config import TaskConfig
from torchrl_happo.recipe.tasks import vmas, vmas_extra


def _schemas(family: str, module: ModuleType) -> dict[str, type[TaskConfig]]:
    """The dataclasses that ``module`` defines, each under the name of its YAML file."""
    return {
        f"{family}/{re.sub('(?<!^)(?=[A-Z])', '_', name).lower()}": schema
        for name, schema in vars(module).items()
        if isinstance(schema, type) and schema.__module__ == module.__name__
    }


TASKS: dict[str, type[TaskConfig]] = {
    **_schemas("vmas", vmas),
    **_schemas("vmas", vmas_extra),
}
