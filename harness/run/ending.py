"""How an attempt ends: in its end record, and in words for people.

An uncaught error is recorded by the rank that has it first. The record is created exclusively, so the first word stands: what
the other ranks then see, a peer that is gone, does not hide the cause.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from types import TracebackType
from typing import Any

from harness.checkpoint import attempts
from harness.checkpoint.attempts import Attempt
from harness.errors import HarnessError, LostRankError, StorageError, SupersededError, report
from harness.events import say
from harness.ranks import World, is_lost_peer, own_rank
from harness.store import Store

AFTER_OTHERS_S = 1.0
RECORD_S = 5.0  # for how long a remote store is asked to take the record


class Ending:
    """Watches over the end of this process's attempt, from now on."""

    def __init__(self) -> None:
        self._stores: tuple[Store, ...] = ()
        self._attempt: Attempt | None = None
        self._world: World | None = None
        self.failed = False
        self._default = sys.excepthook
        self.take_hook()

    def take_hook(self) -> None:
        """Be the one who is told of an uncaught error. Joining a process group puts torch's hook around ours, and what we print
        is lost in its buffer when we leave the process from there: then take it back."""
        sys.excepthook = self._on_error

    def begun(self, stores: tuple[Store, ...], attempt: Attempt, world: World) -> None:
        """From here on there is an attempt to record the end of."""
        self._stores, self._attempt, self._world = stores, attempt, world

    def record(self, why: str, stores: tuple[Store, ...], **details: Any) -> None:
        """Record the attempt's end, on the writer. Nothing is raised: the checkpoints tell what can be gone on from."""
        if self._world is not None and self._world.is_writer:
            self._create(why, stores, details)

    def _create(self, why: str, stores: tuple[Store, ...], details: dict[str, Any]) -> None:
        if self._attempt is None:
            return
        for store in stores:
            is_writer = self._world is not None and self._world.is_writer
            if store.is_local and not is_writer and not attempts.holds(store, self._attempt):
                continue  # another node's disk
            try:
                attempts.end(store.patient(RECORD_S), self._attempt, why, **details)
            except StorageError as error:
                say(f"harness: the end of attempt {self._attempt.number} is not recorded: {error.what}", sys.stderr)

    def _on_error(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.excepthook, self.failed = self._default, True
        if is_lost_peer(error):
            time.sleep(AFTER_OTHERS_S)  # whoever really failed has the first word
            if not isinstance(error, LostRankError):
                error = LostRankError("another rank of this attempt is lost", f"found: {str(error).splitlines()[0][:200]}")
        why = "superseded" if isinstance(error, SupersededError) else "failed"
        last = traceback.format_exception(kind, error, trace)[-1].strip()
        self._create(why, self._stores, {"error": str(error) if isinstance(error, HarnessError) else last, "rank": own_rank()})
        if not isinstance(error, HarnessError):
            say(f"harness: uncaught error on rank {own_rank()}:", sys.stderr)
            self._default(kind, error, trace)
            return
        report(error)
        sys.stdout.flush()
        os._exit(error.exit_code)  # a hook cannot choose the exit code otherwise
