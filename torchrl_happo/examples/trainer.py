r"""TorchRL's ``Trainer`` around the sequential update, with its checkpoints.

    python -m torchrl_happo.examples.trainer

:class:`UpdaterHook` is all it takes: the trainer collects, logs and saves, the hook updates. The
trainer's own optimisation steps are switched off by ``optim_steps_per_batch=0``. Saved with the
trainer, the updater's state brings back networks, optimisers and generators. The example trains,
saves in the middle, goes on from the checkpoint with new objects and prints both runs side by side.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.collectors import Collector
from torchrl.trainers import Trainer, TrainerHookBase

from torchrl_happo import HAPPOLoss, SequentialUpdater, make_actor, make_critic
from torchrl_happo.envs import MatrixGame

try:
    from torchrl.checkpoint import Checkpoint
except ModuleNotFoundError:  # before TorchRL 0.14 a trainer saves in one way only
    Checkpoint = None

PAYOFF = torch.tensor([[8.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 2.0]])
BATCH = 500


class UpdaterHook(TrainerHookBase):
    """Updates the team with each batch of a trainer, and logs the agents' divergences.

    Args:
        updater (SequentialUpdater): the update.
    """

    def __init__(self, updater: SequentialUpdater) -> None:
        self.updater = updater
        self.rewards: list[float] = []

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        """Update the team, before the trainer's own (empty) optimisation."""
        self.metrics = self.updater(batch).flatten_keys("/")
        self.rewards.append(batch["next", "reward"].mean().item())
        return batch

    def log(self, batch: TensorDictBase) -> dict[str, Any]:
        """Return what the trainer logs after each batch."""
        return {key: value.item() for key, value in self.metrics.items() if key.endswith("/kl")}

    def state_dict(self) -> dict[str, Any]:
        """Return the updater's state: networks, optimisers, generators."""
        return self.updater.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        self.updater.load_state_dict(state_dict)

    def register(self, trainer: Trainer, name: str = "updater") -> None:
        """Add the update, its log and its state to a trainer."""
        trainer.register_op("batch_process", self)
        trainer.register_op("post_steps_log", self.log)
        trainer.register_module(name, self)


def make_trainer(file: Path, total_frames: int, seed: int) -> tuple[Trainer, UpdaterHook]:
    """Build a team that plays a matrix game, and its trainer."""
    torch.manual_seed(seed)
    env = MatrixGame(PAYOFF, num_envs=50)
    actor = make_actor(env)
    loss = HAPPOLoss(actor, make_critic(env), entropy_coeff=0.0)
    adam = partial(torch.optim.Adam, lr=3e-3)
    hook = UpdaterHook(SequentialUpdater(loss, optimizer=adam, num_epochs=5))
    trainer = Trainer(
        collector=Collector(env, actor, frames_per_batch=BATCH, total_frames=total_frames),
        total_frames=total_frames,
        frame_skip=1,
        optim_steps_per_batch=0,
        loss_module=loss,
        progress_bar=False,
        save_trainer_file=file,
        **({} if Checkpoint is None else {"checkpoint": Checkpoint()}),
    )
    hook.register(trainer)
    return trainer, hook


def main(total_frames: int = 10_000) -> tuple[list[float], list[float]]:
    """Train, save half-way, go on; return the mean rewards of both halves."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trainer"
        first, before = make_trainer(file, total_frames // 2, seed=0)
        first.train()  # saves at its end
        second, after = make_trainer(file, total_frames, seed=1)
        second.load_from_file(file)
        second.train()
    for name, rewards in (("before", before.rewards), ("after", after.rewards)):
        print(f"{name:>6} the checkpoint:", *(f"{reward:.2f}" for reward in rewards))
    return before.rewards, after.rewards


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
