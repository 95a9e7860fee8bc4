"""A run of the recipe whose learner 1 is killed: ``torchrun ... rank_trainer.py FOLDER OVERRIDES``.

It is killed in its third update, unless there is a file ``killed`` beside ``FOLDER``: its first
life leaves one.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from torchrl_happo import SequentialUpdater, train

update = SequentialUpdater.__call__


def kill_in_the_third(killed, self, batch):
    if self.learners.rank == 1 and self.num_updates == 2 and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, batch)


if __name__ == "__main__":
    killed = Path(sys.argv.pop(1)).parent / "killed"
    SequentialUpdater.__call__ = lambda self, batch: kill_in_the_third(killed, self, batch)
    sys.exit(train.main())
