"""Learners in several processes: two with half a batch each are one with the whole batch."""

from __future__ import annotations

import copy
import runpy
from functools import partial
from pathlib import Path
from unittest import TestCase

import pytest
import torch
import torch.distributed as dist
from compilation import forget_graphs, num_graphs
from newer import PopArtValueNorm, RunningValueNorm
from ranks import Ranks
from team import make_actor, make_batch, make_critic
from tensordict import TensorDict
from torch.distributions import Categorical
from torchrl.modules import IndependentNormal
from wrong_calls import same

from torchrl_happo import (
    HAPPOLagrangianLoss,
    HAPPOLoss,
    HATRPOLoss,
    MACPOLoss,
    SequentialUpdater,
)
from torchrl_happo.distributed import Learners
from torchrl_happo.recipe.ranks import Ranks as RecipeRanks
from torchrl_happo.steps import minibatches
from torchrl_happo.steps.minibatches import ShuffledMinibatches
from torchrl_happo.steps.trust_region import line_search
from torchrl_happo.steps.trust_region import step as trust_region

#: Two more processes take long to start.
pytestmark = pytest.mark.slow

SCALE = Path(__file__).parents[1] / "benchmarks" / "scale.py"
N_ENVS, TIME, UPDATES = 4, 6, 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, fork_server):
    """Two processes, started once: that takes longer than what the tests do there."""
    pool = Ranks(2, tmp_path_factory.mktemp("ranks"), fork_server)
    yield pool
    pool.close()


# -- the numbers they share ------------------------------------------------------------------------


def shared_numbers(rank, group):
    learners = Learners(group)
    own = torch.tensor([1.0, 5.0])[rank]
    nothing = learners.mean([torch.tensor([float("nan"), 3.0])[rank], own.expand(2)], [0, 2][rank])
    nobody = learners.mean([torch.tensor(float("nan"))], 0)
    half = learners.mean([torch.full((3,), 2.0 + rank, dtype=torch.half)], 40_000)
    followed = [torch.tensor([rank, 7]), torch.tensor([rank == 0]), torch.full((2, 2), float(rank))]
    learners.follow_first(followed)
    generator = torch.Generator().manual_seed(rank)
    learners.draw_as_first([generator])
    return {
        "place": (learners.rank, learners.size),
        "mean": learners.mean([own, own.expand(2, 1)], torch.tensor([3, 1])[rank]),
        "nothing": nothing,
        "nobody": nobody,
        "half": half,
        "maximum": learners.maximum(torch.tensor([[0.0, 9.0], [4.0, -1.0]])[rank]),
        "most": learners.most(rank + 3),
        "gather": learners.gather(torch.full((2 + rank, 1), float(rank))),
        "followed": followed,
        "drawn": torch.rand(3, generator=generator),
    }


def test_the_numbers_learners_share(ranks):
    """Means by weight, also of nothing; maxima; unlike rows; what the first one holds and draws."""
    for rank, got in enumerate(ranks(shared_numbers)):
        assert got["place"] == (rank, 2)
        assert [m.tolist() for m in got["mean"]] == [2.0, [[2.0], [2.0]]]
        assert [m.tolist() for m in got["nothing"]] == [3.0, [5.0, 5.0]]
        assert got["nobody"] == [0.0]
        assert got["half"][0].tolist() == [2.5] * 3
        assert got["half"][0].dtype == torch.half
        assert got["maximum"].tolist() == [4.0, 9.0]
        assert got["most"] == 4
        assert got["gather"].flatten().tolist() == [0, 0, 1, 1, 1]
        assert [t.tolist() for t in got["followed"]] == [[0, 7], [True], [[0, 0], [0, 0]]]
        assert got["drawn"].equal(torch.rand(3, generator=torch.Generator().manual_seed(0)))


def test_alone_nothing_is_sent(monkeypatch):
    """Without a group, or with one of size 1, no collective is called."""
    team = Case("happo").team(None)
    for name in ("all_reduce", "all_gather", "broadcast"):
        monkeypatch.setattr(dist, name, None)
    team(Case("happo").batch())


def test_a_group_must_be_one():
    """Anything else gets a sentence."""
    with pytest.raises(ValueError, match=r"process_group must be a process group .* got 'gloo'"):
        Case("happo").team("gloo")


def pool_rows(rank, group):
    """What the recipe makes of the learners' rows, flags and answers."""
    ranks = RecipeRanks("cpu", timeout=60)
    ranks.size, ranks.rank, ranks.learners = 2, rank, Learners(group)

    def broken():
        raise ValueError(f"of {rank}")

    nan = float("nan")
    ended = {"return": 4.0 + rank, "episode_length": 10.0, "episodes": 1.0 + rank, "reward": 2.0}
    ended["win_rate"] = float(rank)
    one = {**ended, "return": [nan, 7.0][rank], "episodes": [0.0, 2.0][rank]}
    none = {**ended, "return": nan, "episode_length": nan, "episodes": 0.0}
    try:
        ranks.from_first(broken)
    except (SystemExit, ValueError) as error:
        said = repr(error)
    answer = ranks.from_first(lambda: {"from": torch.tensor(rank)})
    flags = ranks.any(rank == 1), ranks.any(False)
    return [ranks.pooled(row) for row in (ended, one, none)], said, answer, flags


def test_the_first_speaks_for_all(ranks):
    """Episodes are pooled by their number; the first one's answers and errors reach everyone."""
    for rank, (rows, said, answer, flags) in enumerate(ranks(pool_rows)):
        ended, one, none = rows
        assert ended["return"] == pytest.approx((4 + 2 * 5) / 3)
        assert ended["win_rate"] == pytest.approx(2 / 3)
        assert (ended["episodes"], ended["reward"]) == (3.0, 2.0)
        assert (one["return"], one["episodes"]) == (7.0, 2.0)
        assert none["return"] != none["return"]
        assert none["episodes"] == 0
        assert said == ["ValueError('of 0')", "SystemExit(2)"][rank]
        assert answer == {"from": torch.tensor(0)}
        assert flags == (True, False)


# -- halves and wholes -----------------------------------------------------------------------------


class HalvesTogether(ShuffledMinibatches):
    """Of the whole batch, what two learners with half of it each draw at the same time."""

    def __call__(self, data):
        first, second = data[: len(data) // 2], data[len(data) // 2 :]
        rows = torch.arange(len(first))
        for index in super().__call__(rows):
            yield torch.cat([first[index], second[index]])


LOSSES = {
    "happo": HAPPOLoss,
    "hatrpo": HATRPOLoss,
    "lagrangian": HAPPOLagrangianLoss,
    "macpo": MACPOLoss,
}


class Case:
    """A team in float64, its data, and how it is trained; the same in every process."""

    def __init__(
        self,
        algorithm,
        *,
        discrete=False,
        masks=(),
        blocks=(),
        norm=None,
        fisher_fraction=1.0,
        multiplier="learned",
        **settings,
    ):
        self.algorithm, self.masks, self.blocks, self.norm = algorithm, masks, blocks, norm
        self.fisher_fraction, self.multiplier = fisher_fraction, multiplier
        self.distribution = Categorical if discrete else IndependentNormal
        self.settings = settings

    def networks(self):
        torch.manual_seed(0)
        actor = make_actor(distribution=self.distribution).double()
        return actor, make_critic().double()

    def team(self, group, seed=0, **settings):
        actor, critic = self.networks()
        if seed:
            torch.manual_seed(seed)
            for parameter in [*actor.parameters(), *critic.parameters()]:
                torch.nn.init.normal_(parameter)
        own = {
            "happo": {"entropy_coeff": 0.01},
            "hatrpo": {"fisher_fraction": self.fisher_fraction},
            "lagrangian": {"multiplier": self.multiplier},
            "macpo": {},
        }[self.algorithm]
        if self.algorithm in ("lagrangian", "macpo"):
            own |= {"cost_critic": copy.deepcopy(critic), "cost_limit": 1.0}
        norm = self.norm and {"popart": PopArtValueNorm, "running": RunningValueNorm}[self.norm]
        loss = LOSSES[self.algorithm](
            actor,
            critic,
            blocks=self.blocks,
            value_norm=norm and norm(shape=1).double(),
            popart=self.norm == "popart",
            **own,
        )
        loss.set_keys(value=("agents", "state_value"), action=("agents", "action"))
        settings = {"num_epochs": 3, "max_grad_norm": 0.5, **self.settings, **settings}
        optimizer = partial(torch.optim.Adam, lr=1e-3)
        return SequentialUpdater(loss, optimizer=optimizer, process_group=group, **settings)

    def batch(self):
        torch.manual_seed(1)
        data = make_batch(self.networks()[0], N_ENVS, TIME)
        if "agents" in self.masks:
            data["agents", "active"] = torch.rand(N_ENVS, TIME, 3) > 0.3
            data["agents", "active"][: N_ENVS // 2, :, 1] = False  # nowhere on the first learner
        if "second" in self.masks:
            data["agents", "active"][: N_ENVS // 2] = True
        if "nobody" in self.masks:
            data["agents", "active"] = torch.ones(N_ENVS, TIME, 3, dtype=torch.bool)
            data["agents", "active"][..., 2] = False
        if "steps" in self.masks:
            data["collector", "mask"] = torch.rand(N_ENVS, TIME) > 0.2
        if self.algorithm in ("lagrangian", "macpo"):
            data["next", "cost"] = torch.rand(N_ENVS, TIME, 1).double()
            data["next", "episode_cost"] = data["next", "cost"].cumsum(1)
            data["next", "done"] = torch.zeros(N_ENVS, TIME, 1, dtype=torch.bool)
            data["next", "done"][1:, -1] = True  # fewer episodes end with the first learner
        return data


def numbers(updater, metrics):
    """All that an update leaves behind."""
    state = updater.state_dict()
    moments = {
        f"{name}.{i}.{key}": value
        for name, step in state["steps"].items()
        for i, entry in step.get("optimizer", {"state": {}})["state"].items()
        for key, value in entry.items()
    }
    reports = {".".join(key): value for key, value in metrics.items(True, True)}
    return {**{k: v.clone() for k, v in state["loss"].items()}, **moments, **reports}


def train_half(rank, group, case):
    forget_graphs()
    updater = case.team(group, seed=rank)  # the second begins with the networks of the first
    half = case.batch().split(N_ENVS // 2)[rank]
    if "second" in case.masks and rank == 0:
        del half["agents", "active"]  # this learner's environments know no such thing
    with TestCase().assertNoLogs("torchrl_happo", "WARNING"):
        for _ in range(UPDATES):
            metrics = updater(half)
    return numbers(updater, metrics), num_graphs()


def train_whole(case):
    # Where the halves are compiled, the whole is not: that is ``test_compile.py``'s.
    updater = case.team(None, compile=False)
    if case.settings.get("minibatch_size"):
        for step in updater.steps.values():
            if hasattr(step, "minibatches"):
                own = step.minibatches
                step.minibatches = HalvesTogether(own.size, own.generator)
    for _ in range(UPDATES):
        metrics = updater(case.batch())
    return numbers(updater, metrics)


CASES = {
    "epochs": {},
    "minibatches": {"minibatch_size": 5},
    "discrete": {"discrete": True},
    "dead agents": {"masks": ("agents",)},
    "nobody": {"masks": ("nobody",)},
    "masks of one": {"masks": ("agents", "second")},
    "padding": {"masks": ("agents", "steps"), "norm": "running"},
    "block": {"blocks": ("agents",), "masks": ("steps",)},
    "chunks": {"sequence_length": 3, "masks": ("agents",)},
    "popart": {"norm": "popart"},
    "order": {"order": "fixed"},
    "compiled": {"compile": {"backend": "eager"}, "masks": ("agents",)},
    "early stop": {"target_kl": 1e-5, "num_epochs": 8},
}


@pytest.mark.parametrize("algorithm", ["happo", "hatrpo"])
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_two_halves_are_a_whole(ranks, algorithm, settings):
    """Parameters, optimisers, statistics and metrics are those of one learner, to 1e-10."""
    if algorithm == "hatrpo" and "target_kl" in settings:
        pytest.skip("HATRPO has no target_kl")
    case = Case(algorithm, **settings)
    (first, graphs), (second, others) = ranks(train_half, case)
    whole = train_whole(case)
    # For all agents together, and the critic; where one of them is nowhere, there are more.
    compiled = {"happo": 4, "hatrpo": 6}[algorithm] if "compile" in settings else 0
    assert min(graphs, others) == compiled
    assert first.keys() == second.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(first[name], second[name]) or value.isnan().any(), name
        torch.testing.assert_close(first[name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("lagrangian", {"minibatch_size": 5}),
        ("lagrangian", {"multiplier": "projected", "masks": ("agents",)}),
        ("macpo", {"masks": ("agents",)}),
    ],
    ids=["learned", "projected", "bounded"],
)
def test_two_halves_are_a_whole_with_costs(ranks, algorithm, settings):
    """Multipliers, the cost of an episode and the step within its bound, to 1e-10."""
    case = Case(algorithm, **settings)
    (first, _), (second, _) = ranks(train_half, case)
    for name, value in train_whole(case).items():
        assert torch.equal(first[name], second[name]) or value.isnan().any(), name
        torch.testing.assert_close(first[name], value, rtol=1e-10, atol=1e-10, msg=name)


def test_a_share_of_the_samples_in_the_fisher_matrix(ranks, monkeypatch):
    """Each learner draws from its own, by the same numbers; the matrix is that of all drawn."""
    case = Case("hatrpo", fisher_fraction=0.5)
    (first, _), (second, _) = ranks(train_half, case)
    drawn = []

    def draw_rows(num_rows, valid, share, generator):
        rows = minibatches.draw_rows(num_rows // 2, valid, share, generator)
        drawn.append(rows)
        return torch.cat([rows, rows + num_rows // 2])

    monkeypatch.setattr(trust_region, "draw_rows", draw_rows)
    whole = train_whole(case)
    assert [len(rows) for rows in drawn] == [N_ENVS * TIME // 4] * (3 * UPDATES)
    for name, value in whole.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-10, atol=1e-10, msg=name)


def train_apart(rank, group, case):
    """An update of batches that make unlike numbers of minibatches, and these numbers."""
    updater = case.team(group)
    counts = {}
    for name, step in updater.steps.items():
        step.minibatches = Counted(step.minibatches, counts, name)
    metrics = updater(case.batch().split(N_ENVS // 2)[rank])
    return numbers(updater, metrics), counts


class Counted:
    """Minibatches that are counted."""

    def __init__(self, minibatches, counts, name):
        self.minibatches, self.counts, self.name = minibatches, counts, name

    def __call__(self, data):
        return self.minibatches(data)

    def count(self, data):
        self.counts[self.name] = self.minibatches.count(data)
        return self.counts[self.name]


def test_unlike_numbers_of_minibatches(ranks):
    """A learner that has fewer waits for nobody, and nobody for it; all end up the same."""
    case = Case("happo", minibatch_size=3, masks=("agents",))
    (first, ours), (second, theirs) = ranks(train_apart, case)
    assert ours["agents_0"] > theirs["agents_0"]
    assert ours["agents_2"] < theirs["agents_2"]
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert value.isfinite().all(), name


# -- what goes wrong with one ----------------------------------------------------------------------


def refuse(rank, group, spoil):
    """What a learner says, and what has changed, when the second one's batch is spoiled."""
    updater = Case("happo").team(group)
    batch = Case("happo").batch().split(N_ENVS // 2)[rank]
    updater(batch)
    before = copy.deepcopy(updater.state_dict())
    spoiled = batch.clone()
    if rank == 1:
        spoil(spoiled)
    try:
        updater(spoiled)
    except (KeyError, ValueError) as error:
        words = str(error)
    unchanged = same(updater.state_dict(), before)
    updater(batch)  # goes on, in step with the others
    return words, unchanged, numbers(updater, TensorDict())


def not_a_number(batch):
    batch["next", "reward"][0, 0] = float("nan")


def no_action(batch):
    del batch["agents", "action"]


def out_of_range(batch):
    batch["agents", "action"] = batch["agents", "action"][..., :1]


def narrow(batch):
    for place in (batch, batch["next"]):
        place["agents", "observation"] = place["agents", "observation"][..., :1]


@pytest.mark.parametrize("spoil", [not_a_number, no_action, out_of_range, narrow])
def test_what_one_refuses_all_refuse(ranks, spoil):
    """One sentence each, nothing changed with anyone, and the next batch is learned from."""
    (first, first_unchanged, ours), (second, second_unchanged, theirs) = ranks(refuse, spoil)
    assert first.startswith("Learner 1 of 2 refused its batch")
    assert "Learner" not in second
    assert first_unchanged
    assert second_unchanged
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def lose_a_gradient(rank, group):
    updater = Case("happo").team(group)
    step = updater.steps["agents_1"]
    objective = step.objective
    if rank == 1:
        step.objective = lambda data: objective(data) * float("nan")
    before = {key: value.clone() for key, value in updater.state_dict()["loss"].items()}
    updater(Case("happo").batch().split(N_ENVS // 2)[rank])
    after = updater.state_dict()["loss"]
    actor = [key for key in before if key.startswith("actor_network.")]
    return [[bool((after[k][row] == before[k][row]).all()) for k in actor] for row in range(3)]


def test_a_gradient_that_is_not_finite_with_one(ranks):
    """No learner follows it; the other agents move."""
    for rows in ranks(lose_a_gradient):
        assert all(rows[1])
        assert not any(rows[0] + rows[2])


# -- what it costs ---------------------------------------------------------------------------------


def count_messages(rank, group, case):
    """Sizes of the messages of one update, the tries of its line searches and its parameters."""
    updater = case.team(group)
    half = case.batch().split(N_ENVS // 2)[rank]
    sizes = []

    def counting(collective, place):
        def counted(*args, **kwargs):
            sizes.append(args[place].numel() * args[place].element_size())
            return collective(*args, **kwargs)

        return counted

    places = {"all_reduce": 0, "all_gather": 1, "broadcast": 0}
    originals = {name: getattr(dist, name) for name in places}
    tried = []
    search = line_search.sequential_line_search
    line_search.LINE_SEARCHES["sequential"] = lambda evaluate, *args, **kwargs: search(
        lambda theta: (tried.append(1), evaluate(theta))[1], *args, **kwargs
    )
    try:
        for name, place in places.items():
            setattr(dist, name, counting(originals[name], place))
        updater(half)
    finally:
        line_search.LINE_SEARCHES["sequential"] = search
        for name, original in originals.items():
            setattr(dist, name, original)
    actors = [sum(p.numel() for p in agent.parameters()) for agent in updater.loss.agents]
    critic = sum(p.numel() for p in updater.loss.critic_network.parameters())
    return len(sizes), sum(sizes), len(tried), tuple(actors), critic


@pytest.mark.skipif(not SCALE.exists(), reason="needs the benchmarks")
@pytest.mark.parametrize("norm", [None, "running"])
@pytest.mark.parametrize("algorithm", ["happo", "hatrpo"])
def test_messages_and_bytes_are_those_of_the_formula(ranks, algorithm, norm):
    """Counted in an update of each learner, and computed by ``benchmarks/scale.py``."""
    formula = runpy.run_path(str(SCALE))
    case = Case(algorithm, num_epochs=2, minibatch_size=4, norm=norm)
    for messages, size, tries, actors, critic in ranks(count_messages, case):
        update = formula["Update"](
            algorithm,
            actors,
            critic,
            epochs=2,
            minibatches=3,
            tries=0,
            returns=N_ENVS // 2 * TIME * 3 if norm else 0,
            number_bytes=8,
            values_of_agents=True,
        )
        expected, expected_size = formula["traffic"](update)
        assert messages == expected + tries
        assert size == expected_size + tries * 3 * 8
