"""The memory tier: the newest checkpoint in this machine's memory, for a restart on this machine.

The tier is an ordinary store in /dev/shm: it has the same format and the same commit, and its data
is verified before use. A checkpoint in it counts if it is newer than every checkpoint on the disk.
The run then resumes from it, while the checkpoint on the disk remains the fallback after the loss
of the machine. The tier is deleted when the disk has a checkpoint that is as new. A run that dies
and is not restarted leaves it behind: /dev/shm/harness-UID-….
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
    """Return the store of a run's memory tier, derived from the path of the run."""
    return LocalStore(
        ROOT / f"harness-{os.getuid()}-{hashlib.sha256(str(run).encode()).hexdigest()[:16]}"
    )


def listed(store: LocalStore) -> Catalog:
    """Return the catalog of the tier, which is empty if there is none or it is not this user's."""
    return read_catalog(store) if is_ours(store) else Catalog()


def newest(there: Catalog, catalog: Catalog) -> Manifest | None:
    """Return the tier's newest checkpoint of this run if it is newer than the disk's, else None.

    Args:
        there: Catalog of the tier.
        catalog: Catalog of the run's stores.
    """
    ours = [
        m for m in there.manifests if m.run_id == catalog.run_id and m.attempt in catalog.attempts
    ]
    return (
        ours[-1] if ours and (catalog.head is None or ours[-1].order > catalog.head.order) else None
    )


def check_readable(there: Catalog, catalog: Catalog) -> None:
    """Raise NewerFormatError if the run should resume from the tier, but only a newer harness can.

    This is so if the tier's newest checkpoint has a newer format, is of an attempt of this run, and
    is newer than every checkpoint on the disk.

    Args:
        there: Catalog of the tier.
        catalog: Catalog of the run's stores.
    """
    error, key = there.unreadable_head, max(there.newer, key=fmt.order_of, default="")
    attempt, step = fmt.order_of(key) if error else (0, 0)
    if (
        error
        and attempt in catalog.attempts
        and (catalog.head is None or (attempt, step) > catalog.head.order)
    ):
        raise error


def drop_if_empty(store: LocalStore) -> None:
    """Delete the folders of a tier of this user that holds no checkpoint any more."""
    if not is_ours(store):
        return
    for folder in (store.root / fmt.CHECKPOINTS, store.root):
        with contextlib.suppress(OSError):  # the folder is not empty
            folder.rmdir()


def is_ours(store: LocalStore) -> bool:
    """Return whether the tier exists, belongs to this user and is closed to all other users.

    The check is needed because /dev/shm is shared by all users.
    """
    with contextlib.suppress(OSError):
        status = os.lstat(store.root)
        return (
            stat.S_ISDIR(status.st_mode)
            and status.st_uid == os.getuid()
            and not status.st_mode & 0o077
        )
    return False
