"""Pass the requests "stop" and "save" to a running attempt through its store.

They are for people who can write to the store but cannot send a signal to the job.
"""

from __future__ import annotations

import json
import re
import secrets
import socket
from collections.abc import Iterable

from harness.store import Store, delete_all
from harness.text import now

REQUESTS = "requests"
REQUEST_NAME = re.compile(
    r"^requests/(?P<attempt>[0-9]{4,})\.(?P<what>stop|save)-[0-9a-f]+\.json\Z"
)


def leave(store: Store, attempt: int, kind: str) -> str:
    """Request an attempt to stop or to save, and return the key of the request.

    Args:
        store: Store that the attempt polls for requests.
        attempt: Number of the attempt.
        kind: "stop" or "save".

    Raises:
        StorageError: The request cannot be written.
    """
    key = f"{REQUESTS}/{attempt:04d}.{kind}-{secrets.token_hex(4)}.json"
    store.prepare((REQUESTS,))
    store.create(
        key, (json.dumps({"host": socket.gethostname(), "time": now()}) + "\n").encode(), attempt
    )
    return key


def pending(store: Store, attempt: int) -> dict[str, str]:
    """Return the requests to an attempt: key -> "stop" or "save".

    Raises StorageError if the store cannot be listed.
    """
    matches = (REQUEST_NAME.match(entry.key) for entry in store.entries(REQUESTS))
    return {
        match.string: match["what"]
        for match in matches
        if match and int(match["attempt"]) == attempt
    }


def sweep(stores: Iterable[Store], below_attempt: int) -> None:
    """Delete the requests to attempts before `below_attempt`.

    A request that another user wrote may not be deletable. It does no harm, as it names another
    attempt.

    Raises:
        StorageError: A store cannot be listed, or not all of its requests could be deleted. All
            deletions in that store were tried; the stores after it are not swept.
    """
    for store in stores:
        names = (REQUEST_NAME.match(entry.key) for entry in store.entries(REQUESTS))
        delete_all(
            store,
            [match.string for match in names if match and int(match["attempt"]) < below_attempt],
        )
