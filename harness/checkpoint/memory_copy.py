"""The memory tier: the newest checkpoint in this machine's memory, for a process that dies and is started again on it.

It is a store like any other, in /dev/shm: the same format, committed in the same way, verified before it is used. A checkpoint in it
counts if it is newer than all that is on the disk; then it is gone on from, and what is on the disk stays what a lost machine falls
back on. It is let go when the disk has something as new. Who dies for good leaves it behind: /dev/shm/harness-UID-….
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path

from harness.checkpoint import format as fmt
from harness.checkpoint.catalog import Catalog, read_catalog
from harness.checkpoint.format import Manifest
from harness.store import LocalStore, Store

ROOT = Path("/dev/shm")


def place(run: Store) -> LocalStore:
    """Where the tier of a run lies, by the run's own place."""
    return LocalStore(ROOT / f"harness-{os.getuid()}-{hashlib.sha256(str(run).encode()).hexdigest()[:16]}")


def newest(store: LocalStore, found: Catalog) -> Manifest | None:
    """What is in the tier, if that is newer than all that was found on the disk, and of the same run."""
    if not is_ours(store):
        return None
    there = [m for m in read_catalog(store).manifests if m.run_id == found.run_id and m.attempt in found.attempts]
    return there[-1] if there and (found.head is None or there[-1].order > found.head.order) else None


def check_readable(store: LocalStore, found: Catalog) -> None:
    """Raises NewerFormatError if what is in the tier is newer than all that was found on the disk, and of a newer format."""
    there = read_catalog(store) if is_ours(store) else Catalog()
    error, key = there.unreadable_head, max(there.newer, key=fmt.order_of, default="")
    attempt, step = fmt.order_of(key) if error else (0, 0)
    if error and attempt in found.attempts and (found.head is None or (attempt, step) > found.head.order):
        raise error


def is_ours(store: LocalStore) -> bool:
    """Whether it is there, and nobody else has made it or may write to it: /dev/shm is everybody's."""
    with contextlib.suppress(OSError):
        status = os.lstat(store.root)
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    return False
