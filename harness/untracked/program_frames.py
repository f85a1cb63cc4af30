"""The frames of the program itself, and what supplies its data."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from harness.data.held_generators import is_library

PACKAGE = str(Path(__file__).resolve().parents[1])
TRAINER, TASKS = os.path.join(PACKAGE, "train.py"), os.path.join(PACKAGE, "tasks")


def stack(frame: FrameType | None) -> list[FrameType]:
    """Return a frame and its callers, innermost first."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def program_frames(frames: Iterable[FrameType]) -> Iterator[tuple[str, FrameType]]:
    """Yield those of the frames that are of the program's own code.

    Each comes with the prefix of its variables' names: "train.py: main(): ".
    """
    for frame in frames:
        code = frame.f_code
        if is_programs_file(code.co_filename):
            file = Path(code.co_filename).name
            is_function = bool(code.co_flags & inspect.CO_OPTIMIZED)
            yield f"{file}: {code.co_name}(): " if is_function else f"{file}: ", frame


def values_of(frame: FrameType) -> dict[str, Any]:
    """Return the variables of a frame, and keep no other reference to their values."""
    local = frame.f_locals
    values = dict(local)
    if (
        frame.f_code.co_flags & inspect.CO_OPTIMIZED
        and type(local) is dict
        and sys.gettrace() is None
        and sys.getrefcount(local) <= 3
    ):
        # Before Python 3.13 this is a copy, which would keep objects alive that the program frees.
        local.clear()
    return values


@functools.lru_cache(10_000)
def is_programs_file(file: str) -> bool:
    """Return whether a file is the program's own code.

    Libraries are not. Of the harness, only `train.py` and the tasks are.
    """
    if file.startswith("<"):
        return not file.startswith("<frozen")
    if file.startswith(PACKAGE + os.sep):
        return file == TRAINER or os.path.dirname(file) == TASKS
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
    return [(name, obj) for name, obj in held.items() if obj is not None]
