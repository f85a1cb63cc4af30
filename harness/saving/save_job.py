"""One save in flight, and a small one without a file that comes before the first."""

from __future__ import annotations

import contextlib
import functools
import io
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.modules.normalization import LayerNorm
from torch.optim.sgd import SGD

import harness.selfcheck.trial_load as trial_load
from harness import state
from harness.checkpoint.commit import About
from harness.state.snapshot import Snapshot
from harness.store import Sink
from harness.store.staging_buffer import ReadLease, StagingBuffer


class MutatedDuringCopyError(Exception):
    """The state changed while it was copied."""


Finish = Callable[["Job", Callable[[Sink], None], Callable[[], None]], None]
# Returns why there is no checkpoint, or "", and whether to save again at the next step.
Ended = Callable[["Job"], tuple[str, bool]]


@dataclass
class Job:
    """One save in flight, from the capture on the training thread to the commit."""

    head: dict[str, Any]
    about: About
    parameters: dict[int, tuple[str, torch.dtype]]
    snapshot: Snapshot
    began_at: float
    finish: Finish  # commits the copy
    is_compared: bool  # copied at once, and compared with the state before the next update
    ended: Ended | None = None  # called last
    blocked_s: float = 0.0  # how long training has waited for this save, in seconds
    problem: str = ""  # why there is no checkpoint, if training may go on all the same
    is_torn: bool = False  # the state was mutated during the copy
    is_passed: bool = False  # another step has been made since
    released: threading.Event = field(default_factory=threading.Event)  # the copy may begin
    lease: ReadLease | None = None  # on the complete copy
    # Set once it is known whether the state was mutated during the copy.
    sealed: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    failure: BaseException | None = None

    def costs(self, more_blocked_s: float = 0.0) -> dict[str, float]:
        """Return how long training has waited so far and how long the copy took, in seconds.

        Args:
            more_blocked_s: how long it has waited for the save in other ways.
        """
        return {
            "blocked_s": round(self.blocked_s + self.snapshot.held_s() + more_blocked_s, 6),
            "copy_s": round(self.snapshot.copy_s, 6),
        }


@functools.cache
def warm_up() -> None:
    """Call what saving threads call of torch once, on the training thread, with small tensors.

    The first call of each operator registers a function with `__cxa_atexit`, under a lock of the C
    library. A loader worker that is forked meanwhile inherits the lock as locked, and waits for it
    for ever in its first new operator (`torch.set_num_threads`). This is not as rare as the lock is
    short: a thread that holds it and writes to memory waits until the fork is over.
    """
    with contextlib.suppress(Exception):  # a program may have patched what is called here
        _save_and_load()


def _save_and_load() -> None:
    """Save the state of a small model to memory, and load it."""
    model = LayerNorm(2, device="cpu")  # nothing in it is drawn from a generator
    optimizer = SGD(model.parameters(), lr=1.0)
    for parameter in model.parameters():
        # One that is kept at loading, and one that is cast and mended.
        momentum = {
            "same": torch.zeros_like(parameter),
            "other": torch.zeros_like(parameter).double(),
        }
        optimizer.state[parameter] = momentum
    values = {"integers": torch.zeros(2, dtype=torch.uint8, device="cpu")}
    captured = state.captured(values, {"model": model, "optimizer": optimizer})
    shapes = trial_load.without_data(captured.payload)
    snapshot = Snapshot(captured.payload, captured.steady)
    with contextlib.closing(StagingBuffer()) as staging:
        snapshot.copy_at_once(staging)
        snapshot.is_torn(compare=True)
        snapshot.check_finite(captured.parameters)
        snapshot.forget()
        file = io.BytesIO(b"".join(staging.chunks()))
        torch.frombuffer(staging.memory, dtype=torch.uint8).zero_()
    torch.load(file, map_location="meta", weights_only=True, mmap=False)
    trial_load.of_torchs("model", model, shapes["model_state_dict"])
    trial_load.of_torchs("optimizer", optimizer, shapes["optimizer_state_dict"])
