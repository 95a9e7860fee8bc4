"""The command that measures a GPU, rehearsed on the CPU with the smallest sizes."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.slow


@pytest.fixture
def command(monkeypatch, tmp_path, capfd):
    """Runs the command here, its stages in processes of their own; gives code, stages, words."""

    def command(*options):
        words = ["--device", "cpu", "--tiny", "--results", tmp_path, *options]
        monkeypatch.setattr("sys.argv", [str(SCRIPT), *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
        return ended.value.code, stages, "".join(capfd.readouterr())

    return command


def test_rehearsal(command):
    """Updates and a learning curve: one file with every row, one table."""
    code, stages, said = command("--only", "updates", "learning", "--limit", 280)
    assert code == 0, said
    assert [stage["ended"] for stage in stages.values()] == ["whole", "whole"]
    contestants = [row["contestant"] for row in stages["updates"]["rows"]]
    assert contestants == ["mappo", "happo eager", "hatrpo eager"]
    assert {row["file"] for row in stages["learning"]["rows"]} == {"metrics.csv", "evaluation.csv"}
    assert "| 2 | 40 | hatrpo eager |" in said


def test_a_stage_that_is_out_of_time_leaves_its_rows(command):
    """The others go on, and the command says which one was cut short."""
    code, stages, _ = command("--only", "updates", "--limit", 1)
    assert code == 1
    assert (stages["updates"]["ended"], stages["updates"]["rows"]) == ("out of time", [])
