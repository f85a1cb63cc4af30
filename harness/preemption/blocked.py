"""Act on stop signals while the main thread is in code of others, which does not ask for the flag.

That is code that can only be ended by an error, or a wait in a library in which no handler runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from harness import preemption


@contextlib.contextmanager
def raising(error: Callable[[str, signal.Signals], Exception], most: int) -> Iterator[None]:
    """Let the first stop signals raise an error inside the block.

    The block runs code of others that can only be ended by an error. Signals after the first `most`
    set the flag but raise nothing. A second SIGINT ends the process at once.

    Args:
        error: Function that makes the error from a message and the signal.
        most: Number of signals that raise an error.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        preemption.handle(number, frame)
        if len(preemption.requests()) <= most:
            raise error(f"got {preemption.name_of(number)}", signal.Signals(number))

    preemption.install()
    before = {number: signal.getsignal(number) for number in preemption.STOP_SIGNALS}
    for number in before:
        if preemption.is_caught(number):
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def noticed_at_once() -> Iterator[Callable[[], bool]]:
    """Yield a function with which other threads detect a stop signal at once.

    It also works while the main thread cannot run its signal handler because it waits inside a
    library. Only the main thread may enter the block.
    """
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    came, lock = list[int](), threading.Lock()

    def noticed() -> bool:
        with lock, contextlib.suppress(OSError):  # the pipe is empty or closed
            came.extend(os.read(reader, 100))
        return preemption.requested() is not None or any(
            number in preemption.STOP_SIGNALS for number in came
        )

    try:
        yield noticed
    finally:
        signal.set_wakeup_fd(before)
        with lock:
            os.close(writer)
            os.close(reader)
            reader = -1
