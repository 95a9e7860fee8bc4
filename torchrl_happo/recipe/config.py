"""The typed schema of a run: what may be set, of which type, within which range.

A value stands in one place. What the library decides, the schema reads from the library
(:func:`default_of`); what the recipe decides is in ``torchrl_happo/conf``; what a simulator
decides, the simulator knows. The parts of the algorithms are in
:mod:`torchrl_happo.recipe.algorithms`. The text below a field is its help on the command line.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch.distributed as dist
from omegaconf import MISSING
from torchrl.envs import EnvBase
from torchrl.objectives import ValueEstimators
from torchrl.objectives.utils import default_value_kwargs

from torchrl_happo.networks.actors import make_actor
from torchrl_happo.networks.critics import CRITIC_INPUTS
from torchrl_happo.networks.recurrent import CELLS
from torchrl_happo.objectives import HAPPOLoss
from torchrl_happo.recipe.learner import Learner

ADVANTAGE = default_value_kwargs(ValueEstimators.GAE)


class ConfigError(ValueError):
    """A configuration that cannot be run; its message is one sentence for the user."""


def default_of(function: Callable[..., Any], name: str) -> Any:
    """Return the default of an argument of a function or class of the library."""
    return inspect.signature(function).parameters[name].default


def number(
    default: Any = MISSING,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> Any:
    """Declare a field whose value (or, for a list, each of its values) lies in a range."""
    bounds = {"above": above, "at least": at_least, "below": below, "at most": at_most}
    metadata = {"bounds": {kind: bound for kind, bound in bounds.items() if bound is not None}}
    if isinstance(default, tuple):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def choice(*options: str, default: Any = MISSING) -> Any:
    """Declare a field that holds one of ``options``."""
    return field(default=default, metadata={"options": options})


def count(default: Any = MISSING) -> Any:
    """Declare a field that holds a whole number of at least one."""
    return number(default, at_least=1)


@dataclass
class TaskConfig:
    """The environment of a run."""

    name: str = MISSING
    """Its path under ``conf/task``, for example ``vmas/balance``."""
    simulator: str = MISSING
    """Who builds it: see ``recipe/simulators.py``."""
    max_steps: int | None = count()
    """Steps after which an episode is truncated (its value is bootstrapped); null: never."""
    team_reward: str | None = choice("mean", "sum")
    """How the agents' rewards become the team's one; null where all agents get the same."""
    make_env: Any = None
    """With task=custom, who builds the environments: my_package.my_module:function, which returns
    one, or has the arguments num_envs and device and returns so many."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the simulator, by its own names and with its own defaults: task.n_agents=4."""


@dataclass
class ModelConfig:
    """The networks, the same ones for every algorithm."""

    name: str = MISSING
    num_cells: list[int] = count(default_of(make_actor, "num_cells"))  # noqa: RUF009
    """Sizes of the hidden layers; with a memory, of those before it."""
    activation: str = choice("tanh", "relu", "elu", "silu", default="tanh")
    """Between the layers."""
    actor_init: str = choice("orthogonal", "torch", default=default_of(make_actor, "init"))
    """orthogonal, with a small output gain, or as torch initialises its layers."""
    state_dependent_std: bool = default_of(make_actor, "state_dependent_std")
    """Whether the deviation of a continuous action depends on the observation."""
    initial_std: float = number(1.0, above=0.01)
    """Deviation of a continuous action at the start, before it is bounded; TorchRL's
    biased_softplus adds 0.01 to what can be learned."""
    max_std: float | None = number(default_of(make_actor, "max_std"), above=0)
    """Bound of a deviation that does not depend on the observation; null: none."""
    layer_norm: bool = default_of(make_actor, "layer_norm")
    """Whether inputs and the outputs of hidden layers are normalised, of actors and critics."""
    make_actor: Any = None
    """Who builds the actors in place of the recipe: my_package.my_module:function."""


@dataclass
class MlpModel(ModelConfig):
    """Feed-forward policies."""


@dataclass
class RecurrentModel(ModelConfig):
    """Policies with memory: hidden layers, a recurrent unit, a linear layer."""

    hidden_size: int = count(default_of(make_actor, "hidden_size"))
    """Of the memory."""
    sequence_length: int | None = count(None)
    """Consecutive steps that a minibatch holds whole; null: those of the batch."""


@dataclass
class CriticConfig:
    """What the critic of HAPPO and HATRPO sees, and whether it remembers."""

    input: str = choice("auto", *CRITIC_INPUTS)
    """auto: the state where the task has one of its own, else the observations of all agents."""
    model: str = choice("mlp", *CELLS)
    """mlp, or the memory behind its hidden layers, whatever the model of the policies."""
    hidden_size: int = count(default_of(make_actor, "hidden_size"))
    """Of the memory."""
    make_critic: Any = None
    """Who builds the critic in place of the recipe: my_package.my_module:function."""


@dataclass
class CollectorConfig:
    """Where batches come from; one dataclass for each way."""

    #: Version of TorchRL that has everything the collector needs.
    min_torchrl: ClassVar[str] = "0.11"

    name: str = MISSING
    restart_interval: int = number(10, at_least=0)
    """Iterations after which the environments begin anew; checkpoints fall only there, so that a
    resumed run does as one that was not interrupted. 0: never, with one checkpoint at the end."""


@dataclass
class SingleCollector(CollectorConfig):
    """The environments step in the training process."""

    compile_policy: bool = False
    """Whether the policy that acts is compiled: some seconds at the start, then faster."""


@dataclass
class WorkersCollector(CollectorConfig):
    """What the ways to collect in worker processes share: each has its part of the environments."""

    min_torchrl: ClassVar[str] = "0.14"

    num_workers: int = count()
    """Processes that collect; num_envs is split over them."""
    sync: bool = True
    """Whether all workers collect a batch at once, with the newest policy. Otherwise a batch is one
    worker's, with the policy of when it began, and no run is repeatable bit for bit."""


@dataclass
class MultiCollector(WorkersCollector):
    """Processes of this machine, tensors in shared memory."""


@dataclass
class RayCollector(WorkersCollector):
    """Actors of a Ray cluster."""

    address: str | None = None
    """auto, or of a cluster that is running; null: one is started for the run."""
    gpus_per_worker: float = number(0.0, at_least=0)
    """A share of a GPU, where device=cuda."""


@dataclass
class DistributedCollector(WorkersCollector):
    """Processes that talk by ``torch.distributed``."""

    launcher: str = choice("mp", "submitit", default="mp")
    """mp: on this machine; submitit: as jobs of a Slurm cluster."""
    backend: str = choice("gloo", "nccl", default="gloo")
    """Of ``torch.distributed``."""


@dataclass
class EvaluationConfig:
    """Deterministic episodes on environments of their own."""

    interval: int = number(at_least=0)
    """Iterations between two evaluations; 0 evaluates at the end only."""
    episodes: int = count()
    """Episodes of an evaluation, played side by side."""
    seed: int = number(at_least=0)
    """Every evaluation starts from this seed, so that all see the same initial states."""


@dataclass
class CheckpointConfig:
    """When a checkpoint is written and how many stay."""

    interval: int = number(at_least=0)
    """Iterations between two checkpoints, a multiple of collector.restart_interval, which is the
    default; 0 writes one at the end only. It changes no number of the run."""
    keep: int = count()
    """How many of the newest checkpoints stay."""


@dataclass
class AlgorithmConfig:
    """What all algorithms share: advantage, critic and optimiser.

    An algorithm is a subclass in a file of its own, which says how a learner is made, a YAML file
    and a line of the registry in :mod:`torchrl_happo.recipe.algorithms`.
    """

    #: Whether ``torchrun`` may train it with several learners.
    splits: ClassVar[bool] = False
    #: Version of TorchRL that has everything the algorithm needs.
    min_torchrl: ClassVar[str] = "0.11"

    name: str = MISSING
    gamma: float = number(ADVANTAGE["gamma"], at_least=0, at_most=1)
    """Discount of the reward."""
    lmbda: float = number(ADVANTAGE["lmbda"], at_least=0, at_most=1)
    """Of the generalised advantage estimate."""
    loss_critic_type: str = choice(
        "l1", "l2", "smooth_l1", default=default_of(HAPPOLoss, "loss_critic_type")
    )
    """Loss of the critic."""
    critic_coeff: float = number(1.0, above=0)
    """Weight of the critic's loss: it matters where the gradient is clipped."""
    clip_value: float | None = number(default_of(HAPPOLoss, "clip_value"), above=0)
    """How far a fit may move a value and still gain by it, on the scale of the critic's output;
    null: as far as it will."""
    value_norm: str | None = choice("popart_ema", "running", default=None)
    """Statistics by which the critic's values are normalised; null: they are not."""
    value_norm_decay: float = number(0.99999, above=0, below=1)
    """What remains, at an update of popart_ema, of the statistics before it."""
    num_epochs: int = count()
    """Passes over a batch."""
    minibatch_size: int | None = count()
    """Frames (a frame is one step of one environment, with all its agents); null: a batch."""
    lr: float = number(above=0)
    """Of Adam."""
    lr_schedule: str = choice("constant", "linear", default="constant")
    """linear: from lr to zero over the total_frames of the run."""
    adam_eps: float = number(1e-8, above=0)
    """Of Adam's denominator."""
    max_grad_norm: float | None = number(above=0)
    """The gradient is scaled down to this norm; null: it is not."""

    def check(self, config: TrainConfig) -> None:
        """Refuse what does not go together with the rest of the run.

        Raises:
            ConfigError: in one sentence.
        """

    def make_learner(
        self, config: TrainConfig, env: EnvBase, process_group: dist.ProcessGroup | None
    ) -> Learner:
        """Build networks, loss and updater for an environment.

        Args:
            config (TrainConfig): the run.
            env (EnvBase): any environment of the task, for its specs.
            process_group (ProcessGroup, optional): of several learners.
        """
        raise NotImplementedError


@dataclass
class TrainConfig:
    """One run."""

    task: TaskConfig = MISSING
    algorithm: AlgorithmConfig = MISSING
    model: ModelConfig = MISSING
    critic: CriticConfig = MISSING
    collector: CollectorConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    checkpoint: CheckpointConfig = MISSING
    seed: int = number(at_least=0)
    """Decides everything that is drawn in the run."""
    total_frames: int = count()
    """Environment steps of the whole run, over all environments; the last batch is never cut."""
    num_envs: int = count()
    """Environments that step side by side."""
    steps_per_batch: int = count()
    """Steps of each environment in a batch: a batch is num_envs * steps_per_batch frames."""
    device: str = MISSING
    """cpu or cuda, such as cuda:0."""
    learner_timeout: float = number(above=0)
    """Seconds that learners wait for each other (torchrun), evaluations included."""
    threads: int = count()
    """Threads of torch; more than one only pays on an idle machine with large networks."""
    logger: str = choice("csv", "tensorboard", "wandb")
    """csv: the tables that every run writes; the others come on top."""
    progress: bool = MISSING
    """A progress bar on a terminal, now and then a line elsewhere."""
    render: bool = MISSING
    """Record rollout.gif at the end; tasks of VMAS alone are drawn."""
    resume: str | None = MISSING
    """A run's folder, to go on there, or a checkpoint, to branch off into a new folder."""

    @property
    def frames_per_batch(self) -> int:
        """Frames that one iteration collects and learns from."""
        return self.num_envs * self.steps_per_batch

    @property
    def iterations(self) -> int:
        """Iterations of the whole run; the last batch is never cut."""
        return -(-self.total_frames // self.frames_per_batch)
