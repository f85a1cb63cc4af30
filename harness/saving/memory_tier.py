"""The writer's side of the memory tier; `harness/checkpoint/memory_copy.py` says what that is."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable

from harness import state
from harness.checkpoint import format as fmt
from harness.checkpoint import retention
from harness.checkpoint.attempts import Attempt
from harness.checkpoint.catalog import read_catalog
from harness.checkpoint.commit import About, commit
from harness.checkpoint.format import Manifest
from harness.checkpoint.memory_copy import is_ours
from harness.errors import SaveError, StorageError
from harness.saving.async_saver import AsyncSaver, Job
from harness.state import Captured
from harness.store import LocalStore, Sink
from harness.store.staging_buffer import SPARE, free_memory_bytes

COPIES = 2  # the newest, and the next while it is written; the copy that they are made from is there anyway


class MemoryTier:
    """Keeps the newest checkpoint in memory, as long as there is room, and takes away what is no longer of use."""

    def __init__(self, store: LocalStore, background: AsyncSaver, say: Callable[[str], None], *, is_on: bool) -> None:
        self.store, self.background, self.is_on = store, background, is_on
        self._say, self._has_room = say, False
        self._attempt: Attempt | None = None

    def remember(self, capture: Callable[[], Captured], about: Callable[[], About]) -> bool:
        """Begin to keep a step, unless something is on its way, or there is no room, which is said; returns whether it has begun. For the
        thread that trains."""
        if not self.is_on or self.background.is_busy or self.background.is_unable:
            return False
        began_at, captured = time.perf_counter(), capture()
        try:
            self._check_room(state.size_bytes(captured.tracked))
        except (StorageError, OSError) as error:
            self._turn_off(error)
            return False
        self.background.start(captured, about(), began_at, self._keep)
        return True

    def _check_room(self, size_bytes: int) -> None:
        if self._has_room:
            return
        memory = os.statvfs(self.store.root.parent)
        free_bytes, needed_bytes = min(memory.f_bavail * memory.f_frsize, free_memory_bytes()), COPIES * size_bytes
        if needed_bytes > SPARE * free_bytes:
            raise StorageError("there is not enough memory", f"found: {free_bytes} bytes, needed: {needed_bytes}")
        self._has_room = True

    def _make(self) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.store.root, 0o700)
        if not is_ours(self.store):
            raise StorageError(f"{self.store} is somebody else's", "found: another owner, or rights for others")
        self.store.prepare((fmt.CHECKPOINTS,))

    def _turn_off(self, error: Exception) -> None:
        self.is_on = False
        self._say(f"harness: checkpoints are not kept in memory: {' '.join(str(error).split())}")
        self._let_go(None)

    def begin(self, attempt: Attempt, origin: Manifest | None) -> None:
        """Let go what earlier attempts have left, whole or not, but for the checkpoint that is gone on from."""
        self._attempt = attempt
        self._let_go(origin)

    def _let_go(self, but: Manifest | None) -> None:
        names = (f"{but.name}.pt", f"{but.name}.json") if but else ()
        if is_ours(self.store):
            for path in (self.store.root / fmt.CHECKPOINTS).glob("*"):
                if path.name not in names:
                    path.unlink(missing_ok=True)
            self._leave_if_empty()

    def _keep(self, job: Job, write: Callable[[Sink], None], check: Callable[[], None]) -> None:
        """Commit a checkpoint here, and let the one before go. What this fails of is said, and costs training nothing."""
        try:
            self._make()
            assert self._attempt is not None, "a loop runs"
            manifest = commit(self.store, self._attempt, job.head, job.about, write, check)
        except (SaveError, StorageError, OSError) as error:
            self._turn_off(error)
        else:
            self.drop(before=manifest.order)

    def drop(self, before: tuple[int, int]) -> None:
        """Let go what is older than (attempt, step); what a newer attempt has kept stays."""
        if is_ours(self.store):
            with contextlib.suppress(StorageError):
                for manifest in read_catalog(self.store).manifests:
                    if manifest.order < before:
                        retention.delete(self.store, manifest)
            self._leave_if_empty()

    def _leave_if_empty(self) -> None:
        for folder in (self.store.root / fmt.CHECKPOINTS, self.store.root):
            with contextlib.suppress(OSError):  # there is something in it
                folder.rmdir()
