"""Train a team: ``python -m torchrl_happo.train task=vmas/het_mass algorithm=happo``.

What runs is in :mod:`torchrl_happo.recipe`; from Python it is
:func:`torchrl_happo.recipe.train`.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

INTERRUPTED = 130
REFUSED = 2

#: The packages of the extra ``train``.
NEEDED = ("hydra", "matplotlib", "omegaconf", "PIL", "tqdm")


def main() -> int:
    """Run the command line; return its exit code: 0, 2 for a refusal, 130 after Ctrl-C."""
    words = sys.argv[1:]
    if "--help" in words or "-h" in words:
        from torchrl_happo.conf.help import help_text

        sys.stdout.write(help_text())
        return 0
    if "--version" in words:
        from torchrl_happo import __version__

        sys.stdout.write(f"torchrl_happo {__version__}\n")
        return 0
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        sys.stderr.write(
            f"torchrl-happo needs {', '.join(missing)}: pip install 'torchrl_happo[train]'.\n"
        )
        return REFUSED
    try:
        from torchrl_happo.recipe import cli

        return cli.main(words)
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
