"""Trains and writes checkpoints without pause: what is killed in ``test_faults.py``.

``python checkpoint_writer.py FOLDER`` forks a child for each line on its standard input. The child
goes on from the newest checkpoint of the folder, says its process id when it has something new to
write, and writes and trains until it is killed; then the parent says so.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from torchrl_happo import HAPPOLoss, SequentialUpdater, make_actor, make_critic
from torchrl_happo.envs import MatrixGame
from torchrl_happo.recipe import checkpoint
from torchrl_happo.recipe.checkpoint import Checkpoints, Progress
from torchrl_happo.recipe.compose import compose_config

KEEP = 3
WIDTHS = (256, 256)


class Training:
    """A run whose every iteration depends on its number and on the state before, alone."""

    def __init__(self):
        torch.manual_seed(0)
        self.env = MatrixGame(torch.eye(2), num_envs=8)
        # Wide networks, so that most of the time goes into writing.
        self.actor = make_actor(self.env, num_cells=WIDTHS)
        critic = make_critic(self.env, num_cells=WIDTHS)
        loss = HAPPOLoss(self.actor, critic, entropy_coeff=0.0)
        self.updater = SequentialUpdater(loss, num_epochs=1)
        self.progress = Progress()

    def resume(self, folder):
        """Goes on from the newest checkpoint, if there is one."""
        if checkpoint.list_checkpoints(folder / "checkpoints"):
            self.progress = checkpoint.restore(checkpoint.read(folder), self.updater)
        return self

    def iterate(self):
        """One batch and one update."""
        torch.manual_seed(self.progress.iteration)
        with torch.no_grad():
            batch = self.env.rollout(1, self.actor)
        self.updater(batch)
        self.progress.iteration += 1


def write_until_killed(folder, config):
    training = Training().resume(folder)
    checkpoints = Checkpoints(folder, KEEP)
    training.iterate()
    say(os.getpid())
    while True:
        checkpoints.save(config, training.updater, training.progress)
        training.iterate()


def say(word):
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def main():
    torch.set_num_threads(1)
    folder, config = Path(sys.argv[1]), compose_config()
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            write_until_killed(folder, config)
        os.waitpid(child, 0)
        say("ended")


if __name__ == "__main__":
    main()
