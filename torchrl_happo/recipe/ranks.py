"""The learners of a run: processes that ``torchrun`` starts, each with environments of its own.

``torchrun --standalone --nproc-per-node 2 -m torchrl_happo.train ...`` runs the same program in two
processes. ``num_envs``, ``minibatch_size`` and ``total_frames`` are those of the whole run: each
learner has its part of the environments, and all take each step together (see
:mod:`torchrl_happo.distributed`). The first one alone evaluates and writes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from torchrl_happo.distributed import Learners
from torchrl_happo.recipe.config import ConfigError, DistributedCollector, TrainConfig
from torchrl_happo.recipe.records import Row

T = TypeVar("T")


class LearnerError(RuntimeError):
    """Another learner cannot be reached; the message is one sentence for the user."""


def world_size() -> int:
    """How many learners the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def world_rank() -> int:
    """Which of them this process is."""
    return int(os.environ.get("RANK", "0"))


def restarts() -> int:
    """How often ``torchrun`` has started the learners anew, after one of them had ended."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch_time() -> datetime:
    """When the run was launched: the same for all learners, and after a restart."""
    now = str(time.time())
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The launcher's own store outlives the learners.
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, is_master=False)
        now = store.compare_set("torchrl_happo/launched", "", now).decode()
    return datetime.fromtimestamp(float(now))


def part_of(config: TrainConfig, size: int) -> TrainConfig:
    """What one of ``size`` learners runs: its part of the environments and of each minibatch.

    Raises:
        ConfigError: if the run cannot be split.
    """
    if size == 1:
        return config
    algorithm = config.algorithm
    if not algorithm.splits:
        raise ConfigError(
            f"algorithm={algorithm.name} learns in one process: take happo or hatrpo, or start it "
            "without torchrun."
        )
    if isinstance(config.collector, DistributedCollector):
        raise ConfigError(
            "collector=distributed and several learners both need the process group of torch: take "
            "collector=multi or ray with torchrun."
        )
    workers = getattr(config.collector, "num_workers", 1)
    if config.num_envs % (size * workers):
        raise ConfigError(
            f"num_envs={config.num_envs} cannot be split evenly over {size} learners"
            + (f" with {workers} workers each" if workers > 1 else "")
            + ": choose a multiple."
        )
    minibatch = algorithm.minibatch_size
    if minibatch is not None and minibatch % size:
        raise ConfigError(
            f"algorithm.minibatch_size={minibatch} cannot be split evenly over {size} learners: "
            "choose a multiple."
        )
    device = config.device
    if device == "cuda":
        here, available = int(os.environ.get("LOCAL_WORLD_SIZE", size)), torch.cuda.device_count()
        if here > available:
            raise ConfigError(
                f"{here} learners on this machine need as many CUDA devices, but torch sees "
                f"{available}: start fewer, or take device=cpu."
            )
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return replace(
        config,
        num_envs=config.num_envs // size,
        algorithm=replace(algorithm, minibatch_size=minibatch and minibatch // size),
        device=device,
    )


class Ranks:
    """This process among the learners of a run; without a launcher it is alone.

    Used as a context, it joins the others and, at the end, leaves them. Whether a learner has ended
    is for ``torchrun`` to see and to say; the others find that they cannot reach it.

    Args:
        device (str): where this learner computes; CUDA devices talk by NCCL, others by gloo.
        timeout (float): seconds after which a learner that cannot be reached counts as ended.

    Raises:
        LearnerError: at the end of the context, if another learner could not be reached.
    """

    def __init__(self, device: str, timeout: float) -> None:
        self.device = torch.device(device)
        self.timeout = timedelta(seconds=timeout)
        self.size, self.rank = world_size(), world_rank()
        self.learners = Learners()

    @property
    def is_first(self) -> bool:
        """Whether this learner evaluates, writes and speaks for all."""
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group of all learners; ``None`` if this one is alone."""
        return self.learners.group

    def __enter__(self) -> Ranks:
        if self.size > 1:
            on_gpu = self.device.type == "cuda"
            if on_gpu:
                torch.cuda.set_device(self.device)
            store, rank, size = next(rendezvous("env://", timeout=self.timeout))
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                # After a restart the launcher's store still has what was said before it.
                store=PrefixStore(f"torchrl_happo/{restarts()}", store),
                rank=rank,
                world_size=size,
                timeout=self.timeout,
            )
            self.learners = Learners(dist.group.WORLD)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.size == 1:
            return
        if error is None:
            dist.destroy_process_group()
        elif isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and "gloo" in str(error).lower()
        ):
            raise LearnerError(
                f"Learner {self.rank} of {self.size} cannot reach the others and stops: torchrun "
                "says which one has ended; resume from the last checkpoint (torchrun "
                "--max-restarts does)."
            ) from error

    def any(self, flag: bool) -> bool:
        """Whether the flag is up with any of the learners."""
        return self.learners.most(int(flag)) > 0

    def from_first(self, function: Callable[[], T]) -> T:
        """What a function returns to the first learner, for all.

        Raises:
            SystemExit: where it has raised for the first learner; there, the error itself.
        """
        if self.size == 1:
            return function()
        answer: list[T | None] = [None]
        error: Exception | None = None
        if self.is_first:
            try:
                answer = [function()]
            except Exception as caught:
                error = caught
        if self.any(error is not None):
            raise SystemExit(2) if error is None else error
        dist.broadcast_object_list(answer, group_src=0, group=self.group)
        return answer[0]  # type: ignore[return-value]

    def pooled(self, row: Row) -> Row:
        """The :func:`~torchrl_happo.recipe.records.episode_statistics` of all learners."""
        if self.size == 1:
            return row
        device = self.device
        numbers = {name: torch.tensor(value, device=device) for name, value in row.items()}
        episodes = [name for name in row if name not in ("reward", "episodes")]
        means = self.learners.mean([numbers[name] for name in episodes], row["episodes"])
        reward, count = self.learners.mean([numbers["reward"], numbers["episodes"]], 1.0)
        none = float("nan") if count == 0 else 0.0
        return {
            **{name: mean.item() + none for name, mean in zip(episodes, means, strict=True)},
            "episodes": count.item() * self.size,
            "reward": reward.item(),
        }
