"""Private names of TorchRL and tensordict: in ``versions.py``, with the versions they hold for.

Read from the source. A name with one underscore belongs to whoever defines it: code may use those
of its own module, and of its own classes by ``self``. Blind to names that are put together, and to
a private attribute of a parent class that a class of ours sets as well.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import torchrl_happo

ROOT = Path(torchrl_happo.__file__).parent
ADAPTER = ROOT / "versions.py"
#: Public whatever their names look like: namedtuples are documented with them.
OF_NAMEDTUPLES = {"_asdict", "_field_defaults", "_fields", "_make", "_replace"}
#: Torch's and Python's own, which do not change with TorchRL: mostly the slots of a module.
OF_TORCH = {"_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"}
OF_TORCH |= {"_backward_hooks", "_backward_pre_hooks", "_post_accumulate_grad_hooks"}
OF_TORCH |= {"_BatchNorm", "_DropoutNd", "_closed", "_dynamo", "_foreach_copy_"}
#: Methods that TorchRL and torch document as what a subclass overrides, and may call of its parent.
OVERRIDDEN = {"_reset", "_step", "_set_seed", "_call", "_inv_call", "_load_from_state_dict"}
OVERRIDDEN |= {"_build_env", "_build_single_net"}
#: What Python and TorchRL write into each class by themselves.
WRITTEN = {"_abc_impl", "_all_schedulable_buffers", "_is_protocol"}
#: Environments, once one of them has been built in the process.
WRITTEN |= {"_batch_locked", "_cache_in_keys", "_device", "_inplace_update"}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def is_own(node):
    """Whether an expression is ``self``, ``cls`` or ``super()``."""
    if isinstance(node, ast.Call):
        node = node.func
    return isinstance(node, ast.Name) and node.id in ("self", "cls", "super")


class Names(ast.NodeVisitor):
    """The private names that a module defines, and those that it uses of others."""

    def __init__(self):
        self.defined, self.own, self.foreign = set(), [], []

    def define(self, name):
        if is_private(name):
            self.defined.add(name)

    def visit_FunctionDef(self, node):
        self.define(node.name)
        self.generic_visit(node)

    visit_ClassDef = visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Store):  # of a module or a class
            self.define(node.id)

    def visit_Attribute(self, node):
        self.generic_visit(node)
        if not is_private(node.attr):
            return
        if is_own(node.value) and isinstance(node.ctx, ast.Store):
            self.define(node.attr)
        else:
            uses = self.own if is_own(node.value) else self.foreign
            uses.append((node.attr, node.lineno))

    def visit_Call(self, node):
        self.generic_visit(node)
        function = getattr(node.func, "id", None)
        if function in ("getattr", "setattr", "hasattr", "delattr") and len(node.args) > 1:
            name = getattr(node.args[1], "value", None)
            if isinstance(name, str) and is_private(name):
                uses = self.own if is_own(node.args[0]) else self.foreign
                uses.append((name, node.lineno))

    def visit_ImportFrom(self, node):
        parts = (node.module or "").split(".")
        if parts[0] in ("torchrl", "tensordict"):
            names = [*parts, *(alias.name for alias in node.names)]
            self.foreign += [(name, node.lineno) for name in names if is_private(name)]


def uses(sources):
    """Return where a package uses private names that are not its own, by file."""
    read = {}
    for path, text in sources.items():
        read[path] = Names()
        read[path].visit(ast.parse(text))
    own = OVERRIDDEN.union(*(names.defined for names in read.values()))
    known = OF_NAMEDTUPLES | OF_TORCH
    found = []
    for path, names in read.items():
        found += [(path, *use) for use in names.foreign if use[0] not in names.defined | known]
        found += [(path, *use) for use in names.own if use[0] not in own | known]
    return found


def test_private_names_are_in_one_module():
    """Nobody else reads, writes or imports one."""
    files = [path for path in ROOT.rglob("*.py") if path != ADAPTER]
    assert uses({str(path.relative_to(ROOT)): path.read_text() for path in files}) == []


def test_the_check_sees_them():
    """Of another object, of a parent class, by ``getattr``, and imported; not those of its own."""
    text = """
from torchrl._utils import logger
from tensordict.nn import _set
class Policy(Base):
    _ours = 1
    def __init__(self, other: "Policy"):
        self._kept = other._kept + self._ours
        super()._reset()
    def call(self, buffer, named):
        buffer._writes = buffer._reads
        self._parent()
        super()._parents()
        return getattr(buffer, "_gets", None), named._replace(x=1), buffer.public
"""
    other = "x = policy._ours"  # in another module it is not its own
    names = [name for _, name, _ in uses({"one.py": text, "two.py": other})]
    assert sorted(names) == sorted(
        ["_utils", "_set", "_writes", "_reads", "_gets", "_parent", "_parents", "_ours"]
    )


def classes():
    """All classes of the package, once."""
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        if not {"benchmarl", "examples"} & set(parts):
            module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
            for value in vars(module).values():
                if isinstance(value, type) and value.__module__ == module.__name__:
                    yield value


def test_no_private_name_of_a_parent_is_defined_again():
    """TorchRL's own code would run ours by a name that may mean another thing tomorrow."""
    found = {}
    for kind in classes():
        parents = [b for b in kind.__mro__ if b.__module__.startswith(("torchrl.", "tensordict."))]
        taken = {name for parent in parents for name in vars(parent) if is_private(name)}
        again = taken & set(vars(kind)) - OVERRIDDEN - WRITTEN
        if again:
            found[kind.__qualname__] = sorted(again)
    assert found == {}
