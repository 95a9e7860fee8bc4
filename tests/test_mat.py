"""MAT: PPO for a team of one, one optimiser of policy and values, unlike agents in one block."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from agent_transformers import UNLIKE, double, game, make_transformer, rollout
from newer import RunningValueNorm
from team import same_state, state_of
from test_networks import team
from torch import nn
from torchrl.data import Bounded, Unbounded
from torchrl.objectives import ClipPPOLoss, ValueEstimators

from torchrl_happo import HAPPOLoss, MATLoss, SequentialUpdater, make_critic


def ppo_of(actor, critic, **kwargs):
    """TorchRL's loss in a script of the user's own."""
    loss = ClipPPOLoss(actor, critic, clip_epsilon=0.2, entropy_coeff=0.01, **kwargs)
    key = critic.out_keys[0]
    loss.set_keys(
        action=("agents", "action"), sample_log_prob=("agents", "action_log_prob"), value=key
    )
    loss.make_value_estimator(ValueEstimators.MAGAE, gamma=0.99, lmbda=0.95)
    return loss


@pytest.mark.parametrize("n_agents", [1, 3])
def test_it_is_ppo_on_the_same_network(n_agents):
    """Losses and gradients of TorchRL's ClipPPOLoss; a team of one differs in nothing else."""
    env = game(n_agents)
    actor, critic = make_transformer(env)
    batch = rollout(env, actor, 3)
    batch["advantage"], batch["value_target"] = torch.randn(2, 16, 3, n_agents, 1).double()
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    losses = []
    for build in (partial(ppo_of, functional=False), MATLoss):
        loss = build(actor, critic)
        output = loss(batch.copy())
        names = ["loss_objective", "loss_critic", "loss_entropy"]
        total = sum(output[name] for name in names)
        gradients = torch.autograd.grad(total, list(actor.parameters()), allow_unused=True)
        losses.append(([output[name] for name in names], gradients))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=1e-12)


def test_a_team_of_one_is_updated_as_by_ppo():
    """Epochs of one Adam on both losses: the parameters of a loop written by hand, to 1e-12."""
    env = game(1)
    actor, critic = make_transformer(env)
    batch = rollout(env, actor, 4)
    before = state_of(actor)
    adam = partial(torch.optim.Adam, lr=1e-2)
    updater = SequentialUpdater(MATLoss(actor, critic), optimizer=adam, num_epochs=3)
    assert list(updater.steps) == ["agents"]
    updater(batch)
    ours = state_of(actor)

    actor.load_state_dict(before)
    loss = ppo_of(actor, critic)
    loss.value_estimator(batch)
    advantage = batch["advantage"]
    deviation = (advantage - advantage.mean()).square().mean().sqrt()
    batch["advantage"] = (advantage - advantage.mean()) / deviation.clamp_min(1e-12)
    optimizer = adam(list(actor.parameters()))
    for _ in range(3):
        output = loss(batch.reshape(-1))
        optimizer.zero_grad()
        sum(output[name] for name in ("loss_objective", "loss_critic", "loss_entropy")).backward()
        optimizer.step()
    assert not same_state(ours, before)
    for name, value in actor.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=1e-7, atol=1e-9, msg=name)


def test_one_optimizer_moves_policy_and_values():
    """The block owns the critic: encoder, decoder and value head move; there is no critic step."""
    env = game()
    actor, critic = make_transformer(env)
    updater = SequentialUpdater(MATLoss(actor, critic), num_epochs=1)
    before = state_of(actor)
    metrics = updater(rollout(env, actor, 2))
    assert set(metrics.keys()) == {"agents", "critic"}
    assert list(metrics["critic"].keys()) == ["explained_variance"]
    moved = {name for name, value in actor.state_dict().items() if not value.equal(before[name])}
    for part in ("encoder", "decoder", "values", "policies", "who_sees", "who_acts"):
        assert any(f".{part}" in name for name in moved), part


def test_a_critic_of_its_own_has_a_step_of_its_own():
    """Nothing is shared: the critic is fitted after the block, by its own optimiser."""
    env = game()
    actor, _ = make_transformer(env)
    loss = MATLoss(actor, make_critic(env, num_cells=(8,)).double())
    assert not loss.owns_critic
    assert list(SequentialUpdater(loss).steps) == ["agents", "critic"]


def test_a_user_may_share_a_part():
    """Actor and critic with one encoder and heads of their own are one block with one optimiser."""
    env = game()
    actor, critic = make_transformer(env)
    head = nn.Linear(1, 1).double()
    critic.module = nn.Sequential(critic.module, head)
    updater = SequentialUpdater(MATLoss(actor, critic), num_epochs=1)
    before = head.weight.clone()
    updater(rollout(env, actor, 2))
    assert list(updater.steps) == ["agents"]
    assert not head.weight.equal(before)


def test_the_loss_of_values_is_symmetric():
    """Errors of +-20, beyond the bend of the loss, count and pull alike."""
    env = game()
    actor, critic = make_transformer(env, scale=0.0)
    loss = MATLoss(actor, critic)
    data = double(env.reset())
    value = critic(data.copy())["agents", "state_value"].detach()
    found = []
    for error in (20.0, -20.0):
        data["value_target"] = value + error
        objective = loss.critics["critic"].objective(data)
        found.append(
            (
                objective,
                torch.autograd.grad(objective, critic.module.transformer.values[-1].bias)[0],
            )
        )
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], -found[1][1])
    assert found[0][1].abs() > 0.1


def test_ratios_of_dimensions():
    """For one dimension they are those of agents; for two, the sum of two surrogates."""
    adam = partial(torch.optim.Adam, lr=1e-2)
    for size, same in ((1, True), (2, False)):
        env = team(Bounded(-1.0, 1.0, (3, size)), batch_size=(16,))
        results = []
        for ratio in ("agent", "dimensions"):
            actor, critic = make_transformer(env)
            batch = rollout(env, actor, 2)
            batch["next", "reward"] = batch["agents", "action"].sum((-1, -2)).unsqueeze(-1)
            loss = MATLoss(actor, critic, ratio=ratio, entropy_coeff=0.0)
            SequentialUpdater(loss, optimizer=adam, num_epochs=4)(batch)
            results.append(torch.cat([p.detach().flatten() for p in actor.parameters()]))
        assert torch.allclose(*results, rtol=0, atol=1e-9) == same


def test_the_surrogate_of_dimensions_by_hand():
    """Each dimension has a ratio of its own, clipped for itself."""
    env = team(Unbounded((3, 2)), batch_size=(16,))
    actor, critic = make_transformer(env)
    batch = rollout(env, actor)
    batch["advantage"] = torch.randn(16, 1, 3, 1).double()
    loss = MATLoss(actor, critic, ratio="dimensions", entropy_coeff=0.0)
    (block,) = loss.agents
    data = loss.agent_data(block, batch)
    data["old_dimensions"] = loss.dimension_log_prob(block, data).detach()
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    dist = actor.get_dist(batch.copy()).base_dist
    ratio = (dist.log_prob(batch["agents", "action"]) - data["old_dimensions"]).exp()
    assert ((ratio - 1).abs() > 0.2).any()
    gain = torch.minimum(ratio * batch["advantage"], ratio.clamp(0.8, 1.2) * batch["advantage"])
    torch.testing.assert_close(loss.agent_loss(block, data), -gain.sum(-1).mean())


def test_an_update_goes_on_bit_for_bit():
    """State of optimiser and value normalisation included; a refused batch changes nothing."""
    env = game()
    batches, ends = [], []
    for split in (False, True):
        actor, critic = make_transformer(env)
        norm = RunningValueNorm(shape=1).double()
        build = partial(SequentialUpdater, num_epochs=2, minibatch_size=10)
        updater = build(MATLoss(actor, critic, value_norm=norm))
        batches = batches or [rollout(env, actor, 2) for _ in range(2)]
        updater(batches[0])
        if split:
            state = updater.state_dict()
            wrong = batches[1].clone()
            wrong["next", "reward"][0] = float("nan")
            with pytest.raises(ValueError, match="reward"):
                updater(wrong)
            actor, critic = make_transformer(env, seed=5)
            updater = build(MATLoss(actor, critic, value_norm=RunningValueNorm(shape=1).double()))
            updater.load_state_dict(state)
        updater(batches[1])
        ends.append(state_of(updater.loss))
    assert same_state(*ends)


def test_a_failed_update_restores_the_statistics(monkeypatch):
    """The value normalisation that was updated before the block moved is rolled back."""
    env = game()
    actor, critic = make_transformer(env)
    updater = SequentialUpdater(
        MATLoss(actor, critic, value_norm=RunningValueNorm(shape=1).double()), num_epochs=1
    )
    before = state_of(updater.loss)
    monkeypatch.setattr(updater.steps["agents"].optimizer, "step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        updater(rollout(env, actor, 2))
    assert same_state(state_of(updater.loss), before)


def test_groups_side_by_side_and_who_is_active():
    """A block of unlike groups: their masks follow each other, and who is dead moves nothing."""
    actor, critic = make_transformer(UNLIKE)
    batch = rollout(UNLIKE, actor, 3)
    batch["next", "reward"] = torch.randn(4, 3, 1).double()
    active = torch.rand(4, 3, 2) < 0.6
    batch["runner", "active"] = active
    loss = MATLoss(actor, critic)
    (block,) = loss.agents
    assert (loss.num_agents, block.groups) == (4, ("runner", "guide", "boss"))
    data = batch.copy().set("advantage", torch.randn(4, 3, 4, 1).double())
    own = loss.agent_data(block, data)
    assert torch.equal(own["valid"][..., :2], active)
    assert own["valid"][..., 2:].all()
    metrics = SequentialUpdater(loss, num_epochs=2, minibatch_size=5)(batch)
    assert metrics["agent", "kl"] > 0
    results = []
    for noise in (0.0, 1.0):
        actor, critic = make_transformer(UNLIKE, order=[0, 2, 3, 1])  # nobody chooses after 1
        noisy = batch.clone()
        noisy["runner", "active"][..., 0] = True
        dead = ~noisy["runner", "active"].unsqueeze(-1)
        moved = (noisy["runner", "action"] + 0.1 * noise).clamp(-0.9, 0.9)
        noisy["runner", "action"] = torch.where(dead, moved, noisy["runner", "action"])
        SequentialUpdater(MATLoss(actor, critic), num_epochs=1)(noisy)
        results.append(state_of(actor))
    assert same_state(*results)


def test_other_losses_take_it_as_a_block():
    """HAPPO with a critic of its own: one unit; with the shared one it is refused."""
    env = game()
    actor, critic = make_transformer(env)
    assert len(HAPPOLoss(actor, make_critic(env)).agents) == 1
    with pytest.raises(ValueError, match="Actor and critic share"):
        HAPPOLoss(actor, critic)


@pytest.mark.slow
def test_compiled_it_is_the_same(caplog):
    """One compiled function of policy and values: the same parameters up to rounding."""
    env = game()
    ends = []
    for compiled in (False, {"backend": "eager"}):  # torch's own code takes minutes
        actor, critic = make_transformer(env)
        updater = SequentialUpdater(
            MATLoss(actor, critic), num_epochs=2, minibatch_size=16, compile=compiled
        )
        torch.manual_seed(0)
        for _ in range(2):
            updater(rollout(env, actor, 2))
        ends.append(state_of(actor))
    own = [each for each in caplog.records if each.name.startswith("torchrl_happo")]
    assert not own  # nothing was left as it is
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-9, atol=1e-11)
