"""What a change did: two results of ``update_cost.py`` or ``throughput.py`` side by side.

    python benchmarks/compare.py OLD.json NEW.json

Absolute times of two runs only compare on a quiet machine of the same kind; the ratios within each
run compare anywhere. Both are printed: old, new, and new over old.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Key = tuple[Any, ...]


def figures(path: Path) -> dict[Key, float]:
    """Every ratio and every median time of a result, by what was measured."""
    found: dict[Key, float] = {}
    for row in json.loads(path.read_text())["rows"]:
        kinds = (str, int, bool)
        size = tuple((k, v) for k, v in row.items() if isinstance(v, kinds))
        for name, ratio in row["ratios"].items():
            found[(*size, "ratio", name)] = ratio
        for name, times in _times(row):
            found[(*size, "time", name)] = statistics.median(times)
    return found


def _times(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, list[float]]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _times(value, f"{path}{name} ")
        elif isinstance(value, list):
            yield path + name, value


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args()
    old, new = figures(args.old), figures(args.new)
    for key, value in new.items():
        *size, kind, name = key
        where = ", ".join(f"{v} {k}" for k, v in size)
        before = old.get(key)
        change = "       new" if before is None else f"{before:10.3g}"
        ratio = "" if before is None else f"   x {value / before:.2f}"
        print(f"{where:<48} {kind:<6} {name:<40} {change} {value:10.3g}{ratio}")
    for key in old.keys() - new.keys():
        print(f"{', '.join(f'{v} {k}' for k, v in key[:-2]):<48} {key[-1]}: gone")


if __name__ == "__main__":
    main()
