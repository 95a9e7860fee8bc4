"""TorchRL's collectors, as the configuration asks for them: where the environments step."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import BaseCollector, Collector
from torchrl.envs import EnvBase

from torchrl_happo.networks.actors import memory_transforms
from torchrl_happo.recipe.config import (
    CollectorConfig,
    ConfigError,
    DistributedCollector,
    MultiCollector,
    RayCollector,
    SingleCollector,
    TrainConfig,
    WorkersCollector,
)
from torchrl_happo.recipe.environments import make_env
from torchrl_happo.recipe.randomness import derive_seed, seed_everything
from torchrl_happo.versions import since


def make_collector(config: TrainConfig, policy: TensorDictModuleBase, seed: int) -> BaseCollector:
    """Build an endless collector of batches of ``frames_per_batch`` frames.

    Args:
        config (TrainConfig): the run.
        policy (TensorDictModuleBase): acts in the environments; workers have copies of it.
        seed (int): of the environments and of whatever else the workers draw.
    """
    kind = config.collector
    make = partial(
        make_env, config.task, device=config.device, transforms=memory_transforms(policy)
    )
    common: dict[str, Any] = {
        "frames_per_batch": config.frames_per_batch,
        # memory_transforms are there already
        **since("0.13", auto_register_policy_transforms=False),
    }
    if isinstance(kind, SingleCollector):
        return Collector(
            make(num_envs=config.num_envs, seed=seed),
            policy,
            **common,
            total_frames=-1,
            device=config.device,
            compile_policy=kind.compile_policy,
            # Nobody asks for them, and they take time at each step.
            **since("0.13", track_traj_ids=False),
        )
    assert isinstance(kind, WorkersCollector)
    home = (socket.gethostname(), os.getpid())
    make = partial(make, num_envs=config.num_envs // kind.num_workers)
    workers = [
        partial(_make_worker_env, make, derive_seed(seed, worker), config.threads, home)
        for worker in range(kind.num_workers)
    ]
    if isinstance(kind, MultiCollector):
        return Collector(
            workers,
            policy,
            **common,
            num_collectors=kind.num_workers,
            sync=kind.sync,
            total_frames=-1,
            device=config.device,
            cat_results=0 if kind.sync else None,
            use_buffers=True,
            num_threads=config.threads,
        )
    # Tensors are sent as they lie in memory.
    options = {"collector_kwargs": {**common, "device": config.device, "postproc": _contiguous}}
    frames = options["collector_kwargs"].pop("frames_per_batch")
    collector = Collector(
        workers,
        policy,
        backend="ray" if isinstance(kind, RayCollector) else "distributed",
        num_collectors=kind.num_workers,
        sync=kind.sync,
        frames_per_batch=frames,
        # More frames than anyone collects: the remote collectors of TorchRL 0.14 end at -1.
        total_frames=sys.maxsize // frames * frames,
        backend_options={**options, **_engine_options(kind)},
    )
    collector.update_policy_weights_()
    return collector


def _engine_options(kind: CollectorConfig) -> dict[str, Any]:
    """Return what Ray, or ``torch.distributed``, needs to know."""
    if isinstance(kind, RayCollector):
        if find_spec("ray") is None:
            raise ConfigError("collector=ray needs Ray: pip install 'torchrl_happo[ray]'.")
        cluster: dict[str, Any] = {"address": kind.address, "log_to_driver": False}
        if kind.address is None:
            cluster = {"num_cpus": kind.num_workers, "include_dashboard": False, **cluster}
        resources = {"num_cpus": 1, "num_gpus": kind.gpus_per_worker}
        return {"ray_init_config": cluster, "remote_configs": resources}
    assert isinstance(kind, DistributedCollector)
    if kind.launcher == "submitit" and find_spec("submitit") is None:
        raise ConfigError("collector.launcher=submitit needs submitit: pip install submitit.")
    return {"launcher": kind.launcher, "backend": kind.backend, "tcp_port": _free_port()}


def _make_worker_env(
    make: Callable[..., EnvBase], seed: int, threads: int, home: tuple[str, int]
) -> EnvBase:
    """Build the environments of a worker process, whose random states are its own."""
    if (socket.gethostname(), os.getpid()) != home:
        if threading.current_thread() is threading.main_thread():
            # Ctrl-C reaches every process of the terminal, but ending is up to the first one.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        torch.set_num_threads(threads)
        seed_everything(seed)
    return make(seed=seed)


def _contiguous(batch: TensorDictBase) -> TensorDictBase:
    return batch.apply(lambda tensor: tensor.contiguous())


def _free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
