"""Learners in several processes: two with half a batch each are one with the whole batch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from team import make_actor, make_batch, make_critic
from torch.distributions import Categorical
from torchrl.modules import IndependentNormal, PopArtValueNorm, RunningValueNorm

from torchrl_happo import HAPPOLoss, HATRPOLoss, SequentialUpdater
from torchrl_happo.learners import Learners
from torchrl_happo.optim.minibatches import ShuffledMinibatches

N_ENVS, TIME, UPDATES = 4, 6, 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Two processes, started once: that takes longer than what the tests do there."""
    pool = Ranks(2, tmp_path_factory.mktemp("ranks"))
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
    }


def test_the_numbers_learners_share(ranks):
    """Means by weight, also of nothing; maxima; rows of unlike number; what the first one holds."""
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


# -- halves and wholes -----------------------------------------------------------------------------


class HalvesTogether(ShuffledMinibatches):
    """Of the whole batch, what two learners with half of it each draw at the same time."""

    def __call__(self, data):
        first, second = data[: len(data) // 2], data[len(data) // 2 :]
        rows = torch.arange(len(first))
        for index in super().__call__(rows):
            yield torch.cat([first[index], second[index]])


class Case:
    """A team in float64, its data, and how it is trained; the same in every process."""

    def __init__(self, algorithm, *, discrete=False, masks=(), blocks=(), norm=None, **settings):
        self.algorithm, self.masks, self.blocks, self.norm = algorithm, masks, blocks, norm
        self.distribution = Categorical if discrete else IndependentNormal
        self.settings = settings

    def networks(self):
        torch.manual_seed(0)
        actor = make_actor(distribution=self.distribution).double()
        return actor, make_critic().double()

    def team(self, group, seed=0):
        actor, critic = self.networks()
        if seed:
            torch.manual_seed(seed)
            for parameter in [*actor.parameters(), *critic.parameters()]:
                torch.nn.init.normal_(parameter)
        happo = {"entropy_coeff": 0.01} if self.algorithm == "happo" else {}
        norm = self.norm and {"popart": PopArtValueNorm, "running": RunningValueNorm}[self.norm]
        loss = {"happo": HAPPOLoss, "hatrpo": HATRPOLoss}[self.algorithm](
            actor,
            critic,
            blocks=self.blocks,
            value_norm=norm and norm(shape=1).double(),
            popart=self.norm == "popart",
            **happo,
        )
        loss.set_keys(value=("agents", "state_value"), action=("agents", "action"))
        settings = {"num_epochs": 3, "max_grad_norm": 0.5, **self.settings}
        optimizer = partial(torch.optim.Adam, lr=1e-3)
        return SequentialUpdater(loss, optimizer=optimizer, process_group=group, **settings)

    def batch(self):
        torch.manual_seed(1)
        data = make_batch(self.networks()[0], N_ENVS, TIME)
        if "agents" in self.masks:
            data["agents", "active"] = torch.rand(N_ENVS, TIME, 3) > 0.3
            data["agents", "active"][: N_ENVS // 2, :, 1] = False  # nowhere on the first learner
        if "nobody" in self.masks:
            data["agents", "active"] = torch.ones(N_ENVS, TIME, 3, dtype=torch.bool)
            data["agents", "active"][..., 2] = False
        if "steps" in self.masks:
            data["collector", "mask"] = torch.rand(N_ENVS, TIME) > 0.2
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
    updater = case.team(group, seed=rank)  # the second begins with the networks of the first
    half = case.batch().split(N_ENVS // 2)[rank]
    for _ in range(UPDATES):
        metrics = updater(half)
    return numbers(updater, metrics)


def train_whole(case):
    updater = case.team(None)
    if case.settings.get("minibatch_size"):
        for step in updater._steps.values():
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
    "padding": {"masks": ("agents", "steps"), "norm": "running"},
    "block": {"blocks": ("agents",), "masks": ("steps",)},
    "chunks": {"sequence_length": 3, "masks": ("agents",)},
    "popart": {"norm": "popart"},
    "order": {"order": "fixed"},
}


@pytest.mark.parametrize("algorithm", ["happo", "hatrpo"])
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_two_halves_are_a_whole(ranks, algorithm, settings):
    """Parameters, optimisers, statistics and metrics are those of one learner, to 1e-10."""
    case = Case(algorithm, **settings)
    first, second = ranks(train_half, case)
    whole = train_whole(case)
    assert first.keys() == second.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(first[name], second[name]) or value.isnan().any(), name
        torch.testing.assert_close(first[name], value, rtol=1e-10, atol=1e-10, msg=name)
