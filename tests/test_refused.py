"""A wrong call gets one clear sentence, and leaves everything as it was."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from team import N_AGENTS, OBS_DIM, make_actor, make_batch, make_critic, same_state
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import LazyTensorStorage, ReplayBuffer
from wrong_calls import same

from torchrl_happo import (
    ActorList,
    HAPPOLoss,
    HATRPOLoss,
    SequentialUpdater,
    TeamReward,
    joint_policy,
)
from torchrl_happo.envs import MatrixGame

NAN, INF = float("nan"), float("inf")


def loss(**kwargs):
    """A loss of a small team."""
    return HAPPOLoss(make_actor(), make_critic(), **{"entropy_coeff": 0.0, **kwargs})


def updater(**kwargs):
    """An updater that has seen a batch, so that its optimisers have state."""
    made = SequentialUpdater(loss(), num_epochs=1, **kwargs)
    made(make_batch(made.loss.actor_network))
    return made


def spoil(key, value, at=(0, 1)):
    """Writes a value into one entry of a batch."""

    def change(batch):
        entry = batch[key].clone()
        entry[at] = value
        return batch.set(key, entry)

    return change


def drop(*keys):
    """Leaves entries out."""
    return lambda batch: batch.exclude(*keys)


def put(key, make):
    """Replaces an entry by one made from the batch."""
    return lambda batch: batch.set(key, make(batch))


def with_advantage(value):
    """A batch that brings its own advantage."""

    def change(batch):
        advantage = torch.randn(*batch.shape, 1)
        advantage[0, 0] = value
        target = torch.randn(*batch.shape, N_AGENTS, 1)
        return batch.set("advantage", advantage).set("value_target", target)

    return change


def per_agent_rewards(batch):
    """Rewards that differ between the agents."""
    return batch.set(("next", "agents", "reward"), torch.randn(*batch.shape, N_AGENTS, 1))


BATCHES = {
    "nan_reward": (spoil(("next", "reward"), NAN), ValueError, r"next.*reward"),
    "inf_reward": (spoil(("next", "reward"), INF), ValueError, r"next.*reward"),
    "nan_observation": (spoil(("agents", "observation"), NAN), ValueError, "observation"),
    "inf_observation": (spoil(("agents", "observation"), -INF), ValueError, "observation"),
    "nan_next_observation": (
        spoil(("next", "agents", "observation"), NAN),
        ValueError,
        r"next.*observation",
    ),
    "nan_action": (spoil(("agents", "action"), NAN), ValueError, "action"),
    "nan_log_prob": (spoil(("agents", "action_log_prob"), NAN), ValueError, "action_log_prob"),
    "nan_advantage": (with_advantage(NAN), ValueError, "advantage"),
    "inf_advantage": (with_advantage(INF), ValueError, "advantage"),
    "no_observation": (drop(("agents", "observation")), KeyError, "observation"),
    "no_action": (drop(("agents", "action")), KeyError, "action"),
    "no_log_prob": (drop(("agents", "action_log_prob")), KeyError, "return_log_prob=True"),
    "no_reward": (drop(("next", "reward")), KeyError, "TeamReward"),
    "no_done": (drop(("next", "done")), KeyError, "done"),
    "advantage_shape": (
        put("advantage", lambda b: torch.randn(*b.shape, 2, 1)),
        (ValueError, KeyError),
        r"advantage|value_target",
    ),
    "advantage_without_target": (
        put("advantage", lambda b: torch.randn(*b.shape, 1)),
        KeyError,
        "value_target",
    ),
    "observation_size": (
        put(("agents", "observation"), lambda b: torch.zeros(*b.shape, N_AGENTS, OBS_DIM + 1)),
        ValueError,
        "observation",
    ),
    "no_steps": (lambda batch: batch[:0], ValueError, "batch size"),
    "not_a_tensordict": (lambda batch: batch.to_dict(), TypeError, "TensorDict"),
    "other_device": (lambda batch: batch.to("meta"), ValueError, "meta"),
}


@pytest.mark.parametrize("case", list(BATCHES))
def test_a_wrong_batch(case):
    """Networks, optimisers and generators are bit-identical after the refusal."""
    change, error, sentence = BATCHES[case]
    made = updater()
    batch = change(make_batch(made.loss.actor_network))
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(error, match=sentence) as caught:
        made(batch)
    assert len(str(caught.value)) < 400
    after = made.state_dict()
    assert same_state(before["loss"], after["loss"])
    assert all(map(torch.equal, before["generators"], after["generators"]))
    for name, step in before["steps"].items():
        for index, entry in step["optimizer"]["state"].items():
            assert same_state(entry, after["steps"][name]["optimizer"]["state"][index])
    assert before["num_updates"] == after["num_updates"]


def test_rewards_that_differ_are_refused_at_the_first_update():
    """Nobody chose how to make one reward of several: the sentence names the choice."""
    chosen = loss()
    chosen.set_keys(reward=("agents", "reward"))
    made = SequentialUpdater(chosen, num_epochs=1)
    with pytest.raises(ValueError, match="TeamReward"):
        made(per_agent_rewards(make_batch(chosen.actor_network)))


def plain_actor(n_agents):
    """One network over a group with an agent dimension: all its agents share it."""
    from torchrl.modules import ProbabilisticActor

    actor = ProbabilisticActor(
        TensorDictModule(
            nn.Linear(OBS_DIM, 3),
            in_keys=[("agents", "observation")],
            out_keys=[("agents", "logits")],
        ),
        in_keys=[("agents", "logits")],
        out_keys=[("agents", "action")],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    made = SequentialUpdater(HAPPOLoss(actor, make_critic(n_agents)))
    made(make_batch(actor, n_agents=n_agents))


def foreign_optimizer(parameters):
    """A factory that ignores what it is called with."""
    return torch.optim.Adam([nn.Parameter(torch.zeros(1))])


def load(change):
    """Loads a changed state into an updater."""
    made = updater()
    state = copy.deepcopy(made.state_dict())
    made.load_state_dict(change(state))


def other_architecture(state):
    """The state of a team with other networks."""
    other = SequentialUpdater(HAPPOLoss(make_actor(act_dim=3), make_critic()))
    return other.state_dict()


CALLS = {
    "empty_mapping": (lambda: HAPPOLoss({}, make_critic()), ValueError, "empty"),
    "not_an_actor": (lambda: HAPPOLoss(nn.Linear(2, 2), make_critic()), TypeError, "Probabilistic"),
    "shared_parameters": (
        lambda: HAPPOLoss(make_actor(share_params=True), make_critic()),
        ValueError,
        "share_params",
    ),
    "plain_network_for_a_group": (lambda: plain_actor(3), ValueError, "share"),
    "unknown_block": (lambda: loss(blocks=["robots"]), ValueError, "robots"),
    "clip_epsilon_zero": (lambda: loss(clip_epsilon=0.0), ValueError, "clip_epsilon"),
    "clip_epsilon_large": (lambda: loss(clip_epsilon=1.5), ValueError, "clip_epsilon"),
    "unknown_keyword": (lambda: loss(clip_eps=0.1), TypeError, "clip_eps"),
    "unknown_key": (lambda: loss().set_keys(rewards="reward"), (ValueError, KeyError), "rewards"),
    "critic_writes_another_key": (
        lambda: loss().set_keys(value="state_value"),
        (KeyError, ValueError),
        "state_value",
    ),
    "popart_without_value_norm": (lambda: loss(popart=True), ValueError, "value_norm"),
    "max_kl_negative": (lambda: HATRPOLoss(make_actor(), None, max_kl=-1.0), ValueError, "max_kl"),
    "line_search_unknown": (
        lambda: HATRPOLoss(make_actor(), None, line_search="golden"),
        ValueError,
        "line_search",
    ),
    "target_kl_with_hatrpo": (
        lambda: SequentialUpdater(HATRPOLoss(make_actor(), None), target_kl=0.1),
        ValueError,
        "max_kl",
    ),
    "no_epochs": (lambda: SequentialUpdater(loss(), num_epochs=0), ValueError, "num_epochs"),
    "minibatch_of_none": (
        lambda: SequentialUpdater(loss(), minibatch_size=0),
        ValueError,
        "minibatch_size",
    ),
    "negative_norm": (
        lambda: SequentialUpdater(loss(), max_grad_norm=-1.0),
        ValueError,
        "max_grad_norm",
    ),
    "unknown_order": (lambda: SequentialUpdater(loss(), order="sorted"), ValueError, "order"),
    "order_with_a_gap": (lambda: SequentialUpdater(loss(), order=[0, 1]), ValueError, "order"),
    "order_with_a_double": (
        lambda: SequentialUpdater(loss(), order=[0, 1, 1]),
        ValueError,
        "order",
    ),
    "foreign_optimizer": (
        lambda: SequentialUpdater(loss(), optimizer=foreign_optimizer),
        ValueError,
        "optimizer",
    ),
    "an_optimizer_object": (
        lambda: SequentialUpdater(loss(), optimizer=torch.optim.Adam(make_actor().parameters())),
        (TypeError, ValueError),
        "optimizer",
    ),
    "buffer_without_batch_size": (
        lambda: SequentialUpdater(
            loss(), replay_buffer=ReplayBuffer(storage=LazyTensorStorage(100))
        ),
        ValueError,
        "batch_size",
    ),
    "sequence_length": (
        lambda: updater(sequence_length=4),
        ValueError,
        "sequence_length=4 does not divide",
    ),
    "garbage_state": (lambda: load(lambda state: {"weights": 1}), ValueError, "state"),
    "state_version": (lambda: load(lambda state: {**state, "version": 99}), ValueError, "version"),
    "state_of_another_team": (
        lambda: load(lambda state: {**state, "steps": {}}),
        ValueError,
        "team|steps",
    ),
    "state_of_other_networks": (
        lambda: load(other_architecture),
        ValueError,
        "architecture|shape",
    ),
    "team_reward_word": (lambda: TeamReward("median"), ValueError, "median"),
    "payoff_shape": (lambda: MatrixGame(torch.zeros(2, 3)), ValueError, "payoff"),
    "empty_actor_list": (lambda: ActorList([]), ValueError, "ActorList"),
    "empty_policy": (lambda: joint_policy({}), ValueError, "actor"),
    "no_critic_no_advantage": (
        lambda: SequentialUpdater(HAPPOLoss(make_actor(), None))(make_batch(make_actor())),
        KeyError,
        "critic",
    ),
    "factor_shape": (
        lambda: loss()(
            make_batch(make_actor())
            .set("factor", torch.ones(4, 6, 2, 1))
            .set("advantage", torch.randn(4, 6, 1))
            .set("value_target", torch.randn(4, 6, N_AGENTS, 1))
        ),
        ValueError,
        "factor",
    ),
    "root_tensor": (
        lambda: SequentialUpdater(loss())(TensorDict({}, [])),
        (ValueError, KeyError),
        "batch size",
    ),
}


@pytest.mark.parametrize("case", list(CALLS))
def test_a_wrong_call(case):
    """One sentence that names the argument."""
    call, error, sentence = CALLS[case]
    with pytest.raises(error, match=sentence) as caught:
        call()
    assert len(str(caught.value)) < 500


def test_a_refused_state_changes_nothing():
    """A state that turns out not to fit after half of it was loaded is taken back."""
    made, other = updater(), updater()
    before = copy.deepcopy(made.state_dict())
    state = other.state_dict()
    assert not same(state["loss"], before["loss"])
    state["generators"] = [torch.zeros(3, dtype=torch.uint8)] * 2
    with pytest.raises(ValueError, match="state"):
        made.load_state_dict(state)
    assert same(made.state_dict(), before)


def test_partial_of_an_optimizer_is_what_is_wanted():
    """The right call, for comparison."""
    SequentialUpdater(loss(), optimizer=partial(torch.optim.Adam, lr=1e-3))
