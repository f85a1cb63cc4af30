"""Test the operations that a run needs from a store before the run starts."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable

from harness.errors import RefusedError, StorageError
from harness.store.base import Store

FOLDER = "probe"


def new_key() -> str:
    """Return a random key for the checks."""
    return f"{FOLDER}/{secrets.token_hex(8)}"


def checks(store: Store, key: str) -> list[tuple[str, Callable[[], None]]]:
    """Return the named checks, to be called in this order.

    Each check raises StorageError on failure; a failed check may leave `key` in the store.
    """
    ours, theirs = os.urandom(64), os.urandom(64)

    def create_again() -> None:
        try:
            store.create(key, theirs, 0)
        except FileExistsError:
            return
        raise RefusedError(
            f"{store} does not create exclusively: a second create of one key succeeded",
            "expected: a refusal (If-None-Match: * on S3)",
            "Two attempts of one run could both think that they are the only one: "
            "use another store, or a newer server.",
        )

    def read_back() -> None:
        if (actual := store.read(key)) != ours:
            raise StorageError(
                f"{store} gave back other bytes than were written",
                f"found: {actual[:16]!r}…, expected: {ours[:16]!r}…",
            )

    def is_listed() -> None:
        if key not in {entry.key for entry in store.entries(FOLDER)}:
            raise StorageError(
                f"{store} does not list what was just written", f"searched: {store.where(key)}"
            )

    def delete() -> None:
        store.delete(key)
        if store.exists(key):
            raise StorageError(
                f"{store} still has what was just deleted", f"found: {store.where(key)}"
            )

    return [
        ("list", lambda: _discard(store.entries(FOLDER))),
        ("create", lambda: store.create(key, ours, 0)),
        ("create exclusively", create_again),
        ("read back", read_back),
        ("list what was written", is_listed),
        ("delete", delete),
    ]


def check(store: Store) -> None:
    """Run all checks with a new key, at the start of an attempt.

    After a failure the key is deleted without retries, if that is possible.

    Raises:
        StorageError: The first failed check.
    """
    key = new_key()
    try:
        for _, make in checks(store, key):
            make()
    except StorageError:
        with contextlib.suppress(StorageError):
            store.with_retry_limit(0).delete(key)
        raise


def _discard(result: object) -> None:
    """Drop the result of a check that only has to succeed."""
