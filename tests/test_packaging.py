"""The package installs, and the commands that the README promises are the ones that are run."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

import torchrl_happo

ROOT = Path(__file__).parent.parent


def test_version_is_the_packaged_one():
    """``__version__`` and the distribution's metadata cannot drift apart."""
    assert torchrl_happo.__version__ == metadata.version("torchrl_happo")


def test_continuous_integration_runs_the_command_of_the_readme():
    """``.ci/run`` calls the README's test command to the letter, and leaves no test out.

    What it adds to the command shares the tests among processes, and chooses none.
    """
    commands = re.findall(r"```bash\n(.*)\n```", (ROOT / "README.md").read_text())
    (command,) = [line for line in commands if line.endswith(".venv/bin/pytest")]
    script = (ROOT / ".ci" / "run").read_text()
    assert script.count(command) == 1
    (added,) = re.findall(r'PYTEST_ADDOPTS="(.*)"', script)
    assert added.split() == ["-p", "no:cacheprovider", "-n", "2", "--dist", "worksteal"]


def test_every_requirement_is_pinned():
    """Whatever ``pyproject.toml`` names has its tested version in ``constraints.txt``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    required = project["dependencies"] + [entry for extra in extras for entry in extra]
    name = re.compile(r"[A-Za-z0-9_.-]+")
    named = {name.match(entry)[0].lower().replace("_", "-") for entry in required}
    pins = (ROOT / "constraints.txt").read_text().lower().replace("_", "-")
    pinned = set(re.findall(r"^([a-z0-9.-]+)==", pins, flags=re.MULTILINE))
    assert named - pinned == {"torchrl-happo"}


def test_the_oldest_versions_are_those_that_are_promised():
    """``constraints-oldest.txt`` pins every lower bound of what the tests are installed with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    installed = ["test", "train", "vmas", "pettingzoo", "ray"]
    required = project["dependencies"] + [entry for extra in installed for entry in extras[extra]]
    pins = re.findall(r"^(\S+)==(\S+)", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE)
    oldest = {name.lower().replace("_", "-"): Version(version) for name, version in pins}
    for requirement in map(Requirement, required):
        if requirement.name != "torchrl_happo":
            (bound,) = (b for b in requirement.specifier if b.operator != "<")
            assert bound.operator == ">="
            assert oldest[requirement.name] == Version(bound.version), requirement
