"""One save in flight."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from harness.checkpoint.commit import About
from harness.state.snapshot import Snapshot
from harness.store import Sink
from harness.store.staging_buffer import ReadLease


class MutatedDuringCopyError(Exception):
    """The state changed while it was copied."""


Finish = Callable[["Job", Callable[[Sink], None], Callable[[], None]], None]


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

    def costs(self) -> dict[str, float]:
        """Return how long training has waited so far and how long the copy took, in seconds."""
        return {
            "blocked_s": round(self.blocked_s + self.snapshot.held_s(), 6),
            "copy_s": round(self.snapshot.copy_s, 6),
        }
