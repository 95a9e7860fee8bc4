"""BenchMARL's command line, with the algorithms of this library."""

from __future__ import annotations

from benchmarl.run import hydra_experiment

from torchrl_happo.benchmarl import register

if __name__ == "__main__":
    register()
    hydra_experiment()
