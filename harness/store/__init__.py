"""A place that keeps a run's files: a directory, or a URL that fsspec opens. The only door to file systems and to fsspec.

The contract, whatever the store:

* A key is a relative path with forward slashes. What is written under a key appears whole or not at all, and is durable
  when the call returns.
* `create` is exclusive: of any number of rivals exactly one succeeds, also when a reply is lost.
* `entries` either returns everything that is there or raises; an unreachable store never looks like an empty one.
* Any failure of the medium is a `StorageError` that names the key and what the medium said.

What happens when something goes wrong with a remote store (`remote.py`, `../retry.py`; the run's side is `../run/uploader.py`):

    the fault                                      what follows
    500, 502, 503, 504, 429, SlowDown, time-outs   tried again, exponential waits with full jitter, until `store.wait_s` (a minute
    resets, a reply cut short                      for a background upload) is over; each try is an event, a person reads one line
    a lost reply of an exclusive create            the second try finds the key taken: read back, ours if it is ours to the byte
    a lost reply of the last part                  what has arrived is compared: size, and the server's checksum or the bytes
    a body damaged on its way up                   refused by the server by its MD5 and sent again; or found by the comparison
    a body damaged on its way down, a torn read    the checkpoint's digest does not match: read again once, then the next older
    expired credentials                            read anew from the environment, once
    no such bucket, access denied, bad keys,       at once, in words, exit 78; in the middle of a run training goes on, and the
    a clock that is far off                        upload is tried again every ten seconds
    unreachable at the start                       waited for, then exit 74; never step 0
    unreachable in the middle                      training goes on, checkpoints stay in run.dir; afterwards the newest, the best and
                                                   every n-th are uploaded, not those that were overtaken
    unreachable at the end                         waited for, then exit 74 and where the checkpoint lies; the next start uploads it
    killed between data and manifest, or in parts  there is no checkpoint; `harness prune` finds what is left
    another attempt has begun                      seen before each manifest: exit 76. Seen too late: cut off by the lineage
    a store that ignores If-None-Match             found out before each attempt's claim: exit 78
    an object damaged, cut short, gone, replaced   passed over for the other store's copy, then the next older; marked
    a stale listing                                no cache is used
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from harness.errors import UsageError
from harness.store.base import CHUNK_BYTES, SET_ASIDE, TEMP, Entry, Sink, Store, delete_all
from harness.store.bucket import ObjectClient
from harness.store.explain import redacted
from harness.store.local import LocalStore
from harness.store.sealed_memory import Handle, SealedMemory, attached, keep

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
    "is_url",
    "keep",
    "open_store",
    "redacted",
]  # fmt: skip

DEFAULT_WAIT_S = 300.0


def is_url(text: str) -> bool:
    return "://" in text


def check_url(url: str) -> str | None:
    """What is wrong with the URL of a store, or None. What it says is safe to print."""
    parts = urlsplit(url)
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*", parts.scheme) or not is_url(url):
        return "a URL like s3://bucket/prefix"
    has_password = "@" in parts.netloc + parts.path or (":" in parts.netloc and parts.scheme in ("s3", "s3a"))
    if has_password or parts.query or parts.fragment:
        return "a URL without credentials or options: those come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL …)"
    if not parts.netloc and parts.scheme not in ("file", "local", "memory"):
        return "a URL with a bucket: s3://bucket/prefix"
    if any(part in (".", "..") for part in parts.path.split("/")):
        return "a URL without '..'"
    return None


def open_store(place: str | Path, wait_s: float = DEFAULT_WAIT_S) -> Store:
    """The store at a path or a URL, without asking whether anything is there; `wait_s` is for how long a request is tried.

    Raises UsageError for a URL that no store can be opened with.
    """
    text = str(place)
    if not is_url(text):
        return LocalStore(text)
    if problem := check_url(text):
        raise UsageError(f"{redacted(text)} is not a place for a run", f"expected: {problem}")
    if urlsplit(text).scheme in ("file", "local"):  # fsspec would overwrite what is to be created, and write in place
        return LocalStore(unquote(text.partition("://")[2]))
    from harness.store.remote import RemoteStore  # takes half a second to import, which a local run need not pay

    return RemoteStore(text, _bucket(text), wait_s)


def _bucket(url: str) -> ObjectClient:
    if urlsplit(url).scheme in ("s3", "s3a"):
        from harness.store.s3_client import S3Client

        return S3Client(url)
    from harness.store.fsspec_client import FsspecClient

    try:
        return FsspecClient(url)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{url} cannot be opened", f"found: {error}", "Install the package that fsspec needs for it.") from None
