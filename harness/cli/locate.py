"""What RUN and CHECKPOINT on a command line mean, and how tables look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.checkpoint import format as fmt
from harness.checkpoint.format import Manifest
from harness.checkpoint.history import Survey, survey
from harness.errors import DamagedError, UsageError
from harness.store import LocalStore


def run(path: str) -> tuple[LocalStore, Survey]:
    """A run's directory and what is in it. Raises UsageError if there is no run, StorageError if it cannot be listed."""
    _refuse_url(path)
    store = LocalStore(path)
    found = survey(store)
    if not (found.greatest or found.manifests or found.orphans):
        raise UsageError(
            f"there is no run in {store}", "found: neither attempts nor checkpoints", "Give the run's directory, the one of run.dir."
        )
    return store, found


def checkpoint(path: str) -> tuple[LocalStore, Manifest]:
    """A checkpoint by its `.pt` or `.json` file, or a run's newest one. Raises UsageError, DamagedError."""
    _refuse_url(path)
    file = Path(path)
    if file.is_dir():
        store, found = run(path)
        if found.head is None:
            raise UsageError(f"the run in {store} has no checkpoint", remedy="harness ls shows what is there.")
        return store, found.head
    if not file.exists():
        raise UsageError(f"there is nothing at {path}", remedy="Give a run's directory, or a checkpoint's file.")
    key = f"{fmt.CHECKPOINTS}/{file.stem}.json"
    if fmt.CHECKPOINT_NAME.match(f"{fmt.CHECKPOINTS}/{file.name}") is None or file.parent.name != fmt.CHECKPOINTS:
        raise UsageError(
            f"{path} is not a checkpoint of this harness",
            "expected: RUN/checkpoints/step_00000120-0003.pt, or the run's directory",
            "harness ls RUN shows a run's checkpoints.",
        )
    store = LocalStore(file.absolute().parent.parent)
    try:
        return store, fmt.from_bytes(key, store.read(key))
    except FileNotFoundError:
        raise DamagedError(
            f"{path} has no manifest, so it is no checkpoint", f"searched: {store.path(key)}", "harness ls RUN shows those that are."
        ) from None


def _refuse_url(path: str) -> None:
    if "://" in path:
        raise UsageError("remote storage is not supported by this version", f"found: {path}", "Give a local directory.")


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns, aligned to the left, without lines."""
    widths = [max(len(row[at]) for row in [header, *rows]) for at in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [header, *rows])


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"
