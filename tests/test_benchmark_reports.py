"""The reports of the learning benchmarks, on made-up runs and on the committed ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from torchrl_happo.recipe.report import Run

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def aggregate(monkeypatch):
    """The module, which imports its neighbours by their names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return pytest.importorskip("aggregate", reason="needs scipy, of the extra `benchmark`")


def runs(task, label, lasts, first=-10.0):
    """Runs of some seeds that begin at one return and end at others."""
    return [
        Run(task, label, seed, [{"frames": 0, "return": first}, {"frames": 100, "return": last}])
        for seed, last in enumerate(lasts)
    ]


def test_scores_go_from_the_untrained_policies_to_the_best_seed(aggregate):
    """On each task by itself; a task that lacks an algorithm does not count."""
    known = [
        *runs("a/x", "happo", [0.0, 10.0]),
        *runs("a/x", "mappo", [-10.0, 0.0]),
        *runs("a/y", "happo", [90.0, 40.0], first=-10.0),
        *runs("a/y", "mappo", [65.0, 15.0], first=-10.0),
        *runs("a/z", "happo", [1.0]),
    ]
    tasks, scores = aggregate.scores_of(known, ["happo", "mappo"])
    assert tasks == ["a/x", "a/y"]
    assert [list(values) for values in scores["happo"]] == [[0.5, 1.0], [1.0, 0.5]]
    assert [list(values) for values in scores["mappo"]] == [[0.0, 0.5], [0.75, 0.25]]
    # Of four pairs on x three are lower and one is level; on y one of four is higher.
    assert aggregate.probability_above(scores["mappo"], scores["happo"]) == (0.125 + 0.25) / 2


def test_the_interval_holds_the_middle_and_draws_seeds_within_tasks(aggregate):
    """The interquartile mean by hand; seeds that agree on each task leave no doubt."""
    generator = np.random.default_rng(0)
    sure = [np.full(4, 0.25), np.full(4, 0.75)]
    assert aggregate.interquartile_mean(sure, generator) == (0.5, 0.5, 0.5)
    middle, low, high = aggregate.interquartile_mean([np.arange(8.0)], generator)
    assert middle == np.mean([2, 3, 4, 5])
    assert low < middle < high


def test_marl_eval_has_every_evaluation(aggregate):
    """By environment, task, algorithm, seed and step."""
    data = aggregate.marl_eval(runs("vmas/balance", "happo", [3.0, 4.0]))
    assert data["vmas"]["balance"]["happo"]["seed_1"] == {
        "step_0": {"step_count": 0, "return": [-10.0]},
        "step_1": {"step_count": 100, "return": [4.0]},
        "absolute_metrics": {"return": [4.0]},
    }


@pytest.mark.parametrize("suite", ["vmas", "mpe2"])
def test_committed_results_can_be_aggregated(aggregate, suite):
    """Each algorithm has its row."""
    rows = aggregate.table(suite, ["happo", "hatrpo", "mappo"]).splitlines()
    assert [row.split(" | ")[0] for row in rows[-3:]] == ["| happo", "| hatrpo", "| mappo"]


def test_every_recorded_row_says_its_revision():
    """And no machine's folder stands in the results."""
    from csv import DictReader

    for path in sorted((BENCHMARKS / "results").glob("*.csv")):
        rows = list(DictReader(path.open()))
        if path.stem not in ("kl_histogram", "mpe2_settings"):
            assert all(row["revision"] for row in rows), path.name
