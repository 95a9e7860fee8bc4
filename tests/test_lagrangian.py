"""HAPPO with Lagrange multipliers: its limits, its multipliers, and a game with a known answer."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from recipe_helpers import table, tiny_config
from team import N_AGENTS, make_actor, make_batch, make_critic, same_state
from torch.nn import functional as F
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_happo import HAPPOLagrangianLoss, HAPPOLoss, SequentialUpdater
from torchrl_happo import make_actor as build_actor
from torchrl_happo import make_critic as build_critic
from torchrl_happo.envs import MatrixGame
from torchrl_happo.objectives.lagrangian import adam_ascent
from torchrl_happo.recipe import training
from torchrl_happo.recipe.compose import compose_config
from torchrl_happo.recipe.config import ConfigError


def make_updater(kind=HAPPOLagrangianLoss, compile=False, **kwargs):
    """A small team; with costs, whose bound is 1, if the loss has them."""
    torch.manual_seed(0)
    actor, critic, cost_critic = make_actor(), make_critic(), make_critic()
    costs = {} if kind is HAPPOLoss else {"cost_critic": cost_critic, "cost_limit": 1.0, **kwargs}
    loss = kind(actor, critic, entropy_coeff=0.0, **costs)
    optimizer = partial(torch.optim.Adam, lr=1e-2)
    return SequentialUpdater(loss, num_epochs=2, optimizer=optimizer, compile=compile)


def costly(batch, cost=None, ends=True):
    """The batch with a cost of the team and what each episode has cost, which ends each 3 steps."""
    generator = torch.Generator().manual_seed(1)
    cost = torch.rand(*batch.shape, 1, generator=generator) if cost is None else cost
    batch["next", "cost"] = cost
    batch["next", "done"] = torch.zeros(*batch.shape, 1, dtype=torch.bool)
    batch["next", "episode_cost"] = torch.zeros_like(cost)
    if ends:
        batch["next", "done"][:, 2::3] = True
        sums = cost.unflatten(1, (-1, 3)).cumsum(2).flatten(1, 2)
        batch["next", "episode_cost"] = sums
    return batch


def of_actor(updater):
    return {name: p.detach().clone() for name, p in updater.loss.actor_network.named_parameters()}


class TestLimits:
    def test_without_a_price_it_is_happo(self):
        """A fixed multiplier of 0: agents, critic and metrics, bit for bit."""
        safe = make_updater(multiplier="fixed", initial_multiplier=0.0)
        plain = make_updater(HAPPOLoss)
        batch = costly(make_batch(plain.loss.actor_network))
        for _ in range(3):
            one, two = safe(batch), plain(batch)
        assert same_state(of_actor(safe), of_actor(plain))
        for agent in plain.loss.agents:
            for name, value in two[agent.name].items():
                assert torch.equal(one[agent.name, name], value), name
        assert torch.equal(one["critic", "loss"], two["critic", "loss"])

    @pytest.mark.parametrize("multiplier", ["learned", "projected"])
    def test_costs_of_zero_leave_the_agents_as_happo_has_them(self, multiplier):
        """The advantage of a cost of zero is zero (its critic says so), and multipliers move."""
        safe, plain = make_updater(multiplier=multiplier), make_updater(HAPPOLoss)
        batch = costly(make_batch(plain.loss.actor_network), torch.zeros(4, 6, 1))
        zeros = torch.zeros(*batch.shape, 1)
        batch.update({"cost_advantage": zeros, "cost_value_target": zeros.expand(-1, -1, N_AGENTS)})
        batch["cost_value_target"] = batch["cost_value_target"].unsqueeze(-1)
        before = safe.loss.multipliers
        safe(batch), plain(batch)
        assert same_state(of_actor(safe), of_actor(plain))
        assert (safe.loss.multipliers < before).all()  # nothing is spent of the bound


def test_compiled_it_is_that_of_eager(caplog):
    """Agents, both critics, multipliers and metrics."""
    eager, compiled = (make_updater(compile=c) for c in (False, {"backend": "eager"}))
    batch = costly(make_batch(eager.loss.actor_network))
    for _ in range(2):
        wanted, got = eager(batch), compiled(batch)
        torch.testing.assert_close(got.to_dict(), wanted.to_dict(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled.loss.state_dict(), eager.loss.state_dict())
    assert "not compiled" not in caplog.text


class TestMultipliers:
    def test_projected_ones_move_as_the_paper_has_it(self):
        """By (J - d)(1 - gamma) and each agent's own mean of ratio times cost advantage."""
        updater = make_updater(multiplier="projected", multiplier_lr=0.3)
        updater.loss.make_value_estimator(gamma=0.9, lmbda=0.95)
        batch = costly(make_batch(updater.loss.actor_network))
        cost_advantage = torch.zeros(*batch.shape, 1)  # then E[r A] = 0 whatever the ratio
        target = torch.zeros(*batch.shape, N_AGENTS, 1)
        batch.update({"cost_advantage": cost_advantage, "cost_value_target": target})
        metrics = updater(batch)
        ended = batch["next", "episode_cost"][batch["next", "done"]]
        assert len(ended) == 8
        expected = 0.5 + 0.3 * 0.1 * (ended.mean() - 1.0)
        torch.testing.assert_close(updater.loss.multipliers, expected.expand(1, N_AGENTS))
        assert torch.equal(metrics["agents_0", "episode_cost"], ended.mean())

    def test_an_advantage_of_costs_moves_its_agent_alone(self):
        """The ratio times the advantage of the cost, of the agent that has just moved."""
        updater = make_updater(multiplier="projected", multiplier_lr=1.0)
        batch = costly(make_batch(updater.loss.actor_network), ends=False)
        metrics = updater(batch)
        assert metrics["agents_0", "episode_cost"].isnan()  # no episode has ended
        assert (updater.loss.multipliers == 0.5).all()  # so nothing is known
        batch = costly(make_batch(updater.loss.actor_network))
        updater(batch)
        assert updater.loss.multipliers.unique().numel() == N_AGENTS

    def test_learned_ones_follow_torch(self):
        """Three steps equal the steps of torch's Adam on the dual written out."""
        xi = torch.tensor([0.3, -1.0], requires_grad=True)
        optimizer = torch.optim.Adam([xi], lr=0.1)
        state = torch.stack([xi.detach(), *torch.zeros(3, 2)])
        for excess in torch.randn(3, 2, generator=torch.Generator().manual_seed(0)):
            optimizer.zero_grad()
            (-F.softplus(xi) * excess).sum().backward()
            optimizer.step()
            state = adam_ascent(state, excess, 0.1)
        torch.testing.assert_close(state[0], xi.detach())

    def test_learned_ones_wait_for_an_episode(self):
        """Without an ended episode nothing is known, and nothing moves."""
        updater = make_updater()
        before = updater.loss.multiplier_state.clone()
        updater(costly(make_batch(updater.loss.actor_network), ends=False))
        assert torch.equal(updater.loss.multiplier_state, before)
        updater(costly(make_batch(updater.loss.actor_network)))
        assert not torch.equal(updater.loss.multiplier_state, before)

    def test_the_team_goes_on_from_its_state(self):
        """Multipliers and their momentum are part of the updater's state, bit for bit."""
        one, two = make_updater(), make_updater()
        batch = costly(make_batch(one.loss.actor_network))
        one(batch)
        two.load_state_dict(one.state_dict())
        one(batch), two(batch)
        assert torch.equal(one.loss.multiplier_state, two.loss.multiplier_state)
        assert same_state(of_actor(one), of_actor(two))

    def test_a_refused_batch_leaves_them_alone(self):
        """As networks and optimisers."""
        updater = make_updater()
        batch = costly(make_batch(updater.loss.actor_network))
        before = updater.loss.multiplier_state.clone()
        with pytest.raises(ValueError, match="NaN"):
            updater(batch.clone().set(("next", "cost"), float("nan") * batch["next", "cost"]))
        updater.steps["cost"].propose = None  # fails when all agents have moved
        with pytest.raises(TypeError):
            updater(batch)
        assert torch.equal(updater.loss.multiplier_state, before)


def test_each_agent_has_costs_of_its_own():
    """Costs [*B, n, 1] with a critic that has a value for each: one multiplier an agent."""
    torch.manual_seed(0)
    actor, critic, cost = make_actor(), make_critic(), make_critic()
    loss = HAPPOLagrangianLoss(
        actor,
        critic,
        {("agents", "cost"): cost},
        cost_limit={("agents", "cost"): 1.0},
        by_agent=True,
    )
    updater = SequentialUpdater(loss, num_epochs=1)
    batch = make_batch(actor)
    costs = torch.arange(3.0).reshape(1, 1, 3, 1).expand(4, 6, 3, 1).clone()
    batch["next", "agents", "cost"] = batch["next", "agents", "episode_cost"] = costs
    batch["next", "done"][:] = True
    metrics = updater(batch)
    got = [metrics[f"agents_{i}", "episode_agents_cost"].item() for i in range(3)]
    assert got == [0.0, 1.0, 2.0]
    moved = loss.multipliers[0] - 0.5
    assert moved[0] < 0
    assert moved[2] > 0
    assert moved[1].abs() < 1e-6


@pytest.mark.parametrize("bootstrap", [True, False])
@pytest.mark.parametrize("place", ["cost", ("agents", "cost")])
def test_a_truncated_episode_costs_what_is_to_come(place, bootstrap):
    """The critic's expectation after a cut is added, if asked for, but not where the task ended."""
    torch.manual_seed(0)
    actor, critic, cost_critic = make_actor(), make_critic(), make_critic()
    *_, weight, bias = cost_critic.parameters()
    with torch.no_grad():
        weight.zero_(), bias.fill_(2.0)
    loss = HAPPOLagrangianLoss(
        *(actor, critic, {place: cost_critic}),
        cost_limit={place: 1.0},
        bootstrap_truncated=bootstrap,
    )
    batch = costly(make_batch(actor))
    done, paid = batch["next", "done"], batch["next", "episode_cost"]
    if place != "cost":
        scale = torch.arange(1.0, 1 + N_AGENTS).unsqueeze(-1)
        for name in ("cost", "episode_cost"):
            batch["next", "agents", name] = batch["next", name].unsqueeze(-2) * scale
    batch["next", "terminated"] = done.clone()
    batch["next", "terminated"][1:] = False  # only the first copy's episodes end of themselves
    share_cut = done[1:].sum() / done.sum()
    metrics = SequentialUpdater(loss, num_epochs=1)(batch)
    (name,) = loss.cost_limits
    for index in range(N_AGENTS):
        own = paid[done].mean() * (1 if place == "cost" else index + 1)
        wanted = own + bootstrap * 2 * share_cut
        torch.testing.assert_close(metrics[f"agents_{index}", f"episode_{name}"], wanted)


def test_several_costs_at_once():
    """Each has a critic, a bound and a multiplier."""
    actor, critic = make_actor(), make_critic()
    loss = HAPPOLagrangianLoss(
        actor,
        critic,
        {"heat": make_critic(), "noise": make_critic()},
        cost_limit={"heat": 0.0, "noise": 100.0},
    )
    updater = SequentialUpdater(loss, num_epochs=1)
    batch = costly(make_batch(actor))
    for name in ("heat", "noise"):
        batch["next", name] = batch["next", "cost"].clone()
        batch["next", f"episode_{name}"] = batch["next", "episode_cost"].clone()
    metrics = updater(batch)
    assert {"heat", "noise"} <= set(metrics.keys())
    assert metrics["agents_0", "multiplier_heat"] > 0.5 > metrics["agents_0", "multiplier_noise"]


@pytest.mark.learning
def test_a_game_with_a_known_answer():
    """One state, r = c = (1, 0), at most d = .3 of cost, entropy weighed by .1.

    At the saddle action 0 has probability .3 and its price is 1 - .1 logit(.3): the gains of both
    actions are equal. Policy and multiplier circle around it, so that averages are compared.
    """
    torch.manual_seed(0)
    env = MatrixGame(torch.tensor([1.0, 0.0]), num_envs=128)
    networks = [make(env, num_cells=[]) for make in (build_actor, build_critic, build_critic)]
    loss = HAPPOLagrangianLoss(
        *networks, cost_limit=0.3, initial_multiplier=0.9, entropy_coeff=0.1, critic_coeff=0.0
    )
    updater = SequentialUpdater(
        loss,
        num_epochs=1,
        optimizer=partial(torch.optim.SGD, lr=4.0),
        standardize_advantage=False,
    )
    shares, prices = [], []
    for _ in range(200):
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            batch = env.rollout(1, networks[0])
        reward = batch["next", "reward"]
        advantage = reward - reward.mean()
        for name in ("cost", "episode_cost"):
            batch["next", name] = reward.clone()
        for name in ("advantage", "cost_advantage"):
            batch[name] = advantage.clone()
        batch["value_target"] = batch["cost_value_target"] = reward.clone()
        updater(batch)
        shares.append(reward.mean())
        prices.append(loss.multipliers[0, 0])
    assert torch.stack(shares[66:]).mean().item() == pytest.approx(0.3, abs=0.02)
    price = 1 - 0.1 * torch.logit(torch.tensor(0.3)).item()
    assert torch.stack(prices[66:]).mean().item() == pytest.approx(price, abs=0.02)


class TestBadInput:
    @pytest.mark.parametrize(
        ("missing", "words"),
        [
            (("next", "cost"), "no entry .*cost.*append TeamCost"),
            (("next", "episode_cost"), r"RewardSum\(in_keys=\['cost'\], out_keys=\['episode_cost'"),
        ],
    )
    def test_a_batch_without_costs(self, missing, words):
        """One sentence with the transform to append; nothing has moved."""
        updater = make_updater()
        batch = costly(make_batch(updater.loss.actor_network))
        before = of_actor(updater)
        with pytest.raises(KeyError, match=words):
            updater(batch.exclude(missing))
        assert same_state(of_actor(updater), before)

    @pytest.mark.parametrize(
        ("kwargs", "words"),
        [
            ({"multiplier": "adam"}, "'learned'|\"learned\""),
            ({"initial_multiplier": 0.0}, "finite number above 0"),
            ({"initial_multiplier": -1.0, "multiplier": "fixed"}, "at least 0"),
            ({"multiplier_lr": 0.0}, "multiplier_lr must be positive"),
            ({"cost_limit": float("nan")}, "bound of the mean cost"),
            ({"cost_limit": {"heat": 1.0}}, "give each cost both"),
            ({"cost_critic": torch.nn.Linear(2, 1)}, "writes one entry"),
        ],
    )
    def test_arguments(self, kwargs, words):
        """Each is refused where it is given."""
        with pytest.raises((ValueError, TypeError), match=words):
            make_updater(**kwargs)

    def test_one_network_for_both(self):
        """It would be fitted to rewards and to costs in turn."""
        critic = make_critic()
        with pytest.raises(ValueError, match="give each its own network"):
            HAPPOLagrangianLoss(make_actor(), critic, critic, cost_limit=1.0)


class TestRecipe:
    words = ("task=mujoco/halfcheetah_2x3_velocity", "algorithm=happo_lagrangian")

    def test_it_trains_and_reports_costs(self, tmp_path, monkeypatch):
        """Training and evaluation say what an episode has cost, and the multiplier its price."""
        pytest.importorskip("envpool")
        monkeypatch.setattr(training, "write_report", lambda config, folder: None)
        folder = training.run(tiny_config(*self.words, "algorithm.minibatch_size=null"), tmp_path)
        row, played = (table(folder / name)[-1] for name in ("metrics.csv", "evaluation.csv"))
        assert {"cost", "agents_0/multiplier_cost", "cost/loss"} <= row.keys()
        assert (float(played["cost"]), float(played["within_limit"])) == (0.0, 1.0)

    def test_a_task_without_costs(self, tmp_path):
        """One sentence that names a task with costs; no folder is left."""
        with pytest.raises(ConfigError, match=r"needs a task with a cost, .*_velocity"):
            training.run(tiny_config("algorithm=happo_lagrangian"), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("wrong", "mended", "sentence"),
        [
            ("algorithm.initial_multiplier=0", "algorithm.multiplier=projected", "starts above 0"),
            ("critic.model=gru", "critic.model=mlp", "take critic.model=mlp"),
            ("algorithm.multiplier=adam", "algorithm.multiplier=learned", "one of learned, proj"),
        ],
    )
    def test_settings(self, wrong, mended, sentence):
        """Each is refused with a cure that works."""
        with pytest.raises(ConfigError, match=sentence):
            compose_config(*self.words, wrong)
        compose_config(*self.words, mended)
