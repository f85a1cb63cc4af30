"""List every checkpoint of a run, newest first, and which one it would go on from.

Of a run directory that has a remote store both are listed. The column "data" compares sizes only; with --verify everything is read
and checked.

example: harness ls runs/a
"""

from __future__ import annotations

import argparse
import json

from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Manifest
from harness.cli import locate
from harness.store import Store
from harness.supervision import attempt_history
from harness.text import duration, say, size

GOOD = ("size ok", "verified", "marked as damaged")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--verify", action="store_true", help="read and check the data of each")
    parser.add_argument("--json", action="store_true", help="for machines")


def run(given: argparse.Namespace) -> int:
    _, found = locate.everywhere(given.run)
    history = {manifest.name for manifest in found.history}
    states = {m.name: _states(found, m, given.verify) for m in found.manifests}
    candidates = found.candidates if found.unreadable_head is None else []  # then no start goes on
    chosen = next((m.name for m in candidates if any(state in GOOD for state in states[m.name].values())), None)
    rows = []
    for m in sorted(found.manifests, key=lambda m: m.order, reverse=True):
        note = "next start goes on from here" if m.name == chosen else "" if m.name in history else "cut off: not in the run's history"
        note = f"final; {note}".rstrip("; ") if m.final else note
        metrics = " ".join(f"{name}={value:.4g}" for name, value in m.metrics.items())
        rows.append(
            (
                m.name,
                str(m.step),
                str(m.epoch),
                locate.number(m.loss),
                metrics,
                size(m.size_bytes),
                duration(attempt_history.age_s(m)),
                str(m.attempt),
                " ".join(states[m.name]) or "-",
                " ".join(dict.fromkeys(states[m.name].values())),
                note,
            )
        )
    others = [(key, f"damaged manifest: {why}") for key, why in found.damaged.items()]
    others += [(key, f"{error.what.removeprefix(key).strip()}: {error.found}") for key, error in found.newer.items()]
    others += [(key, "set aside as damaged") for key in found.set_aside]
    others += [(key, "data without a manifest: no checkpoint") for key in found.orphans]
    others += [(key, "of another run") for key in found.strangers] + [(key, "no checkpoint") for key in found.foreign]
    header = ("checkpoint", "step", "epoch", "loss", "metrics", "size", "age", "attempt", "where", "data", "note")
    if given.json:
        say(json.dumps({"checkpoints": [dict(zip(header, row, strict=True)) for row in rows], "others": dict(others)}, indent=1))
        return 0
    say(locate.table(header, rows) if rows else "no checkpoints")
    if others:
        say("\n" + locate.table(("other files", "what"), others))
    return 0


def _states(found: Catalog, manifest: Manifest, verify: bool) -> dict[str, str]:
    """How the data of a checkpoint is, in each store that has it."""
    copies = found.copies(manifest)
    return {
        "local" if store.is_local else "remote": _state(store, part, manifest, verify)
        for store, part in zip(found.stores, found.parts, strict=True)
        if store in copies
    }


def _state(store: Store, part: Catalog, manifest: Manifest, verify: bool) -> str:
    key = manifest.data_key
    if part.sizes.get(key) != manifest.data.size_bytes:
        return "WRONG SIZE" if key in part.sizes else "MISSING"
    if verify:
        return "DAMAGED" if any(problem for _, problem in locate.verify(store, manifest)) else "verified"
    return "marked as damaged" if manifest.key in part.marked else "size ok"
