"""The training recipe: :func:`train` starts a run, :func:`load` brings back what it has learned.

On the command line it is ``python -m torchrl_happo.train``.
"""

from __future__ import annotations

from torchrl_happo.recipe.api import train
from torchrl_happo.recipe.trained import load

__all__ = ["load", "train"]
