"""The typed schema of a run: what may be set, of which type, within which range.

The values are in ``torchrl_happo/conf``, one YAML file for each dataclass of this module and of
:mod:`torchrl_happo.recipe.tasks`; the dataclasses hold types and ranges only. A schema without
values cannot disagree with the files. Whether a configuration keeps to it is for
:mod:`torchrl_happo.recipe.validation`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from torchrl_happo.networks.critics import CRITIC_INPUTS
from torchrl_happo.networks.recurrent import CELLS

ALGORITHMS = ("happo", "hatrpo", "mappo", "ippo")
LOGGERS = ("csv", "tensorboard", "wandb")


class ConfigError(ValueError):
    """A configuration that cannot be run; its message is one sentence for the user."""


def number(
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> Any:
    """Declares a field whose value (or, for a list, each of its values) lies in a range."""
    bounds = {"above": above, "at least": at_least, "below": below, "at most": at_most}
    return field(default=MISSING, metadata={"bounds": bounds})


def choice(*options: str) -> Any:
    """Declares a field that holds one of ``options``."""
    return field(default=MISSING, metadata={"options": options})


def count() -> Any:
    """Declares a field that holds a whole number of at least one."""
    return number(at_least=1)


@dataclass
class TaskConfig:
    """What every task says about itself."""

    name: str = MISSING
    """Its path under ``conf/task``, for example ``"vmas/balance"``."""
    max_steps: int = count()
    """Steps after which an episode is truncated (not terminated: the value is bootstrapped)."""
    team_reward: str | None = choice("mean", "sum")
    """How the agents' rewards become the team's one; ``null`` where they are one already."""


@dataclass
class VmasTask(TaskConfig):
    """A scenario of the vectorised multi-agent simulator (Bettini et al., 2022)."""

    scenario: str = MISSING
    continuous_actions: bool = MISSING


@dataclass
class PettingZooTask(TaskConfig):
    """A particle environment of mpe2, PettingZoo's own."""

    scenario: str = MISSING
    """Name of its module in mpe2, version included."""
    continuous_actions: bool = MISSING


@dataclass
class ForagingTask(TaskConfig):
    """Level-based foraging (Christianos et al., 2020): sparse rewards, discrete actions."""

    environment: str = MISSING
    """Its name in lbforaging, version included."""


@dataclass
class MujocoTask(TaskConfig):
    """A robot of MuJoCo whose joints are moved by different agents (Peng et al., 2021)."""

    robot: str = MISSING
    partition: str = MISSING
    version: str = MISSING
    """Of the Gymnasium task."""
    nearest: int | None = number(at_least=0)
    """Links up to which an agent observes joints; ``null``: it observes the whole state."""
    identity: bool = MISSING
    """Whether an agent observes who it is."""
    standardize: bool = MISSING
    """Whether each observation has mean 0 and standard deviation 1 over its own entries."""
    bounded_actions: bool = MISSING
    """Whether a policy keeps within the motors' range, by a tanh, or is Gaussian."""
    num_threads: int = count()
    """Threads of the simulator; results do not depend on it."""


@dataclass
class ModelConfig:
    """The networks, the same ones for every algorithm."""

    name: str = MISSING
    num_cells: list[int] = count()  # noqa: RUF009 (a field, of which each instance has its own)
    activation: str = choice("tanh", "relu", "elu", "silu")
    actor_init: str = choice("orthogonal", "torch")
    state_dependent_std: bool = MISSING
    """Whether the deviation of a continuous action depends on the observation."""
    initial_std: float = number(above=0.01)
    """Deviation of a continuous action at the start, before bounds are imposed on it; 0.01, below
    which TorchRL's ``biased_softplus`` does not go, is added to what can be learned."""
    max_std: float | None = number(above=0)
    """Bound of a deviation that does not depend on the observation; ``null``: none."""
    layer_norm: bool = MISSING
    """Whether inputs and the outputs of hidden layers are normalised, of actors and critics."""


@dataclass
class MlpModel(ModelConfig):
    """Feed-forward policies."""


@dataclass
class RecurrentModel(ModelConfig):
    """Policies with memory behind their hidden layers; for the critic's see ``critic.model``."""

    hidden_size: int = count()
    """Of the memory."""
    sequence_length: int | None = count()
    """Consecutive steps that a minibatch holds whole; ``null``: those of the batch."""


@dataclass
class CriticConfig:
    """What the critic of HAPPO and HATRPO sees, and whether it remembers."""

    input: str = choice("auto", *CRITIC_INPUTS)
    """``auto``: the state where the task has one of its own, else all observations."""
    model: str = choice("mlp", *CELLS)
    """``mlp``, or the memory behind its hidden layers."""
    hidden_size: int = count()
    """Of the memory."""


@dataclass
class CollectorConfig:
    """Where batches come from; one dataclass for each way."""

    name: str = MISSING


@dataclass
class SingleCollector(CollectorConfig):
    """TorchRL's ``Collector``: the environments step in the training process."""

    compile_policy: bool = MISSING
    """Whether the policy that acts is compiled (``torch.compile``)."""


@dataclass
class WorkersCollector(CollectorConfig):
    """What the ways to collect in worker processes share: each has its part of the environments."""

    num_workers: int = count()
    sync: bool = MISSING
    """Whether a batch is collected by all workers at once, with the newest policy. Otherwise it is
    one worker's, with the policy of when that worker began, and the others go on meanwhile. The
    ratio of the loss then starts from the log-probabilities that are stored with the actions; that
    of the factor, from the policy just before an agent's update, as always."""


@dataclass
class MultiCollector(WorkersCollector):
    """TorchRL's ``MultiCollector``: processes of this machine, tensors in shared memory."""


@dataclass
class RayCollector(WorkersCollector):
    """TorchRL's ``RayCollector``: actors of a Ray cluster."""

    address: str | None = MISSING
    """Of a running cluster, such as ``"auto"``; ``null``: one is started here for the run."""
    gpus_per_worker: float = number(at_least=0)


@dataclass
class DistributedCollector(WorkersCollector):
    """TorchRL's ``DistributedCollector``: processes that talk by ``torch.distributed``."""

    launcher: str = choice("mp", "submitit")
    """``mp``: on this machine; ``submitit``: as jobs of a Slurm cluster."""
    backend: str = choice("gloo", "nccl")


@dataclass
class EvaluationConfig:
    """Deterministic episodes on environments of their own."""

    interval: int = number(at_least=0)
    """Iterations between two evaluations; 0 evaluates at the end only."""
    episodes: int = count()
    seed: int = number(at_least=0)
    """Every evaluation starts from this seed, so that all see the same initial states."""


@dataclass
class CheckpointConfig:
    """When a checkpoint is written and how many stay."""

    interval: int = number(at_least=0)
    """Iterations between two checkpoints, at which the environments begin anew, so that a resumed
    run does as one that was not interrupted; 0 writes one at the end only."""
    keep: int = count()


@dataclass
class AlgorithmConfig:
    """What all algorithms share: advantage, critic and optimiser."""

    name: str = choice(*ALGORITHMS)
    gamma: float = number(at_least=0, at_most=1)
    lmbda: float = number(at_least=0, at_most=1)
    loss_critic_type: str = choice("l1", "l2", "smooth_l1")
    critic_coeff: float = number(above=0)
    """Weight of the critic's loss: it matters where the gradient is clipped."""
    clip_value: float | None = number(above=0)
    """How far a fit may move a value and still gain by it, on the scale of the critic's output;
    ``null``: as far as it will."""
    value_norm: str | None = choice("popart_ema", "running")
    """Statistics by which the critic's values are normalised; ``null``: they are not."""
    value_norm_decay: float = number(above=0, below=1)
    """What remains, at an update of ``popart_ema``, of the statistics before it."""
    num_epochs: int = count()
    minibatch_size: int | None = count()
    """Frames (a frame is one step of one environment, with all its agents); ``null``: a batch."""
    lr: float = number(above=0)
    lr_schedule: str = choice("constant", "linear")
    """``linear``: from ``lr`` to zero over the ``total_frames`` of the run."""
    adam_eps: float = number(above=0)
    max_grad_norm: float | None = number(above=0)


@dataclass
class ClippedConfig(AlgorithmConfig):
    """What the algorithms with a clipped surrogate share."""

    clip_epsilon: float = number(above=0, below=1)
    entropy_coeff: float = number(at_least=0)


@dataclass
class SequentialConfig(AlgorithmConfig):
    """What the algorithms that update agent after agent share."""

    order: str = choice("random", "fixed")
    critic_epochs: int | None = count()
    """Passes of the critic over the batch; ``null``: ``num_epochs``."""
    popart: bool = MISSING
    """Whether the critic's last layer is rescaled when the statistics move."""
    compile: bool = MISSING
    """Whether the update is compiled (``torch.compile``), once for agents with alike networks."""


@dataclass
class Happo(SequentialConfig, ClippedConfig):
    """Heterogeneous-agent PPO: agents in order, each with a network and an Adam of its own."""

    clip_epsilon_high: float | None = number(above=0)
    """Threshold for ratios above 1; ``null``: ``clip_epsilon``, which is for those below."""
    target_kl: float | None = number(above=0)
    """Nats after which an agent's epochs end early; ``null``: never."""


@dataclass
class Hatrpo(SequentialConfig):
    """Heterogeneous-agent TRPO: the epochs, minibatches and ``lr`` are the critic's alone."""

    max_kl: float = number(above=0)
    kl_split: str | None = choice("equal")
    damping: float = number(at_least=0)
    cg_iterations: int = count()
    fisher_fraction: float = number(above=0, at_most=1)


@dataclass
class Mappo(ClippedConfig):
    """Multi-agent PPO by TorchRL's ``MAPPOLoss``: all agents at once, a centralised critic."""

    share_params: bool = MISSING


@dataclass
class Ippo(ClippedConfig):
    """Independent PPO by TorchRL's ``IPPOLoss``: all agents at once, a critic for each."""

    share_params: bool = MISSING


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
    total_frames: int = count()
    """Environment steps of the whole run, over all environments."""
    num_envs: int = count()
    steps_per_batch: int = count()
    """Steps of each environment in a batch: a batch is ``num_envs * steps_per_batch`` frames."""
    device: str = MISSING
    learner_timeout: float = number(above=0)
    """Seconds after which a learner of several that cannot be reached counts as ended."""
    threads: int = count()
    """Threads of torch. With another busy process on the machine more than one can stall."""
    logger: str = choice(*LOGGERS)
    progress: bool = MISSING
    """A progress bar on a terminal, now and then a line elsewhere."""
    render: bool = MISSING
    """Record ``rollout.gif`` at the end; tasks of VMAS alone are drawn."""
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
