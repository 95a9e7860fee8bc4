"""The command that measures a GPU, rehearsed on the CPU with the smallest sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.slow


def test_rehearsal(tmp_path):
    """Updates and a learning curve: one file with every row, one table."""
    options = ["--device", "cpu", "--tiny", "--results", tmp_path, "--only", "updates", "learning"]
    command = [sys.executable, SCRIPT, *options, "--limit", "280"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert [stage["ended"] for stage in stages.values()] == ["whole", "whole"]
    contestants = [row["contestant"] for row in stages["updates"]["rows"]]
    assert contestants == ["mappo", "happo eager", "hatrpo eager"]
    assert {row["file"] for row in stages["learning"]["rows"]} == {"metrics.csv", "evaluation.csv"}
    assert "| 2 | 40 | hatrpo eager |" in run.stdout


def test_a_stage_that_is_out_of_time_leaves_its_rows(tmp_path):
    """The others go on, and the command says which one was cut short."""
    options = ["--device", "cpu", "--tiny", "--results", tmp_path, "--only", "updates"]
    command = [sys.executable, SCRIPT, *options, "--limit", "1"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert run.returncode == 1
    stage = json.loads((tmp_path / "gpu.json").read_text())["stages"]["updates"]
    assert (stage["ended"], stage["rows"]) == ("out of time", [])
