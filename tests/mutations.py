"""The small changes that ``mutants.py`` tries: what may stand in the place of what."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

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
