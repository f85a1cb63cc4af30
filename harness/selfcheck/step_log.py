"""Step log: write the samples and losses of each step to a file while training runs.

A killed process loses at most the records of its last 50 milliseconds. Written records are in the
page cache, where they outlive the process. A separate thread writes, because a write may block on
the disk. It writes the records of long steps at once. Short steps are written together, every 50
milliseconds: each time that the thread runs, the training thread may wait for the interpreter's
lock, which costs more than all other work of the log.
"""

from __future__ import annotations

import collections
import contextlib
import os
import queue
import secrets
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from harness.checkpoint import format as fmt
from harness.checkpoint.attempts import first_word
from harness.errors import StorageError
from harness.selfcheck import step_records
from harness.store import LocalStore, Store
from harness.text import say

PAUSE_S = 0.05  # least time from one write to the next
CLOSE_S = 2.0
WORTH_BYTES = 256 << 10  # file size from which a compaction is worth its cost
MOST_LINES = 100_000  # limit of lines that wait during an outage: about ten megabytes


class StepLog:
    """The step log of one attempt, in the run directory and in a bucket.

    The uploader's thread sends the lines to the bucket. The log also deletes the files of earlier
    attempts when they are no longer needed.
    """

    def __init__(
        self,
        local: LocalStore | None,
        has_remote: bool,
        attempt: int,
        about: Mapping[str, Any],
        before: step_records.Before,
    ) -> None:
        self.attempt, self._head = attempt, step_records.head(about)
        self._local, self._file = local, -1
        self._compacted_at = 0  # safe step of the last compaction
        # Of the local file: bytes of lines, and the last step in it.
        self._size = self._last = 0
        # Step of the newest checkpoint of this attempt, by store ("here": local, "there": remote).
        self._arrived = dict.fromkeys(("here",) * (local is not None) + ("there",) * has_remote, 0)
        kept = dict(zip(self._arrived, before.keys, strict=False))
        self._old = {place: dict(kept.get(place, {})) for place in self._arrived}
        # None wakes the thread for work other than a line.
        self._new: queue.SimpleQueue[step_records.Line | None] = queue.SimpleQueue()
        self._unsent: collections.deque[tuple[int, bytes]] = collections.deque(maxlen=MOST_LINES)
        self._segments, self._segment = 0, (0, b"")
        self._verdict: dict[str, dict[str, Any]] = {}  # by store that still lacks the verdict
        self._sending, self._closing = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="steps")
        self._thread.start()

    @property
    def safe_step(self) -> int:
        """Return the step of the newest checkpoint of this attempt that all stores have, or 0."""
        return min(self._arrived.values(), default=0)

    def add(self, line: step_records.Line) -> None:
        """Queue a line for writing; drop it if `MOST_LINES` are waiting.

        Called by the training thread.
        """
        if self._new.qsize() < MOST_LINES:
            self._new.put(line)

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Record that a store has a new checkpoint, from a "saved" or "uploaded" event.

        May be called from any thread.
        """
        place = {"saved": next(iter(self._arrived), ""), "uploaded": "there"}.get(
            str(event.get("event"))
        )
        match = (
            fmt.CHECKPOINT_NAME.match(f"{fmt.CHECKPOINTS}/{event.get('checkpoint')}.pt")
            if place in self._arrived
            else None
        )
        if place and match and int(match["attempt"]) == self.attempt:
            self._arrived[place] = max(self._arrived[place], int(match["step"]))
            self._new.put(None)

    def tell(self, verdict: Mapping[str, Any]) -> None:
        """Record the result of the comparison; the first record in a store stays.

        May be called from any thread.
        """
        self._verdict = {place: dict(verdict) for place in self._arrived}
        self._new.put(None)

    def close(self) -> None:
        """Write the remaining lines and end the thread; wait at most `CLOSE_S` seconds."""
        self._closing.set()
        self._new.put(None)
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._safely([self._new.get()])
            self._closing.wait(PAUSE_S)
        self._safely([])
        if self._file >= 0:
            os.close(self._file)

    def _safely(self, first: list[step_records.Line | None]) -> None:
        """Run one turn; on a disk error, print a warning and stop writing to the disk.

        Training does not depend on the step log.
        """
        try:
            self._turn(first)
        except (StorageError, OSError) as error:
            self._local = None
            say(
                f"harness: warning: what each step was is not recorded: "
                f"{str(error).splitlines()[0]}",
                sys.stderr,
            )

    def _turn(self, first: list[step_records.Line | None]) -> None:
        """Write the queued lines and delete records that are no longer needed."""
        new = first + [self._new.get() for _ in range(self._new.qsize())]
        lines = [(line.step, step_records.pack(line)) for line in new if line is not None]
        if "there" in self._arrived:
            self._unsent.extend(lines)
        if self._local is None:
            return
        if lines:
            self._write(self._local, b"".join(line for _, line in lines))
            self._last = max(self._last, *(step for step, _ in lines))
        if verdict := self._verdict.pop("here", None):
            first_word(self._local, step_records.verdict_key(self.attempt), verdict, self.attempt)
        self._prune("here", self._local)
        if self._size and self._last <= self.safe_step:
            os.ftruncate(self._file, len(self._head))
            self._size = 0
        elif self._size > WORTH_BYTES and self.safe_step > self._compacted_at:
            self._compact(self._local)
        if self._closing.is_set() and self._file >= 0 and not self._size:
            self._local.delete(step_records.key(self.attempt))

    def _write(self, local: LocalStore, lines: bytes) -> None:
        if self._file < 0:
            path = local.path(step_records.key(self.attempt))
            self._file = os.open(
                path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666
            )
            lines = self._head + lines
            self._size -= len(self._head)
        self._size += len(lines)
        while lines:
            lines = lines[os.write(self._file, lines) :]

    def _compact(self, local: LocalStore) -> None:
        """Replace the file by one that has only the lines that are still needed."""
        self._compacted_at, path = self.safe_step, local.path(step_records.key(self.attempt))
        _, lines = step_records.parse(os.pread(self._file, len(self._head) + self._size, 0))
        records = b"".join(
            step_records.pack(line) for line in lines if line.step > self._compacted_at
        )
        temp = path.with_name(f"{path.name}.tmp-{self.attempt:04d}-{secrets.token_hex(4)}")
        file = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            left = self._head + records
            while left:
                left = left[os.write(file, left) :]
            os.replace(temp, path)
        except OSError:
            os.close(file)
            with contextlib.suppress(OSError):
                os.unlink(temp)
            raise
        os.close(self._file)
        self._file, self._size = file, len(records)

    def _prune(self, place: str, store: Store) -> None:
        """Delete the files in a store up to the step of a checkpoint that all stores have."""
        old, safe = self._old[place], self.safe_step
        for key in [key for key, last in old.items() if safe and last <= safe]:
            store.delete(key)
            del old[key]

    def send(self, remote: Callable[[], Store]) -> None:
        """Send the lines since the last call, and delete remote files that are no longer needed.

        Called by a thread that may block. Raises StorageError.
        """
        if self._sending.acquire(timeout=CLOSE_S):  # else another thread is sending
            try:
                self._send(remote)
            finally:
                self._sending.release()

    def _send(self, remote: Callable[[], Store]) -> None:
        # A segment that was not confirmed is sent again with the same bytes: it may have arrived.
        if not self._segment[1]:
            lines = [self._unsent.popleft() for _ in range(len(self._unsent))]
            needed = [(step, line) for step, line in lines if step > self.safe_step]
            if needed:
                self._segment = (
                    max(step for step, _ in needed),
                    self._head + b"".join(line for _, line in needed),
                )
        last, content = self._segment
        if content:
            key = step_records.segment_key(self.attempt, self._segments + 1)
            remote().create(key, content, self.attempt)
            self._segments, self._segment = self._segments + 1, (0, b"")
            self._old["there"][key] = last
        if verdict := self._verdict.get("there"):
            first_word(remote(), step_records.verdict_key(self.attempt), verdict, self.attempt)
            self._verdict.pop("there", None)
        self._prune("there", remote())
