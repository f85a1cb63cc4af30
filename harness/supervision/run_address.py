"""What RUN and CHECKPOINT mean, on a command line and in a notebook."""

from __future__ import annotations

import os
from pathlib import Path

from harness.checkpoint import format as fmt
from harness.checkpoint import load, retention
from harness.checkpoint.attempts import remembered
from harness.checkpoint.catalog import Catalog, read_catalog
from harness.checkpoint.format import Manifest
from harness.errors import DamagedError, UsageError
from harness.store import LocalStore, Store, is_url, open_store
from harness.supervision import launches

FILES = (".pt", ".json", ".pth", ".tar", ".t7", ".ckpt", ".bin", ".pkl", ".safetensors", ".pt2")  # what a URL of one file ends with
WAIT_S = 30.0  # somebody sits in front of it
NEWEST, BEST = "newest", "best"


def stores(path: str) -> tuple[Store, ...]:
    """The store at a path or URL, and, of a run directory, the remote store that it remembers."""
    store = open_store(path, WAIT_S)
    remote = remembered(store) if isinstance(store, LocalStore) else None
    return (store, open_store(remote, WAIT_S)) if remote else (store,)


def run(*places: Store | str) -> tuple[Store, Catalog]:
    """A run's first store and what is in all those given. Raises UsageError if there is no run, StorageError if one cannot be listed."""
    opened = [open_store(place, WAIT_S) if isinstance(place, str) else place for place in places]
    found = read_catalog(*opened)
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


def is_run(path: str) -> bool:
    """Whether a path or URL means a run, not one of its checkpoints or another file."""
    return os.path.isdir(path) or (is_url(path) and not path.endswith(FILES))


def is_checkpoint(path: str) -> bool:
    """Whether a path or URL is called as the checkpoints of a run are."""
    place, _, name = str(path if is_url(path) else Path(path).absolute()).rpartition("/")
    called = fmt.CHECKPOINT_NAME.match(f"{fmt.CHECKPOINTS}/{name}")
    return called is not None and called["aside"] is None and place.rpartition("/")[2] == fmt.CHECKPOINTS


def checkpoint(path: str, which: str | int = NEWEST) -> tuple[Store, Manifest]:
    """A checkpoint by its `.pt` or `.json` file, or a run's newest one, its best, or that of a step. Raises UsageError, DamagedError."""
    if is_run(path):
        store, found = run(path)
        return store, _chosen(store, found, which)
    if which != NEWEST:
        raise UsageError(f"{path} is one file: there is nothing to choose from", f"found: {which}", "Name the run to choose from it.")
    if not is_url(path):
        if not Path(path).exists():
            raise UsageError(f"there is nothing at {path}", remedy="Give a run's directory, or a checkpoint's file.")
        path = str(Path(path).absolute())
    if not is_checkpoint(path):
        raise UsageError(
            f"{path} is not a checkpoint of this harness",
            "expected: RUN/checkpoints/step_00000120-0003.pt, or the run's directory",
            "harness ls RUN shows a run's checkpoints.",
        )
    place, _, name = path.rpartition("/")
    store, key = open_store(place.rpartition("/")[0], WAIT_S), f"{fmt.CHECKPOINTS}/{name.rpartition('.')[0]}.json"
    try:
        return store, fmt.from_bytes(key, store.read(key))
    except FileNotFoundError:
        raise DamagedError(
            f"{path} has no manifest, so it is no checkpoint", f"searched: {store.where(key)}", "harness ls RUN shows those that are."
        ) from None


def _chosen(store: Store, found: Catalog, which: str | int) -> Manifest:
    if which in (NEWEST, BEST):
        found.check_readable()
    if found.head is None:
        raise UsageError(f"the run in {store} has no checkpoint", remedy="harness ls shows what is there.")
    if which == NEWEST:
        return found.head
    if which == BEST:
        return _best(store, found, found.head)
    of_step = [manifest for manifest in found.history if str(manifest.step) == str(which)]
    if not of_step:
        steps = ", ".join(str(manifest.step) for manifest in found.history)
        raise UsageError(f"the run in {store} has no checkpoint of step {which}", f"found: steps {steps}", "Name one, or newest, or best.")
    return max(of_step, key=lambda manifest: manifest.order)


def _best(store: Store, found: Catalog, head: Manifest) -> Manifest:
    """The checkpoint with the best value that the newest one knows of; its metric stands in the settings, or is whose value it is."""
    payload = load.outline(store, head.data_key)
    metric, _, direction = str(payload["config"].get("checkpoint", {}).get("best", "")).rpartition(":")
    if metric:
        ranked = retention.best(found.history, retention.Policy(metric=metric, higher_is_better=direction == "max"))
    else:
        ranked = [manifest for manifest in found.history if payload["best"] in manifest.metrics.values()]
    if not ranked:
        raise UsageError(
            f"no checkpoint of the run in {store} was evaluated by {metric or 'the metric that init(best=…) names'}",
            f"found: {', '.join(head.metrics) or 'no metrics'}",
            "Take the newest, or name a step.",
        )
    return ranked[0]
