"""Batches of experience from TorchRL's collectors, restarted from a seed where a run can resume."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
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
        """Begins anew; what the environments were doing is dropped."""
        self.close()
        seed_everything(seed)
        with deaf_children():
            self._collector = make_collector(self.config, self.policy, seed)
        self._iterator = iter(self._collector)

    def next(self) -> TensorDictBase:
        """Collects the next batch, of shape ``[num_envs, steps_per_batch]``.

        Asynchronous workers take turns: a batch is one worker's, as many frames from its part of
        the environments.

        Raises:
            WorkerError: if a worker process has ended.
        """
        batch = self._watched(lambda: next(self._iterator))
        return batch if batch.ndim == 2 else batch.flatten(0, 1)  # [num_workers, envs, steps]

    def policy_changed(self) -> None:
        """Sends the policy's weights to wherever copies of it act.

        Raises:
            WorkerError: if a worker process has ended.
        """
        if self._collector is not None:
            self._watched(self._collector.update_policy_weights_, self._ping_actors())

    def _watched(self, function: Callable[[], Any], pings: Sequence[Any] = ()) -> Any:
        """Calls a function that needs the workers, which TorchRL may wait for without end."""
        if not self._workers and not pings:
            return _named(function)
        self._check_workers()
        call = _Call(function)
        call.start()
        while call.is_alive():
            call.join(timeout=1.0)
            self._check_workers()
            _check_pings(pings)
        if call.error is not None:
            self._check_workers()
            raise call.error
        return call.result

    def _ping_actors(self) -> list[Any]:
        """Asks the actors of Ray, where there are any, for a sign of life."""
        if not isinstance(self._collector, RayCollector):
            return []
        return [actor.__ray_ready__.remote() for actor in self._collector.remote_collectors]

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
        """Ends the environments and, where there are any, their processes."""
        collector, workers = self._collector, self._workers
        self._collector = None
        if isinstance(collector, DistributedCollector) and any(w.exitcode for w in workers):
            # It would wait for an answer of the dead.
            for worker in workers:
                worker.kill()
            dist.destroy_process_group()
        elif collector is not None:
            collector.shutdown()


def _named(function: Callable[[], Any]) -> Any:
    """Calls a function, and says in one sentence what Ray has to say."""
    try:
        return function()
    except Exception as error:
        if not type(error).__module__.startswith("ray."):
            raise
        raise WorkerError(
            f"An actor of Ray that collects has ended ({first_line(error)}): resume from the last "
            "checkpoint."
        ) from error


def _check_pings(pings: Sequence[Any]) -> None:
    """Raises if an actor has ended in place of answering."""
    if pings:
        import ray

        answered, _ = ray.wait(list(pings), num_returns=len(pings), timeout=0)
        _named(partial(ray.get, answered))


class _Call(threading.Thread):
    """Calls a function from a thread that can be left behind."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.function = function
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Calls it, and remembers what came of it."""
        try:
            self.result = self.function()
        except BaseException as error:
            self.error = error
