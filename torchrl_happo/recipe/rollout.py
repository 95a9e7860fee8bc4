"""Draws an episode of a trained team: ``python -m torchrl_happo.recipe.rollout FOLDER``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_happo.networks.actors import memory_transforms
from torchrl_happo.recipe import checkpoint
from torchrl_happo.recipe.algorithms import make_learner
from torchrl_happo.recipe.checkpoint import CheckpointError
from torchrl_happo.recipe.config import ConfigError, VmasTask
from torchrl_happo.recipe.environments import make_env
from torchrl_happo.recipe.places import run_folder

WIDTH = 420
MILLISECONDS_PER_FRAME = 60


@torch.no_grad()
def record(source: Path, target: Path) -> None:
    """Plays one deterministic episode of a checkpoint and writes it as a GIF.

    Args:
        source (Path): a run's folder or a checkpoint.
        target (Path): the GIF to write.

    Raises:
        CheckpointError: in one sentence, if there is none or it cannot be used.
        ConfigError: if the task's simulator does not draw.
    """
    content = checkpoint.read(source)
    config = checkpoint.read_config(content)
    if not isinstance(config.task, VmasTask):
        raise ConfigError(f"Tasks of VMAS alone are drawn, not {config.task.name}.")
    env = make_env(config.task, num_envs=1, seed=config.evaluation.seed)
    learner = make_learner(config, env)
    for transform in memory_transforms(learner.policy):
        env = env.append_transform(transform)
    checkpoint.restore(content, learner.updater)
    frames = []
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        state = env.reset()
        for _ in range(config.task.max_steps):
            frames.append(_draw(env))
            step, state = env.step_and_maybe_reset(learner.policy(state))
            if step["next", "done"].all():
                break
    frames[0].save(
        target,
        save_all=True,
        append_images=frames[1:],
        duration=MILLISECONDS_PER_FRAME,
        loop=0,
        optimize=True,
    )


def _draw(env: EnvBase) -> Image.Image:
    picture = Image.fromarray(env.render(mode="rgb_array"))
    height = round(picture.height * WIDTH / picture.width)
    return picture.resize((WIDTH, height)).quantize(64)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="a run's folder or a checkpoint")
    parser.add_argument("--output", type=Path, help="default: rollout.gif in the run's folder")
    arguments = parser.parse_args()
    try:
        record(arguments.source, arguments.output or run_folder(arguments.source) / "rollout.gif")
    except (CheckpointError, ConfigError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
