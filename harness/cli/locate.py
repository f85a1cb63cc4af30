"""What RUN and CHECKPOINT on a command line mean, and how tables look."""

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

__all__ = ["WAIT_S", "check", "checkpoint", "everywhere", "is_run", "number", "run", "stores", "table", "verify"]


def everywhere(path: str) -> tuple[Store, Catalog]:
    """A run and what is in all its stores; if the remote one that a directory remembers cannot be reached, that is said."""
    first, *others = stores(path)
    try:
        return run(first, *others)
    except StorageError as error:
        if not others:
            raise
        say(f"harness: warning: only what is in {first}: {error.what} ({error.found})", sys.stderr)
        return run(first)


def verify(store: Store, *manifests: Manifest) -> Iterator[tuple[Manifest, HarnessError | None]]:
    """Read and check every byte, behind a live line; each checkpoint with what is wrong with it, or None."""
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
    """Raises DamagedError unless every byte of the checkpoint is as it was written."""
    for _, problem in verify(store, manifest):
        if isinstance(problem, NewerFormatError):
            raise problem
        if problem is not None:
            raise DamagedError(f"{problem.what} {problem.found}".rstrip())
