"""Tell the names that statements set before they read them."""

from __future__ import annotations

import ast
from typing import Any

DETACHES = ("detach", "detach_", "data")  # attributes of a tensor that has a graph


class NameFlow(ast.NodeVisitor):
    """A visitor of statements in the order of execution.

    A name is stored once each way to this point has stored it; each inner loop is assumed to run.
    An attribute of a name counts as a name: "self.center".
    """

    def __init__(self) -> None:
        self.stored: set[str] = set()
        self.assigned: set[str] = set()  # names that are stored on some way
        self.exposed: set[str] = set()  # names that are read before they are stored
        self.detached: set[str] = set()  # those of them that are read without their graph
        self.given: set[tuple[str, str]] = set()  # function and name: its only argument
        self.alias: dict[str, str] = {}  # by variable: the attribute that it was read from

    def within(self, prefix: str) -> NameFlow:
        """Return what is done with the names that begin so, without that beginning."""
        own = NameFlow()
        for word in ("assigned", "exposed", "detached"):
            names = vars(self)[word]
            vars(own)[word] |= {
                name.removeprefix(prefix) for name in names if name.startswith(prefix)
            }
        own.given.update((by, name.removeprefix(prefix)) for by, name in self.given)
        return own

    def _attribute(self, node: ast.AST) -> str | None:
        """Return the attribute that an expression is, or was read from, if it is not stored yet."""
        if isinstance(node, ast.Name):
            return self.alias.get(node.id)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            return name if name not in self.stored else None
        return None

    def _name(self, target: ast.AST, value: ast.AST) -> None:
        """Note variables that are given an attribute, or the parts of one."""
        source = self._attribute(value)
        for name in ast.walk(target):
            if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                self.alias.pop(name.id, None)
                self.alias |= {name.id: source} if source else {}

    def _use(self, name: str, *, is_read: bool) -> None:
        if is_read:
            self.exposed |= {name} - self.stored
        else:
            self.stored.add(name)
            self.assigned.add(name)

    def visit_Name(self, node: ast.Name) -> None:
        self._use(node.id, is_read=isinstance(node.ctx, ast.Load))

    def visit_Call(self, node: ast.Call) -> None:
        """Note a function that is called with an attribute alone: it may detach it."""
        source = self._attribute(node.args[0]) if len(node.args) == 1 else None
        if source and isinstance(node.func, ast.Name):
            self.given.add((node.func.id, source))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in DETACHES and (source := self._attribute(node.value)):
            self.detached.add(source)
        if isinstance(node.value, ast.Name):
            self._use(f"{node.value.id}.{node.attr}", is_read=isinstance(node.ctx, ast.Load))
        self.visit(node.value)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self._name(node.target, node.iter)
        self.in_order(node.target, *node.body, *node.orelse)

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        self._either(node.body, node.orelse)

    def visit_Try(self, node: ast.Try) -> None:
        self._either([*node.body, *node.orelse], *(handler.body for handler in node.handlers))
        self.in_order(*node.finalbody)

    def visit_Match(self, node: ast.Match) -> None:
        self.visit(node.subject)
        self._either([], *([case.pattern, *case.body] for case in node.cases))

    def _either(self, *ways: list[Any]) -> None:
        """Visit statements of which one list is executed; what all of them store is stored.

        A way that leaves the loop or the function does not count.
        """
        before, ends = set(self.stored), []
        for way in ways:
            self.stored = set(before)
            self.in_order(*way)
            if not (way and isinstance(way[-1], ast.Continue | ast.Break | ast.Return | ast.Raise)):
                ends.append(self.stored)
        self.stored = set.intersection(*ends) if ends else before

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self._name(target, node.value)
        self.in_order(*node.targets)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.in_order(*filter(None, (node.value, node.target if node.value else None)))

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.in_order(node.value, node.target)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):
            self._use(node.target.id, is_read=True)
        elif isinstance(node.target, ast.Attribute) and isinstance(node.target.value, ast.Name):
            self._use(f"{node.target.value.id}.{node.target.attr}", is_read=True)
        self.in_order(node.value, node.target)

    def visit_FunctionDef(
        self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef
    ) -> None:
        """Store only the name: a function looks up what it uses when it is called."""
        if not isinstance(node, ast.Lambda):
            self._use(node.name, is_read=False)

    # `ast.NodeVisitor` prescribes these names.
    visit_AsyncFunctionDef = visit_Lambda = visit_ClassDef = visit_FunctionDef  # noqa: N815

    def visit_ListComp(
        self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp
    ) -> None:
        within = NameFlow()
        within.stored |= self.stored
        within.alias.update(self.alias)
        for part in node.generators:
            within._name(part.target, part.iter)
            within.in_order(part.iter, part.target, *part.ifs)
        within.in_order(
            *((node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,))
        )
        self.exposed |= within.exposed
        self.detached |= within.detached
        self.given |= within.given

    visit_SetComp = visit_GeneratorExp = visit_DictComp = visit_ListComp  # noqa: N815

    def in_order(self, *nodes: ast.AST) -> None:
        """Visit the nodes in the given order."""
        for node in nodes:
            self.visit(node)
