"""Batches of experience from TorchRL's collectors, restarted from a seed where a run can resume."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from functools import partial

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
        """Collects the next batch, of shape ``[num_envs, steps_per_batch]``."""
        return next(self._iterator)

    def policy_changed(self) -> None:
        """Sends the policy's weights to wherever copies of it act."""
        if self._collector is not None:
            self._collector.update_policy_weights_()

    def close(self) -> None:
        """Ends the environments and, where there are any, their processes."""
        if self._collector is not None:
            self._collector.shutdown()
            self._collector = None


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
