"""Open and check the stores of a run: a directory, a remote store, or both, directory first."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from harness.checkpoint import attempts
from harness.checkpoint import format as fmt
from harness.checkpoint.attempts import Attempt, remembered
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Manifest
from harness.checkpoint.replicate import arrived, replicate, send_shard, wanted
from harness.checkpoint.retention import Policy
from harness.distributed.ranks import World
from harness.errors import DamagedError, UsageError
from harness.monitoring.store_health import StoreHealth
from harness.store import LocalStore, Store, open_store, redacted
from harness.text import say

SHARED_WITHIN_S = 10.0


def places(directory: str | Path | None, remote: str | None, wait_s: float) -> tuple[Store, ...]:
    """Return the stores of a run; the last one is the authority on attempts.

    Args:
        directory: the run directory, or None.
        remote: the URL of the remote store, or None.
        wait_s: how long a request to the remote store is retried, in seconds.

    Raises:
        UsageError: no store is given, both are the same one, or the directory is a URL.
    """
    if directory is not None and re.match(r"[a-z][a-z0-9+.-]+:/", str(directory)):
        raise UsageError(
            f"run.dir is a URL: {redacted(str(directory))}",
            "expected: a local directory",
            "For a bucket alone: harness.init(None, remote=URL), or run.dir=null run.remote=URL.",
        )
    stores: list[Store] = [] if directory is None else [LocalStore(directory)]
    if remote is not None:
        stores.append(open_store(remote, wait_s))
    if not stores:
        raise UsageError(
            "a run needs a place",
            "found: neither a directory nor a remote store",
            "Give one of them, or both.",
        )
    if len({str(store) for store in stores}) < len(stores):
        raise UsageError(
            "run.dir and run.remote are the same place",
            f"found: {stores[0]}",
            "Leave run.remote out, or name another.",
        )
    return tuple(stores)


def check_remembered(stores: tuple[Store, ...], accept: tuple[str, ...], here: Catalog) -> None:
    """Raise UsageError if a run directory is used without, or with another than, its remote store.

    The attempt records in the directory name the remote store that it was last used with. The
    check is skipped if `accept` contains "remote".

    Args:
        stores: the stores of the run.
        accept: the differences that the user insists on.
        here: the catalog of the first store alone.
    """
    local = stores[0]
    if not isinstance(local, LocalStore) or "remote" in accept:
        return
    before = remembered(here)
    now = str(stores[1]) if len(stores) > 1 else None
    if before is not None and before != now:
        raise UsageError(
            f"{local} belongs to a run whose remote store is another one",
            f"found: run.remote={now or 'null'}, expected: {before}",
            "What is newest may be there. Name it, or insist: resume.accept=[remote].",
        )


def listen(stores: tuple[Store, ...], is_writer: bool) -> StoreHealth:
    """Return a StoreHealth that listens to the stores; only the writer prints its messages."""
    store_health = StoreHealth(
        str(stores[-1]), (lambda text: say(text, sys.stderr)) if is_writer else lambda text: None
    )
    for store in stores:
        store.listen(store_health.on_retry, store_health.on_success)
    return store_health


def check_shared(stores: tuple[Store, ...], attempt: Attempt, world: World) -> None:
    """Check that every rank sees the claim in each store that is a directory.

    Several nodes with a run directory each would be several runs.
    Collective: every rank must call it.

    Raises:
        UsageError: at least one rank does not see the claim.
    """
    for store in (store for store in stores if store.is_local):
        # Network file systems may show the claim late.
        until = time.monotonic() + (SHARED_WITHIN_S if world.size > 1 else 0)
        while not (seen := attempts.holds(store, attempt)) and time.monotonic() < until:
            time.sleep(0.1)
        if blind := [rank for rank, sees in enumerate(world.gather(seen)) if not sees]:
            alone = (
                ", or say that each node has its own: run.scratch=true, or "
                "harness.init(…, is_scratch=True)"
            )
            raise UsageError(
                f"the run directory is not shared: rank(s) {blind} do not see what rank 0 wrote",
                f"found: {store}",
                "Put it on a file system that all nodes share"
                f"{'' if store is stores[-1] else alone}.",
            )


def hand_in_shards(
    stores: tuple[Store, ...],
    catalog: Catalog | None,
    last: Manifest,
    world: World,
    give_up: Callable[[], object],
) -> None:
    """Send the shards of a finished run's last checkpoint that only this machine has.

    Collective: every rank must call it.

    Args:
        stores: the stores of the run: a directory that each machine has for itself, a remote one.
        catalog: the catalog of the run's stores, on the writer.
        last: the last checkpoint of the run.
        world: the ranks.
        give_up: returns a true value if this process was asked to stop.

    Raises:
        StorageError: a store cannot be read or written.
        DamagedError: a shard is damaged, or this machine does not have it.
    """

    def look() -> list[int]:
        assert catalog is not None, "the writer has listed the stores"
        return [catalog.greatest, last.name not in arrived(catalog)]

    number, is_lacking = world.on_writer(look, give_up=give_up)
    attempt = Attempt(number, last.run_id, "")

    def send() -> None:
        for file in last.shards[world.rank :: world.size]:
            send_shard(stores[0], file, stores[-1], attempt)

    if is_lacking:
        world.on_each(send, give_up=give_up)


def hand_in(catalog: Catalog | None, last: Manifest | None, policy: Policy) -> str:
    """Copy what the last store of a finished run lacks, without claiming an attempt.

    This is what the run would have uploaded before its end: the last checkpoint, the best and every
    n-th. The last checkpoint is copied last, see `wanted`.

    Args:
        catalog: the catalog of the run's stores.
        last: the last checkpoint of the run.
        policy: the retention policy of the last store.

    Returns:
        A description of what was done, or "" if nothing was missing.

    Raises:
        StorageError: a store cannot be read or written.
        DamagedError: the copy of the last checkpoint that is read is damaged.
        SupersededError: a newer attempt has begun.
    """
    assert catalog is not None and last is not None, (
        "there is a checkpoint that the run has come to"
    )
    source, target = catalog.stores[0], catalog.stores[-1]
    if source is target:
        return ""
    there = arrived(catalog)
    missing = [m for m in wanted(catalog.history, there, policy) if source in catalog.copies(m)]
    copied, problems, attempt = [], list[str](), Attempt(catalog.greatest, last.run_id, "")
    for manifest in missing:
        target.prepare(fmt.FOLDERS)
        try:
            replicate(source, manifest, target, attempt)
            copied.append(manifest.name)
        except DamagedError as error:
            if manifest.name == last.name:
                raise
            problems.append(f"{manifest.name} is not in {target}: {error.what}")
    if copied:
        were, are = ("was", "is") if len(copied) == 1 else ("were", "are")
        problems.insert(0, f"{', '.join(copied)} {were} missing in {target} and {are} there now")
    return "; ".join(problems)
