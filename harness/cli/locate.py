"""Resolve RUN and CHECKPOINT on a command line, and format tables."""

from __future__ import annotations

from collections.abc import Iterator

from harness.checkpoint import load
from harness.checkpoint.format import Manifest, NewerFormatError
from harness.checkpoint.load import GoneError
from harness.errors import DamagedError, HarnessError, StorageError
from harness.monitoring.console import ProgressBar
from harness.store import Store
from harness.supervision.run_address import WAIT_S, checkpoint, everywhere, is_run, run, stores
from harness.text import number, table

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
        StorageError: The checkpoint could not be read, so that it is unknown whether it is damaged.
        GoneError: The checkpoint was deleted after it was listed.
        DamagedError: The check has found any other error.
    """
    for _, problem in verify(store, manifest):
        if isinstance(problem, (*UNKNOWN, GoneError)):
            raise problem
        if problem is not None:
            raise DamagedError(f"{problem.what} {problem.found}".rstrip())
