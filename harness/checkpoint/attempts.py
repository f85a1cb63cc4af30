"""Claim, fence and end attempts.

An attempt is claimed exclusively. Attempts are numbered in increasing order, without gaps, and no
number is reused. The number is the fencing token. An end record states in words how an attempt
ended.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.checkpoint import format as fmt
from harness.checkpoint import records
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Manifest
from harness.errors import SupersededError
from harness.store import LocalStore, Store
from harness.text import now


@dataclass(frozen=True)
class Attempt:
    """One attempt of a run: one life of the process group."""

    number: int
    run_id: str
    nonce: str


def claim(
    catalog: Catalog,
    went_on_from: Manifest | None,
    world_size: int,
    kind: str = "train",
    more: Mapping[str, Any] | None = None,
) -> Attempt:
    """Create the record of the next attempt in every store of the catalog and return the attempt.

    The record is created in the last store first: that store decides which of two starts wins.

    Args:
        catalog: Catalog of the run's stores.
        went_on_from: Checkpoint that the attempt resumes from; None for step 0.
        world_size: Number of ranks.
        kind: Kind of the attempt, "train", "import" or "rollback".
        more: Additional fields of the record; the fields set here take precedence.

    Raises:
        SupersededError: Another start has claimed the number first.
    """
    attempt = Attempt(
        catalog.greatest + 1, catalog.run_id or secrets.token_hex(8), secrets.token_hex(16)
    )
    record = dict(more or {}) | {
        "attempt": attempt.number,
        "run_id": attempt.run_id,
        "nonce": attempt.nonce,
        "kind": kind,
        "from": {"attempt": went_on_from.attempt, "step": went_on_from.step}
        if went_on_from
        else None,
        "reached": catalog.reached,
        "world_size": world_size,
        "remote": str(catalog.stores[-1]) if len(catalog.stores) > 1 else None,
        "launch": os.environ.get("HARNESS_LAUNCH"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": now(),
    }
    key = fmt.attempt_key(attempt.number)
    for store in reversed(catalog.stores):
        try:
            store.create(key, spell(record), attempt.number)
        except FileExistsError:
            if not holds(store, attempt):  # else an earlier try succeeded and its reply was lost
                raise _superseded(store, attempt) from None
    return attempt


def _superseded(store: Store, attempt: Attempt) -> SupersededError:
    """Return the error for an attempt that another start has claimed."""
    return SupersededError(
        f"another start of this run was faster: attempt {attempt.number} of {store} is not ours",
        remedy="Only one job may train a run. If the other one is gone, start this one again.",
    )


def remembered(here: Catalog) -> str | None:
    """Return the remote store that a run directory was last used with, or None.

    `here` is the catalog of the directory alone.
    """
    readable = [number for number in sorted(here.attempts) if "nonce" in here.attempts[number]]
    remote = here.attempts[readable[-1]].get("remote") if readable else None
    return str(remote) if remote else None


def holds(store: Store, attempt: Attempt) -> bool:
    """Return whether the store holds this attempt's own record, identified by its nonce."""
    try:
        return bool(
            records.parse(store.read(fmt.attempt_key(attempt.number))).get("nonce") == attempt.nonce
        )
    except FileNotFoundError:
        return False


def check_fence(store: Store, attempt: Attempt) -> None:
    """Raise SupersededError if a newer attempt has begun.

    The check only gives early notice. The lineage in the manifests is what protects the history.
    """
    matches = [
        match
        for entry in store.entries(fmt.ATTEMPTS)
        if (match := fmt.ATTEMPT_NAME.match(entry.key))
    ]
    newest = max((int(match["attempt"]) for match in matches), default=attempt.number)
    if newest > attempt.number:
        raise SupersededError(
            f"attempt {attempt.number} is superseded: attempt {newest} of {store} has begun",
            remedy="This process writes nothing more; the newer attempt goes on.",
        )


def end(store: Store, attempt: Attempt, why: str, **details: Any) -> bool:
    """Record how an attempt ended: finished, stopped, failed or superseded.

    The first record stays; later ones are ignored.

    Args:
        store: Store that receives the record.
        attempt: Attempt that ended.
        why: One of the four words above.
        details: Additional fields of the record.

    Returns:
        True if this call has created the record.
    """
    return first_word(
        store, fmt.end_key(attempt.number), {"why": why, "time": now()} | details, attempt.number
    )


def end_copied(store: Store, attempt: Attempt, manifest: Manifest, by: str) -> None:
    """Record the end of an attempt that has only put one checkpoint into the run.

    Args:
        store: Store that receives the record.
        attempt: Attempt that ended.
        manifest: Its checkpoint, which the next start resumes from.
        by: The command: "import" or "rollback".
    """
    step = manifest.step
    end(store, attempt, "stopped", step=step, saved=True, saved_step=step, by=by)


def first_word(store: Store, key: str, record: dict[str, Any], attempt: int = 0) -> bool:
    """Create a record that only the first caller creates; return whether this call created it.

    Args:
        store: Store that receives the record.
        key: Key of the record.
        record: Fields of the record.
        attempt: Number of the attempt that writes.

    Raises:
        StorageError: The store fails.
    """
    try:
        store.create(key, spell(record), attempt)
    except FileExistsError:
        return False
    return True


def add_event(store: Store, attempt: Attempt, rank: int, line: bytes) -> None:
    """Add a line to an attempt's event log from a rank that does not write the log.

    On a store that cannot append, the line becomes a file of its own.

    Args:
        store: Store of the run.
        attempt: Attempt that the event belongs to.
        rank: Rank that reports the event.
        line: The event, one line of JSON.

    Raises:
        StorageError: The store fails.
    """
    if not isinstance(store, LocalStore):
        store.create(fmt.rank_events_key(attempt.number, rank), line, attempt.number)
    elif holds(store, attempt):  # else the directory is on another node's disk
        store.append(fmt.events_key(attempt.number), line)


def spell(record: dict[str, Any]) -> bytes:
    """Serialise a small record to the bytes that a store holds."""
    return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()
