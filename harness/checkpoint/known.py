"""Read the manifests and the attempt records of a store, each of them once: none ever changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from harness.checkpoint import format as fmt
from harness.checkpoint import records
from harness.checkpoint.format import Manifest
from harness.errors import DamagedError, StorageError
from harness.retry import reading
from harness.store import Store

READERS = 8  # small files that are read concurrently from a remote store


@dataclass
class Known:
    """The manifests and records of one store that this process has read or written, by key.

    Only the listing tells which of them still exist: a file that is listed no longer is forgotten.
    A file that cannot be parsed is not kept, because it may be read whole the next time. An object
    is used by one thread at a time.
    """

    manifests: dict[str, Manifest] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    def wrote(self, manifest: Manifest) -> None:
        """Take a manifest that this process has committed, as a reader would parse it."""
        # One that no reader accepts must not count as a checkpoint here either.
        with contextlib.suppress(DamagedError, fmt.NewerFormatError):
            self.manifests[manifest.key] = fmt.from_bytes(manifest.key, fmt.to_bytes(manifest))

    def read_manifests(
        self, store: Store, keys: list[str]
    ) -> tuple[list[Manifest], dict[str, fmt.NewerFormatError], dict[str, str]]:
        """Return the manifests under the listed keys, and read those that are not known.

        A manifest that was deleted since the listing is left out.

        Returns:
            The readable manifests, the error of each one in a newer format by key, and the reason
            why each damaged one cannot be read by key.
        """
        newer, damaged = dict[str, fmt.NewerFormatError](), dict[str, str]()
        parsed = {key: self.manifests[key] for key in keys if key in self.manifests}
        for key, text in read_files(store, [key for key in keys if key not in parsed]):
            try:
                parsed[key] = _manifest(store, key, text)
            except FileNotFoundError:  # deleted since the first read
                continue
            except fmt.NewerFormatError as error:
                newer[key] = error
            except DamagedError as error:
                damaged[key] = error.what
        self.manifests = parsed
        return list(parsed.values()), newer, damaged

    def read_records(self, store: Store, keys: list[str]) -> dict[str, dict[str, Any]]:
        """Return the records under the listed keys, in their order; read those that are not known.

        A record that cannot be parsed is {}. One that was deleted since the listing is left out.
        """
        parsed = {key: self.records[key] for key in keys if key in self.records}
        for key, text in read_files(store, [key for key in keys if key not in parsed]):
            parsed[key] = records.parse(text)
        self.records = {key: record for key, record in parsed.items() if record}
        return {key: parsed[key] for key in keys if key in parsed}


def read_files(store: Store, keys: list[str]) -> Iterator[tuple[str, bytes]]:
    """Read small files and yield (key, content), concurrently from a remote store.

    A file that was deleted since the listing is left out. Raises StorageError.
    """
    store = store.together()

    def read(key: str) -> bytes | None:
        try:
            return reading(partial(store.read, key)) if store.is_local else store.read(key)
        except FileNotFoundError:
            return None
        except StorageError:
            if store.is_local and key.startswith(fmt.ATTEMPTS):
                # A bad sector under one record is no reason to refuse the run. A failing server is
                # one: it may hide anything.
                return b""
            raise

    if store.is_local:
        texts = [read(key) for key in keys]
    else:
        with ThreadPoolExecutor(READERS, thread_name_prefix="list") as pool:
            texts = list(pool.map(read, keys))
    return ((key, text) for key, text in zip(keys, texts, strict=True) if text is not None)


def _manifest(store: Store, key: str, text: bytes) -> Manifest:
    """Parse a manifest, and read it again from a remote store if it is damaged.

    Data that was damaged on the network may be intact in the second read. Raises DamagedError.
    """
    try:
        return fmt.from_bytes(key, text)
    except DamagedError:
        if store.is_local:
            raise
        return fmt.from_bytes(key, store.read(key))
