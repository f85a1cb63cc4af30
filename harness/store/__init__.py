"""Store a run's files in a local directory or at a URL that fsspec opens.

All other packages access a run's files and fsspec through this one. Every store keeps this
contract:

* A key is a relative path with forward slashes. A file appears under its key whole or not at all,
  and it is durable when the call returns.
* `create` is exclusive: of any number of concurrent callers exactly one succeeds, even if a reply
  is lost.
* `entries` either returns every file or raises. An unreachable store never looks like an empty one.
* Any failure of the medium raises a `StorageError` that names the key and the error of the medium.

Faults of a remote store and their handling (`remote.py`, `../retry.py`; on the run's side
`../saving/uploader.py`):

    500, 502, 503, 504, 429, SlowDown,      The request is retried with exponential waits and full
    time-outs, connection resets, a reply   jitter until `store.wait_s` (a minute for a background
    that is cut short                       upload) is over. Each retry is an event; one line is
                                            printed for the user.
    lost reply of an exclusive create       The retry finds the key taken. The object is read back
                                            and counts as created if the bytes are identical.
    lost reply of the last part             The stored object is compared: its size, and the
                                            server's checksum or the bytes.
    body damaged during the upload          The server rejects it by its checksum and it is sent
                                            again, or the comparison finds the damage.
    body damaged during the download,       The digest of the checkpoint does not match. It is read
    mix of two versions                     once more; then the next older checkpoint is used.
    expired credentials                     They are read again from the environment, once.
    no such bucket, access denied, bad      The start fails at once with a message, exit 78. During
    keys, clock that is far off             a run training continues, and the upload is retried
                                            every ten seconds.
    unreachable at the start                The run waits, then exits with 74. It never starts at
                                            step 0.
    unreachable during the run              Training continues and checkpoints stay in run.dir.
                                            Afterwards the newest, the best and every n-th are
                                            uploaded, but not those that were superseded.
    unreachable at the end                  The run waits, then exits with 74 and prints the path of
                                            the checkpoint. The next start uploads it.
    killed between data and manifest, or    There is no checkpoint. `harness prune` finds the
    during a multipart upload               remains.
    another attempt has begun               Detected before each manifest is written: exit 76. If it
                                            is detected too late, the lineage excludes the
                                            checkpoint.
    store that ignores If-None-Match        Detected before each attempt's claim: exit 78.
    object damaged, truncated, missing or   The copy of the other store is used, then the next older
    replaced                                checkpoint. The damaged copy is marked.
    stale listing                           Does not occur: no cache is used.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from harness.errors import UsageError
from harness.store.base import CHUNK_BYTES, SET_ASIDE, TEMP, Entry, Sink, Store, delete_all
from harness.store.bucket import ObjectClient
from harness.store.local import LocalStore
from harness.store.sealed_memory import Handle, SealedMemory, attached, keep
from harness.store.urls import DEFAULT_WAIT_S, check_url, expanded, is_url, redacted

__all__ = [
    "CHUNK_BYTES",
    "DEFAULT_WAIT_S",
    "SET_ASIDE",
    "TEMP",
    "Entry",
    "Handle",
    "LocalStore",
    "SealedMemory",
    "Sink",
    "Store",
    "attached",
    "check_url",
    "delete_all",
    "expanded",
    "is_url",
    "keep",
    "open_store",
    "redacted",
]


def open_store(place: str | Path, wait_s: float = DEFAULT_WAIT_S) -> Store:
    """Return the store at a path or URL, without checking that it exists.

    Args:
        place: Path or URL of the store.
        wait_s: Retry limit of each request to a remote store in seconds.

    Raises:
        UsageError: The URL is invalid, or no store can be opened with it.
    """
    text = str(place)
    if not is_url(text):
        return LocalStore(text)
    if problem := check_url(text):
        raise UsageError(f"{redacted(text)} is not a place for a run", f"expected: {problem}")
    # fsspec's local file system overwrites on an exclusive create, and writes in place.
    if urlsplit(text).scheme in ("file", "local"):
        return LocalStore(unquote(text.partition("://")[2]))
    # Imported here because it takes half a second, which a local run does not need to spend.
    from harness.store.remote import RemoteStore

    return RemoteStore(text, _bucket(text), wait_s)


def _bucket(url: str) -> ObjectClient:
    """Return the client for a URL. Raises UsageError if fsspec cannot open it."""
    if urlsplit(url).scheme in ("s3", "s3a"):
        from harness.store.s3_client import S3Client

        return S3Client(url)
    from harness.store.fsspec_client import FsspecClient

    try:
        return FsspecClient(url)
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"{url} cannot be opened",
            f"found: {error}",
            "Install the package that fsspec needs for it.",
        ) from None
