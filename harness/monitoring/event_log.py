"""The event log of an attempt: machine-readable, one JSON line per event.

A full disk never stops the run: a failed write is reported once and counted.
"""

from __future__ import annotations

import collections
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from harness.checkpoint import format as fmt
from harness.errors import StorageError
from harness.store import LocalStore, Store
from harness.text import now, say

SPENT_EVERY_S, ENDS = 1.0, ("finished", "stopped")
ALIVE_EVERY_S = 30.0  # interval of signs of life, if no other event is written
MOST_KEPT = 50_000  # lines waiting for the upload: about ten megabytes


class EventLog:
    """The events of one attempt.

    In a local store they are appended to one file, such as `events/0003.jsonl`. For a remote store
    they are buffered here until `send` writes them as a segment.

    Args:
        store: Local store, or None if the run has only a remote one.
        key: Key of the events file in the local store.
        kept: Whether lines are buffered for a remote store.
        spent: Function that returns the goodput accounting in seconds. It is recorded with an event
            at most every `SPENT_EVERY_S`, and always with the events in `ENDS`. None: it is not
            recorded.
        clock: Function that returns the current time in seconds.
    """

    def __init__(
        self,
        store: LocalStore | None,
        key: str,
        kept: bool = False,
        spent: Callable[[], dict[str, float]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self.key, self.clock = store, key, clock
        self.lost = 0
        self._written_at = clock()
        self._spent, self._spent_at = spent, -SPENT_EVERY_S
        # Called with each event, on the thread that writes it.
        self.listeners: list[Callable[[Mapping[str, Any]], object]] = []
        self._kept: collections.deque[bytes] | None = (
            collections.deque(maxlen=MOST_KEPT) if kept else None
        )
        self._segments, self._segment = 0, b""  # how many were sent; the one that is being sent

    def send(self, remote: Store, attempt: int) -> None:
        """Send the lines since the last call, but no more than the newest `MOST_KEPT`.

        Called by the upload thread only.

        Args:
            remote: Remote store.
            attempt: Number of the attempt whose events these are.

        Raises:
            StorageError: The segment is not sent. The next call sends it again.
        """
        # A failed segment is sent again with the same bytes, as the last try may have arrived.
        self._segment = self._segment or self._take()
        if self._segment:
            remote.create(fmt.segment_key(attempt, self._segments + 1), self._segment, attempt)
            self._segments, self._segment = self._segments + 1, b""

    def _take(self) -> bytes:
        taken: list[bytes] = []
        while self._kept:
            taken.append(self._kept.popleft())
        return b"".join(taken)

    def write(self, kind: str, *rows: Mapping[str, Any], **fields: Any) -> None:
        """Append one event, or one for each row of further fields, in a single write.

        About one event per second includes the goodput accounting. The first failed write is
        reported on stderr. All failed writes are counted in `lost`.
        """
        at_all: dict[str, Any] = {"event": kind, "time": now()} | fields
        events = [at_all | dict(row) for row in rows or ({},)]
        if self._spent is not None and (
            kind in ENDS or self.clock() - self._spent_at >= SPENT_EVERY_S
        ):
            self._spent_at, events[-1]["spent"] = self.clock(), self._spent()
        self._written_at = self.clock()
        for event in events:
            for listener in self.listeners:
                listener(event)
        lines = [(json.dumps(event, default=str) + "\n").encode() for event in events]
        if self._kept is not None:
            self._kept.extend(lines)
        if self.store is None:
            return
        try:
            self.store.append(self.key, b"".join(lines))
        except (StorageError, OSError) as error:
            if self.lost == 0:
                say(f"harness: events are not recorded: {str(error).splitlines()[0]}", sys.stderr)
            self.lost += 1

    def alive(self, step: int) -> None:
        """Append a sign of life after a step, if nothing was appended for `ALIVE_EVERY_S`."""
        if self.clock() - self._written_at >= ALIVE_EVERY_S:
            self.write("alive", step=step)
