r"""HAPPO and its family as algorithms of BenchMARL 1.5.2, in its own ``Experiment``.

The configurations are used like BenchMARL's (``pip install 'torchrl_happo[benchmarl]'``)::

    from benchmarl.environments import VmasTask
    from benchmarl.experiment import Experiment, ExperimentConfig
    from benchmarl.models.mlp import MlpConfig
    from torchrl_happo.benchmarl import HappoConfig

    config = ExperimentConfig.get_from_yaml()
    config.share_policy_params = False  # each agent has a network of its own
    Experiment(
        task=VmasTask.BALANCE.get_from_yaml(),
        algorithm_config=HappoConfig(),
        model_config=MlpConfig.get_from_yaml(),
        seed=0,
        config=config,
    ).run()

:func:`register` adds ``happo``, ``hatrpo``, ``haa2c``, ``coppo`` and ``a2po`` to BenchMARL's
registry and to its command line, which this module offers with them::

    python -m torchrl_happo.benchmarl algorithm=happo task=vmas/balance \
        experiment.share_policy_params=false

All groups of an environment are one team. Learning rate, Adam, discount, epochs
(``on_policy_n_minibatch_iters``), minibatches and the bound of gradient norms are the experiment's.
This is where the sequential update meets BenchMARL's interface of an algorithm:

======================  ============================================================================
``process_env_fun``     adds :class:`~torchrl_happo.TeamReward`; loggers see the agents' own rewards
a loss for each group   the policy of the group, and the metrics of its agents
optimisers, buffers     none: the updater has its own
``process_batch``       of the first group: the update, with the joint batch of all groups
checkpoints             the state of the updater, under ``"torchrl_happo"``
======================  ============================================================================

BenchMARL 1.5.2 wants TorchRL below 0.12. Beside TorchRL 0.14 it is installed by ``pip install
'torchrl_happo[train]' && pip install --no-deps benchmarl==1.5.2``. A script, which takes the place
of the command line, then begins with the one name that BenchMARL misses::

    import torchrl.collectors

    torchrl.collectors.SyncDataCollector = torchrl.collectors.Collector
"""

from __future__ import annotations

from benchmarl.algorithms import algorithm_config_registry
from hydra.core.config_store import ConfigStore

from torchrl_happo.benchmarl.configs import (
    A2poConfig,
    CoppoConfig,
    Haa2cConfig,
    HappoConfig,
    HatrpoConfig,
)

__all__ = ["A2poConfig", "CoppoConfig", "Haa2cConfig", "HappoConfig", "HatrpoConfig", "register"]


def register() -> None:
    """Add the algorithms to BenchMARL's registry and to its command line.

    In the same process the command line of this library then finds BenchMARL's settings.
    """
    for config in (A2poConfig, CoppoConfig, Haa2cConfig, HappoConfig, HatrpoConfig):
        name = config.algorithm.__name__.lower()
        algorithm_config_registry[name] = config
        ConfigStore.instance().store(name=name, group="algorithm", node=config)
