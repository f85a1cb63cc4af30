"""A place that keeps a run's files: a directory, or a URL that fsspec opens. The only door to file systems and to fsspec.

The contract, whatever the store:

* A key is a relative path with forward slashes. What is written under a key appears whole or not at all, and is durable
  when the call returns.
* `create` is exclusive: of any number of rivals exactly one succeeds, also when a reply is lost.
* `entries` either returns everything that is there or raises; an unreachable store never looks like an empty one.
* Any failure of the medium is a `StorageError` that names the key and what the medium said.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from harness.errors import UsageError
from harness.store.base import CHUNK_BYTES, SET_ASIDE, TEMP, Entry, Sink, Store
from harness.store.local import LocalStore
from harness.store.words import redacted

__all__ = [
    "CHUNK_BYTES", "DEFAULT_WAIT_S", "SET_ASIDE", "TEMP", "Entry", "LocalStore", "Sink", "Store", "check_url", "is_url", "open_store",
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
    if "@" in parts.netloc or parts.query or parts.fragment:
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
        raise UsageError(f"{redacted(text).partition('?')[0]} is not a place for a run", f"expected: {problem}")
    if urlsplit(text).scheme in ("file", "local"):  # fsspec would overwrite what is to be created, and write in place
        return LocalStore(unquote(text.partition("://")[2]))
    from harness.store.remote import RemoteStore  # takes half a second to import, which a local run need not pay

    return RemoteStore(text, _bucket(text), wait_s)


def _bucket(url: str):  # type: ignore[no-untyped-def]
    if urlsplit(url).scheme in ("s3", "s3a"):
        from harness.store.s3 import S3Bucket

        return S3Bucket(url)
    from harness.store.anyfs import AnyBucket

    try:
        return AnyBucket(url)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{url} cannot be opened", f"found: {error}", "Install the package that fsspec needs for it.") from None
