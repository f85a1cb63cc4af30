"""Tell variables that a loop carries from one step to the next from those it sets anew.

A variable is carried if the loop reads it before it sets it.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import linecache
import textwrap
from collections.abc import Iterator
from types import FrameType, FunctionType
from typing import NamedTuple

from harness.source_code.name_flow import NameFlow

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
MOST_SOURCE = 1 << 20  # characters; longer source code is not parsed
OF_THE_RUN = ("by_epoch", "batches", "steps")  # methods of a run that a loop goes over
POSITIONS = ("batch", "step", "epoch")  # attributes of a run, from which a program may count on
# Functions that only show what they are given.
SHOWN = ("print", "write", "info", "debug", "log", "set_postfix", "set_description", "add_scalar")


class LoopNames(NamedTuple):
    """Variables of a frame that its loops set.

    Of those in `passing` nothing is left from one step to the next. Those in `carried` hold a value
    that an earlier step has set. Those in `made` hold what a loop around the innermost one has set,
    and that one reads: its steps may fill it, as a list of losses that each epoch makes.
    """

    passing: set[str]
    carried: set[str]
    made: set[str]


NO_NAMES = LoopNames(set(), set(), set())


def names_of(frame: FrameType) -> LoopNames | None:
    """Return the variables that the loops around a frame's current line set.

    The outermost loop sets a passing variable before it reads it, and no loop inside it around that
    line carries it: a sum that an outer loop over epochs sets to 0 is carried by the inner loop
    over batches. A variable that is set at times only is carried, too, if a function reads it, or
    what follows the loop. None: there is no source code. The names are empty if there is no loop.
    """
    loops, tree = _loops_around(frame)
    if not loops or tree is None:
        return None if tree is None else NO_NAMES
    flows = [NameFlow() for _ in loops]
    for flow, loop in zip(flows, loops, strict=True):
        flow.visit(loop)
    outermost = flows[0]
    carried = set[str]().union(*(flow.assigned & flow.exposed for flow in flows))
    own = tree.body[0] if frame.f_code.co_flags & inspect.CO_OPTIMIZED else None
    carried |= (outermost.assigned - outermost.stored) & _read_elsewhere(tree, own, loops[0])
    inner, made = flows[1:], set[str]()
    if inner:
        made = set[str]().union(*(flow.exposed for flow in inner), _read_by_functions(tree, own))
        made &= outermost.assigned - carried - set[str]().union(*(flow.assigned for flow in inner))
    return LoopNames(outermost.assigned - carried - made, carried, made)


def _read_elsewhere(tree: ast.AST, own: ast.AST | None, loop: ast.For | ast.While) -> set[str]:
    """Return the variables that functions in a tree but `own` read, or what follows a loop."""
    return _read_by_functions(tree, own) | {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name)
        and isinstance(node.ctx, ast.Load)
        and node.lineno > (loop.end_lineno or 0)
    }


def _read_by_functions(tree: ast.AST, own: ast.AST | None) -> set[str]:
    functions = (node for node in ast.walk(tree) if isinstance(node, FUNCTIONS) and node is not own)
    return set[str]().union(*map(_read_from_outside, functions))


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
    flow, outside = NameFlow(), _declared([*ast.walk(own)])
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
