"""Resolve RUN and CHECKPOINT on a command line, and format tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from harness.checkpoint import load
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Manifest, NewerFormatError
from harness.errors import DamagedError, HarnessError, StorageError
from harness.monitoring.console import ProgressBar
from harness.store import Store
from harness.supervision.run_address import WAIT_S, checkpoint, is_run, run, stores
from harness.text import number, say, table

__all__ = [
    "WAIT_S",
    "check",
    "checkpoint",
    "everywhere",
    "is_run",
    "number",
    "run",
    "stores",
    "table",
    "verify",
]


def everywhere(path: str) -> tuple[Store, Catalog]:
    """Return a run's first store, and the catalog of all its stores.

    If the remote store that a run directory remembers cannot be reached, a warning is printed and
    the catalog is that of the directory alone. Raises UsageError if there is no run, StorageError
    if the first store cannot be listed.
    """
    first, *others = stores(path)
    try:
        return run(first, *others)
    except StorageError as error:
        if not others:
            raise
        say(f"harness: warning: only what is in {first}: {error.what} ({error.found})", sys.stderr)
        return run(first)


# Errors that say nothing about the bytes of a checkpoint: it is not damaged for them.
UNKNOWN = (NewerFormatError, StorageError)


def verify(store: Store, *manifests: Manifest) -> Iterator[tuple[Manifest, HarnessError | None]]:
    """Read and check every byte of checkpoints, and show a progress bar.

    Yields:
        Each checkpoint with the error that was found in it, or None.
    """
    problem: HarnessError | None
    bar = ProgressBar(f"reading {store}", sum(manifest.size_bytes for manifest in manifests))
    for manifest in manifests:
        try:
            load.check(store, manifest, bar)
            problem = None
        except HarnessError as error:
            problem = error
        bar.end()
        yield manifest, problem


def check(store: Store, manifest: Manifest) -> None:
    """Verify every byte of a checkpoint.

    Raises:
        NewerFormatError: Only a newer harness can read the checkpoint.
        StorageError: The checkpoint could not be read, which says nothing about it.
        DamagedError: The check has found any other error.
    """
    for _, problem in verify(store, manifest):
        if isinstance(problem, UNKNOWN):
            raise problem
        if problem is not None:
            raise DamagedError(f"{problem.what} {problem.found}".rstrip())
