"""Find variables that a loop carries from one step to the next: it reads them before it sets them.

They begin anew after a restart, like the plain values of the loop's objects (see `finder`). Many
are only for display (a mean that is printed), others affect training (a hidden state, the patience
of early stopping). Only the author of the loop knows which, so all of them are reported. Variables
are found in the source code, if it is available.
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
MOST_SOURCE = 1 << 20  # characters; longer source code is not parsed


class LoopVariables:
    """The carried variables of the frames that run the loop, as they were before its first step."""

    def __init__(self, frames: Iterable[tuple[str, FrameType]]) -> None:
        """Record the carried variables of the frames.

        Each frame comes after the prefix of its variables' names: "train.py: main(): ".
        """
        # By code object: the prefix, and the fingerprint of each variable.
        self._names: dict[CodeType, tuple[str, dict[str, Any]]] = {}
        for spelled, frame in frames:
            if names := variables(frame):
                local = values_of(frame)
                self._names[frame.f_code] = (
                    spelled,
                    {name: fingerprint(local[name]) for name in names if name in local},
                )

    def changed(self, frame: FrameType | None) -> list[str]:
        """Return the names of the variables that have changed, each only once.

        Args:
            frame: the innermost frame at present.
        """
        found = []
        while frame is not None and self._names:
            if frame.f_code in self._names:
                spelled, before = self._names[frame.f_code]
                local = values_of(frame)
                names = [
                    name
                    for name, was in before.items()
                    if _is_value(local.get(name)) and fingerprint(local[name]) != was
                ]
                found += [spelled + name for name in names]
                for name in names:
                    del before[name]
            frame = frame.f_back
        return found


def values_of(frame: FrameType) -> dict[str, Any]:
    """Return the variables of a frame, and keep no other reference to their values."""
    local = frame.f_locals
    found = dict(local)
    if (
        frame.f_code.co_flags & inspect.CO_OPTIMIZED
        and type(local) is dict
        and sys.gettrace() is None
        and sys.getrefcount(local) <= 3
    ):
        # Before Python 3.13 this is a copy, which would keep objects alive that the program frees.
        local.clear()
    return found


def _is_value(value: Any) -> bool:
    """Return whether a value is plain or an array; also a short list or tuple of such values."""
    if isinstance(value, list | tuple):
        return len(value) <= 100 and all(map(_is_value, value))
    return isinstance(value, VALUES) and value is not None


def variables(frame: FrameType) -> set[str]:
    """Return the variables that the loop around a frame's current line carries along.

    The loop, the outermost one around that line, both sets them and reads them before it sets them.
    The set is empty if there is no source code or no loop.
    """
    try:
        lines, first = inspect.getsourcelines(frame)
        source = textwrap.dedent("".join(lines))
        tree = ast.parse(source) if len(source) <= MOST_SOURCE else ast.Module([], [])
    except (OSError, TypeError, SyntaxError, ValueError, RecursionError):
        return set()
    line = frame.f_lineno - max(first, 1) + 1
    loops = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.For | ast.While) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    if not loops:
        return set()
    outermost = min(loops, key=lambda node: node.lineno)
    flow = _Flow()
    flow.visit(outermost)
    return flow.exposed & flow.stored


class _Flow(ast.NodeVisitor):
    """A visitor of statements in the order of execution.

    It assumes that each branch is taken and that each inner loop runs.
    """

    def __init__(self) -> None:
        self.stored: set[str] = set()
        self.exposed: set[str] = set()  # names that are read before they are stored

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

    def visit_FunctionDef(
        self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef
    ) -> None:
        """Store only the name: a function looks up what it uses when it is called."""
        if not isinstance(node, ast.Lambda):
            self.stored.add(node.name)

    # `ast.NodeVisitor` prescribes these names.
    visit_AsyncFunctionDef = visit_Lambda = visit_ClassDef = visit_FunctionDef  # noqa: N815

    def visit_ListComp(
        self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp
    ) -> None:
        within = _Flow()
        within.stored |= self.stored
        for part in node.generators:
            within._in_order(part.iter, part.target, *part.ifs)
        within._in_order(
            *((node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,))
        )
        self.exposed |= within.exposed

    visit_SetComp = visit_GeneratorExp = visit_DictComp = visit_ListComp  # noqa: N815

    def _in_order(self, *nodes: ast.AST) -> None:
        """Visit the nodes in the given order."""
        for node in nodes:
            self.visit(node)
