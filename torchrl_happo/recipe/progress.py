"""How far a run is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import math
import sys
import time
from typing import Any

from tqdm import tqdm

from torchrl_happo.recipe.config import TrainConfig
from torchrl_happo.recipe.report import short

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 15.0


class ProgressDisplay:
    """Shows frames, return, frames per second and the time left.

    Args:
        config (TrainConfig): the run.
        frames (int): frames that a resumed run has already seen.
    """

    def __init__(self, config: TrainConfig, frames: int) -> None:
        self.total = config.iterations * config.frames_per_batch
        self.frames = self._first_frames = frames
        self._start = self._last_line = time.perf_counter()
        self._return = math.nan
        self._bar: Any = None
        if config.progress and sys.stderr.isatty():
            self._bar = tqdm(
                total=self.total,
                initial=frames,
                desc=f"{config.algorithm.name} {config.task.name}",
                unit="frame",
                unit_scale=True,
                dynamic_ncols=True,
            )
        self._lines = config.progress and self._bar is None

    def update(self, frames: int, episode_return: float) -> None:
        """Shows the state after an iteration; a return of NaN means that no episode ended."""
        if not math.isnan(episode_return):
            self._return = episode_return
        if self._bar is not None:
            self._bar.set_postfix_str(self._returned, refresh=False)
            self._bar.update(frames - self.frames)
        self.frames = frames
        now = time.perf_counter()
        if self._lines and (now - self._last_line > SECONDS_BETWEEN_LINES or frames == self.total):
            self._last_line = now
            rate = (frames - self._first_frames) / (now - self._start)
            left = int((self.total - frames) / rate)
            logger.info(
                "%d of %d frames, %s, %d frames/s, %d:%02d left",
                *(frames, self.total, self._returned, rate, left // 60, left % 60),
            )

    @property
    def _returned(self) -> str:
        return "no episode over" if math.isnan(self._return) else f"return {short(self._return)}"

    def close(self) -> None:
        """Leaves the terminal as the next line expects it."""
        if self._bar is not None:
            self._bar.close()
