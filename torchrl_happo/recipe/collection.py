"""Batches of experience from TorchRL's collectors, restarted from a seed where a run can resume."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import torch.distributed as dist
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import BaseCollector
from torchrl.collectors.distributed import DistributedCollector, RayCollector

from torchrl_happo.arguments import first_line
from torchrl_happo.recipe.collectors import make_collector
from torchrl_happo.recipe.config import TrainConfig
from torchrl_happo.recipe.interrupt import deaf_children
from torchrl_happo.recipe.randomness import seed_everything


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
        """Begin anew; what the environments were doing is dropped."""
        self.close()
        seed_everything(seed)
        with deaf_children():
            self._collector = make_collector(self.config, self.policy, seed)
        self._iterator = iter(self._collector)

    def next(self) -> TensorDictBase:
        """Collect the next batch, of shape ``[num_envs, steps_per_batch]``.

        Asynchronous workers take turns: a batch is one worker's, as many frames from its part of
        the environments.

        Raises:
            WorkerError: if a worker process has ended.
        """
        with self._watched():
            batch = next(self._iterator)
        return batch if batch.ndim == 2 else batch.flatten(0, 1)  # [num_workers, envs, steps]

    def policy_changed(self) -> None:
        """Send the policy's weights to wherever copies of it act.

        Raises:
            WorkerError: if a worker process has ended.
        """
        collector = self._collector
        if collector is None:
            return
        with self._watched():
            if isinstance(collector, RayCollector):
                import ray

                # TorchRL waits without end for an actor that has ended; asking the actor raises.
                ray.get([actor.__ray_ready__.remote() for actor in collector.remote_collectors])
            collector.update_policy_weights_()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Raise when a worker ends in this block, where TorchRL would wait for it without end."""
        self._check_workers()
        in_main = threading.current_thread() is threading.main_thread()
        watches = bool(self._workers) and in_main
        before: Any = None
        if watches:
            # The system tells at once, and Python calls this between two waits of TorchRL's.
            before = signal.signal(signal.SIGCHLD, lambda number, frame: self._check_workers())
        try:
            yield
        except WorkerError:
            raise
        except Exception as error:
            self._check_workers()
            if type(error).__module__.startswith("ray."):
                raise WorkerError(
                    f"An actor of Ray that collects has ended ({first_line(error)}): resume from "
                    "the last checkpoint."
                ) from error
            raise
        finally:
            if watches:
                signal.signal(signal.SIGCHLD, before)

    @property
    def _workers(self) -> list[Any]:
        """The worker processes on this machine, if they are no one else's to watch."""
        started = getattr(self._collector, "procs", getattr(self._collector, "jobs", ()))
        return [worker for worker in started if isinstance(worker, BaseProcess)]

    def _check_workers(self) -> None:
        # TorchRL terminates and closes the others when it finds one dead.
        ended = [w for w in self._workers if not w._closed and w.exitcode is not None]
        if ended:
            codes = ", ".join(str(w.exitcode) for w in ended)
            killed = any(w.exitcode == -signal.SIGKILL for w in ended)
            why = ", perhaps for want of memory" if killed else "; what they said stands above"
            raise WorkerError(
                f"{len(ended)} of {len(self._workers)} processes that collect have ended (exit "
                f"codes: {codes}){why}: resume from the last checkpoint."
            )

    def close(self) -> None:
        """End the environments and, where there are any, their processes."""
        collector, workers = self._collector, self._workers
        self._collector = None
        if isinstance(collector, DistributedCollector) and any(w.exitcode for w in workers):
            # It would wait for an answer of the dead.
            for worker in workers:
                worker.kill()
            dist.destroy_process_group()
        elif collector is not None:
            collector.shutdown()
