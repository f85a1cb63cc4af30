"""Compare what two runs have left."""

from __future__ import annotations

from pathlib import Path

from conftest import events

from harness.checkpoint import load
from harness.checkpoint.catalog import read_catalog
from harness.exchange.compare import differences
from harness.store import LocalStore


def differing(a: Path, b: Path) -> list[tuple[str, ...]]:
    """What differs between the newest checkpoints of two runs; settings are left out, they name the
    directory."""
    payloads = []
    for directory in (a, b):
        store = LocalStore(directory)
        head = read_catalog(store).head
        assert head is not None and head.final is not None, f"{directory} is not finished"
        payload = load.load(store, head)
        payload.pop("config")
        payloads.append(payload)
    one, other = payloads
    return list(differences(one, other))


def losses(directory: Path) -> dict[int, float]:
    """The loss of each step; a step that was done again after a kill must have given the same."""
    found: dict[int, float] = {}
    for event in events(directory, "step"):
        assert found.setdefault(event["step"], event["loss"]) == event["loss"], (
            f"step {event['step']} came out differently when done again"
        )
    return found
