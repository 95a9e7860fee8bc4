"""TorchRL's collectors, as the configuration asks for them: where the environments step."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import BaseCollector, Collector
from torchrl.envs import EnvBase

from torchrl_happo.networks.actors import memory_transforms
from torchrl_happo.recipe.config import (
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

EnvMaker = Callable[..., EnvBase]


def make_collector(config: TrainConfig, policy: TensorDictModuleBase, seed: int) -> BaseCollector:
    """An endless collector of batches of ``frames_per_batch`` frames.

    Args:
        config (TrainConfig): the run.
        policy (TensorDictModuleBase): acts in the environments; workers have copies of it.
        seed (int): of the environments and of whatever else the workers draw.
    """
    for schema, make in _MAKERS.items():
        if isinstance(config.collector, schema):
            return make(config, policy, seed)
    raise ConfigError(f"The recipe cannot collect with collector={config.collector.name}.")


def _make_single(config: TrainConfig, policy: TensorDictModuleBase, seed: int) -> BaseCollector:
    make = _env_maker(config, policy, config.num_envs)
    assert isinstance(config.collector, SingleCollector)
    return Collector(
        make(seed=seed),
        policy,
        total_frames=-1,
        device=config.device,
        compile_policy=config.collector.compile_policy,
        track_traj_ids=False,  # nobody asks for them, and they take time at each step
        **_common(config),
    )


def _make_multi(config: TrainConfig, policy: TensorDictModuleBase, seed: int) -> BaseCollector:
    kind = _workers(config)
    return Collector(
        _worker_makers(config, policy, seed),
        policy,
        num_collectors=kind.num_workers,
        sync=kind.sync,
        total_frames=-1,
        device=config.device,
        cat_results=0 if kind.sync else None,
        use_buffers=True,
        num_threads=config.threads,
        **_common(config),
    )


def _make_ray(config: TrainConfig, policy: TensorDictModuleBase, seed: int) -> BaseCollector:
    kind = config.collector
    assert isinstance(kind, RayCollector)
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("collector=ray needs Ray: pip install torchrl_happo[ray].")
    cluster: dict[str, Any] = {"address": kind.address, "log_to_driver": False}
    if kind.address is None:
        cluster = {"num_cpus": kind.num_workers, "include_dashboard": False, **cluster}
    return _make_remote(
        config,
        policy,
        seed,
        engine="ray",
        ray_init_config=cluster,
        remote_configs={"num_cpus": 1, "num_gpus": kind.gpus_per_worker},
    )


def _make_distributed(
    config: TrainConfig, policy: TensorDictModuleBase, seed: int
) -> BaseCollector:
    kind = config.collector
    assert isinstance(kind, DistributedCollector)
    if kind.launcher == "submitit" and importlib.util.find_spec("submitit") is None:
        raise ConfigError("collector.launcher=submitit needs submitit: pip install submitit.")
    return _make_remote(
        config,
        policy,
        seed,
        engine="distributed",
        launcher=kind.launcher,
        backend=kind.backend,
        tcp_port=_free_port(),
    )


def _make_remote(
    config: TrainConfig,
    policy: TensorDictModuleBase,
    seed: int,
    *,
    engine: str,
    **options: Any,
) -> BaseCollector:
    """A collector whose workers may be on other machines."""
    kind = _workers(config)
    common = _common(config)
    collector = Collector(
        _worker_makers(config, policy, seed),
        policy,
        backend=engine,
        num_collectors=kind.num_workers,
        sync=kind.sync,
        frames_per_batch=common.pop("frames_per_batch"),
        total_frames=_endless(config),
        backend_options={
            # Tensors are sent as they lie in memory.
            "collector_kwargs": {**common, "device": config.device, "postproc": _contiguous},
            **options,
        },
    )
    collector.update_policy_weights_()
    return collector


def _common(config: TrainConfig) -> dict[str, Any]:
    return {
        "frames_per_batch": config.frames_per_batch,
        "auto_register_policy_transforms": False,  # memory_transforms are there already
    }


def _endless(config: TrainConfig) -> int:
    """More frames than anyone collects: the remote collectors of TorchRL 0.14 end at -1."""
    return sys.maxsize // config.frames_per_batch * config.frames_per_batch


def _workers(config: TrainConfig) -> WorkersCollector:
    assert isinstance(config.collector, WorkersCollector)
    return config.collector


def _env_maker(config: TrainConfig, policy: TensorDictModuleBase, num_envs: int) -> EnvMaker:
    return partial(
        make_env,
        config.task,
        num_envs=num_envs,
        device=config.device,
        transforms=memory_transforms(policy),
    )


def _worker_makers(
    config: TrainConfig, policy: TensorDictModuleBase, seed: int
) -> list[Callable[[], EnvBase]]:
    """One for each worker, with its part of the environments and a seed of its own."""
    number = _workers(config).num_workers
    make = _env_maker(config, policy, config.num_envs // number)
    home = _process()
    return [
        partial(_make_worker_env, make, derive_seed(seed, worker), config.threads, home)
        for worker in range(number)
    ]


def _process() -> tuple[str, int]:
    """Which process this is."""
    return socket.gethostname(), os.getpid()


def _make_worker_env(make: EnvMaker, seed: int, threads: int, home: tuple[str, int]) -> EnvBase:
    """Builds the environments of a worker process, whose random states are its own."""
    if _process() != home:
        if threading.current_thread() is threading.main_thread():
            # Ctrl-C reaches every process of the terminal, but ending is up to the first one.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        torch.set_num_threads(threads)
        seed_everything(seed)
    return make(seed=seed)


def _contiguous(batch: TensorDictBase) -> TensorDictBase:
    return batch.apply(lambda tensor: tensor.contiguous())


def _free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


_MAKERS: dict[type, Callable[[TrainConfig, TensorDictModuleBase, int], BaseCollector]] = {
    SingleCollector: _make_single,
    MultiCollector: _make_multi,
    RayCollector: _make_ray,
    DistributedCollector: _make_distributed,
}
