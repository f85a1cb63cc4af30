"""Tell variables that a loop carries from one step to the next from those it sets anew.

A variable is carried if the loop reads it before it sets it. The same holds for an attribute in a
method of its class. Both are found in the source code, if it is available.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import linecache
import re
import sys
import textwrap
from collections.abc import Iterator
from types import FrameType, FunctionType
from typing import Any, NamedTuple

DETACHES = ("detach", "detach_", "data")  # attributes of a tensor that has a graph
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
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
MOST_SOURCE = 1 << 20  # characters; longer source code is not parsed
OF_THE_RUN = ("by_epoch", "batches", "steps")  # methods of a run that a loop goes over
POSITIONS = ("batch", "step", "epoch")  # attributes of a run, from which a program may count on
# Functions that only show what they are given.
SHOWN = ("print", "write", "info", "debug", "log", "set_postfix", "set_description", "add_scalar")


class LoopNames(NamedTuple):
    """Variables of a frame that its loops set.

    Of those in `passing` nothing is left from one step to the next. Those in `carried` hold a value
    that an earlier step has set.
    """

    passing: set[str]
    carried: set[str]


def names_of(frame: FrameType) -> LoopNames | None:
    """Return the variables that the loops around a frame's current line set.

    The outermost loop sets a passing variable before it reads it, and no loop inside it around that
    line carries it: a sum that an outer loop over epochs sets to 0 is carried by the inner loop
    over batches. A variable that is set at times only is carried, too, if a function reads it, or
    what follows the loop. None: there is no source code. The names are empty if there is no loop.
    """
    loops, tree = _loops_around(frame)
    if not loops or tree is None:
        return None if tree is None else LoopNames(set(), set())
    flows = [_Flow() for _ in loops]
    for flow, loop in zip(flows, loops, strict=True):
        flow.visit(loop)
    outermost = flows[0]
    carried = set[str]().union(*(flow.assigned & flow.exposed for flow in flows))
    own = tree.body[0] if frame.f_code.co_flags & inspect.CO_OPTIMIZED else None
    carried |= (outermost.assigned - outermost.stored) & _read_elsewhere(tree, own, loops[0])
    return LoopNames(outermost.assigned - carried, carried)


def _read_elsewhere(tree: ast.AST, own: ast.AST | None, loop: ast.For | ast.While) -> set[str]:
    """Return the variables that functions in a tree but `own` read, or what follows a loop."""
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS) and node is not own:
            names |= _read_from_outside(node)
        elif isinstance(node, ast.Name) and node.lineno > (loop.end_lineno or 0):
            names |= {node.id} if isinstance(node.ctx, ast.Load) else set()
    return names


def _read_from_outside(function: ast.AST) -> set[str]:
    """Return the names that a function reads and does not set, or declares not to be its own."""
    within = [*ast.walk(function)]
    names = [node for node in within if isinstance(node, ast.Name)]
    own = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    own |= {node.arg for node in within if isinstance(node, ast.arg)}
    return {node.id for node in names if isinstance(node.ctx, ast.Load)} - (own - _declared(within))


def _declared(nodes: list[ast.AST]) -> set[str]:
    """Return the names that are declared to be those of a module or of an outer function."""
    return {
        name for node in nodes if isinstance(node, ast.Global | ast.Nonlocal) for name in node.names
    }


@functools.lru_cache(1000)
def carried_outside(function: FunctionType) -> frozenset[str]:
    """Return the names outside a function that it reads before it sets them.

    These are variables of its module or of an outer function, and its own attributes.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError, RecursionError):
        return frozenset()
    own = next((node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)), None)
    if own is None:
        return frozenset()
    flow, outside = _Flow(), _declared([*ast.walk(own)])
    flow.in_order(*own.body)
    carried, prefix = flow.assigned & flow.exposed, f"{own.name}."
    return frozenset(
        name.removeprefix(prefix) for name in carried if name in outside or name.startswith(prefix)
    )


def _loops_around(frame: FrameType) -> tuple[list[ast.For | ast.While], ast.Module | None]:
    """Return the loops around a frame's current line, outermost first, and the source code.

    The latter is None if there is none.
    """
    try:
        lines, first = _source_lines(frame)
        source = textwrap.dedent("".join(lines))
        tree = ast.parse(source) if len(source) <= MOST_SOURCE else None
    except (OSError, TypeError, SyntaxError, ValueError, RecursionError):
        return [], None
    if tree is None:
        return [], None
    line = frame.f_lineno - max(first, 1) + 1
    loops = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.For | ast.While) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    return sorted(loops, key=lambda node: node.lineno), tree


def counted_anew(frame: FrameType) -> list[str]:
    """Return what loops around a frame's current line count or read beside the batches of a run.

    These are the counters of `enumerate`, and the other arguments of `zip`, if the body of the loop
    reads them. An iterator that is made at the beginning of a loop begins anew after a restart.
    """
    found = list[str]()
    loops = [loop for loop in _loops_around(frame)[0] if isinstance(loop, ast.For)]
    requests = dis.opname[frame.f_code.co_code[frame.f_lasti]] == "FOR_ITER"
    for loop in loops:
        if (requests and loop is loops[-1]) or _is_of_run(loop.iter, frame):
            found += _beside(loop.iter, loop.target, loop.body, frame)
    return found


def _beside(
    made: ast.expr, target: ast.expr | None, body: list[ast.stmt], frame: FrameType
) -> Iterator[str]:
    """Yield the counters and further arguments in the expression that a loop goes over.

    Args:
        made: The expression, or a part of it.
        target: What the loop sets to its items; None if that is not known.
        body: The body of the loop.
        frame: The frame with the variables.
    """
    if not isinstance(made, ast.Call):
        return
    name, args = _name_of(made.func), made.args
    parts = list(target.elts) if isinstance(target, ast.Tuple | ast.List) else []
    if name == "enumerate" and isinstance(made.func, ast.Name) and args:
        given = [*args[1:], *(keyword.value for keyword in made.keywords)]
        if not any(map(_goes_on, given)) and _is_read(parts[0] if parts else None, body):
            counter = ast.unparse(parts[0]) if parts else "the counter"
            yield f"{counter} of {ast.unparse(made)}"
        yield from _beside(args[0], parts[1] if len(parts) == 2 else None, body, frame)
    elif name == "zip":
        of_each = parts if len(parts) == len(args) else [None] * len(args)
        others = [
            isinstance(arg, ast.Call) and _name_of(arg.func) in ("count", "range")
            for arg, each in zip(args, of_each, strict=True)
            if not (_is_of_run(arg, frame) or _goes_on(arg)) and _is_read(each, body)
        ]
        # One of the arguments is the batches, maybe one that cannot be told by its name.
        is_known = any(others) or any(_is_of_run(arg, frame) for arg in args)
        if len(others) > (not is_known):
            yield ast.unparse(made)
        for arg, each in zip(args, of_each, strict=True):
            yield from _beside(arg, each, body, frame)
    else:  # a progress bar, say
        for arg in args:
            yield from _beside(arg, target, body, frame)


def _name_of(func: ast.expr) -> str:
    return func.id if isinstance(func, ast.Name) else getattr(func, "attr", "")


def _is_of_run(made: ast.expr, frame: FrameType) -> bool:
    """Return whether an expression has batches or epochs of a run in it."""

    def module_of(node: ast.expr) -> str:
        name = node.id if isinstance(node, ast.Name) else ""
        return type(frame.f_locals.get(name, frame.f_globals.get(name))).__module__

    return any(
        (isinstance(node, ast.Name) and module_of(node) == "harness.run.epochs")
        or (
            isinstance(node, ast.Attribute)
            and node.attr in OF_THE_RUN
            and (node.attr == "by_epoch" or module_of(node.value) == "harness.run.api")
        )
        for node in ast.walk(made)
    )


def _goes_on(made: ast.expr) -> bool:
    """Return whether a value follows from a run's position, or is the same for each item."""
    if isinstance(made, ast.Call) and _name_of(made.func) == "repeat":
        return True
    return any(
        isinstance(node, ast.Attribute) and node.attr in POSITIONS for node in ast.walk(made)
    )


def _is_read(target: ast.expr | None, body: list[ast.stmt]) -> bool:
    """Return whether a loop reads what it sets, other than to show it."""
    if target is None:
        return True
    names = {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names:
            return True
        if not _is_shown(node):
            waiting += ast.iter_child_nodes(node)
    return False


def _is_shown(node: ast.AST) -> bool:
    """Return whether a statement only shows something, maybe under a condition."""
    if isinstance(node, ast.If):
        return not node.orelse and all(map(_is_shown, node.body))
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and _name_of(call.func) in SHOWN


def _source_lines(frame: FrameType) -> tuple[list[str], int]:
    """Return the source code of a frame's function or file, and the number of its first line.

    `inspect.getsourcelines` goes through all modules for each frame.
    """
    code = frame.f_code
    lines = linecache.getlines(code.co_filename, frame.f_globals)
    if not lines:
        raise OSError(f"no source code of {code.co_filename}")
    if code.co_name == "<module>":
        return lines, 0
    return inspect.getblock(lines[code.co_firstlineno - 1 :]), code.co_firstlineno


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
        if name.startswith("to") or name.startswith("new_"):  # a receiver of these may count
            parts = [function.value] if isinstance(function, ast.Attribute) else node.args
            return name.startswith("to") and any(_depends(part, known) for part in parts)
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


def _methods(kind: type) -> Iterator[tuple[str, _Flow]]:
    """Yield the methods of a class and its bases, with what they do with their attributes.

    Classes without source code, and torch's `Module`, are left out.
    """
    for method, own in _method_nodes(kind):
        flow = _Flow()
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


class _Flow(ast.NodeVisitor):
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

    def within(self, prefix: str) -> _Flow:
        """Return what is done with the names that begin so, without that beginning."""
        own = _Flow()
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
        within = _Flow()
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
