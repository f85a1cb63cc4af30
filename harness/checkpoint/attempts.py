"""Attempts: claimed exclusively, numbered without gap or return, ended in words. The number is the fencing token."""

from __future__ import annotations

import datetime
import json
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.checkpoint import format as fmt
from harness.checkpoint import records
from harness.checkpoint.catalog import Catalog, read_catalog
from harness.checkpoint.format import Manifest
from harness.errors import SupersededError
from harness.store import LocalStore, Store


@dataclass(frozen=True)
class Attempt:
    """One life of the process group."""

    number: int
    run_id: str
    nonce: str


def now() -> str:
    """The time for people to read; nothing is ever decided by it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")


def claim(
    found: Catalog, went_on_from: Manifest | None, world_size: int, kind: str = "train", more: Mapping[str, Any] | None = None
) -> Attempt:
    """Create the next attempt's record, with `more` in it, in every store of the survey, the last one first: it is the authority.

    Raises SupersededError if another start was faster.
    """
    attempt = Attempt(found.greatest + 1, found.run_id or secrets.token_hex(8), secrets.token_hex(16))
    record = dict(more or {}) | {
        "attempt": attempt.number,
        "run_id": attempt.run_id,
        "nonce": attempt.nonce,
        "kind": kind,
        "from": {"attempt": went_on_from.attempt, "step": went_on_from.step} if went_on_from else None,
        "reached": found.reached,
        "world_size": world_size,
        "remote": str(found.stores[-1]) if len(found.stores) > 1 else None,
        "launch": os.environ.get("HARNESS_LAUNCH"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": now(),
    }
    key = fmt.attempt_key(attempt.number)
    for store in reversed(found.stores):
        try:
            store.create(key, spell(record), attempt.number)
        except FileExistsError:
            if not holds(store, attempt):  # else: our own first try, whose reply was lost
                raise SupersededError(
                    f"another start of this run was faster: attempt {attempt.number} of {store} is not ours",
                    remedy="Only one job may train a run. If the other one is gone, start this one again.",
                ) from None
    return attempt


def remembered(local: Store) -> str | None:
    """The remote store that a run directory was last used with."""
    records = read_catalog(local).attempts
    readable = [number for number in sorted(records) if "nonce" in records[number]]
    found = records[readable[-1]].get("remote") if readable else None
    return str(found) if found else None


def holds(store: Store, attempt: Attempt) -> bool:
    """Whether the store shows this attempt's own record, by its nonce."""
    try:
        return bool(records.parse(store.read(fmt.attempt_key(attempt.number))).get("nonce") == attempt.nonce)
    except FileNotFoundError:
        return False


def check_fence(store: Store, attempt: Attempt) -> None:
    """Raises SupersededError if a newer attempt has begun. Early notice only: what keeps a history clean is the lineage."""
    matches = [match for entry in store.entries(fmt.ATTEMPTS) if (match := fmt.ATTEMPT_NAME.match(entry.key))]
    newest = max((int(match["attempt"]) for match in matches), default=attempt.number)
    if newest > attempt.number:
        raise SupersededError(
            f"attempt {attempt.number} is superseded: attempt {newest} of {store} has begun",
            remedy="This process writes nothing more; the newer attempt goes on.",
        )


def end(store: Store, attempt: Attempt, why: str, **details: Any) -> bool:
    """Record how an attempt ended: finished, stopped, failed or superseded. The first word stands; returns whether it was ours."""
    return first_word(store, fmt.end_key(attempt.number), {"why": why, "time": now()} | details, attempt.number)


def first_word(store: Store, key: str, record: dict[str, Any], attempt: int = 0) -> bool:
    """Create a record that is made once, by whoever is first; returns whether it was us. Raises StorageError."""
    try:
        store.create(key, spell(record), attempt)
    except FileExistsError:
        return False
    return True


def add_event(store: Store, attempt: Attempt, rank: int, line: bytes) -> None:
    """Add a line to an attempt's events from a rank that does not keep them; on a store that cannot append, in a file of its own.
    Raises StorageError."""
    if not isinstance(store, LocalStore):
        store.create(fmt.rank_events_key(attempt.number, rank), line, attempt.number)
    elif holds(store, attempt):  # else another node's disk
        store.append(fmt.events_key(attempt.number), line)


def spell(record: dict[str, Any]) -> bytes:
    """A small record as it lies in a store."""
    return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()
