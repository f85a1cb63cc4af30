"""Save checkpoints to the memory tier; runs on the writer (rank 0).

`harness/checkpoint/memory_copy.py` describes the memory tier itself.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

from harness import state
from harness.checkpoint import format as fmt
from harness.checkpoint import retention
from harness.checkpoint.attempts import Attempt
from harness.checkpoint.catalog import read_catalog
from harness.checkpoint.commit import About, commit
from harness.checkpoint.format import Manifest
from harness.checkpoint.memory_copy import drop_if_empty, is_ours
from harness.distributed.ranks import World
from harness.errors import SaveError, StorageError
from harness.saving.async_saver import AsyncSaver
from harness.saving.save_job import Job
from harness.sharding.save_protocols import RankCheckpointer, ShardSaves
from harness.sharding.tier_saves import TierSaves
from harness.state import Captured
from harness.store import LocalStore, Sink
from harness.store.staging_buffer import SPARE, free_memory_bytes

# How many checkpoints must fit: the newest one, and the next one while it is written. The staging
# buffer that they are written from is allocated in any case.
COPIES = 2


class MemoryTier:
    """The newest checkpoint of a run, kept in /dev/shm as long as there is room for it.

    The tier deletes checkpoints that are outdated, and turns itself off when it fails.

    Args:
        store: the store in /dev/shm.
        background: copies the state and calls the tier to commit it.
        say: prints a line to the user.
        is_on: whether checkpoints are kept in memory at all.
    """

    def __init__(
        self, store: LocalStore, background: AsyncSaver, say: Callable[[str], None], *, is_on: bool
    ) -> None:
        self.store, self.background, self.is_on = store, background, is_on
        self._say, self._has_room = say, False
        self._attempt: Attempt | None = None
        self._by_shards: TierSaves | None = None

    def save_by_shards(
        self, world: World, checkpointer: RankCheckpointer, saves: ShardSaves | None
    ) -> None:
        """Keep steps of a sharded state, of which each rank holds parts; None if it is not."""
        self._by_shards = TierSaves(world, checkpointer, saves, self) if saves else None

    @property
    def is_writing(self) -> bool:
        """Return whether the save in flight is one for the tier."""
        if self._by_shards is not None:
            return self._by_shards.is_writing and self.background.is_busy
        return self.background.is_busy_with(self._keep)

    def remember(self, capture: Callable[[], Captured], about: Callable[[], About]) -> bool:
        """Begin to keep a checkpoint of this step in memory. For the training thread of each rank.

        Nothing is done if the tier is off, if a save is in flight, or if states cannot be copied in
        the background; nor if the last save has failed or must be repeated, which the next save to
        the disk raises or does. If there is not enough memory, the tier reports that and turns
        itself off.

        Args:
            capture: returns the state to keep.
            about: returns the manifest entries that are not part of the state.

        Returns:
            Whether the state was passed to the background saver.
        """
        if self._by_shards is not None:
            return self._by_shards.remember(capture, about)
        saver = self.background
        if not self.is_on or saver.is_busy or saver.is_unable:
            return False
        if saver.has_failed or saver.must_repeat:
            return False
        began_at, captured = time.perf_counter(), capture()
        try:
            self.check_room(state.size_bytes(captured.tracked))
        except (StorageError, OSError) as error:
            self.turn_off(error)
            return False
        self.background.start(captured, about(), began_at, self._keep)
        return True

    def check_room(self, size_bytes: int) -> None:
        """Check, once, that checkpoints of a state of that size fit into memory.

        Raises:
            StorageError: They do not.
        """
        if self._has_room:
            return
        memory = os.statvfs(self.store.root.parent)
        free_bytes = min(memory.f_bavail * memory.f_frsize, free_memory_bytes())
        needed_bytes = COPIES * size_bytes
        if needed_bytes > SPARE * free_bytes:
            raise StorageError(
                "there is not enough memory", f"found: {free_bytes} bytes, needed: {needed_bytes}"
            )
        self._has_room = True

    def make(self) -> None:
        """Make the folders. Raises StorageError if somebody else has done so, and OSError."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.store.root, 0o700)
        if not is_ours(self.store):
            raise StorageError(
                f"{self.store} is somebody else's", "found: another owner, or rights for others"
            )
        self.store.prepare((fmt.CHECKPOINTS,))

    def halt(self) -> None:
        """Keep no further step."""
        self.is_on = False

    def turn_off(self, problem: object) -> None:
        """Keep no further step, and say why."""
        self.is_on = False
        self._say(f"harness: checkpoints are not kept in memory: {' '.join(str(problem).split())}")
        # What is there stays until the disk has something newer: it may be the only copy of the
        # resume point, or belong to a newer attempt.
        drop_if_empty(self.store)

    def begin(self, attempt: Attempt, origin: Manifest | None) -> None:
        """Delete what earlier attempts left in memory, except the resume point.

        Incomplete checkpoints are deleted as well.
        """
        self._attempt = attempt
        names = (origin.name, f"{origin.name}.pt", f"{origin.name}.json") if origin else ()
        if is_ours(self.store):
            for path in (self.store.root / fmt.CHECKPOINTS).glob("*"):
                if path.name not in names and path.is_dir():  # shards
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name not in names:
                    path.unlink(missing_ok=True)
        drop_if_empty(self.store)

    def _keep(self, job: Job, write: Callable[[Sink], None], check: Callable[[], None]) -> None:
        """Commit a checkpoint to the memory tier and delete the older ones.

        If the tier cannot be written, it reports that and turns itself off; training goes on.
        """
        self.commit(job.head, job.about, write, check)

    def commit(
        self,
        payload: Mapping[str, Any],
        about: About,
        write: Callable[[Sink], None] | None,
        check: Callable[[], None] = lambda: None,
    ) -> str:
        """Commit a checkpoint and delete the older ones; return why there is none, or "".

        The arguments are those of `commit.commit`. If the tier cannot be written, it reports that
        and turns itself off.
        """
        try:
            self.make()
            assert self._attempt is not None, "a loop runs"
            manifest = commit(self.store, self._attempt, payload, about, write, check)
        except (SaveError, StorageError, OSError) as error:
            self.turn_off(error)
            return str(error)
        self.drop(before=manifest.order)
        return ""

    def drop(self, before: tuple[int, int]) -> None:
        """Delete the checkpoints that are older than `before`, an (attempt, step) pair.

        Checkpoints of a newer attempt stay.
        """
        if is_ours(self.store):
            with contextlib.suppress(StorageError):
                for manifest in read_catalog(self.store).manifests:
                    if manifest.order < before:
                        retention.delete(self.store, manifest)
        drop_if_empty(self.store)
