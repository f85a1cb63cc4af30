"""Resolve the arguments RUN and CHECKPOINT of the command line and of the notebook functions."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from harness.checkpoint import format as fmt
from harness.checkpoint import load, retention
from harness.checkpoint.attempts import remembered
from harness.checkpoint.catalog import Catalog, read_catalog
from harness.checkpoint.format import Manifest
from harness.config.rules import METRIC
from harness.errors import DamagedError, HarnessError, StorageError, UsageError
from harness.store import LocalStore, Store, is_url, open_store
from harness.supervision import launches
from harness.text import say

# Suffixes by which a URL of one file is recognised.
FILES = (
    ".pt",
    ".json",
    ".pth",
    ".tar",
    ".t7",
    ".ckpt",
    ".bin",
    ".pkl",
    ".safetensors",
    ".pt2",
)
WAIT_S = 30.0  # retry limit of a request in seconds; short, because a person waits for the result
NEWEST, BEST = "newest", "best"


def stores(path: str) -> tuple[Store, ...]:
    """Return the store at a path or URL and, for a run directory, the recorded remote store."""
    store = open_store(path, WAIT_S)
    remote = remembered(read_catalog(store)) if isinstance(store, LocalStore) else None
    return (store, open_store(remote, WAIT_S)) if remote else (store,)


def run(*places: Store | str) -> tuple[Store, Catalog]:
    """Return the first of a run's stores and the catalog of all of them.

    Raises:
        UsageError: There is no run, or the stores hold different runs.
        StorageError: A store cannot be listed.
    """
    opened = [open_store(place, WAIT_S) if isinstance(place, str) else place for place in places]
    catalog = read_catalog(*opened)
    catalog.check_same_run()
    if not (
        catalog.greatest
        or catalog.manifests
        or catalog.orphans
        or any(_was_submitted(store) for store in opened)
    ):
        raise UsageError(
            f"there is no run in {opened[0]}",
            "found: neither attempts nor checkpoints",
            "Give the run's directory or URL.",
        )
    return opened[0], catalog


def everywhere(path: str, *, strict: bool = False) -> tuple[Store, Catalog]:
    """Return a run's first store, and the catalog of all its stores.

    The remote store that a run directory remembers may be impossible to open or reach. Then a
    warning is printed, and the catalog is that of the directory alone, with `unread` set: the
    remote store may hold newer checkpoints and attempts, or a rollback.

    Args:
        path: Path or URL of the run.
        strict: Raise StorageError instead of returning the catalog of the directory alone.

    Raises:
        UsageError: There is no run, or the stores hold different runs.
        StorageError: The first store cannot be listed, or with `strict`, the remote one cannot.
    """
    first, others = open_store(path, WAIT_S), list[Store]()
    problem: HarnessError
    try:
        _, *others = stores(path)
    except UsageError as error:  # what opens the remote store is not installed here
        problem = error
    else:
        try:
            return run(first, *others)
        except StorageError as error:
            if not others:
                raise
            problem = error
    found = f" ({problem.found})" if problem.found else ""
    if strict:
        raise StorageError(
            f"only {first} can be read, not the run's remote store: {problem.what}{found}",
            "The remote store decides which checkpoint is the newest one.",
            f"Make it readable here, or name one checkpoint of the directory: "
            f"{first}/{fmt.CHECKPOINTS}/NAME.pt",
        ) from problem
    say(f"harness: warning: only what is in {first}: {problem.what}{found}", sys.stderr)
    _, catalog = run(first)
    catalog.unread = problem.what
    return first, catalog


def _was_submitted(store: Store) -> bool:
    """Return whether a run was submitted or launched, even if no attempt has begun."""
    return store.exists(launches.SUBMITTED) or bool(store.entries(launches.LAUNCHES))


def is_run(path: str) -> bool:
    """Return whether a path or URL is that of a run, not of a checkpoint or another file.

    A path must be an existing directory. A URL must not end with a suffix in `FILES`.
    """
    return os.path.isdir(path) or (is_url(path) and not path.endswith(FILES))


def is_checkpoint(path: str) -> bool:
    """Return whether a path or URL has the form of a checkpoint in a run; it need not exist."""
    place, _, name = str(path if is_url(path) else Path(path).absolute()).rpartition("/")
    called = fmt.CHECKPOINT_NAME.match(f"{fmt.CHECKPOINTS}/{name}")
    return (
        called is not None
        and called["aside"] is None
        and place.rpartition("/")[2] == fmt.CHECKPOINTS
    )


def is_shard(path: str) -> bool:
    """Return whether a path or URL has the form of a shard in a run; it need not exist."""
    parts = str(path if is_url(path) else Path(path).absolute()).split("/")
    return fmt.SHARD_NAME.match("/".join(parts[-3:])) is not None


def checkpoint(path: str, which: str | int = NEWEST) -> tuple[Store, Manifest]:
    """Find a checkpoint by the path or URL of its `.pt` or `.json` file, or of its run.

    That of a run is chosen from all of its stores: the remote one may hold what is newer. If that
    cannot be read, only the file of a checkpoint can be named.

    Args:
        path: Path or URL of a checkpoint or a run.
        which: Checkpoint of a run: "newest", "best" or a step.

    Returns:
        A store that holds the checkpoint, the first that has it whole, and its manifest.

    Raises:
        UsageError: There is no such run or checkpoint, it needs a newer harness to be read, or
            `which` is given for the file of one checkpoint.
        DamagedError: The checkpoint has no manifest, or its manifest cannot be read.
        StorageError: A store of the run cannot be listed or read.
    """
    if is_run(path):
        store, catalog = everywhere(path, strict=True)
        manifest = _chosen(store, catalog, which)
        return _holder(catalog, manifest), manifest
    return _of_file(path, which)


def _of_file(path: str, which: str | int) -> tuple[Store, Manifest]:
    """Return the store and the manifest of one checkpoint's file (see `checkpoint`)."""
    if which != NEWEST:
        raise UsageError(
            f"{path} is one file: there is nothing to choose from",
            f"found: {which}",
            "Name the run to choose from it.",
        )
    if not is_url(path):
        if not Path(path).exists():
            raise UsageError(
                f"there is nothing at {path}",
                remedy="Give a run's directory, or a checkpoint's file.",
            )
        path = str(Path(path).absolute())
    if not is_checkpoint(path):
        raise UsageError(
            f"{path} is not a checkpoint of this harness",
            "expected: RUN/checkpoints/step_00000120-0003.pt, or the run's directory",
            "harness ls RUN shows a run's checkpoints.",
        )
    place, _, name = path.rpartition("/")
    store = open_store(place.rpartition("/")[0], WAIT_S)
    key = f"{fmt.CHECKPOINTS}/{name.rpartition('.')[0]}.json"
    try:
        return store, fmt.from_bytes(key, store.read(key))
    except FileNotFoundError:
        raise DamagedError(
            f"{path} has no manifest, so it is no checkpoint",
            f"searched: {store.where(key)}",
            "harness ls RUN shows those that are.",
        ) from None


def _holder(catalog: Catalog, manifest: Manifest) -> Store:
    """Return the first store that has a checkpoint whole, so far as its listing shows."""
    copies, whole = catalog.copies(manifest), catalog.whole_copies(manifest)
    return next((store for store in copies if store in whole), copies[0])


def _chosen(store: Store, catalog: Catalog, which: str | int) -> Manifest:
    if which in (NEWEST, BEST):
        catalog.check_readable()
    if catalog.head is None:
        raise UsageError(
            f"the run in {store} has no checkpoint", remedy="harness ls shows what is there."
        )
    if which == NEWEST:
        return catalog.head
    if which == BEST:
        return _best(_holder(catalog, catalog.head), catalog, catalog.head)
    of_step = [manifest for manifest in catalog.history if str(manifest.step) == str(which)]
    if not of_step:
        steps = ", ".join(str(manifest.step) for manifest in catalog.history)
        raise UsageError(
            f"the run in {store} has no checkpoint of step {which}",
            f"found: steps {steps}",
            "Name one, or newest, or best.",
        )
    return max(of_step, key=lambda manifest: manifest.order)


def _best(store: Store, catalog: Catalog, head: Manifest) -> Manifest:
    """Return the best checkpoint in the history of the newest one, `head`.

    The metric is the one that the run has recorded. For a run of an earlier version it is that of
    the setting `checkpoint.best` in `head`. Without that setting, the newest checkpoint is returned
    that has the best value recorded in `head` among its metrics. Raises UsageError if there is
    none.
    """
    policy = retention.recorded(catalog, is_local=True)
    if policy is None:
        payload = load.outline(store, head.data_key)
        settings = payload["config"].get("checkpoint")
        metric = settings.get("best") if isinstance(settings, dict) else None
        if isinstance(metric, str) and METRIC.holds(metric):
            policy = retention.policy(0, None, 0, metric)
    if policy is not None:
        ranked = retention.best(catalog.history, policy)
    else:
        ranked = [
            manifest for manifest in catalog.history if payload["best"] in manifest.metrics.values()
        ]
    if not ranked:
        raise UsageError(
            f"no checkpoint of the run in {store} was evaluated by "
            f"{policy.metric if policy else 'the metric that init(best=…) names'}",
            f"found: {', '.join(head.metrics) or 'no metrics'}",
            "Take the newest, or name a step.",
        )
    return ranked[0]
