"""Wrong calls about transformers over agents, each with the call that its sentence asks for."""

from __future__ import annotations

import torch
from team import make_actor
from test_observations import KINDS
from torchrl.objectives import ValueEstimators
from wrong_calls import built

from torchrl_happo import MATLoss, SequentialUpdater, TPPOLoss, make_transformer
from torchrl_happo import make_actor as build_actor
from torchrl_happo.envs import DifferentialGame, MatrixGame, permutation_payoff
from torchrl_happo.update.distillation import Distillation


def game(n_agents=3):
    return MatrixGame(permutation_payoff(n_agents), num_envs=4)


def transformer(**kwargs):
    return make_transformer(game(), **{"size": 8, **kwargs})


def acts(n_agents):
    """The policy of a team of three in a game of so many."""
    return transformer()[0](game(n_agents).reset())


def values(n_agents):
    return transformer()[1](game(n_agents).reset())


def trains(n_agents):
    """The loss of a team of three with the batch of a team of so many."""
    env = game(n_agents)
    with torch.no_grad():
        batch = env.rollout(1, make_transformer(env, size=8)[0])
    SequentialUpdater(MATLoss(*transformer()), num_epochs=1)(batch)


def ordered(order):
    """A transformer that gets the weights of one whose agents choose in another order."""
    transformer(order=order)[0].load_state_dict(transformer()[0].state_dict())


def masked(allowed):
    """Acting where an agent is left with so many of its actions."""
    env, _ = KINDS["mask of integers"]
    data = env.reset()
    data["agents", "action_mask"][1, 1] = (torch.arange(3) < allowed).long()
    return make_transformer(env, size=8)[0](data)


def loss(**kwargs):
    return MATLoss(*transformer(), **kwargs)


def chain():
    return TPPOLoss(*transformer(prefix_values=True))


def distillation(n_agents=3, **kwargs):
    """Students of a game like the teacher's; without a number, of continuous actions."""
    env = DifferentialGame(n_agents=3) if n_agents is None else game(n_agents)
    return Distillation(transformer()[0], build_actor(env, num_cells=(4,), **kwargs))


# fmt: off
TRANSFORMERS = built([
    ("heads that do not divide", lambda: transformer(num_heads=3), ValueError,
     "num_heads=3 does not divide size=8; choose a divisor"),
    ("no blocks of a transformer", lambda: transformer(num_blocks=0), ValueError,
     "num_blocks must be at least 1, got 0"),
    ("an order with one agent twice", lambda: transformer(order=[0, 0, 1]), ValueError,
     r"order must name each of the positions 0 to 2 once, got \[0, 0, 1\]"),
    ("an order of agents that act alone",
     lambda: transformer(decentralized=True, order=[0, 1, 2]), ValueError, "leave order out"),
    ("prefixes of agents that act alone",
     lambda: transformer(decentralized=True, prefix_values=True), ValueError,
     "leave prefix_values out"),
    ("weights of another order", lambda: ordered([2, 0, 1]), ValueError,
     r"in the order \[0, 1, 2\], but these .* \[2, 0, 1\]; build .* order=\[0, 1, 2\]"),
    ("a mask that forbids all", lambda: masked(0), ValueError,
     r"'action_mask'\) of shape \[4, 3\] forbids every action of agent 1 somewhere; leave"),
    ("a larger team for a transformer", lambda: acts(4), ValueError,
     r"'observation'\) is of 4 agents, but the transformer was built for 3; build it"),
    ("values of a smaller team", lambda: values(2), ValueError,
     r"'observation'\) is of 2 agents, but the transformer was built for 3; build it"),
    ("a batch of a larger team", lambda: trains(4), ValueError, "for 3 agents; collect with it"),
    ("blocks of a block", lambda: loss(blocks=["agents"]), TypeError,
     "MATLoss moves all agents at once: blocks would not act; leave it out"),
    ("a ratio of nothing", lambda: loss(ratio="dimension"), ValueError,
     "ratio must be one of 'agent', 'dimensions', got 'dimension'; did you mean 'dimensions'"),
    ("two actors in one block",
     lambda: MATLoss({"a": make_actor(group="a"), "b": make_actor(group="b")}), ValueError,
     r"MATLoss moves .* groups \['a', 'b'\]; put all agents into one group"),
    ("a critic without prefixes", lambda: TPPOLoss(*transformer()), ValueError,
     r"reads \[\('agents', 'observation'\)\], but .* action .*; build it by make_transformer"),
    ("a chain without GAE", lambda: chain().make_value_estimator(ValueEstimators.TD0), ValueError,
     r"estimated by GAE, not by .*TD0; call make_value_estimator\(gamma=..., lmbda=...\)"),
    ("students with one network", lambda: distillation(share_params=True), ValueError,
     "share_params=True.*needs a network for each"),
    ("students of other actions", lambda: distillation(n_agents=None), ValueError,
     r"parameter \('agents', 'loc'\), which .* does not write; build both of the same environ"),
])
# fmt: on

#: From the name of a wrong call to the call that its sentence asks for.
TRANSFORMER_CALLS = {
    "heads that do not divide": lambda: transformer(num_heads=4),
    "no blocks of a transformer": lambda: transformer(num_blocks=1),
    "an order with one agent twice": lambda: transformer(order=[2, 0, 1]),
    "an order of agents that act alone": lambda: transformer(decentralized=True),
    "prefixes of agents that act alone": lambda: transformer(decentralized=True),
    "weights of another order": lambda: ordered([0, 1, 2]),
    "a mask that forbids all": lambda: masked(1),
    "a larger team for a transformer": lambda: acts(3),
    "values of a smaller team": lambda: values(3),
    "a batch of a larger team": lambda: trains(3),
    "blocks of a block": loss,
    "a ratio of nothing": lambda: loss(ratio="dimensions"),
    "two actors in one block": loss,
    "a critic without prefixes": chain,
    "a chain without GAE": lambda: chain().make_value_estimator(gamma=0.9, lmbda=0.9),
    "students with one network": lambda: distillation(share_params=False),
    "students of other actions": distillation,
}
