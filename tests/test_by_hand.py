"""The loss in loops of one's own: with public names only, and equal to the updater."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from team import N_AGENTS, make_actor, make_batch, make_critic, perturb
from torchrl.modules import IndependentNormal, TanhNormal

from torchrl_happo import HAPPOLoss, HATRPOLoss, SequentialUpdater
from torchrl_happo.examples.happo_by_hand import main, update

ADAM = partial(torch.optim.Adam, lr=1e-2)


@pytest.mark.parametrize("distribution", [IndependentNormal, TanhNormal])
def test_the_loop_by_hand_equals_the_updater(distribution):
    """Parameters of actors and critic after two updates agree to rounding in float64."""
    actor, critic = make_actor(distribution=distribution).double(), make_critic().double()
    twins = copy.deepcopy((actor, critic))
    loss, twin = (HAPPOLoss(*pair, entropy_coeff=0.01) for pair in ((actor, critic), twins))
    order = [2, 0, 1]
    updater = SequentialUpdater(twin, optimizer=ADAM, num_epochs=3, order=order)
    optimizers = {agent.name: ADAM(agent.parameters()) for agent in loss.agents}
    optimizers["critic"] = ADAM(critic.parameters())
    for _ in range(2):
        batch = make_batch(actor)
        torch.manual_seed(1)  # a Monte-Carlo entropy draws from the global generator
        updater(batch)
        torch.manual_seed(1)
        update(loss, optimizers, batch, order, num_epochs=3)
    for one, other in zip(loss.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_example_finds_the_best_joint_action():
    """It ends with a team that plays it nearly always."""
    assert main(total_frames=5_000) > 0.9


@pytest.mark.parametrize("loss_class", [partial(HAPPOLoss, entropy_coeff=0.01), HATRPOLoss])
@pytest.mark.parametrize("with_masks", [False, True])
def test_forward_is_the_weighted_mean_of_the_agents_losses(loss_class, with_masks):
    """The losses of ``forward`` sum to the agents' losses, weighted by their valid decisions."""
    actor = make_actor(distribution=IndependentNormal).double()
    batch = make_batch(actor)
    batch["advantage"] = torch.randn(*batch.shape, 1, dtype=torch.double)
    batch["factor"] = torch.rand(*batch.shape, 1, dtype=torch.double) + 0.5
    if with_masks:
        batch["agents", "active"] = torch.rand(*batch.shape, N_AGENTS) < 0.6
    perturb(actor)
    loss = loss_class(actor, None)
    output = loss(batch)
    whole = sum(value for key, value in output.items() if key.startswith("loss_"))
    total, weight = 0.0, 0.0
    for agent in loss.agents:
        agent.tie()
        data = loss.agent_data(agent, batch)
        own = loss.agent_weight(agent, data)
        total, weight = total + own * loss.agent_loss(agent, data), weight + own
    torch.testing.assert_close(whole, total / weight, rtol=1e-12, atol=1e-12)


def test_a_team_differentiated_without_a_factor_is_told():
    """Once, when the loss of several agents is differentiated, as in a loop of MAPPO."""
    actor = make_actor(distribution=IndependentNormal)
    batch = make_batch(actor)
    batch["advantage"] = torch.randn(*batch.shape, 1)
    loss = HAPPOLoss(actor, None, entropy_coeff=0.0)
    with pytest.warns(UserWarning, match="without an entry 'factor'"):
        loss(batch)["loss_objective"].backward()
    loss(batch)["loss_objective"].backward()  # an error, if it warned again
    batch["factor"] = torch.ones(*batch.shape, 1)
    HAPPOLoss(actor, None, entropy_coeff=0.0)(batch)["loss_objective"].backward()
    one = HAPPOLoss(make_actor(n_agents=1), None, entropy_coeff=0.0)
    single = make_batch(one.actor_network, n_agents=1)
    single["advantage"] = torch.randn(*single.shape, 1)
    one(single)["loss_objective"].backward()
