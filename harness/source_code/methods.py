"""Tell attributes that a method carries from one call to the next from those it sets anew.

An attribute is carried if a method of its class reads it before it sets it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from harness.source_code.name_flow import NameFlow

# What a tensor tells of itself beside its numbers; functions that draw or copy.
OF_SHAPE = (
    "shape",
    "size",
    "dim",
    "ndim",
    "numel",
    "device",
    "dtype",
    "len",
    "range",
    "isinstance",
)
COPIES = re.compile("rand|normal|perm|choice|sample|shuffle|uniform|copy|clone|detach|item$")


@functools.lru_cache(1000)
def carried_attributes(kind: type) -> frozenset[str]:
    """Return the attributes that a method of the class reads before it sets them."""
    return frozenset(name for _, flow in _methods(kind) for name in flow.exposed & flow.assigned)


@functools.lru_cache(1000)
def detached_attributes(kind: type) -> frozenset[str]:
    """Return those that a method reads without their graph before it sets them: `self.h.detach()`.

    A graph ends with its step, so what is carried on to the next one is detached there. What only
    the calls of one step carry on (a cell, for each element of a sequence) is not.
    """
    scope = vars(sys.modules.get(kind.__module__, inspect))
    return frozenset(
        name
        for _, flow in _methods(kind)
        for name in flow.assigned
        & (flow.detached | {name for by, name in flow.given if _detaches(scope.get(by))})
    )


def _detaches(function: Any) -> bool:
    try:
        return inspect.isfunction(function) and "detach" in inspect.getsource(function)
    except (OSError, TypeError):
        return False


@functools.lru_cache(1000)
def kept_attributes(kind: type) -> frozenset[str]:
    """Return those of `carried_attributes` that are made of what a method is given, or drawn.

    The first loss is one, and a noise that is drawn once. A table that is computed from sizes and
    devices is none: a restart computes the same.
    """
    made = {name for method, own in _method_nodes(kind) for name in _made_of_values(method, own)}
    return carried_attributes(kind) & made


def _made_of_values(method: ast.FunctionDef, own: str) -> set[str]:
    """Return the attributes of `own`, in a method, that are set to what depends on values."""
    known = {arg.arg for arg in ast.walk(method.args) if isinstance(arg, ast.arg)} - {own}
    made = set[str]()
    for node in ast.walk(method):
        if not isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) or not node.value:
            continue
        if not _depends(node.value, known):
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            for part in ast.walk(target):
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    known.add(part.id)
                elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                    made.add(part.attr)
    return made


def _depends(node: ast.AST, known: set[str]) -> bool:
    """Return whether an expression depends on the values of some names, or draws or copies."""
    if isinstance(node, ast.Attribute) and node.attr in OF_SHAPE:
        return False
    if isinstance(node, ast.Call):
        function = node.func
        name = getattr(function, "attr", getattr(function, "id", ""))
        if name in OF_SHAPE:
            return False
        if COPIES.search(name):
            return True
        if name.startswith("new_"):  # of its receiver only shape, type and device
            return False
        if name.startswith("to"):
            parts = [function.value] if isinstance(function, ast.Attribute) else node.args
            return any(_depends(part, known) for part in parts)
    if isinstance(node, ast.Name):
        return node.id in known
    return any(_depends(part, known) for part in ast.iter_child_nodes(node))


def is_told_the_epoch(value: Any) -> bool:
    """Return whether an object has a `set_epoch`, which is called again after a restart."""
    own = getattr(value, "__dict__", {})
    return not isinstance(value, type) and callable(
        own.get("set_epoch") or getattr(type(value), "set_epoch", None)
    )


@functools.lru_cache(1000)
def results(kind: type) -> frozenset[str]:
    """Return the attributes that methods of the class set, and never read before they set them."""
    own = {name for by, flow in _methods(kind) if by != "__init__" for name in flow.assigned}
    return frozenset(own - carried_attributes(kind))


@functools.lru_cache(1000)
def told_attributes(kind: type) -> frozenset[str] | None:
    """Return the attributes that `set_epoch` of the class, or a method that it calls, sets anew.

    A restart sets them again. What these methods read before they set it is left out. The result is
    None if no source code of a `set_epoch` is found.
    """
    methods = list(_methods(kind))
    names, told, carried = ["set_epoch"], set[str](), set[str]()
    for name in names:
        for own, flow in methods:
            if own == name:
                told, carried = told | flow.assigned, carried | (flow.exposed & flow.assigned)
                called = {other for other, _ in methods} & flow.exposed
                names += sorted(called.difference(names))
    return frozenset(told - carried) if any(own == "set_epoch" for own, _ in methods) else None


def _methods(kind: type) -> Iterator[tuple[str, NameFlow]]:
    """Yield the methods of a class and its bases, with what they do with their attributes.

    Classes without source code, and torch's `Module`, are left out.
    """
    for method, own in _method_nodes(kind):
        flow = NameFlow()
        flow.in_order(*method.body)
        yield method.name, flow.within(f"{own}.")


def _method_nodes(kind: type) -> Iterator[tuple[ast.FunctionDef, str]]:
    """Yield the methods of a class and its bases, each with the name of its first argument."""
    for base in kind.__mro__:
        if base.__module__ in ("builtins", "torch.nn.modules.module"):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError, ValueError, RecursionError):
            continue
        for method in ast.walk(tree):
            if isinstance(method, ast.FunctionDef) and method.args.args:
                yield method, method.args.args[0].arg
