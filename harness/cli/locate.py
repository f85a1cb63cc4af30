"""What RUN and CHECKPOINT on a command line mean, and how tables look."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.checkpoint import format as fmt
from harness.checkpoint import launches, load
from harness.checkpoint.attempts import remembered
from harness.checkpoint.format import Manifest
from harness.checkpoint.history import Survey, survey
from harness.errors import DamagedError, HarnessError, StorageError, UsageError
from harness.events import Bar, say
from harness.store import LocalStore, Store, is_url, open_store

WAIT_S = 30.0  # somebody sits in front of it


def stores(path: str) -> tuple[Store, ...]:
    """The store at a path or URL, and, of a run directory, the remote store that it remembers."""
    store = open_store(path, WAIT_S)
    remote = remembered(store) if isinstance(store, LocalStore) else None
    return (store, open_store(remote, WAIT_S)) if remote else (store,)


def run(*places: Store | str) -> tuple[Store, Survey]:
    """A run's first store and what is in all those given. Raises UsageError if there is no run, StorageError if one cannot be listed."""
    opened = [open_store(place, WAIT_S) if isinstance(place, str) else place for place in places]
    found = survey(*opened)
    found.check_one_run()
    if not (found.greatest or found.manifests or found.orphans or any(_was_submitted(store) for store in opened)):
        raise UsageError(
            f"there is no run in {opened[0]}",
            "found: neither attempts nor checkpoints",
            "Give the run's directory or URL.",
        )
    return opened[0], found


def _was_submitted(store: Store) -> bool:
    """Whether a supervisor knows the run, though no attempt has begun."""
    return store.exists(launches.SUBMITTED) or bool(store.entries(launches.LAUNCHES))


def everywhere(path: str) -> tuple[Store, Survey]:
    """A run and what is in all its stores; if the remote one that a directory remembers cannot be reached, that is said."""
    first, *others = stores(path)
    try:
        return run(first, *others)
    except StorageError as error:
        if not others:
            raise
        say(f"harness: warning: only what is in {first}: {error.what} ({error.found})", sys.stderr)
        return run(first)


def is_run(path: str) -> bool:
    """Whether a path or URL means a run, not one of its checkpoints."""
    return Path(path).is_dir() or (is_url(path) and not path.endswith((".pt", ".json")))


def checkpoint(path: str) -> tuple[Store, Manifest]:
    """A checkpoint by its `.pt` or `.json` file, or a run's newest one. Raises UsageError, DamagedError."""
    if is_run(path):
        store, found = run(path)
        if found.head is None:
            raise UsageError(f"the run in {store} has no checkpoint", remedy="harness ls shows what is there.")
        return store, found.head
    if not is_url(path):
        if not Path(path).exists():
            raise UsageError(f"there is nothing at {path}", remedy="Give a run's directory, or a checkpoint's file.")
        path = str(Path(path).absolute())
    place, _, name = path.rpartition("/")
    root, _, folder = place.rpartition("/")
    key = f"{fmt.CHECKPOINTS}/{name.rpartition('.')[0]}.json"
    if fmt.CHECKPOINT_NAME.match(f"{fmt.CHECKPOINTS}/{name}") is None or folder != fmt.CHECKPOINTS:
        raise UsageError(
            f"{path} is not a checkpoint of this harness",
            "expected: RUN/checkpoints/step_00000120-0003.pt, or the run's directory",
            "harness ls RUN shows a run's checkpoints.",
        )
    store = open_store(root, WAIT_S)
    try:
        return store, fmt.from_bytes(key, store.read(key))
    except FileNotFoundError:
        raise DamagedError(
            f"{path} has no manifest, so it is no checkpoint", f"searched: {store.where(key)}", "harness ls RUN shows those that are."
        ) from None


def verify(store: Store, *manifests: Manifest) -> Iterator[tuple[Manifest, str]]:
    """Read and check every byte, behind a live line; each checkpoint with what is wrong with it, or ""."""
    bar = Bar(f"reading {store}", sum(manifest.size_bytes for manifest in manifests))
    for manifest in manifests:
        try:
            load.check(store, manifest, bar)
            problem = ""
        except HarnessError as error:
            problem = f"{error.what} {error.found}".rstrip()
        bar.end()
        yield manifest, problem


def check(store: Store, manifest: Manifest) -> None:
    """Raises DamagedError unless every byte of the checkpoint is as it was written."""
    for _, problem in verify(store, manifest):
        if problem:
            raise DamagedError(problem)


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns, aligned to the left, without lines."""
    widths = [max(len(row[at]) for row in [header, *rows]) for at in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [header, *rows])


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"
