"""List every checkpoint of a run, newest first, and which one it would resume from.

For a run directory that has a remote store, both stores are listed. The column "data" compares
sizes only; with --verify all data is read and checked.

example: harness ls runs/a
"""

from __future__ import annotations

import argparse
import json

from harness.checkpoint import memory_copy
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Manifest
from harness.checkpoint.load import GoneError
from harness.cli import locate
from harness.errors import StorageError
from harness.store import Store
from harness.supervision import attempt_history
from harness.text import duration, say, size

GOOD = ("size ok", "verified", "marked as damaged")
HEADER = (
    "checkpoint",
    "step",
    "epoch",
    "loss",
    "metrics",
    "size",
    "age",
    "attempt",
    "where",
    "data",
    "note",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `harness ls`."""
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--verify", action="store_true", help="read and check the data of each")
    parser.add_argument("--json", action="store_true", help="for machines")


def run(given: argparse.Namespace) -> int:
    """Print the checkpoints and the other files of a run, and return 0."""
    _, catalog = locate.everywhere(given.run)
    rows, others = _checkpoints(catalog, given.verify), _others(catalog)
    if given.json:
        checkpoints = [dict(zip(HEADER, row, strict=True)) for row in rows]
        say(json.dumps({"checkpoints": checkpoints, "others": dict(others)}, indent=1))
        return 0
    say(locate.table(HEADER, rows) if rows else "no checkpoints")
    if others:
        say("\n" + locate.table(("other files", "what"), others))
    return 0


def _checkpoints(catalog: Catalog, verify: bool) -> list[tuple[str, ...]]:
    """Return a table row for each checkpoint, newest first.

    `verify` reads and checks the data of each.
    """
    history = {manifest.name for manifest in catalog.history}
    states = {m.name: _states(catalog, m, verify) for m in catalog.manifests}
    chosen = _chosen(catalog, states)
    tier = memory_copy.place(catalog.stores[0])
    in_memory = memory_copy.newest(memory_copy.listed(tier), catalog)
    here = "next start resumes from here"
    rows = []
    if in_memory is not None and catalog.unreadable_head is None:
        state = {"memory of this machine": "not read"}
        rows.append(_row(in_memory, state, f"{here}, on this machine"))
        here += ", on any other machine"
    for m in sorted(catalog.manifests, key=lambda m: m.order, reverse=True):
        note = (
            here
            if m.name == chosen
            else ""
            if m.name in history
            else "cut off: not in the run's history"
        )
        rows.append(_row(m, states[m.name], f"final; {note}".rstrip("; ") if m.final else note))
    return rows


def _chosen(catalog: Catalog, states: dict[str, dict[str, str]]) -> str | None:
    """Return the name of the checkpoint from which the next start resumes, or None.

    This repeats the order of `Chooser` in `checkpoint/resume.py`, but for the memory tier and for
    `launches.steps_back`, which depends on the supervisor of the start. `states` are the results of
    `_states`, by the name of the checkpoint.
    """
    # No start resumes from anything while only a newer harness can read the newest checkpoint.
    candidates = catalog.candidates if catalog.unreadable_head is None else []
    return next(
        (m.name for m in candidates if any(state in GOOD for state in states[m.name].values())),
        None,
    )


def _row(m: Manifest, states: dict[str, str], note: str) -> tuple[str, ...]:
    """Return the table row of a checkpoint: one cell for each name in `HEADER`."""
    return (
        m.name,
        str(m.step),
        str(m.epoch),
        locate.number(m.loss),
        " ".join(f"{name}={value:.4g}" for name, value in m.metrics.items()),
        size(m.size_bytes),
        duration(attempt_history.age_s(m)),
        str(m.attempt),
        " ".join(states) or "-",
        " ".join(dict.fromkeys(states.values())),
        note,
    )


def _others(catalog: Catalog) -> list[tuple[str, str]]:
    """Return the key of each file that is no readable checkpoint of the run, and what it is."""
    return [
        *((key, f"damaged manifest: {why}") for key, why in catalog.damaged.items()),
        *(
            (key, f"{error.what.removeprefix(key).strip()}: {error.found}")
            for key, error in catalog.newer.items()
        ),
        *((key, "set aside as damaged") for key in catalog.set_aside),
        *(
            (key, "data without a manifest: no checkpoint")
            for key in (*catalog.orphans, *catalog.orphan_folders)
        ),
        *((key, "of another run") for key in catalog.strangers),
        *((key, "no checkpoint") for key in catalog.foreign),
    ]


def _states(catalog: Catalog, manifest: Manifest, verify: bool) -> dict[str, str]:
    """Return the state of a checkpoint's data in each store that has it: local, remote."""
    copies = catalog.copies(manifest)
    return {
        "local" if store.is_local else "remote": _state(store, part, manifest, verify)
        for store, part in zip(catalog.stores, catalog.parts, strict=True)
        if store in copies
    }


def _state(store: Store, part: Catalog, manifest: Manifest, verify: bool) -> str:
    """Return the state of a checkpoint's data in one store.

    Args:
        store: The store.
        part: Catalog of this store.
        manifest: Manifest of the checkpoint.
        verify: Read and check the data; otherwise only its size is compared.
    """
    key = manifest.data_key
    if part.sizes.get(key) != manifest.data.size_bytes:
        return "WRONG SIZE" if key in part.sizes else "MISSING"
    if any(part.size_of(store, file) != file.size_bytes for file in manifest.shards):
        if store.is_local and part.may_be_apart(manifest):
            return "shards on other nodes"
        return "SHARDS MISSING" if store.exists(manifest.key) else "deleted meanwhile"
    if verify:
        (_, problem), *_ = locate.verify(store, manifest)
        return (
            "verified"
            if not problem
            else "NOT READ"
            if isinstance(problem, StorageError)
            else "deleted meanwhile"
            if isinstance(problem, GoneError)
            else "DAMAGED"
        )
    return "marked as damaged" if manifest.key in part.marked else "size ok"
