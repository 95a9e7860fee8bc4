"""Breaks the lines of the losses, the updater and the trust region, one by one.

Each mutant is one small change of one place: a condition negated, an operator swapped, a number
changed, a statement or an argument left out. The tests are run on it in a process of its own,
forked after everything but this package was imported, until one of them fails and so *kills* it.
A mutant that survives is a line that no test holds, or a change that makes no difference; the
survivors are listed in ``tests/README.md``, with the reason why each of them may live.

    python tests/mutants.py verdicts.jsonl                       # an hour or two
    python tests/mutants.py verdicts.jsonl optim/line_search.py  # some files only
    python tests/mutants.py verdicts.jsonl --all-tests           # the survivors so far, again

Each file has a few test files that are likely to notice; only what survives them is worth the
minute that all the tests take. A run that was stopped goes on from its file of verdicts.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import random
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "torchrl_happo"

#: What is broken, and the tests that are likely to notice, which therefore come first.
TARGETS = {
    "optim/line_search.py": ["line_search", "trust_region"],
    "optim/natural_gradient.py": ["natural_gradient", "trust_region"],
    "optim/linearize.py": ["natural_gradient", "trust_region", "memory"],
    "optim/trust_region.py": ["trust_region", "trust_region_safety", "trpo", "hatrpo_loss"],
    "optim/second_order.py": ["hatrpo_loss", "trust_region_safety", "goldens", "faults"],
    "optim/first_order.py": ["updater", "faults", "refused"],
    "optim/factories.py": ["bad_input", "updater"],
    "optim/minibatches.py": ["updater", "memory", "bad_input"],
    "objectives/functional.py": ["functional", "happo_loss", "goldens"],
    "objectives/value_norm.py": ["value_norm", "bad_input"],
    "objectives/happo.py": ["happo_loss", "updater", "goldens"],
    "objectives/hatrpo.py": ["hatrpo_loss", "trust_region_safety", "goldens"],
    "objectives/common.py": ["happo_loss", "hatrpo_loss", "unlike_agents", "value_norm"],
    "batch.py": ["updater", "memory", "happo_loss", "unlike_agents", "faults"],
    "updater.py": ["updater", "faults", "refused"],
}
TESTS = [
    *["functional", "happo_loss", "hatrpo_loss", "updater", "goldens", "refused", "trust_region"],
    *["trust_region_safety", "natural_gradient", "line_search", "trpo", "unlike_agents"],
    *["layouts", "memory", "saturation", "value_norm", "value_clipping", "faults", "bad_input"],
]
SLOW = "not (environment_that_raises or worker_that_is or full_disk or killed_while)"
#: Imported before the forks, so that no mutant pays for it.
HEAVY = [
    *["pytest", "hypothesis", "torch", "tensordict", "torchrl.collectors", "torchrl.envs"],
    *["torchrl.modules", "torchrl.objectives", "torchrl.data", "hydra", "omegaconf"],
    *["sb3_contrib", "vmas", "torch.optim", "torch.func"],
]
CPU_SECONDS = 200  # of one mutant; all tests together take a quarter of it

# -- mutations -------------------------------------------------------------------------------------

SWAPS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.GtE, ast.LtE),
    ast.LtE: (ast.Gt, ast.Lt),
    ast.Gt: (ast.LtE, ast.GtE),
    ast.GtE: (ast.Lt, ast.Gt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
ELEMENTS = (ast.Name, ast.Tuple, ast.expr_context)
#: Arguments that make no difference to right data on the CPU.
UNSEEN = {"device", "strict"}

Replacement: TypeAlias = ast.AST | None


def mutations(node: ast.AST) -> Iterator[tuple[str, Replacement]]:
    """What may stand in the place of a node; ``None``: nothing."""
    match node:
        case ast.If() | ast.While() | ast.IfExp():
            yield "negated", _with(node, test=ast.UnaryOp(ast.Not(), node.test))
        case ast.Compare(ops=[operator]):
            for swap in SWAPS[type(operator)]:
                yield "compared", _with(node, ops=[swap()])
        case ast.BinOp(op=operator) if type(operator) in SWAPS:
            for swap in SWAPS[type(operator)]:
                yield "swapped", _with(node, op=swap())
        case ast.BoolOp(op=operator):
            yield "swapped", _with(node, op=SWAPS[type(operator)][0]())
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
            yield "dropped", node.operand
        case ast.Constant(value=bool(value)):
            yield "changed", _with(node, value=not value)
        case ast.Constant(value=int() | float() as value):
            yield "changed", _with(node, value=value + 1)
        case ast.Return(value=value) if value is not None and not _is_none(value):
            yield "returns None", _with(node, value=ast.Constant(None))
        case ast.Assign() | ast.AugAssign() | ast.Raise() | ast.Break():
            yield "left out", ast.Pass()
        case ast.Expr(value=value) if not isinstance(value, ast.Constant):
            yield "left out", ast.Pass()
        case ast.With(body=body, items=items):
            for item in items:
                others = [other for other in items if other is not item]
                kept = _with(node, items=others) if others else ast.If(ast.Constant(1), body, [])
                if item.optional_vars is None:
                    yield "left out", kept
    if isinstance(node, ast.Call):
        for keyword in node.keywords:
            if keyword.arg in UNSEEN:
                continue
            others = [other for other in node.keywords if other is not keyword]
            yield f"without {keyword.arg or '**'}", _with(node, keywords=others)
        if isinstance(node.func, ast.Attribute) and not _is_module(node.func.value):
            yield f"without .{node.func.attr}()", node.func.value
    if isinstance(node, ast.FunctionDef):
        for decorator in node.decorator_list:
            if not _names(decorator) & {"property", "staticmethod", "abstractmethod"}:
                others = [other for other in node.decorator_list if other is not decorator]
                yield "undecorated", _with(node, decorator_list=others)


def _with(node: ast.AST, **changes: Any) -> ast.AST:
    changed = copy.copy(node)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_module(node: ast.AST) -> bool:
    """Whether ``node.f(...)`` is a function of a module, or of a class's parents."""
    return bool(_names(node) & {"torch", "copy", "nn", "logger", "super", "math", "F"})


def _names(node: ast.AST) -> set[str]:
    named = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return named | {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}


def _places(parent: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Every node that runs, with what holds it: parent, field and index."""
    for field, value in ast.iter_fields(parent):
        if field in ("annotation", "returns", "defaults", "kw_defaults"):
            continue  # types are not there at run time, defaults are held by test_docstrings.py
        for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(node, ast.AST):
                yield parent, field, index, node
                if not _is_left_alone(node):
                    yield from _places(node)


def _is_left_alone(node: ast.AST) -> bool:
    """The words of errors have tests of their own."""
    unseen = isinstance(node, ast.keyword) and node.arg in UNSEEN
    return unseen or isinstance(node, (ast.Raise, ast.JoinedStr))


def _bindings(tree: ast.AST) -> set[ast.AST]:
    """Assignments without which a name would not exist; leaving them out would prove nothing."""
    needed: set[ast.AST] = set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            known = {a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)}
            assignments = [n for n in ast.walk(function) if isinstance(n, ast.Assign)]
            for node in sorted(assignments, key=lambda n: n.lineno):
                stored = [n for target in node.targets for n in ast.walk(target)]
                names = {n.id for n in stored if isinstance(n, ast.Name)}
                if not names & known and all(isinstance(n, ELEMENTS) for n in stored):
                    needed.add(node)
                known |= names
    return needed


def mutants(source: str) -> Iterator[tuple[int, str, Callable[[], ast.Module]]]:
    """All mutants of a source: the line, what was changed there, and how to make the tree."""
    names: dict[str, int] = {}
    tree = ast.parse(source)
    scopes, bindings = _scopes(tree), _bindings(tree)
    for place, (parent, _, _, node) in enumerate(_places(tree)):
        top_level = isinstance(parent, ast.Module) and not isinstance(node, ast.FunctionDef)
        if top_level or node in bindings:
            continue
        for number, (kind, replacement) in enumerate(mutations(node)):
            new = "" if isinstance(replacement, ast.Pass) else _text(replacement)
            name = f"{scopes[node]}: {kind}: {_text(node)} -> {new}"
            names[name] = names.get(name, 0) + 1
            name += f" ({names[name]})" * (names[name] > 1)
            line = getattr(node, "lineno", 0) or parent.lineno
            yield line, name, lambda place=place, number=number: _mutated(source, place, number)


def _mutated(source: str, place: int, number: int) -> ast.Module:
    tree = ast.parse(source)
    parent, field, index, node = list(_places(tree))[place]
    replacement = list(mutations(node))[number][1]
    if index is None:
        setattr(parent, field, replacement)
    else:
        getattr(parent, field)[index] = replacement
    return ast.fix_missing_locations(tree)


def _scopes(tree: ast.AST) -> dict[ast.AST, str]:
    """The function or class that each node lies in."""
    scopes: dict[ast.AST, str] = {}

    def visit(node: ast.AST, scope: str) -> None:
        scopes[node] = scope
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            scope = f"{scope}.{node.name}".lstrip(".")
        for child in ast.iter_child_nodes(node):
            visit(child, scope)

    visit(tree, "")
    return scopes


def _text(node: ast.AST | None) -> str:
    text = " ".join(ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).split())
    return text if len(text) < 90 else f"{text[:60]} ... {text[-25:]}"


# -- tests -----------------------------------------------------------------------------------------


class Loader(importlib.machinery.SourceFileLoader):
    """Loads a module from a tree instead of from its file."""

    tree: ast.Module

    def get_code(self, fullname: str) -> Any:
        """The code of the mutant."""
        return compile(self.tree, self.path, "exec", dont_inherit=True)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the mutant in place of the module."""

    def __init__(self, name: str, path: Path, tree: ast.Module) -> None:
        self.name, self.loader = name, Loader(name, str(path))
        self.loader.tree = tree

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """The mutant's spec, if it is asked for."""
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.loader.path, loader=self.loader)


def verdict_on(target: str, tree: ast.Module | None, *, all_tests: bool) -> str:
    """Runs tests on a mutant (``None``: the source as it is)."""
    others = [name for name in TESTS if name not in TARGETS[target]] if all_tests else []
    tests = [f"tests/test_{name}.py" for name in [*TARGETS[target], *others]]
    return "survived" if passes(target, tree, [f"{PACKAGE}/{target}", *tests]) else "killed"


def passes(target: str, tree: ast.Module | None, tests: list[str]) -> bool:
    """Whether no test fails, or runs for ever, in a fork."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    status = 99
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        if tree is not None:
            name = f"{PACKAGE}.{target.removesuffix('.py').replace('/', '.')}"
            sys.meta_path.insert(0, Finder(name, ROOT / PACKAGE / target, tree))
        # Rewriting assertions, pytest would load the module from its file, past the finder.
        options = ["-x", "-q", "-p", "no:cacheprovider", "--assert=plain", "-k", SLOW]
        status = int(importlib.import_module("pytest").main([*options, *tests]))
    finally:
        os._exit(status)


def lines_first(targets: list[str]) -> list[tuple[str, int, str, Callable[[], ast.Module]]]:
    """All mutants in random order: first one for each line, then a second one, and so on."""
    every = [
        (target, *mutant)
        for target in targets
        for mutant in mutants((ROOT / PACKAGE / target).read_text())
    ]
    random.Random(0).shuffle(every)
    seen: dict[tuple[str, int], int] = {}
    rounds = []
    for target, line, _, _ in every:
        rounds.append(seen.get((target, line), 0))
        seen[target, line] = rounds[-1] + 1
    return [mutant for _, mutant in sorted(zip(rounds, every, strict=True), key=lambda r: r[0])]


def main() -> None:
    """Tries the mutants and writes the verdicts."""
    parser = argparse.ArgumentParser(description="Mutation check.")
    parser.add_argument("verdicts", type=Path, help="file of the verdicts, a line for each mutant")
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help="files to break")
    parser.add_argument("--all-tests", action="store_true", help="try survivors on all tests")
    options = parser.parse_args()
    verdicts = options.verdicts.resolve()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    known = {}
    if verdicts.exists():
        entries = map(json.loads, verdicts.read_text().splitlines())
        known = {(entry["file"], entry["mutant"]): entry["verdict"] for entry in entries}
    wanted = "survived" if options.all_tests else None
    todo = [
        (target, name, make)
        for target, _, name, make in lines_first(options.targets)
        if known.get((target, name)) == wanted
    ]
    sys.stdout.write(f"{len(known)} mutants have a verdict, {len(todo)} to do.\n")
    sys.stdout.flush()
    for module in HEAVY:
        importlib.import_module(module)
    if not passes("updater.py", None, [f"tests/test_{name}.py" for name in TESTS]):
        sys.exit("The tests fail as it is.")
    for target, name, make in todo:
        verdict = verdict_on(target, make(), all_tests=options.all_tests)
        with verdicts.open("a") as file:
            file.write(json.dumps({"file": target, "mutant": name, "verdict": verdict}) + "\n")
        if verdict == "survived":
            sys.stdout.write(f"{target}: {name}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
