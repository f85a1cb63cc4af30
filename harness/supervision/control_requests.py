"""Requests to a living attempt, left in its store by whoever may write there but not signal the job: stop, or save."""

from __future__ import annotations

import json
import re
import secrets
import socket
from collections.abc import Iterable

from harness.checkpoint.attempts import now
from harness.store import Store, delete_all

REQUESTS = "requests"
REQUEST_NAME = re.compile(r"^requests/(?P<attempt>[0-9]{4,})\.(?P<what>stop|save)-[0-9a-f]+\.json\Z")


def leave(store: Store, attempt: int, what: str) -> str:
    """Ask an attempt to "stop" or to "save"; returns the request's key. Raises StorageError."""
    key = f"{REQUESTS}/{attempt:04d}.{what}-{secrets.token_hex(4)}.json"
    store.prepare((REQUESTS,))
    store.create(key, (json.dumps({"host": socket.gethostname(), "time": now()}) + "\n").encode(), attempt)
    return key


def pending(store: Store, attempt: int) -> dict[str, str]:
    """The requests that name this attempt, key by what is asked for. Raises StorageError."""
    matches = (REQUEST_NAME.match(entry.key) for entry in store.entries(REQUESTS))
    return {match.string: match["what"] for match in matches if match and int(match["attempt"]) == attempt}


def sweep(stores: Iterable[Store], below_attempt: int) -> None:
    """Delete what earlier attempts were asked for, as far as that can be. Raises StorageError if not all could: it may be another
    user's, and then it stays, without harm, as it names another attempt."""
    for store in stores:
        names = (REQUEST_NAME.match(entry.key) for entry in store.entries(REQUESTS))
        delete_all(store, [match.string for match in names if match and int(match["attempt"]) < below_attempt])
