"""Look at the other threads of this process."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Run no garbage collection inside the block."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def current_frames() -> dict[int, FrameType]:
    """Return the frame in which each thread is, by the thread's ident.

    A garbage collection inside of `sys._current_frames` lets other threads run, and blocks the
    process for ever if one of them starts or ends meanwhile (python/cpython#106883).
    """
    with no_collection():
        return sys._current_frames()
