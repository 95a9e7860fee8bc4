"""The text of ``torchrl-happo --help``, read from the schema's source and the files of this folder.

Nothing is imported that takes long: neither torch nor what the schema itself needs.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

CONF = Path(__file__).parent
RECIPE = CONF.parent / "recipe"
USAGE = """\
Train a team of agents with HAPPO, HATRPO, one of their followers, MAPPO or IPPO.

    torchrl-happo task=vmas/het_mass algorithm=happo    any OPTION=VALUE below
    torchrl-happo -m algorithm=happo,mappo seed=0,1,2   a sweep over all combinations
    torchrl-happo resume=FOLDER                         goes on from the last checkpoint
    torchrl-happo --config-dir=FOLDER task=mine         a YAML of your own, FOLDER/task/mine.yaml

    torchrl-happo evaluate run=FOLDER [episodes=200] [deterministic=true] [seed=N]
    torchrl-happo render   run=FOLDER [output=FILE.gif] [deterministic=true]
    torchrl-happo export   run=FOLDER [agent=NAME] [format=onnx|pt2|weights] [output=FOLDER]

--version says which version this is, --hydra-help what Hydra adds, --cfg job what a run would be.
Whole numbers may be written as 300k, 2M or 1e6; null is a value, too.
"""
#: Each group, its base schemas, and the schema of each choice that has one of its own.
GROUPS: dict[str, tuple[str, ...]] = {
    "task": ("TaskConfig",),
    "algorithm": ("AlgorithmConfig", "SequentialConfig", "SimultaneousConfig", "Happo", "Hatrpo"),
    "model": ("ModelConfig", "RecurrentModel"),
    "collector": ("SingleCollector", "WorkersCollector", "RayCollector", "DistributedCollector"),
    "critic": ("CriticConfig",),
    "evaluation": ("EvaluationConfig",),
    "checkpoint": ("CheckpointConfig",),
}
ONLY = {
    "SequentialConfig": "happo and hatrpo",
    "SimultaneousConfig": "mappo and ippo",
    "Happo": "happo",
    "Hatrpo": "hatrpo",
    "RecurrentModel": "gru and lstm",
    "SingleCollector": "single",
    "WorkersCollector": "multi, ray and distributed",
    "RayCollector": "ray",
    "DistributedCollector": "distributed",
}
#: The files whose values are shown as the defaults of a group, or of a schema.
SHOWN = {
    "algorithm": "shared/optimizer.yaml",
    "Happo": "algorithm/happo.yaml",
    "SimultaneousConfig": "algorithm/mappo.yaml",
    "WorkersCollector": "collector/multi.yaml",
}
WIDTH = 98


def help_text() -> str:
    """Return the text: usage, then every option with its default and what it means."""
    schemas = dict(_schemas())
    values = _values(CONF / "config.yaml")
    for group, file in SHOWN.items():
        found = _values(CONF / file)
        values |= {f"{group}.{name}": value for name, value in found.items()}
    lines = [USAGE, "Options"]
    for name, default, words in schemas["TrainConfig"]:
        if name not in GROUPS:
            lines += _option(name, values.get(name, default), words)
    for group, names in GROUPS.items():
        lines += ["", *_choices(group)]
        for schema in names:
            if schema in ONLY:
                lines.append(f"  of {ONLY[schema]}:")
            for name, default, words in schemas[schema]:
                if name != "name":
                    known = values.get(f"{schema}.{name}") or values.get(f"{group}.{name}")
                    lines += _option(f"{group}.{name}", known or default, words)
    return "\n".join(lines) + "\n"


def _schemas() -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Yield each dataclass with its fields: their names, defaults and docstrings."""
    for path in (RECIPE / "config.py", *sorted((RECIPE / "algorithms").glob("*.py"))):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.ClassDef):
                continue
            found = []
            for entry, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name):
                    if "ClassVar" in ast.unparse(entry.annotation):
                        continue
                    words = ""
                    if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                        words = " ".join(str(after.value.value).split())
                    found.append((entry.target.id, _default(entry.value), words))
            yield node.name, found


def _default(value: ast.expr | None) -> str:
    """Write a default as it stands in the source; of the library's, whose it is."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        if value.func.id == "default_of":
            return f"as {ast.unparse(value.args[0])}"
        named = [word.value for word in value.keywords if word.arg == "default"]
        first = [] if value.func.id == "choice" else value.args[:1]
        return next(map(_default, [*named, *first]), "")
    if isinstance(value, ast.Constant):
        written = {"None": "null", "True": "true", "False": "false"}
        return written.get(str(value.value), str(value.value))
    return ""


def _values(path: Path) -> dict[str, str]:
    """Read the scalars of a YAML file of two levels."""
    found, part = {}, ""
    for line in path.read_text().splitlines():
        match = re.match(r"( *)(\w+):\s*([^#]*)", line)
        if match:
            indent, key, value = match.groups()
            if not indent:
                part = key
            found[f"{part}.{key}" if indent else key] = value.strip()
    return found


def _option(name: str, default: str, words: str) -> list[str]:
    left = f"  {name}={default}" if default else f"  {name}"
    text = textwrap.wrap(words, WIDTH - 44)
    if len(left) > 42:
        return [left, *(" " * 44 + line for line in text)]
    return [f"{left:<44}{text[0] if text else ''}", *(" " * 44 + line for line in text[1:])]


def _choices(group: str) -> list[str]:
    """List the files of a group by what their first lines say."""
    files = sorted((CONF / group).rglob("*.yaml"))
    if not files:
        return [group]
    lines = [f"{group}=..."]
    for path in files:
        name = str(path.relative_to(CONF / group).with_suffix(""))
        comment = [line.lstrip("# ") for line in path.read_text().splitlines() if line[:1] == "#"]
        lines += _option(name, "", " ".join(comment))
    return lines
