"""What the documentation says of arguments is what the code does."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re

import pytest

import torchrl_happo


def documented():
    """Public classes and functions of the library whose arguments are documented."""
    modules = pkgutil.walk_packages(torchrl_happo.__path__, "torchrl_happo.")
    names = sorted(module.name for module in modules)
    if importlib.util.find_spec("benchmarl") is None:  # no extra of the newest versions
        names = [name for name in names if "benchmarl" not in name]
    for module in map(importlib.import_module, names):
        for name in getattr(module, "__all__", ()):
            item = getattr(module, name)
            call = item.__init__ if inspect.isclass(item) else item
            own = getattr(call, "__module__", None) == module.__name__
            if own and "Args:" in (inspect.getdoc(item) or ""):
                yield pytest.param(item, id=f"{module.__name__.partition('.')[2]}.{name}")


SECTION = re.compile(r"^(?:Keyword )?Args:\n((?:    .*\n|\n)+)", re.MULTILINE)
ENTRY = re.compile(r"^    ([\w, *\n]+?)(?: \(.*?\))?: (.*\n(?:     .*\n|\n)*)", re.MULTILINE)
DEFAULT = re.compile(r"Defaults to ``(.+?)``")


def arguments(text):
    """The arguments of a docstring in Google's style, and what is said of each."""
    for section in SECTION.findall(text + "\n"):
        for names, words in ENTRY.findall(section):
            for name in names.split(","):
                yield name.strip(" *\n"), " ".join(words.split())


@pytest.mark.parametrize("item", list(documented()))
def test_arguments_and_defaults(item):
    """All arguments are documented, no others, and with the defaults that they have."""
    words = dict(arguments(inspect.getdoc(item)))
    call = item.__init__ if inspect.isclass(item) else item  # environments have a metaclass
    known = {k: p.default for k, p in inspect.signature(call).parameters.items() if k != "self"}
    assert words.keys() == known.keys()
    for name, default in known.items():
        said = DEFAULT.search(words[name])
        if said and not re.match(r"[a-z]", said[1]):  # a literal, not an expression
            assert default == ast.literal_eval(said[1]), name
