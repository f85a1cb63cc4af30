"""Writes down what each step was, while training goes on: a killed process leaves all but the last milliseconds of it.

What is written is in the page cache at once, where it outlives the process. A thread of its own writes, because a write may wait for a
disk. As long as steps come it looks every five milliseconds: to wake it for each of them costs the training thread more than all the rest.
"""

from __future__ import annotations

import collections
import contextlib
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from harness.checkpoint import format as fmt
from harness.checkpoint.attempts import first_word
from harness.errors import StorageError
from harness.selfcheck import step_records
from harness.store import LocalStore, Store
from harness.text import say

LOOK_S, LOOKS = 0.005, 200  # after a second without a step it waits to be woken
CLOSE_S = 2.0
WORTH_BYTES = 256 << 10  # of lines that are not needed any more
MOST_LINES = 100_000  # that wait, in an outage: some ten megabytes


class StepLog:
    """The lines of one attempt, in the run directory and, sent by the uploader's thread, in a bucket; and the files of earlier attempts,
    until they are not needed any more."""

    def __init__(
        self, local: LocalStore | None, has_remote: bool, attempt: int, about: Mapping[str, Any], before: step_records.Before
    ) -> None:
        self.attempt, self._head = attempt, step_records.head(about)
        self._local, self._file = local, -1
        self._compacted_at = 0  # a step
        self._size = self._last = 0  # of the file here: bytes of lines, and the last step in it
        self._arrived = dict.fromkeys(("here",) * (local is not None) + ("there",) * has_remote, 0)  # by store: its newest checkpoint
        kept = dict(zip(self._arrived, before.keys, strict=False))
        self._old = {place: dict(kept.get(place, {})) for place in self._arrived}
        self._new: queue.SimpleQueue[step_records.Line | None] = queue.SimpleQueue()  # None: there is something else to do
        self._unsent: collections.deque[tuple[int, bytes]] = collections.deque(maxlen=MOST_LINES)
        self._segments, self._segment = 0, (0, b"")
        self._verdict: dict[str, dict[str, Any]] = {}  # by store that still lacks it
        self._sending, self._closing = threading.Lock(), False
        self._thread = threading.Thread(target=self._run, daemon=True, name="steps")
        self._thread.start()

    @property
    def safe_step(self) -> int:
        """The newest checkpoint of this attempt that all stores have."""
        return min(self._arrived.values(), default=0)

    def add(self, line: step_records.Line) -> None:
        """Write a line, soon. For the thread that trains."""
        if self._new.qsize() < MOST_LINES:
            self._new.put(line)

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Take in that a checkpoint has arrived in a store. From any thread."""
        place = {"saved": next(iter(self._arrived), ""), "uploaded": "there"}.get(str(event.get("event")))
        match = fmt.CHECKPOINT_NAME.match(f"{fmt.CHECKPOINTS}/{event.get('checkpoint')}.pt") if place in self._arrived else None
        if place and match and int(match["attempt"]) == self.attempt:
            self._arrived[place] = max(self._arrived[place], int(match["step"]))
            self._new.put(None)

    def tell(self, verdict: Mapping[str, Any]) -> None:
        """Record what came of comparing; the first word stands. From any thread."""
        self._verdict = {place: dict(verdict) for place in self._arrived}
        self._new.put(None)

    def close(self) -> None:
        """Write what is still to be written, if that is quick, and end."""
        self._closing = True
        self._new.put(None)
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while not self._closing:
            self._safely([self._new.get()])  # what comes after a pause wakes this thread, and is written at once
            looks = 0
            while not self._closing and looks < LOOKS:
                time.sleep(LOOK_S)
                looks = looks + 1 if self._new.empty() else 0
                if not looks:
                    self._safely([])
        self._safely([])
        if self._file >= 0:
            os.close(self._file)

    def _safely(self, first: list[step_records.Line | None]) -> None:
        """Training does not depend on what is written here: a disk that fails is complained of, and left alone."""
        try:
            self._turn(first)
        except (StorageError, OSError) as error:
            self._local = None
            say(f"harness: warning: what each step was is not recorded: {str(error).splitlines()[0]}", sys.stderr)

    def _turn(self, first: list[step_records.Line | None]) -> None:
        """Write what has come, and let go what is not needed any more."""
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
        self._let_go("here", self._local)
        if self._size and self._last <= self.safe_step:
            os.ftruncate(self._file, len(self._head))
            self._size = 0
        elif self._size > WORTH_BYTES and self.safe_step > self._compacted_at:
            self._compact(self._local)
        if self._closing and self._file >= 0 and not self._size:
            self._local.delete(step_records.key(self.attempt))

    def _write(self, local: LocalStore, lines: bytes) -> None:
        if self._file < 0:
            path = local.path(step_records.key(self.attempt))
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
            lines = self._head + lines
            self._size -= len(self._head)
        self._size += len(lines)
        while lines:
            lines = lines[os.write(self._file, lines) :]

    def _compact(self, local: LocalStore) -> None:
        """Write a file with the lines that are still needed, and let it take the place of the one that is there."""
        self._compacted_at, path = self.safe_step, local.path(step_records.key(self.attempt))
        _, lines = step_records.parse(os.pread(self._file, len(self._head) + self._size, 0))
        records = b"".join(step_records.pack(line) for line in lines if line.step > self._compacted_at)
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

    def _let_go(self, place: str, store: Store) -> None:
        """Delete the files in a store that are not needed any more."""
        old, safe = self._old[place], self.safe_step
        for key in [key for key, last in old.items() if safe and last <= safe]:
            store.delete(key)
            del old[key]

    def send(self, remote: Callable[[], Store]) -> None:
        """Send what was written since the last call, and let go there what is not needed any more. For a thread that may wait. Raises
        StorageError."""
        if self._sending.acquire(timeout=CLOSE_S):  # else it is being sent
            try:
                self._send(remote)
            finally:
                self._sending.release()

    def _send(self, remote: Callable[[], Store]) -> None:
        if not self._segment[1]:  # else the same bytes again: the last try may have arrived
            lines = [self._unsent.popleft() for _ in range(len(self._unsent))]
            needed = [(step, line) for step, line in lines if step > self.safe_step]
            if needed:
                self._segment = max(step for step, _ in needed), self._head + b"".join(line for _, line in needed)
        last, content = self._segment
        if content:
            key = step_records.segment_key(self.attempt, self._segments + 1)
            remote().create(key, content, self.attempt)
            self._segments, self._segment = self._segments + 1, (0, b"")
            self._old["there"][key] = last
        if verdict := self._verdict.get("there"):
            first_word(remote(), step_records.verdict_key(self.attempt), verdict, self.attempt)
            self._verdict.pop("there", None)
        self._let_go("there", remote())
