"""Where a run lives: a directory, a remote store, or both, the directory first."""

from __future__ import annotations

import sys
from pathlib import Path

from harness.checkpoint.attempts import remembered
from harness.errors import UsageError
from harness.events import say
from harness.run.outage import Outage
from harness.store import LocalStore, Store, open_store


def places(directory: str | Path | None, remote: str | None, wait_s: float) -> tuple[Store, ...]:
    """The stores of a run; the last one is the authority on attempts. Raises UsageError."""
    stores: list[Store] = [] if directory is None else [LocalStore(directory)]
    if remote is not None:
        stores.append(open_store(remote, wait_s))
    if not stores:
        raise UsageError("a run needs a place", "found: neither a directory nor a remote store", "Give one of them, or both.")
    if len({str(store) for store in stores}) < len(stores):
        raise UsageError("run.dir and run.remote are the same place", f"found: {stores[0]}", "Leave run.remote out, or name another.")
    return tuple(stores)


def check_remembered(stores: tuple[Store, ...], accept: tuple[str, ...]) -> None:
    """Raises UsageError if a run directory that has a remote store is to be used without it, or with another one."""
    local = stores[0]
    if not isinstance(local, LocalStore) or "remote" in accept:
        return
    before = remembered(local)
    now = str(stores[1]) if len(stores) > 1 else None
    if before is not None and before != now:
        raise UsageError(
            f"{local} belongs to a run whose remote store is another one",
            f"found: run.remote={now or 'null'}, expected: {before}",
            "What is newest may be there. Name it, or insist: resume.accept=[remote].",
        )


def listen(stores: tuple[Store, ...], is_writer: bool) -> Outage:
    """Let what goes wrong with the remote store be said, by the writer."""
    outage = Outage(str(stores[-1]), (lambda text: say(text, sys.stderr)) if is_writer else lambda text: None)
    for store in stores:
        store.listen(outage.on_trouble, outage.on_success)
    return outage
