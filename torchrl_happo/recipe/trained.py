"""Agents after training: :func:`load` brings them back from the folder of a run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import unravel_key
from torch import Tensor, nn
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import GRUModule, LSTMModule

from torchrl_happo.networks.actors import memory_transforms
from torchrl_happo.objectives import HAPPOLoss
from torchrl_happo.recipe import checkpoint, zoo
from torchrl_happo.recipe.algorithms import make_learner
from torchrl_happo.recipe.algorithms.parts import make_actors
from torchrl_happo.recipe.config import ConfigError, TrainConfig
from torchrl_happo.recipe.environments import make_env
from torchrl_happo.recipe.evaluation import Evaluation
from torchrl_happo.recipe.learner import Learner
from torchrl_happo.recipe.simulators import SIMULATORS

WIDTH = 420
MILLISECONDS_PER_FRAME = 60


class AgentPolicy(nn.Module):
    """The policy of one agent as a function of tensors, with weights of its own.

    It reads what this agent alone observes, in the order of :attr:`in_names`, and returns its
    action and the next states of its memory, in the order of :attr:`out_names`. Actions are the
    most likely ones. States begin an episode with zeros; those that are returned belong to the next
    step.

    Args:
        name (str): of the agent.
        actor (ProbabilisticTensorDictSequential): of this agent alone.
        observed (TensorDict): what it observed once, of batch size ``[1]``.
    """

    def __init__(self, name: str, actor: Any, observed: TensorDict) -> None:
        super().__init__()
        self.name = name
        for parent in list(actor.modules()):
            for place, child in list(parent.named_children()):
                if isinstance(child, (GRUModule, LSTMModule)):
                    parent._modules[place] = MemoryStep(child)
        self.actor = actor
        self.in_keys: list[NestedKey] = [
            key
            for key in map(unravel_key, actor.in_keys)
            if _leaf(key) != "is_init" and observed.get(key, None) is not None
        ]
        written = [unravel_key(key) for key in actor.out_keys]
        states = [key for key in written if key[0] == "next"]
        self.out_keys: list[NestedKey] = [unravel_key(actor.dist_sample_keys[0]), *states]
        self.example = tuple(observed.get(key) for key in self.in_keys)

    @property
    def in_names(self) -> list[str]:
        """Names of the inputs, such as ``"observation"`` and ``"recurrent_state"``."""
        return [_leaf(key) for key in self.in_keys]

    @property
    def out_names(self) -> list[str]:
        """Names of the outputs: ``"action"``, and ``"next_recurrent_state"`` of a memory."""
        return ["action", *(f"next_{_leaf(key)}" for key in self.out_keys[1:])]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Act.

        Args:
            *inputs (Tensor): the entries of :attr:`in_names`, each with a batch dimension.

        Returns:
            the entries of :attr:`out_names`.
        """
        data = TensorDict({}, inputs[0].shape[:1])
        for key, value in zip(self.in_keys, inputs, strict=True):
            data.set(key, value)
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            data = self.actor(data)
        return tuple(data.get(key) for key in self.out_keys)


class MemoryStep(TensorDictModuleBase):
    """One step of a recurrent module, without a look at whether an episode begins.

    TorchRL's modules ask the data whether to reset the memory, which cannot be exported.
    """

    def __init__(self, module: GRUModule | LSTMModule) -> None:
        super().__init__()
        self.cell = module.gru if isinstance(module, GRUModule) else module.lstm
        self.in_keys = [key for key in module.in_keys if _leaf(key) != "is_init"]
        self.out_keys = list(module.out_keys)

    def forward(self, data: TensorDictBase) -> TensorDictBase:
        """Read features ``[B, d]`` and states ``[B, layers, h]``, write what comes of them."""
        features, *states = (data.get(key) for key in self.in_keys)
        states = [state.transpose(0, 1).contiguous() for state in states]
        output, after = self.cell(
            features.unsqueeze(1), states[0] if len(states) == 1 else tuple(states)
        )
        data.set(self.out_keys[0], output.squeeze(1))
        after = (after,) if len(states) == 1 else after
        for key, state in zip(self.out_keys[1:], after, strict=True):
            data.set(key, state.transpose(0, 1))
        return data


@dataclass(frozen=True)
class Trained:
    """A trained team, its environment, and each of its agents alone."""

    config: TrainConfig
    env: EnvBase
    policy: TensorDictModuleBase
    """Acts for all agents in :attr:`env`; its actions are random draws, as in training."""
    agents: dict[str, AgentPolicy]
    """Each agent's own policy, by name; a copy, of whose weights nobody else has a part."""

    def evaluate(
        self, episodes: int = 200, *, deterministic: bool = True, seed: int | None = None
    ) -> dict[str, float]:
        """Play episodes, side by side, and return what :class:`Evaluation` measures.

        Args:
            episodes (int, optional): how many. Defaults to ``200``.

        Keyword Args:
            deterministic (bool, optional): whether agents take their most likely actions. Defaults
                to ``True``.
            seed (int, optional): of initial states and draws. Defaults to ``None``: that of the
                run's own evaluations.
        """
        seed = self.config.evaluation.seed if seed is None else seed
        settings = replace(self.config.evaluation, episodes=episodes, seed=seed)
        evaluate = Evaluation(replace(self.config, evaluation=settings), deterministic)
        try:
            return evaluate(self.policy)
        finally:
            evaluate.close()

    @torch.no_grad()
    def render(self, target: Path, *, deterministic: bool = True) -> Path:
        """Play one episode and write it as a GIF.

        Args:
            target (Path): the GIF to write.

        Keyword Args:
            deterministic (bool, optional): as for :meth:`evaluate`.

        Raises:
            ConfigError: if the simulator of the task does not draw.
        """
        if not SIMULATORS[self.config.task.simulator].draws:
            raise ConfigError(f"Tasks of VMAS alone are drawn, not {self.config.task.name}.")
        frames = []
        kind = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
        with set_exploration_type(kind):
            state, over = self.env.reset(), False
            while not over:
                frames.append(draw(self.env))
                step, state = self.env.step_and_maybe_reset(self.policy(state))
                over = bool(step["next", "done"].all())
        frames[0].save(
            target,
            save_all=True,
            append_images=frames[1:],
            duration=MILLISECONDS_PER_FRAME,
            loop=0,
            optimize=True,
        )
        return target


def load(
    source: Path | str,
    *,
    num_envs: int = 1,
    make_env: Callable[..., Any] | None = None,
    make_actor: Callable[..., Any] | None = None,
    make_critic: Callable[..., Any] | None = None,
) -> Trained:
    """Bring back what a run has learned.

    Args:
        source (Path or str): the folder of a run, one of its checkpoints, or a trained team that
            ships with the library, such as ``"zoo:vmas/het_mass/happo"``
            (:func:`torchrl_happo.recipe.zoo.names` lists them).

    Keyword Args:
        num_envs (int, optional): environments side by side in :attr:`Trained.env`. Defaults to
            ``1``.
        make_env (callable, optional): of a run that was trained with a function which cannot be
            imported by its name, such as a lambda. Defaults to ``None``.
        make_actor (callable, optional): likewise.
        make_critic (callable, optional): likewise.

    Returns:
        environment, policy and agents.

    Raises:
        CheckpointError: in one sentence, if there is no checkpoint or it cannot be used.
        ConfigError: in one sentence, if the task cannot be built here, or the zoo has no such
            team.

    Example:
        >>> team = load("zoo:vmas/het_mass/happo")
        >>> team.evaluate(episodes=10)["return"] > 15
        True
        >>> (action,) = team.agents["agents_0"](torch.zeros(1, 4))
        >>> action.shape
        torch.Size([1, 2])
    """
    functions = {
        "task.make_env": make_env,
        "model.make_actor": make_actor,
        "critic.make_critic": make_critic,
    }
    content = checkpoint.read(zoo.find(source) if zoo.is_name(source) else Path(source))
    given = {option: function for option, function in functions.items() if function is not None}
    config = checkpoint.read_config(content, given)
    env = build_env(config, num_envs)
    learner = make_learner(config, env)
    if "policy" in content:  # of the zoo: nothing that only training needs
        zoo.restore(learner.result, content["policy"])
    else:
        checkpoint.restore(content, learner.updater)
    for transform in memory_transforms(learner.result):
        env = env.append_transform(transform)
    return Trained(config, env, learner.result, own_agents(config, env, learner))


def build_env(config: TrainConfig, num_envs: int) -> EnvBase:
    """Build the environments in which a run was evaluated."""
    seed, device = config.evaluation.seed, config.device
    return make_env(config.task, num_envs=num_envs, seed=seed, device=device)


def own_agents(config: TrainConfig, env: EnvBase, learner: Learner) -> dict[str, AgentPolicy]:
    """Return each agent's policy alone, with weights that nobody shares."""
    actors = copy.deepcopy(learner.actors)
    if getattr(config.algorithm, "share_params", False):
        # The network of a group, once for each agent.
        separate = make_actors(config, env, share_params=False)
        for name, actor in separate.items():
            shared = actors[name].state_dict()
            own = actor.state_dict()
            actor.load_state_dict({key: shared[key].expand_as(own[key]) for key in own})
        actors = separate
    observed = env.reset()[:1]
    agents = {}
    for agent in HAPPOLoss(actors).agents:
        view = TensorDict({}, [1])
        for key in map(unravel_key, agent.actor.in_keys):
            value = observed.get(key, None)
            if value is not None:
                grouped = agent.index is not None and agent.group in (key, key[0])
                view.set(key, value[:, agent.index] if grouped else value)
        agents[agent.name] = AgentPolicy(agent.name, copy.deepcopy(agent.actor), view)
    return agents


def draw(env: EnvBase) -> Image.Image:
    """Draw the environment as it is now."""
    picture = Image.fromarray(env.render(mode="rgb_array"))
    height = round(picture.height * WIDTH / picture.width)
    # A median cut would spend its colours on the background, and paint small agents alike.
    return picture.resize((WIDTH, height)).quantize(64, Image.Quantize.FASTOCTREE)


def _leaf(key: NestedKey) -> str:
    return key if isinstance(key, str) else str(key[-1])
