"""Breaks the lines of the losses, the updater and the trust region, one by one.

Each mutant is one small change of one place (``mutations.py``): a condition negated, an operator
swapped, a number changed, a statement or an argument left out. Tests are run on it until one of
them fails and so *kills* it. A mutant that survives is a line that no test holds, or a change that
makes no difference; the survivors are listed in ``tests/README.md``, with the reason why each of
them may live.

    python tests/mutants.py verdicts.jsonl                       # more than an hour on one core
    python tests/mutants.py verdicts.jsonl steps/trust_region/line_search.py  # some files only
    python tests/mutants.py verdicts.jsonl --again --seconds 600 # the survivors so far
    python tests/mutants.py verdicts.jsonl --again --tests learners --only "learners|weight"

First all tests run once, which shows how long each takes and which lines it reaches. A mutant is
a fork of the process that has collected them: the code of one function is replaced there, and
those tests run that reach the line, until they have taken ``--seconds``: first those that have
killed mutants of lines nearby, then those of the module itself, then those of the other files in
turn, the quick ones that reach little else before the others. What lies outside of functions, or
changes what they close over, needs the package to be imported anew, which takes longer and is done
last. A run that was stopped goes on from its file of verdicts. With ``--tests`` a mutant meets all
tests of the files named, the slow ones included, but for those that compile for a minute.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import importlib.abc
import importlib.machinery
import inspect
import itertools
import json
import mmap
import os
import random
import re
import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import ranks
from mutations import mutants

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "torchrl_happo"

TARGETS = [
    *(f"objectives/{name}.py" for name in ("surrogate", "happo", "hatrpo", "base", "critic")),
    *(f"objectives/{name}.py" for name in ("joint", "entropy", "value_norm")),
    *(f"update/{name}.py" for name in ("updater", "batch", "correction", "order", "metrics")),
    *("update/assembly.py", "update/state.py", "transaction.py", "masked.py"),
    *(f"steps/trust_region/{name}.py" for name in ("solve", "natural_gradient", "line_search")),
    *(f"steps/trust_region/{name}.py" for name in ("linearize", "step")),
    *(f"steps/{name}.py" for name in ("first_order", "optimizers", "minibatches")),
]
TESTS = [
    *["functional", "happo_loss", "hatrpo_loss", "updater", "goldens", "refused", "trust_region"],
    *["trust_region_safety", "natural_gradient", "line_search", "trpo", "unlike_agents"],
    *["layouts", "memory", "saturation", "value_norm", "value_clipping", "faults", "bad_input"],
    *["identities", "isolation", "docstrings", "critics", "masked_entries", "slots", "by_hand"],
    "steps",
]
#: Imported before the forks, so that no mutant pays for it.
HEAVY = [
    *["pytest", "hypothesis", "torch", "tensordict", "torchrl.collectors", "torchrl.envs"],
    *["torchrl.modules", "torchrl.objectives", "torchrl.data", "hydra", "omegaconf"],
    *["sb3_contrib", "vmas", "torch.optim", "torch.func"],
]
# Rewriting assertions, pytest would load the modules from their files.
OPTIONS = ["-q", "-s", "-p", "no:cacheprovider", "--assert=plain", "--no-summary"]
QUICK = ["-m", "not slow and not learning"]

# -- replaced code ---------------------------------------------------------------------------------


def functions(code: CodeType) -> Iterator[CodeType]:
    """The functions of a module or a class, methods included, those within functions not."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_flags & inspect.CO_OPTIMIZED:
                yield constant
            else:
                yield from functions(constant)


def outside(code: CodeType) -> list[Any]:
    """What a module and its classes do themselves."""
    bodies = [c for c in code.co_consts if isinstance(c, CodeType)]
    own = [code.co_code, code.co_names, [c for c in code.co_consts if c not in bodies]]
    return own + [outside(b) for b in bodies if not b.co_flags & inspect.CO_OPTIMIZED]


def replacements(source: CodeType, mutant: CodeType) -> dict[tuple[str, int], CodeType] | None:
    """The functions that differ, by name and line; ``None`` if more than that differs."""
    pairs = list(itertools.zip_longest(functions(source), functions(mutant)))
    if outside(source) != outside(mutant):
        return None
    changed = {(a.co_qualname, a.co_firstlineno): (a, b) for a, b in pairs if a != b}
    if any(a.co_freevars != b.co_freevars for a, b in changed.values()):
        return None
    return {name: new for name, (_, new) in changed.items()}


def living(path: Path) -> dict[tuple[str, int], list[FunctionType]]:
    """All functions that a file has made, by name and line."""
    found: dict[tuple[str, int], list[FunctionType]] = {}
    for thing in gc.get_objects():
        if type(thing) is FunctionType and thing.__code__.co_filename == str(path):
            code = thing.__code__
            found.setdefault((code.co_qualname, code.co_firstlineno), []).append(thing)
    return found


# -- replaced modules ------------------------------------------------------------------------------


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


# -- tests -----------------------------------------------------------------------------------------


class Forked:
    """A pytest plugin that lends the collected tests to ``work`` in place of running them."""

    def __init__(self, work: Callable[[Forked], object]) -> None:
        self.work = work
        self.items: dict[str, Any] = {}
        self.begun = mmap.mmap(-1, 4096)  # shared with the forks

    def pytest_runtestloop(self, session: Any) -> bool:
        """Called by pytest once it has collected the tests."""
        self.items = {item.nodeid: item for item in session.items}
        self.work(self)
        return True

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Called by pytest before each test."""
        self.begun[:] = nodeid.encode().ljust(len(self.begun))

    @property
    def last(self) -> str:
        """The test that began last, here or in a fork."""
        return self.begun[:].decode().strip()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """The first failure ends the fork."""
        if report.failed:
            os._exit(1)

    def run(self, names: Iterable[str]) -> Iterator[str]:
        """Runs tests and yields the name of each one as it begins."""
        chosen = [self.items[name] for name in names if name in self.items]
        for item, following in zip(chosen, [*chosen[1:], None], strict=True):
            yield item.nodeid
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)


def forked(work: Callable[[], None], seconds: float) -> bool:
    """Whether ``work`` comes to its end in a fork, in so many seconds of processor time."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    try:
        limit = int(seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        work()
        os._exit(0)
    finally:
        os._exit(99)


def reach(tests: Forked, file: Path) -> None:
    """Writes how long each test takes, and which tests reach each line of the targets."""
    from coverage import Coverage

    measure = Coverage(data_file=None, config_file=False, include=[str(ROOT / PACKAGE / "*")])
    seconds: dict[str, float] = {}
    measure.start()
    last, began = None, time.process_time()
    for name in itertools.chain(tests.run(tests.items), [None]):
        now = time.process_time()
        if last is not None:
            seconds[last] = now - began
        last, began = name, now
        if name is not None:
            measure.switch_context(name)
    measure.stop()
    data = measure.get_data()
    lines = {
        target: data.contexts_by_lineno(str(ROOT / PACKAGE / target)) or {} for target in TARGETS
    }
    file.write_text(json.dumps({"seconds": seconds, "lines": lines}))


class Reach:
    """Which tests reach a line, and in which order they run."""

    def __init__(self, file: Path) -> None:
        known = json.loads(file.read_text())
        self.seconds: dict[str, float] = known["seconds"]
        self.lines: dict[str, dict[str, list[str]]] = known["lines"]
        lines = [tests for of_file in self.lines.values() for tests in of_file.values()]
        number = Counter(itertools.chain.from_iterable(lines))
        self.rank = {test: number[test] * seconds for test, seconds in self.seconds.items()}

    def __call__(self, target: str, line: int, seconds: float, killers: list[str]) -> list[str]:
        """Tests of a line, or else of the one before it, as many as these seconds suffice for.

        A line that runs when the module is imported has those of the whole file.
        First those of ``killers``, then the module's, then one of each other file in turn; of a
        file, those that are quick and reach little come first.
        """
        lines = self.lines[target]
        above = (lines[str(n)] for n in range(line, 0, -1) if str(n) in lines)
        tests = [test for test in next(above, []) if test]
        tests = tests or list({test for tests in lines.values() for test in tests if test})
        stem = "updater" if target.startswith(("update/", "transaction")) else Path(target).stem
        tests.sort(key=self.rank.__getitem__)
        files: dict[str, list[str]] = {}
        for test in tests:
            files.setdefault(test.partition("::")[0], []).append(test)
        own = [tests for file, tests in files.items() if file.startswith(f"tests/test_{stem}")]
        in_turn = itertools.zip_longest(*files.values())
        known = [test for test in killers if test in tests]
        ordered = itertools.chain(known, *own, *in_turn)
        tests = [test for test in dict.fromkeys(ordered) if test]
        total = itertools.accumulate(self.seconds[test] for test in tests)
        return [test for test, sum_ in zip(tests, total, strict=True) if sum_ <= seconds]


# -- mutants ---------------------------------------------------------------------------------------


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


class Check:
    """The mutants that have no verdict yet, and how they get one."""

    def __init__(self, verdicts: Path, options: argparse.Namespace) -> None:
        self.verdicts, self.seconds = verdicts, options.seconds
        self.reach = verdicts.with_suffix(".reach.json")
        self.others = verdicts.with_suffix(".others.json")
        self.killers: dict[str, list[tuple[int, str]]] = {target: [] for target in TARGETS}
        known = {}
        if verdicts.exists():
            for entry in map(json.loads, verdicts.read_text().splitlines()):
                known[entry["file"], entry["mutant"]] = entry["verdict"]
                if entry["by"]:
                    self.killers[entry["file"]].append((entry["line"], entry["by"]))
        wanted = "survived" if options.again else None
        self.todo = [
            (target, line, name, make)
            for target, line, name, make in lines_first(options.targets)
            if known.get((target, name)) == wanted
            and re.search(options.only, f"{target}:{line}: {name}")
        ]

    def likely(self, target: str, line: int) -> list[str]:
        """The tests that have killed mutants of this file, those of the nearest lines first."""
        nearest = sorted(self.killers[target], key=lambda killer: abs(killer[0] - line))
        return [test for _, test in nearest]

    def note(self, target: str, line: int, name: str, survived: bool, last: str) -> None:
        """Writes a verdict down, and says who has survived."""
        verdict = "survived" if survived else "killed"
        by = "" if survived else last
        entry = {"file": target, "line": line, "mutant": name, "verdict": verdict, "by": by}
        with self.verdicts.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        if by:
            self.killers[target].append((line, by))
        if survived:
            say(f"{target}:{line}: {name}")

    def code(self, tests: Forked) -> None:
        """Tries the mutants that are one function's code."""
        if not self.reach.exists() and not forked(lambda: reach(tests, self.reach), 3600):
            sys.exit("The tests fail as it is.")
        reached = Reach(self.reach)
        alive = {target: living(ROOT / PACKAGE / target) for target in TARGETS}
        gc.freeze()
        others = []
        newer = [name for name in tests.items if name not in reached.seconds]
        for target, line, name, make in self.todo:
            path = ROOT / PACKAGE / target
            source = compile(path.read_text(), str(path), "exec", dont_inherit=True)
            mutant = compile(make(), str(path), "exec", dont_inherit=True)
            changed = replacements(source, mutant)
            if changed is None or not changed.keys() <= alive[target].keys():
                others.append((target, name))
                continue
            likely = self.likely(target, line)
            newer.sort(key=lambda test: likely.index(test) if test in likely else len(likely))
            chosen = reached(target, line, self.seconds, likely) + newer

            def work(
                changed: dict[tuple[str, int], CodeType] = changed,
                alive: dict[tuple[str, int], list[FunctionType]] = alive[target],
                chosen: list[str] = chosen,
            ) -> None:
                for place, code in changed.items():
                    for function in alive[place]:
                        function.__code__ = code
                deque(tests.run(chosen))

            survived = forked(work, 3 * self.seconds + 10)
            self.note(target, line, name, survived, tests.last)
        self.others.write_text(json.dumps(others))

    def modules(self) -> None:
        """Tries the others."""
        reached = Reach(self.reach)
        others = {tuple(other) for other in json.loads(self.others.read_text())}
        for target, line, name, make in self.todo:
            if (target, name) not in others:
                continue
            chosen = reached(target, line, self.seconds, self.likely(target, line))
            tree = make()
            tests = Forked(lambda tests: deque(tests.run(tests.items)))

            def work(
                target: str = target,
                tree: ast.Module = tree,
                chosen: list[str] = chosen,
                tests: Forked = tests,
            ) -> None:
                module = f"{PACKAGE}.{target.removesuffix('.py').replace('/', '.')}"
                sys.meta_path.insert(0, Finder(module, ROOT / PACKAGE / target, tree))
                if pytest_main([*OPTIONS, *chosen], [tests]):
                    os._exit(1)

            survived = not chosen or forked(work, 3 * self.seconds + 60)
            self.note(target, line, name, survived, tests.last)


def pytest_main(arguments: list[str], plugins: Iterable[Any] = ()) -> int:
    """Pytest's exit status."""
    return int(importlib.import_module("pytest").main(arguments, list(plugins)))


def say(words: str) -> None:
    """To whoever waits."""
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


def main() -> None:
    """Tries the mutants and writes the verdicts."""
    parser = argparse.ArgumentParser(description="Mutation check.")
    parser.add_argument("verdicts", type=Path, help="file of the verdicts, a line for each mutant")
    parser.add_argument("targets", nargs="*", default=TARGETS, help="files to break")
    parser.add_argument("--seconds", type=float, default=6.0, help="of tests for each mutant")
    parser.add_argument("--again", action="store_true", help="try the survivors so far")
    parser.add_argument(
        "--only", default="", help="whose 'file:line: name' this pattern is found in"
    )
    parser.add_argument("--tests", nargs="+", default=[], help="files to run in place of the usual")
    options = parser.parse_args()
    verdicts = options.verdicts.resolve()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    for module in HEAVY:
        importlib.import_module(module)
    # Started anew, a process would import what is not broken.
    ranks.METHOD, ranks.SECONDS = "fork", 20
    if options.tests:
        files = [*(f"tests/test_{name}.py" for name in options.tests), "-k", "not compiled"]
    else:
        files = [f"tests/test_{name}.py" for name in TESTS]
        files += [*QUICK, *(f"{PACKAGE}/{target}" for target in TARGETS)]
    child = os.fork()
    if not child:
        os._exit(pytest_main([*OPTIONS, *files], [Forked(Check(verdicts, options).code)]))
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
    Check(verdicts, options).modules()


if __name__ == "__main__":
    main()
