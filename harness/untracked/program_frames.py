"""The frames of the program itself, and the variables in them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from harness.data.held_generators import is_library
from harness.untracked.loop_variables import values_of

PACKAGE = Path(__file__).resolve().parents[1]


def program_frames(frame: FrameType | None) -> Iterator[tuple[str, FrameType]]:
    """Yield the frames of the program's own code, innermost first.

    Each comes with the prefix of its variables' names: "train.py: main(): ".
    """
    while frame is not None:
        code = frame.f_code
        if _is_programs(code.co_filename):
            file = Path(code.co_filename).name
            is_function = bool(code.co_flags & inspect.CO_OPTIMIZED)
            yield f"{file}: {code.co_name}(): " if is_function else f"{file}: ", frame
        frame = frame.f_back


def variables_of(frame: FrameType | None) -> Iterator[tuple[str, Any]]:
    """Yield the local and global variables of the program's frames, innermost first.

    Each comes with its name, prefixed by the file and the function.
    """
    seen = set[int]()
    for spelled, inner in program_frames(frame):
        code, module = inner.f_code, inner.f_globals
        if code.co_flags & inspect.CO_OPTIMIZED:
            yield from [(spelled + name, value) for name, value in values_of(inner).items()]
        if id(module) not in seen and not str(
            module.get("__file__") or code.co_filename
        ).startswith(str(PACKAGE)):
            seen.add(id(module))
            file = Path(code.co_filename).name
            yield from [
                (f"{file}: {name}", value)
                for name, value in list(module.items())
                if not name.startswith("__")
            ]


def _is_programs(file: str) -> bool:
    """Return whether a file is the program's own code.

    Libraries are not. Of the harness, only `train.py` and the tasks are.
    """
    if file.startswith("<"):
        return not file.startswith("<frozen")
    path = Path(file)
    if path.is_relative_to(PACKAGE):
        return path == PACKAGE / "train.py" or path.parent == PACKAGE / "tasks"
    return not is_library(file)


def of_source(source: Any) -> list[tuple[str, Any]]:
    """Return the objects that supply the loop's data, with their names."""
    plan, workers = getattr(source, "plan", None), getattr(source, "workers", None)
    held = {
        "dataset": getattr(source, "dataset", None),
        "collate_fn": getattr(source, "collate", None),
        "order": getattr(plan, "order", None),
        "worker_init_fn": getattr(workers, "init", None),
    }
    return [(name, thing) for name, thing in held.items() if thing is not None]
