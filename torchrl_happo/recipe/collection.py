"""Batches of experience from TorchRL's collectors, restarted from a seed where a run can resume."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import multiprocessing as mp
from torchrl.collectors import BaseCollector, Collector
from torchrl.envs import EnvBase

from torchrl_happo.networks import memory_transforms
from torchrl_happo.recipe.config import ConfigError, MultiCollector, SingleCollector, TrainConfig
from torchrl_happo.recipe.environments import make_env
from torchrl_happo.recipe.randomness import derive_seed, seed_everything

EnvMaker = Callable[..., EnvBase]


class WorkerError(RuntimeError):
    """A process that collects has ended; the message is one sentence for the user."""


class Batches:
    """An endless stream of batches that :meth:`restart` begins anew.

    A restart reseeds every random state and builds environments and collector again. It leaves
    nothing of what was before, so that it does the same in the process that goes on as in one
    that has just loaded a checkpoint, for every simulator, in this process or in workers.

    Args:
        config (TrainConfig): the run.
        policy (TensorDictModuleBase): acts in the environments; always with its newest weights.
    """

    def __init__(self, config: TrainConfig, policy: TensorDictModuleBase) -> None:
        self.config = config
        self.policy = policy
        self._collector: BaseCollector | None = None
        self._iterator: Iterator[TensorDictBase] = iter(())

    def restart(self, seed: int) -> None:
        """Begins anew; what the environments were doing is dropped."""
        self.close()
        seed_everything(seed)
        self._collector = _make_collector(self.config, self.policy, seed)
        self._iterator = iter(self._collector)

    def next(self) -> TensorDictBase:
        """Collects the next batch, of shape ``[num_envs, steps_per_batch]``.

        Raises:
            WorkerError: if a worker process has ended.
        """
        try:
            return next(self._iterator)
        except RuntimeError:
            self._check_workers()
            raise

    def policy_changed(self) -> None:
        """Sends the policy's weights to wherever copies of it act.

        Raises:
            WorkerError: if a worker process has ended.
        """
        if self._collector is None:
            return
        if not self._workers:
            self._collector.update_policy_weights_()
            return
        self._check_workers()
        # TorchRL waits without end for a worker that dies before it can answer.
        sending = _Sending(self._collector)
        sending.start()
        while sending.is_alive():
            sending.join(timeout=1.0)
            self._check_workers()
        if sending.error is not None:
            raise sending.error

    @property
    def _workers(self) -> list[Any]:
        return list(getattr(self._collector, "procs", ()))

    def _check_workers(self) -> None:
        # TorchRL terminates and closes the others when it finds one dead.
        ended = [w for w in self._workers if not w._closed and w.exitcode is not None]
        if ended:
            codes = ", ".join(str(w.exitcode) for w in ended)
            raise WorkerError(
                f"{len(ended)} of {len(self._workers)} processes that collect have ended (exit "
                f"codes: {codes}), perhaps for want of memory: resume from the last checkpoint."
            )

    def close(self) -> None:
        """Ends the environments and, where there are any, their processes."""
        if self._collector is not None:
            self._collector.shutdown()
            self._collector = None


class _Sending(threading.Thread):
    """Sends a collector the policy's weights, from a thread that can be left behind."""

    def __init__(self, collector: BaseCollector) -> None:
        super().__init__(daemon=True)
        self.collector = collector
        self.error: Exception | None = None

    def run(self) -> None:
        """Sends them, and remembers what went wrong."""
        try:
            self.collector.update_policy_weights_()
        except Exception as error:
            self.error = error


def _make_collector(config: TrainConfig, policy: TensorDictModuleBase, seed: int) -> BaseCollector:
    kind = config.collector
    if isinstance(kind, SingleCollector):
        return Collector(
            make_env(
                config.task,
                num_envs=config.num_envs,
                seed=seed,
                device=config.device,
                transforms=memory_transforms(policy),
            ),
            policy,
            frames_per_batch=config.frames_per_batch,
            total_frames=-1,
            device=config.device,
            auto_register_policy_transforms=False,  # memory_transforms are there already
        )
    if isinstance(kind, MultiCollector):
        makers = [
            partial(
                _make_worker_env,
                partial(
                    make_env,
                    config.task,
                    num_envs=config.num_envs // kind.num_workers,
                    device=config.device,
                    transforms=memory_transforms(policy),
                ),
                derive_seed(seed, worker),
                config.threads,
            )
            for worker in range(kind.num_workers)
        ]
        return Collector(
            makers,
            policy,
            num_collectors=kind.num_workers,
            sync=True,
            frames_per_batch=config.frames_per_batch,
            total_frames=-1,
            device=config.device,
            cat_results=0,
            use_buffers=True,
            auto_register_policy_transforms=False,
            num_threads=config.threads,
        )
    raise ConfigError(f"The recipe cannot collect with collector={kind.name}.")


def _make_worker_env(make: EnvMaker, seed: int, threads: int) -> EnvBase:
    """Builds the environments of a worker process, whose random states are its own."""
    if mp.parent_process() is not None:
        # Ctrl-C reaches every process of the terminal, but ending the run is up to the first one.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        torch.set_num_threads(threads)
        seed_everything(seed)
    return make(seed=seed)
