"""HAPPOLoss is TorchRL's clipped PPO loss for a team, and the factor is data."""

from __future__ import annotations

import copy

import pytest
import torch
from newer import MAPPOLoss, needs
from team import N_AGENTS, make_actor, make_batch, make_critic, perturb
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import IndependentNormal, TanhNormal
from torchrl.objectives import ClipPPOLoss, ValueEstimators

from torchrl_happo import HAPPOLoss

KEYS = {"value": ("agents", "state_value"), "action": ("agents", "action")}
DISTRIBUTIONS = [IndependentNormal, TanhNormal, torch.distributions.Categorical]


def team(distribution=IndependentNormal, n_agents=N_AGENTS):
    """Networks that moved a little since they collected the batch."""
    actor = make_actor(n_agents, distribution=distribution).double()
    critic = make_critic(n_agents).double()
    batch = make_batch(actor, n_agents=n_agents)
    perturb(actor)
    perturb(critic)
    return actor, critic, batch


def compare(ours, theirs, batch):
    """Asserts that two losses write the same numbers."""
    outputs = []
    for loss in (ours, theirs):
        torch.manual_seed(1)  # a Monte-Carlo entropy draws from the global generator
        outputs.append(loss(batch.copy()))
    ours, theirs = outputs
    assert set(theirs.keys()) <= set(ours.keys())
    for key in theirs.keys():
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-13, atol=1e-13, msg=key)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_mappo_without_a_factor(distribution, reduction):
    """All outputs equal MAPPOLoss's on the same unshared networks, up to float64 rounding."""
    actor, critic, batch = team(distribution)
    kwargs = {"entropy_coeff": 0.01, "reduction": reduction, "normalize_advantage": False}
    ours = HAPPOLoss(actor, critic, **kwargs)
    theirs = MAPPOLoss(actor, critic, **kwargs)
    for loss in (ours, theirs):
        loss.set_keys(**KEYS)
    compare(ours, theirs, batch)


@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param(
            {"clip_epsilon": (0.1, 0.3)}, marks=needs("MAPPOLoss(clip_epsilon=a pair)", "0.14")
        ),
        {"clip_value": 0.2},
        {"clip_value": True},
        {"loss_critic_type": "l2"},
        {"critic_coeff": 0.5},
        {"log_explained_variance": False},
        {"normalize_advantage": True, "normalize_advantage_exclude_dims": (-2,)},
    ],
    ids=str,
)
def test_equals_mappo_with_its_options(kwargs):
    """Asymmetric clipping, value clipping, critic type and weight, standardisation: as TorchRL."""
    actor, critic, batch = team()
    kwargs = {"normalize_advantage": False, **kwargs}
    ours = HAPPOLoss(actor, critic, **kwargs)
    theirs = MAPPOLoss(actor, critic, entropy_coeff=0.01, **kwargs)
    for loss in (ours, theirs):
        loss.set_keys(**KEYS)
        with torch.no_grad():
            torch.manual_seed(2)
            loss.value_estimator(batch)
    perturb(critic)
    compare(ours, theirs, batch)
    explained = "explained_variance" in ours(batch.copy()).keys()
    assert explained == kwargs.get("log_explained_variance", True)


@needs("ValueEstimators.MAGAE", "0.13")
def test_one_agent_equals_clip_ppo():
    """With one agent the loss is ClipPPOLoss."""
    actor, critic, batch = team(n_agents=1)
    ours = HAPPOLoss(actor, critic)
    theirs = ClipPPOLoss(actor, critic)
    for loss in (ours, theirs):
        loss.set_keys(**KEYS)
    theirs.make_value_estimator(ValueEstimators.MAGAE)
    compare(ours, theirs, batch)


def test_one_agent_takes_the_advantage_of_the_team():
    """A team of one may say its advantage either way, for the team or for each agent."""
    actor, _, batch = team(n_agents=1)
    loss = HAPPOLoss(actor, None, entropy_coeff=0.0, reduction="none")
    batch["advantage"] = torch.randn(*batch.shape, 1, dtype=torch.double)
    of_the_team = loss(batch)["loss_objective"]
    assert of_the_team.shape == batch.shape  # as of ClipPPOLoss
    batch["advantage"] = batch["advantage"].unsqueeze(-2)
    assert torch.equal(of_the_team.flatten(), loss(batch)["loss_objective"].flatten())


def test_an_advantage_of_another_shape_is_refused():
    """Neither the team's nor each agent's: the sentence says what it must be."""
    actor, _, batch = team()
    batch["advantage"] = torch.randn(*batch.shape, 2, 1, dtype=torch.double)
    with pytest.raises(ValueError, match=r"must be \[4, 6, 1\] for the team or \[4, 6, 3, 1\]"):
        HAPPOLoss(actor, None)(batch)


def test_a_batch_without_actions_is_refused():
    """By its own sentence, before anything is computed of the rest."""
    actor, _, batch = team()
    batch["advantage"] = torch.randn(*batch.shape, 1, dtype=torch.double)
    with pytest.raises(
        KeyError, match=r"no entry \('agents', 'action'\), which agent 'agents' needs"
    ):
        HAPPOLoss(actor, None)(batch.exclude(("agents", "action")))


def test_a_log_probability_with_a_gradient_is_refused():
    """The old policy is data; a gradient through it would train the wrong thing."""
    actor, _, batch = team()
    batch["advantage"] = torch.randn(*batch.shape, 1, dtype=torch.double)
    batch["agents", "action_log_prob"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"action_log_prob'\) requires grad; collect under"):
        HAPPOLoss(actor, None)(batch)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_inactive_agents_have_no_loss(reduction):
    """Whatever stands where an agent is inactive, its terms are left out, or zero one by one."""
    actor, _, batch = team()
    batch["advantage"] = torch.randn(*batch.shape, 1, dtype=torch.double)
    terms = HAPPOLoss(actor, None, reduction="none")(batch)["loss_objective"]
    active = torch.rand(*batch.shape, N_AGENTS) < 0.5
    batch["agents", "active"] = active
    batch["agents", "action"][~active] = 0.0
    masked = torch.where(active, terms, 0.0)
    expected = {"mean": masked.sum() / active.sum(), "sum": masked.sum(), "none": masked}
    got = HAPPOLoss(actor, None, reduction=reduction)(batch)["loss_objective"]
    torch.testing.assert_close(got, expected[reduction], rtol=1e-13, atol=1e-13)


def test_an_entropy_bonus_can_be_refused():
    """With ``entropy_bonus=False`` there is none, whatever its coefficient."""
    actor, _, batch = team()
    batch["advantage"] = torch.randn(*batch.shape, 1, dtype=torch.double)
    output = HAPPOLoss(actor, None, entropy_bonus=False, entropy_coeff=0.1)(batch)
    assert "loss_entropy" not in output.keys()


def test_the_clip_fraction_counts_what_is_outside_the_range():
    """Below 1 - 0.2 or above 1 + 0.3, among the valid entries."""
    loss = HAPPOLoss(make_actor(), None, clip_epsilon=(0.2, 0.3))
    log_ratio = torch.tensor([0.75, 0.85, 1.1, 1.25, 5.0]).log()
    valid = torch.tensor([True, True, True, True, False])
    assert loss.agent_report(loss.agents[0], log_ratio, valid)["clip_fraction"] == 1 / 4
    assert loss.agent_report(loss.agents[0], log_ratio, None)["clip_fraction"] == 2 / 5


def test_gradient_reaches_the_stack():
    """A loop of one's own trains the parameters of the actor that was passed."""
    actor, critic, batch = team()
    loss = HAPPOLoss(actor, critic)
    loss.set_keys(**KEYS)
    output = loss(batch)
    (output["loss_objective"] + output["loss_critic"] + output["loss_entropy"]).backward()
    for parameter in [*actor.parameters(), *critic.parameters()]:
        assert parameter.grad is not None


@pytest.mark.parametrize("per_agent", [False, True])
def test_factor_multiplies_the_advantage(per_agent):
    """With a factor in the tensordict the loss is that of the factor times the advantage."""
    actor, critic, batch = team()
    loss = HAPPOLoss(actor, critic)
    loss.set_keys(**KEYS)
    with torch.no_grad():
        loss.value_estimator(batch)
    shape = (*batch.shape, N_AGENTS, 1) if per_agent else (*batch.shape, 1)
    factor = torch.rand(shape, dtype=torch.double) + 0.5
    expected = batch.copy()
    expected["advantage"] = batch["advantage"] * (factor if per_agent else factor.unsqueeze(-2))
    batch["factor"] = factor
    torch.manual_seed(1)
    got = loss(batch)["loss_objective"]
    torch.manual_seed(1)
    assert torch.equal(got, loss(expected)["loss_objective"])


def test_joint_advantage_serves_all_agents():
    """One value at the root gives the same surrogate as the same value repeated per agent."""
    actor, critic, batch = team()
    with torch.no_grad():
        per_agent = HAPPOLoss(actor, critic)
        per_agent.set_keys(**KEYS)
        per_agent.value_estimator(batch)
        expected = per_agent(batch)["loss_objective"]
        root = batch.copy()
        root["advantage"] = batch["advantage"][..., 0, :]
        got = HAPPOLoss(actor, None)(root)["loss_objective"]
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)


def test_groups_of_one_equal_one_group():
    """One group of n agents and n groups of one agent are the same team."""
    actor, _, batch = team()
    loss = HAPPOLoss(actor, None)
    batch["advantage"] = torch.randn(*batch.shape, 1, dtype=torch.double)
    singles = {}
    split = batch.select("advantage", "next")
    for agent in loss.agents:
        single = copy.deepcopy(agent.actor)
        view = agent.view(batch, agent.update_keys)
        name = f"robot_{agent.index}"
        for module in single:
            module.in_keys = [(name, key[-1]) for key in module.in_keys]
        single[0].out_keys = [(name, key[-1]) for key in single[0].out_keys]
        single[-1]._out_keys = [(name, "action")]
        single[-1]._log_prob_keys = [(name, "action_log_prob")]
        single.out_keys = [key for module in single for key in module.out_keys]
        single.in_keys = [(name, "observation")]
        singles[name] = single
        split[name] = view["agents"]
    groups = HAPPOLoss(singles, None)
    assert [agent.name for agent in groups.agents] == [f"robot_{i}" for i in range(N_AGENTS)]
    torch.testing.assert_close(
        groups(split)["loss_objective"], loss(batch)["loss_objective"], rtol=1e-13, atol=0
    )


def saturated(dtype):
    """A policy with actions at the bounds, and a batch of them."""
    actor = make_actor(distribution=TanhNormal).to(dtype)
    with torch.no_grad():
        for name, parameter in actor.named_parameters():
            if name.endswith("4.bias"):
                parameter[..., :2] = 8.5 if dtype is torch.float32 else 19.0
    batch = make_batch(actor, num_envs=50)
    assert (batch["agents", "action"].abs() > 1 - 1e-5).any()
    return actor, batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ratio_is_one_for_saturated_actions(dtype):
    """A policy compared with itself has ratio 1, actions at the bounds included."""
    actor, batch = saturated(dtype)
    loss = HAPPOLoss(actor, make_critic().to(dtype), entropy_coeff=0.0)
    loss.set_keys(**KEYS)
    with torch.no_grad():
        ratio = loss(batch)["max_ratio"]
    assert abs(ratio - 1) < (1e-3 if dtype is torch.float32 else 1e-6)


@needs("a score of fresh TanhNormal actions by their true pre-tanh values", "0.14")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ratio_of_torchrl_is_not_one_for_saturated_actions(dtype):
    """It scores a fresh action with its true pre-tanh value, a stored one with a clamped inverse.

    The actions are scored anew for that reason.
    """
    actor, batch = saturated(dtype)
    loss = MAPPOLoss(actor, make_critic().to(dtype), entropy_bonus=False)
    loss.set_keys(**KEYS)
    with torch.no_grad():
        assert abs(loss(batch)["max_ratio"] - 1) > 0.01


def test_the_entropy_is_estimated_from_as_many_samples_as_asked_for():
    """Where it has no closed form: the draws are those of TorchRL's loss."""
    actor, _, batch = team(TanhNormal)
    batch["advantage"] = torch.randn(*batch.shape, N_AGENTS, 1, dtype=torch.double)
    ours = HAPPOLoss(actor, None, samples_mc_entropy=3)
    theirs = MAPPOLoss(actor, None, entropy_coeff=0.01, samples_mc_entropy=3)
    theirs.set_keys(**KEYS)
    entropies = []
    for loss in (ours, theirs):
        torch.manual_seed(1)
        entropies.append(loss(batch.copy())["entropy"])
    torch.testing.assert_close(*entropies, rtol=1e-13, atol=1e-13)


def test_the_value_estimator_is_the_one_that_was_asked_for():
    """Its kind and its numbers; and the call can be chained, as TorchRL's."""
    actor, critic, _ = team()
    loss = HAPPOLoss(actor, critic)
    assert loss.make_value_estimator(ValueEstimators.GAE, gamma=0.5, lmbda=0.25) is loss
    assert (loss.value_estimator.gamma, loss.value_estimator.lmbda) == (0.5, 0.25)


def test_entropy_bonus_can_be_scheduled_from_zero():
    """Built without an entropy bonus, the loss gains one when its coefficient is set."""
    actor, critic, batch = team()
    loss = HAPPOLoss(actor, critic, entropy_coeff=0.0)
    loss.set_keys(**KEYS)
    loss.entropy_coeff = 0.0
    assert "loss_entropy" not in loss(batch.copy()).keys()
    loss.entropy_coeff = 0.01
    output = loss(batch.copy())
    torch.testing.assert_close(output["loss_entropy"], -0.01 * output["entropy"])


def test_value_key_follows_the_critic():
    """Without set_keys, the state value is read from where the critic writes it."""
    loss = HAPPOLoss(make_actor(), make_critic())
    assert loss.tensor_keys.value == ("agents", "state_value")


def test_in_keys_and_out_keys():
    """The loss names what it reads and writes, as LossModules do."""
    actor, critic, batch = team()
    loss = HAPPOLoss(actor, critic)
    loss.set_keys(**KEYS)
    assert {("agents", "observation"), ("agents", "action"), ("next", "reward")} <= set(
        loss.in_keys
    )
    assert set(loss.out_keys) <= set(loss(batch).keys())


def test_shared_parameters_are_refused_with_the_reason():
    """Agents that share parameters cannot be updated one after the other."""
    with pytest.raises(ValueError, match=r"share_params=True.*blocks=\['agents'\]"):
        HAPPOLoss(make_actor(share_params=True), make_critic())


def test_one_block_of_shared_agents_equals_mappo():
    """A group updated as one block may share parameters; its loss is MAPPO's."""
    actor = make_actor(share_params=True, distribution=IndependentNormal).double()
    critic = make_critic().double()
    batch = make_batch(actor)
    perturb(actor)
    ours = HAPPOLoss(actor, critic, blocks=["agents"])
    theirs = MAPPOLoss(actor, critic, normalize_advantage=False)
    for loss in (ours, theirs):
        loss.set_keys(**KEYS)
    assert len(ours.agents) == 1
    compare(ours, theirs, batch)


def test_critic_may_not_share_the_actors_parameters():
    """Fitting the critic must leave the actors alone."""
    actor = make_actor()
    critic = TensorDictModule(
        nn.Sequential(actor[0].module[0], nn.Linear(4, 1)),
        in_keys=[("agents", "observation")],
        out_keys=[("agents", "state_value")],
    )
    with pytest.raises(ValueError, match="share the parameter"):
        HAPPOLoss(actor, critic)
