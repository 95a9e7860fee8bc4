"""The algorithms as BenchMARL runs them: one loss, critic and updater for all groups."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from benchmarl.algorithms.mappo import Mappo
from benchmarl.experiment import Callback
from benchmarl.models import EnsembleModelConfig, GnnConfig, MlpConfig, SequenceModelConfig
from benchmarl.models.common import ModelConfig
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.envs import TransformedEnv

from torchrl_happo.envs.team_reward import TeamReward
from torchrl_happo.networks.critics import make_critic
from torchrl_happo.objectives import A2POLoss, CoPPOLoss, HAA2CLoss, HAPPOLoss, HATRPOLoss
from torchrl_happo.objectives.base import SequentialLoss
from torchrl_happo.update.updater import SequentialUpdater

__all__ = ["A2po", "Coppo", "Haa2c", "Happo", "Hatrpo", "Team"]

#: What BenchMARL calls a setting, and what the losses call it.
_NAMES = {"entropy_coef": "entropy_coeff", "critic_coef": "critic_coeff"}


def _parts(model: ModelConfig) -> list[ModelConfig]:
    """Return the models of a sequence, or of an ensemble over groups, or the model itself."""
    if isinstance(model, EnsembleModelConfig):
        return [part for own in model.model_configs_map.values() for part in _parts(own)]
    return list(model.model_configs) if isinstance(model, SequenceModelConfig) else [model]


class Team(Mappo):
    """The policies of BenchMARL's MAPPO, with one loss, critic and updater for all groups."""

    loss_class: ClassVar[type[SequentialLoss]]
    #: Whether agents of a group may share a network.
    shares: ClassVar[bool] = False

    def __init__(
        self,
        *,
        experiment: Any,
        order: str,
        team_reward: Literal["mean", "sum"] | None,
        lmbda: float,
        scale_mapping: str,
        use_tanh_normal: bool,
        compile: bool,
        **settings: Any,
    ) -> None:
        super().__init__(
            share_param_critic=True,
            clip_epsilon=0.2,  # not used, like the next two: Mappo's own loss is never built
            entropy_coef=0.0,
            critic_coef=1.0,
            loss_critic_type=settings["loss_critic_type"],
            lmbda=lmbda,
            scale_mapping=scale_mapping,
            use_tanh_normal=use_tanh_normal,
            minibatch_advantage=False,
            experiment=experiment,
        )
        self._check()
        self.order, self.team_reward, self.compile = order, team_reward, compile
        self.settings = {_NAMES.get(name, name): value for name, value in settings.items()}
        self.metrics = TensorDict()
        self.joint_batch: TensorDictBase | None = None
        self._updater: SequentialUpdater | None = None
        # BenchMARL's command line passes its callbacks as a tuple.
        experiment.callbacks = [*experiment.callbacks, _Hooks(self)]

    def _check(self) -> None:
        """Raise if the sequential update cannot train the experiment."""
        who, config = type(self).__name__.upper(), self.experiment_config
        for part in (*_parts(self.model_config), *_parts(self.critic_model_config)):
            if part.is_rnn or isinstance(part, GnnConfig):
                raise ValueError(
                    f"{who} in BenchMARL trains no recurrent and no graph models, got "
                    f"{type(part).__name__}; take MlpConfig, or memory in torchrl_happo's own "
                    "recipe (model=gru)."
                )
        largest = max(len(agents) for agents in self.group_map.values())
        if config.share_policy_params and not self.shares and largest > 1:
            raise ValueError(
                f"{who} trains agents with a network each, but experiment.share_policy_params is "
                "True; set it to False."
            )
        if config.clip_grad_val is not None and not config.clip_grad_norm:
            raise ValueError(
                f"{who} bounds the norm of gradients, but experiment.clip_grad_norm=False bounds "
                "their entries; set it to True, or experiment.clip_grad_val to None."
            )

    def process_env_fun(
        self, env_fun: Callable[[], TransformedEnv]
    ) -> Callable[[], TransformedEnv]:
        """Add the team's reward to an environment; the agents' own rewards stay for loggers."""
        return lambda: env_fun().append_transform(TeamReward(self.team_reward))

    # -- the team: built once, when the first group asks for its loss --------------------------

    @property
    def updater(self) -> SequentialUpdater:
        """The updater of the team."""
        if self._updater is None:
            config = self.experiment_config
            actors = {group: self.get_policy_for_loss(group) for group in self.group_map}
            loss = self.loss_class(actors, self._make_critic(), **self.settings)
            loss.make_value_estimator(gamma=config.gamma, lmbda=self.lmbda)
            adam = partial(torch.optim.Adam, lr=config.lr, eps=config.adam_eps)
            self._updater = SequentialUpdater(
                loss,
                optimizer=partial(adam, **config.adam_extra_kwargs),
                num_epochs=config.on_policy_n_minibatch_iters,
                minibatch_size=config.on_policy_minibatch_size,
                max_grad_norm=config.clip_grad_val,
                order=self.order,
                compile=self.compile,
                seed=self.experiment.seed,
            )
        return self._updater

    def _make_critic(self) -> nn.Module:
        """Build BenchMARL's critic where one group or a state is its input, else one of ours."""
        if len(self.group_map) == 1 or self.state_spec is not None:
            return self.get_critic(next(iter(self.group_map)))[0]  # without a value for each agent
        model = self.critic_model_config
        if not isinstance(model, MlpConfig):
            raise ValueError(
                f"The critic of several groups is an MLP, got {type(model).__name__}; pass "
                "critic_model_config=MlpConfig.get_from_yaml()."
            )
        return make_critic(
            self.experiment.test_env,
            num_cells=list(model.num_cells),
            activation_class=model.activation_class,
            device=self.device,
        )

    def _get_loss(self, group: str, policy_for_loss: Any, continuous: bool) -> tuple[Any, bool]:
        return _GroupReport(self, group, policy_for_loss), False  # no target networks

    def _get_parameters(self, group: str, loss: Any) -> dict[str, Any]:
        return {}  # for each name in here BenchMARL has an Adam and a backward pass

    def get_replay_buffer(self, group: str, transforms: Any = None) -> Any:
        """Return a buffer that holds nothing: the updater draws its own minibatches."""
        return _NoBuffer(self.device)

    # -- an iteration --------------------------------------------------------------------------

    def process_batch(self, group: str, batch: TensorDictBase) -> TensorDictBase:
        """Update the whole team when BenchMARL comes to the first group."""
        if self.joint_batch is not None:
            left_out = self.group_map.keys() - self.experiment.train_group_map.keys()
            if left_out:
                raise ValueError(
                    f"All groups are one team, but train_group_map lacks {sorted(left_out)}; keep "
                    "all groups in it."
                )
            joint, self.joint_batch = self.joint_batch.detach().to(self.device), None
            self.metrics = self.updater(joint)
        return batch

    def process_loss_vals(self, group: str, loss_vals: TensorDictBase) -> TensorDictBase:
        """Return the metrics as they are."""
        return loss_vals


class _Hooks(Callback):
    """Keeps the joint batch, and brings the updater's state into checkpoints and back."""

    def __init__(self, team: Team) -> None:
        super().__init__()
        self.experiment = team.experiment  # the other callbacks were told before
        self.team = team

    def on_batch_collected(self, batch: TensorDictBase) -> None:
        self.team.joint_batch = batch

    def on_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict["torchrl_happo"] = self.team.updater.state_dict()

    def on_load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.team.updater.load_state_dict(state_dict["torchrl_happo"])


class _GroupReport(nn.Module):
    """The loss of a group to BenchMARL: its policy, and the metrics of its agents."""

    def __init__(self, team: Team, group: str, policy: nn.Module) -> None:
        super().__init__()
        self.actor_network = policy
        self._team = [team]  # in a list: a module would be registered
        agents = team.updater.loss.agents
        self._names = [agent.name for agent in agents if agent.group_name == group]

    def forward(self, _: TensorDictBase) -> TensorDictBase:
        metrics = self._team[0].metrics
        own = [name for name in (*self._names, "critic") if name in metrics.keys()]
        return metrics.select(*own).flatten_keys("/")


class _NoBuffer:
    """The replay buffer of a group to BenchMARL."""

    def __init__(self, device: Any) -> None:
        self.storage = SimpleNamespace(device=device)
        self._nothing = TensorDict(device=device)

    def extend(self, _: TensorDictBase) -> None:
        """Store nothing."""

    def sample(self) -> TensorDictBase:
        return self._nothing

    def update_tensordict_priority(self, _: TensorDictBase) -> None:
        """Keep no priorities."""

    def __len__(self) -> int:
        return 0


class Happo(Team):
    """HAPPO: agents in order, each with a clipped surrogate."""

    loss_class = HAPPOLoss


class Hatrpo(Team):
    """HATRPO: agents in order, each within a trust region."""

    loss_class = HATRPOLoss


class Haa2c(Team):
    """HAA2C: agents in order, nothing clipped."""

    loss_class = HAA2CLoss


class Coppo(Team):
    """CoPPO: the agents of the only group at once."""

    loss_class = CoPPOLoss
    shares = True


class A2po(Team):
    """A2PO: agents in order, each with a new advantage."""

    loss_class = A2POLoss
