"""Put the policy of a finished run into the zoo, from where ``load("zoo:NAME")`` brings it back.

python benchmarks/zoo.py benchmarks/runs/vmas/vmas/het_mass/happo/seed_0 vmas/het_mass/happo
"""

from __future__ import annotations

import argparse
from pathlib import Path

from learning import read_origin

from torchrl_happo.recipe import load
from torchrl_happo.recipe.zoo import pack


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("run", type=Path, help="the folder of the run")
    parser.add_argument("name", help="task and algorithm")
    options = parser.parse_args()
    policy = load(options.run).policy
    revision = read_origin(options.run)["revision"]
    print(pack(options.run, options.name, policy, revision))


if __name__ == "__main__":
    main()
