"""The events of an attempt: one line an event, for machines. A full disk under them never hurts the run."""

from __future__ import annotations

import collections
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from harness.checkpoint.attempts import now
from harness.errors import StorageError
from harness.store import LocalStore
from harness.text import say

SPENT_EVERY_S, ENDS = 1.0, ("finished", "stopped")
MOST_KEPT = 50_000  # lines, some ten megabytes


class EventLog:
    """The events of one attempt: `events/0003.jsonl` in a local store, and, `kept` here until then, segments in a remote one."""

    def __init__(
        self, store: LocalStore | None, key: str, kept: bool = False, spent: Callable[[], dict[str, float]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.store, self.key, self.clock = store, key, clock
        self.lost = 0
        self._spent, self._spent_at = spent, -SPENT_EVERY_S
        self.listeners: list[Callable[[Mapping[str, Any]], object]] = []  # are told of each event, on the thread that writes it
        self._kept: collections.deque[bytes] | None = collections.deque(maxlen=MOST_KEPT) if kept else None

    def take(self) -> list[bytes]:
        """The lines since the last call; of very many, the newest."""
        taken: list[bytes] = []
        while self._kept:
            taken.append(self._kept.popleft())
        return taken

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event; one a second tells what the attempt's time was spent on. A store that refuses is complained of once."""
        if self._spent is not None and (kind in ENDS or self.clock() - self._spent_at >= SPENT_EVERY_S):
            self._spent_at, fields["spent"] = self.clock(), self._spent()
        event = {"event": kind, "time": now()} | fields
        for listener in self.listeners:
            listener(event)
        line = (json.dumps(event, default=str) + "\n").encode()
        if self._kept is not None:
            self._kept.append(line)
        if self.store is None:
            return
        try:
            self.store.append(self.key, line)
        except (StorageError, OSError) as error:
            if self.lost == 0:
                say(f"harness: events are not recorded: {str(error).splitlines()[0]}", sys.stderr)
            self.lost += 1
