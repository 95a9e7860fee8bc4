"""Wrong calls to builders, environments and the recipe, with the words of their sentences."""

from __future__ import annotations

from functools import partial

import torch
from team import make_actor, make_observations
from tensordict import TensorDict
from wrong_calls import (
    NAN,
    built,
    flat_actor,
    game,
    play,
    resumed,
)

from torchrl_happo import (
    ActorList,
    TeamReward,
    joint_policy,
)
from torchrl_happo import make_actor as build_actor
from torchrl_happo import make_critic as build_critic
from torchrl_happo.envs import MatrixGame
from torchrl_happo.recipe.compose import compose_config
from torchrl_happo.recipe.config import ConfigError

# fmt: off
BUILDERS = built([
    ("networks for no environment", lambda: build_actor(None), TypeError, "got None; pass an EnvB"),
    ("an unknown group", lambda: build_actor(game(), "agent"), KeyError, r"one of \['agents'\]"),
    ("an unknown observation", lambda: build_actor(game(), observation_key="obs"), KeyError,
     "choose among"),
    ("a layer of width 0", lambda: build_actor(game(), num_cells=(8, 0)), ValueError,
     r"num_cells\[1\] must be at least 1"),
    ("a number for layers", lambda: build_actor(game(), num_cells=128), TypeError, "got 128"),
    ("the name of an activation", lambda: build_actor(game(), activation_class="tanh"), TypeError,
     "activation_class must be a class .*'tanh'"),
    ("an unknown mapping", lambda: build_actor(game(), scale_mapping="exponential"), ValueError,
     "scale_mapping .*'exponential'"),
    ("a bound of no parameter", lambda: build_actor(game(), max_std=0.5), ValueError,
     "state_dependent_std=False"),
    ("a bound that is passed at once",
     lambda: build_actor(game(), max_std=0.5, state_dependent_std=False), ValueError,
     "not below max_std=0.5"),
    ("a gain of NaN", lambda: build_actor(game(), output_gain=NAN), ValueError, "output_gain"),
    ("a critic of no environment", lambda: build_critic("balance"), TypeError, "got a str"),
    ("a critic of no groups", lambda: build_critic(game(), groups=[]), ValueError, "at least one"),
    ("a critic of groups in one string", lambda: build_critic(game(), groups="agents"), TypeError,
     "sequence of names"),
    ("a critic of no state", lambda: build_critic(game(), state_key="state"), KeyError, "'state'"),
    ("a critic of both", lambda: build_critic(game(), groups=["agents"], state_key="state"),
     ValueError, "both groups and state_key"),
    ("no actors to join", lambda: joint_policy({}), ValueError, "no actors"),
    ("nothing to join", lambda: joint_policy({"a": None}), TypeError, "got None for group 'a'"),
    ("a list of no actors", lambda: ActorList([]), ValueError, "needs an actor for each agent"),
    ("a list of two groups", lambda: ActorList([make_actor(group=name) for name in "ab"]),
     ValueError, "must write their actions into one group"),
    ("a list of too many actors", lambda: ActorList([flat_actor()] * 4)(make_observations()),
     ValueError, r"has batch size \[4, 6, 3\], but there are 4 actors; it must be \[4, 6, 4\]"),
    ("a payoff in a list", lambda: MatrixGame([[1, 0], [0, 1]]), TypeError, "tensor .*got a list"),
    ("a payoff of unlike sizes", lambda: MatrixGame(torch.zeros(2, 3)), ValueError, r"\[2, 3\]"),
    ("a payoff of NaN", lambda: MatrixGame(torch.full((2, 2), NAN)), ValueError, "finite"),
    ("no games", lambda: MatrixGame(torch.eye(2), num_envs=0), ValueError, "num_envs .*got 0"),
    ("an action that does not exist", lambda: play(torch.full((4, 2), -1)), ValueError, "-1 to -1"),
    ("a game without action", lambda: game().step(game().reset()), KeyError, "finds no action"),
    ("an unknown reduction", lambda: TeamReward("max"), ValueError, "'mean', 'sum' and None"),
    ("a reduction of nothing", lambda: TeamReward(in_keys=[]), ValueError, "empty in_keys"),
    ("a reward that is missing", lambda: TeamReward(in_keys=["r"])(
        TensorDict({"next": {}}, [2])), KeyError, "finds no reward 'r'"),
    ("a reward of no shape", lambda: TeamReward(in_keys=[("a", "r")])(
        TensorDict({"next": {"a": {"r": torch.zeros(2, 3)}}}, [2])), ValueError, "reshape it"),
])

CONFIGS = built([(override, partial(compose_config, *override.split()), ConfigError, words)
                 for override, words in (
    ("task=vmas/navigatoin", "no task 'vmas/navigatoin'; near: vmas/navigation"),
    ("task=balance", "near: vmas/balance"),
    ("algorithm=hapo", "no algorithm 'hapo'; near: happo"),
    ("collector=multy", "no collector 'multy'; near: multi"),
    ("lr=1e-3", "no option 'lr'; near: algorithm.lr"),
    ("algorithm.lrr=1e-3", "no option 'algorithm.lrr'; near: algorithm.lr"),
    ("algorithm=hatrpo algorithm.clip_epsilon=0.1", "no option 'algorithm.clip_epsilon'"),
    ("algorithm.lr=fast", "algorithm.lr: Value 'fast'"),
    ("algorithm.lr=inf", "algorithm.lr is inf, but must be finite"),
    ("algorithm.gamma=1.5", "algorithm.gamma is 1.5, but must be at least 0 and at most 1"),
    ("algorithm.clip_epsilon=2", "algorithm.clip_epsilon is 2.0, but must be above 0 and below 1"),
    ("algorithm.num_epochs=0", "algorithm.num_epochs is 0, but must be at least 1"),
    ("algorithm.max_grad_norm=-1", "algorithm.max_grad_norm is -1.0, but must be above 0"),
    ("algorithm.order=best", "algorithm.order is 'best', but must be one of random, fixed"),
    ("algorithm.name=mappo", "algorithm.name is 'mappo', .*choose by algorithm=mappo"),
    ("task.name=vmas/nowhere", "task.scenario is 'nowhere', which VMAS has not"),
    ("seed=-1", "seed is -1, but must be at least 0"),
    ("seed=99999999999999999999", "seed is 9+, but must be below"),
    ("num_envs=0", "num_envs is 0, but must be at least 1"),
    ("task.n_agents=0", "task.n_agents is 0, but must be at least 1"),
    ("task=vmas/discovery task.n_targets=0", "task.n_targets is 0, but must be at least 1"),
    ("task=pettingzoo/simple_spread task.N=0", "task.N is 0, but must be at least 1"),
    ("task=pettingzoo/simple_spread task.local_ratio=5", "task.local_ratio is 5, .* at most 1"),
    ("task=pettingzoo/collect_treasure task.num_deposits=0", "task.num_deposits is 0"),
    ("task=vmas/multi_give_way task.n_agents=3", "no option 'task.n_agents'"),
    ("task.max_steps=1001", "checkpoint.interval is 10, .*1001 steps.*: take at least 11, or 0"),
    ("algorithm=ippo algorithm.minibatch_size=1", "algorithm.minibatch_size is 1, .*at least 2"),
    ("model.initial_std=0.005", "model.initial_std is 0.005, but must be above 0.01"),
    ("num_envs=61 collector=multi", "num_envs=61 cannot be split evenly"),
    ("total_frames=0", "total_frames is 0, but must be at least 1"),
    ("logger=tensorbord", "logger is 'tensorbord', but must be one of csv, tensorboard"),
    ("model.num_cells=wide", "model.num_cells: "),
    ("task.n_agents=four", "task.n_agents is 'four', but must be a number"),
    ("task.random_package_pos_on_line=perhaps", "_on_line is 'perhaps', but must be true or false"),
    ("algorithm=happo,mappo", "algorithm=happo,mappo asks for several runs: add -m"),
    ("total_frames=1.5", "total_frames: Value '1.5'"),
    ("task.scenario=wheel", "'wheel', but the task is vmas/balance"),
    ("task=custom", "task=custom needs task.make_env=package.module:function"),
    ("task=custom task.make_env=nowhere:made", "which cannot be imported .*No module named"),
    ("task=custom task.make_env=torchrl_happo:nobody", "which cannot be imported"),
    ("task=custom task.make_env=torchrl_happo:__version__", "but must be a function"),
    ("task.simulator=gazebo", "'gazebo', but must be one of vmas, pettingzoo"),
    ("+colour=red", "no option 'colour'; options cannot be added"),
    ("seed", "'seed' is not an override: write KEY=VALUE"),
)])

CHECKPOINTS = resumed([
    ("no checkpoint", None, ["resume=nowhere"], "no checkpoint or run folder at nowhere"),
    ("a checkpoint of other networks", None, ["model.num_cells=[9]"], "another architecture"),
    ("a checkpoint of another algorithm", None, ["algorithm=hatrpo"], "another architecture"),
    ("a checkpoint of another family", None, ["algorithm=mappo"], "does not fit this run"),
    ("a checkpoint of another version", lambda content: content.update(format=99), [],
     "has format 99, but this version reads format 1"),
    ("a file of something else", lambda content: content.clear(), [], "is no checkpoint of this"),
    ("a checkpoint without its run", lambda content: content.update(config=None), [],
     "holds no config of a run"),
    ("a checkpoint of an unknown task", lambda content: content["config"]["task"].update(name="x"),
     [], "task.scenario is '', which VMAS has not"),
    ("a checkpoint of an unknown option", lambda content: content["config"].update(colour="red"),
     [], "does not fit this version's schema: Key 'colour'"),
    ("a checkpoint without an updater", lambda content: content.pop("updater"), [],
     "holds no updater"),
    ("a checkpoint without progress", lambda content: content["progress"].pop("frames"), [],
     "does not say how far"),
    ("a checkpoint with half an updater", lambda content: content["updater"].pop("steps"), [],
     "must be a dict that holds"),
    ("a truncated checkpoint", len, [], "truncated or damaged"),
    ("a device that is not there", None, ["device=cuda:99"], "torch sees . CUDA devices"),
    ("a device that does not exist", None, ["device=tpu"], "must be cpu or cuda"),
    ("a second CPU", None, ["device=cpu:1"], "device is 'cpu:1', but must be cpu or cuda"),
    ("a scenario that does not exist", None, ["task.name=nope", "task.scenario=nope"],
     "which VMAS has not"),
    ("a team of nobody", None, ["task.n_agents=0"], "task.n_agents is 0"),
])
# fmt: on
