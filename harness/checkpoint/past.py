"""What earlier attempts tell of themselves: how far they came, what of that was saved, and so what has to be done again."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.checkpoint import format as fmt
from harness.checkpoint.format import Manifest
from harness.checkpoint.history import Survey
from harness.errors import StorageError
from harness.store import Store

SEGMENTS = 20  # of an attempt's events, the last ones that are read


@dataclass(frozen=True)
class Life:
    """One attempt, in short."""

    attempt: int
    began: str | None
    kind: str | None
    launch: str | None
    went_on_from: int  # the step
    reached: int  # the last step that is known to have been made
    saved: int  # the last step that was committed
    ended: str | None
    end: dict[str, Any] | None

    @property
    def lost(self) -> int:
        """Steps that were made and have to be made again; of a killed attempt, those that the events still tell."""
        return max(0, self.reached - self.saved)


def life(found: Survey, number: int, told: list[dict[str, Any]]) -> Life:
    """`told` are the events of an attempt whose end does not say how far it came."""
    record, end = found.attempts[number], found.ends.get(number)
    origin = (record.get("from") or {}).get("step", 0)
    committed = [m.step for m in found.manifests if m.attempt == number] + [s for m in found.manifests for a, s in m.lineage if a == number]
    saved = max([origin, int((end or {}).get("saved_step") or 0), *committed])
    reached = max([saved, int((end or {}).get("step") or 0), *(int(event.get("step") or 0) for event in told)])
    names = record.get("time"), record.get("kind"), record.get("launch")
    return Life(number, *names, origin, reached, saved, (end or {}).get("time"), end)


def events(stores: Sequence[Store], number: int) -> list[dict[str, Any]]:
    """What is still there of an attempt's events, in the run directory or in segments."""
    found = []
    for store in stores:
        with contextlib.suppress(StorageError, FileNotFoundError):
            keys = [entry.key for entry in store.entries(fmt.EVENTS) if entry.key.startswith(f"{fmt.EVENTS}/{number:04d}")]
            for line in b"".join(store.read(key) for key in keys[-SEGMENTS:]).splitlines():
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
    return [event for event in found if isinstance(event, dict)]


def steps_again(found: Survey, origin: Manifest) -> int:
    """How many steps were made after the checkpoint that is gone on from, as far as anything tells."""
    reached = [origin.step]
    for number in (number for number in found.attempts if number >= origin.attempt):
        is_told = (found.ends.get(number) or {}).get("step") is not None
        reached.append(life(found, number, [] if is_told else events(found.stores, number)).reached)
    return max(reached) - origin.step


def age_s(manifest: Manifest) -> float:
    """How long ago it was written, by two clocks that may differ."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return max(0.0, (now - datetime.datetime.fromisoformat(manifest.time)).total_seconds())
