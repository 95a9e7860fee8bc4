"""The documentation builds without a warning, and its glossary has what an update reports."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest
import torch
from agent_transformers import game, make_transformer, rollout
from team import make_actor, make_batch, make_critic

import torchrl_happo
from torchrl_happo import (
    A2POLoss,
    CoPPOLoss,
    HAA2CLoss,
    HAPPOLagrangianLoss,
    HAPPOLoss,
    HATRPOLoss,
    MACPOLoss,
    MATLoss,
    SequentialUpdater,
    TPPOLoss,
    examples,
    objectives,
)
from torchrl_happo.update import metrics

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """``.ci/docs`` writes the pages, in which public names resolve; each loss has its page."""
    pytest.importorskip("pdoc")
    build = subprocess.run(
        [sys.executable, ROOT / ".ci" / "docs", tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        check=False,
    )
    assert build.returncode == 0, build.stderr[-500:]
    start = (tmp_path / "torchrl_happo.html").read_text()
    assert "Troubleshooting" in start
    assert 'id="HAPPOLoss"' in start
    for name in objectives.__all__:
        module = getattr(objectives, name).__module__
        page = (tmp_path / Path(*module.split("."))).with_suffix(".html").read_text()
        for word in ("Keys", "Defaults", "When to use it"):
            assert f"<strong>{word}" in page, (name, word)
        assert ":math:" not in page
        assert "<code>~" not in page


LOSSES = {
    "happo": HAPPOLoss,
    "hatrpo": partial(HATRPOLoss, kl_split="weighted"),
    "haa2c": HAA2CLoss,
    "coppo": CoPPOLoss,
    "a2po": A2POLoss,
    "lagrangian": partial(HAPPOLagrangianLoss, cost_limit=1.0),
    "macpo": partial(MACPOLoss, cost_limit=1.0),
    "mat": MATLoss,
    "tppo": TPPOLoss,
}


def glossary():
    """The metrics that the glossary explains: each stands before a colon, with others or alone."""
    words = re.findall(r"((?:``\w+``(?: \([^)]*\))?(?:, )?)+):", metrics.__doc__)
    return {name for entry in words for name in entry.split("``")[1::2]}


def reported():
    """The metrics that updates with all losses return."""
    names = set()
    for name, loss_class in LOSSES.items():
        actor, critic = make_actor(), make_critic()
        costs = (make_critic(),) if name in ("lagrangian", "macpo") else ()
        if name == "tppo":  # whose critic reads actions
            actor, critic = make_transformer(game(), size=8, prefix_values=True)
        updater = SequentialUpdater(loss_class(actor, critic, *costs), num_epochs=1)
        batch = rollout(game(), actor) if name == "tppo" else make_batch(actor)
        batch["next", "cost"] = batch["next", "episode_cost"] = torch.ones_like(
            batch["next", "reward"]
        )
        names |= {key[-1] for key in updater(batch).keys(True, True)}
    return names


def test_the_glossary_has_what_an_update_reports():
    """No metric more, and none less."""
    torch.manual_seed(0)
    assert glossary() == reported()


def test_what_the_pages_name_exists():
    """Metrics in the advice on tuning are in the glossary; modules that are linked are there."""
    named = set(re.findall(r"^- `(\w+)`", examples.__doc__, re.MULTILINE))
    assert named - {"torchrl_happo"} == named & glossary()
    assert len(named) >= 6
    for page in (torchrl_happo, examples):
        for module in re.findall(r"`(torchrl_happo(?:\.\w+)+)`", page.__doc__):
            path = ROOT / Path(*module.split("."))
            assert path.is_dir() or path.with_suffix(".py").is_file(), module
    classes = [getattr(loss, "func", loss).__name__ for loss in LOSSES.values()]
    assert sorted(classes) == sorted(objectives.__all__)


def sentences(path):
    """All strings of a module, with ``...`` for what is filled in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.Constant) else "..." for v in node.values)
            yield "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_sentences_of_the_troubleshooting_are_the_librarys():
    """Each error that is quoted stands in the code of the library, up to its gaps."""
    said = [
        text
        for path in Path(torchrl_happo.__file__).parent.rglob("*.py")
        for text in sentences(path)
        if text is not torchrl_happo.__doc__ and "# Troubleshooting" not in text
    ]
    quotes = re.findall(r'\*"([^"]*)"\*(?! \(TorchRL\))', " ".join(torchrl_happo.__doc__.split()))
    assert len(quotes) >= 6
    for quote in quotes:
        parts = [part.strip() for part in re.split(r"'\w+'|\.\.\.", quote)]
        assert any(all(part in text for part in parts) for text in said), quote


def test_the_long_description_stands_alone():
    """On a package index no picture and no link leads into the repository, and all text remains."""
    hook = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]
    readme = (ROOT / "README.md").read_text()
    text = readme
    for change in hook["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"], text)
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links
    assert all(link.startswith("https://") for link in links)
    assert "Learning curves" in readme
    assert "Learning curves" not in text
    assert "`benchmarks/scale.md`" in text


def test_links_of_the_readme_lead_somewhere():
    """Files of the repository that README and CONTRIBUTING name are there."""
    for page in ("README.md", "CONTRIBUTING.md"):
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text())
        for link in links:
            assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_citation_has_the_version():
    """``CITATION.cff`` is of the version that is packaged."""
    (version,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version == torchrl_happo.__version__
