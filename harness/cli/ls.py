"""List every checkpoint of a run, newest first, and which one it would go on from.

The column "data" compares sizes only; with --verify everything is read and checked.

example: harness ls runs/a
"""

from __future__ import annotations

import argparse
import datetime
import json

from harness.checkpoint import format as fmt
from harness.checkpoint import load
from harness.checkpoint.format import Manifest
from harness.checkpoint.history import Survey
from harness.cli import locate
from harness.errors import HarnessError
from harness.events import duration, say, size
from harness.store import LocalStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--verify", action="store_true", help="read and check the data of each")
    parser.add_argument("--json", action="store_true", help="for machines")


def run(given: argparse.Namespace) -> int:
    store, found = locate.run(given.run)
    history = {manifest.name for manifest in found.history}
    states = {m.name: _data_state(store, found, m, given.verify) for m in found.manifests}
    chosen = next((m.name for m in found.history if states[m.name] in ("size ok", "verified")), None)
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
                _age(m.time),
                str(m.attempt),
                states[m.name],
                note,
            )
        )
    others = [(key, f"damaged manifest: {why}") for key, why in found.damaged.items()]
    others += [(key, why) for key, why in found.newer.items()]
    others += [(key, "set aside as damaged") for key in found.set_aside]
    others += [(key, "data without a manifest: no checkpoint") for key in found.orphans]
    others += [(key, "of another run") for key in found.strangers] + [(key, "no checkpoint") for key in found.foreign]
    header = ("checkpoint", "step", "epoch", "loss", "metrics", "size", "age", "attempt", "data", "note")
    if given.json:
        say(json.dumps({"checkpoints": [dict(zip(header, row, strict=True)) for row in rows], "others": dict(others)}, indent=1))
        return 0
    say(locate.table(header, rows) if rows else "no checkpoints")
    if others:
        say("\n" + locate.table(("other files", "what"), others))
    return 0


def _data_state(store: LocalStore, found: Survey, manifest: Manifest, verify: bool) -> str:
    if found.sizes.get(f"{fmt.CHECKPOINTS}/{manifest.data.name}") != manifest.data.size_bytes:
        return "WRONG SIZE" if f"{fmt.CHECKPOINTS}/{manifest.data.name}" in found.sizes else "MISSING"
    if not verify:
        return "size ok"
    try:
        load.verified(store, manifest).close()
    except HarnessError:
        return "DAMAGED"
    return "verified"


def _age(time: str) -> str:
    then = datetime.datetime.fromisoformat(time)
    return duration(max(0.0, (datetime.datetime.now(datetime.timezone.utc) - then).total_seconds()))
