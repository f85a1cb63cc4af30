"""What a loop carries from one step to the next by itself: variables that it reads before it sets them, and plain values of its objects.

They begin anew after a restart. Many are for the eye (a mean that is printed), some decide about training (a hidden state, the patience of
an early stop): only whoever wrote the loop knows, so they are named. Variables are found in the source, as far as there is one.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterable
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch

from harness.untracked.unkept_values import PLAIN, fingerprint

VALUES = (*PLAIN, torch.Tensor, np.ndarray, np.generic)
MOST_SOURCE = 1 << 20  # characters that are parsed


class LoopVariables:
    """The variables of the frames that the loop runs in, as they were before its first step."""

    def __init__(self, frames: Iterable[tuple[str, FrameType]]) -> None:
        """`frames` come with the beginning of how a variable of theirs is written."""
        self._names: dict[CodeType, tuple[str, dict[str, Any]]] = {}  # by code: before each name; its value then
        for spelled, frame in frames:
            if names := variables(frame):
                local = values_of(frame)
                self._names[frame.f_code] = spelled, {name: fingerprint(local[name]) for name in names if name in local}

    def changed(self, frame: FrameType | None) -> list[str]:
        """The names of those that have changed, each once; `frame` is the innermost one now."""
        found = []
        while frame is not None and self._names:
            if frame.f_code in self._names:
                spelled, before = self._names[frame.f_code]
                local = values_of(frame)
                names = [name for name, was in before.items() if _is_value(local.get(name)) and fingerprint(local[name]) != was]
                found += [spelled + name for name in names]
                for name in names:
                    del before[name]
            frame = frame.f_back
        return found


def values_of(frame: FrameType) -> dict[str, Any]:
    """The variables of a frame; nothing stays of them but what is returned."""
    local = frame.f_locals
    found = dict(local)
    if frame.f_code.co_flags & inspect.CO_OPTIMIZED and type(local) is dict and sys.gettrace() is None and sys.getrefcount(local) <= 3:
        local.clear()  # of Python before 3.13 a copy, which would keep alive what the program lets go
    return found


def _is_value(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= 100 and all(map(_is_value, value))
    return isinstance(value, VALUES) and value is not None


def variables(frame: FrameType) -> set[str]:
    """The variables that the loop around the line in which a frame stands both sets and reads before it sets them; none if there is no
    source or no loop."""
    try:
        lines, first = inspect.getsourcelines(frame)
        source = textwrap.dedent("".join(lines))
        tree = ast.parse(source) if len(source) <= MOST_SOURCE else ast.Module([], [])
    except (OSError, TypeError, SyntaxError, ValueError, RecursionError):
        return set()
    line = frame.f_lineno - max(first, 1) + 1
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For | ast.While) and node.lineno <= line <= (node.end_lineno or 0)]
    if not loops:
        return set()
    outermost = min(loops, key=lambda node: node.lineno)
    flow = _Flow()
    flow.visit(outermost)
    return flow.exposed & flow.stored


class _Flow(ast.NodeVisitor):
    """Goes through statements in the order in which they are run, as if each branch was taken and each inner loop run."""

    def __init__(self) -> None:
        self.stored: set[str] = set()
        self.exposed: set[str] = set()  # read before they were stored

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.exposed |= {node.id} - self.stored
        else:
            self.stored.add(node.id)

    def visit_For(self, node: ast.For) -> None:
        self._in_order(node.iter, node.target, *node.body, *node.orelse)

    def visit_Assign(self, node: ast.Assign) -> None:
        self._in_order(node.value, *node.targets)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._in_order(*filter(None, (node.value, node.target if node.value else None)))

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._in_order(node.value, node.target)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):
            self.exposed |= {node.target.id} - self.stored
        self._in_order(node.value, node.target)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef) -> None:
        """What it uses is looked up when it is called."""
        if not isinstance(node, ast.Lambda):
            self.stored.add(node.name)

    visit_AsyncFunctionDef = visit_Lambda = visit_ClassDef = visit_FunctionDef  # noqa: N815 - as ast calls them

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        within = _Flow()
        within.stored |= self.stored
        for part in node.generators:
            within._in_order(part.iter, part.target, *part.ifs)
        within._in_order(*((node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,)))
        self.exposed |= within.exposed

    visit_SetComp = visit_GeneratorExp = visit_DictComp = visit_ListComp  # noqa: N815

    def _in_order(self, *nodes: ast.AST) -> None:
        for node in nodes:
            self.visit(node)
