"""What earlier attempts tell of themselves: how far they came, what of that was saved, and so what has to be done again."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.checkpoint import format as fmt
from harness.checkpoint import records
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Manifest
from harness.errors import StorageError
from harness.store import Store

TAIL_BYTES = 1 << 18  # of an attempt's events: a million steps are tens of megabytes
FEW = 20  # steps whose times tell how fast they were


@dataclass(frozen=True)
class AttemptSummary:
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


def summarise(found: Catalog, number: int, told: list[dict[str, Any]]) -> AttemptSummary:
    """`told` are the events of an attempt whose end does not say how far it came."""
    record, end = found.attempts[number], found.ends.get(number)
    origin = (record.get("from") or {}).get("step", 0)
    committed = [m.step for m in found.manifests if m.attempt == number] + [s for m in found.manifests for a, s in m.lineage if a == number]
    saved = max([origin, int((end or {}).get("saved_step") or 0), *committed])
    reached = max([saved, int((end or {}).get("step") or 0), *(int(event.get("step") or 0) for event in told)])
    names = record.get("time"), record.get("kind"), record.get("launch")
    return AttemptSummary(number, *names, origin, reached, saved, (end or {}).get("time"), end)


def events(stores: Sequence[Store], number: int, most_bytes: float = TAIL_BYTES) -> list[dict[str, Any]]:
    """What is still there of an attempt's last events, in the run directory or in segments."""
    found = []
    for store in stores:
        with contextlib.suppress(StorageError, FileNotFoundError):
            for line in _tail(store, f"{fmt.EVENTS}/{number:04d}", most_bytes).splitlines():
                found.append(records.parse(line))  # nothing if it is cut off at the beginning, or while it was written
    return [event for event in found if event]


def told(stores: Sequence[Store], number: int, most_bytes: float = TAIL_BYTES) -> list[dict[str, Any]]:
    """The same, once: from the first store that knows of any, where each knows all."""
    return next((found for store in stores if (found := events([store], number, most_bytes))), [])


def _tail(store: Store, name: str, most_bytes: float) -> bytes:
    """The last bytes of all events files that begin with that name."""
    parts: list[bytes] = []
    entries = [
        entry for entry in store.entries(fmt.EVENTS) if entry.key.startswith(name) and entry.key.endswith(".jsonl")
    ]  # what each step was is none
    for entry in reversed(entries):
        if most_bytes <= 0:
            break
        start = max(0, entry.size_bytes - most_bytes)
        parts.append(b"".join(store.chunks(entry.key, int(start))) if start else store.read(entry.key))
        most_bytes -= entry.size_bytes
    return b"".join(reversed(parts))


def steps_per_s(told: Sequence[dict[str, Any]]) -> float | None:
    """How fast the last steps were that an attempt's events tell of; None if they tell of too few."""
    timed = []
    for event in told:
        if event.get("event") == "step":
            with contextlib.suppress(ValueError, KeyError, TypeError):
                timed.append((datetime.datetime.fromisoformat(event["time"]).timestamp(), int(event["step"])))
    (began, first), (ended, last) = (timed[-FEW], timed[-1]) if len(timed) >= FEW else (timed[0], timed[-1]) if timed else ((0, 0), (0, 0))
    return (last - first) / (ended - began) if last > first and ended > began else None


def steps_again(found: Catalog, origin: Manifest | None, newest: list[dict[str, Any]]) -> int:
    """How many steps were made after the checkpoint that is gone on from, or from the beginning on, as far as anything tells. `newest`
    are the newest attempt's events."""
    attempt, step = (origin.attempt, origin.step) if origin else (0, 0)
    reached = [step]
    for number in (number for number in found.attempts if number >= attempt):
        is_known = (found.ends.get(number) or {}).get("step") is not None
        last = newest if number == found.greatest else [] if is_known else told(found.stores, number)
        reached.append(summarise(found, number, last).reached)
    return max(reached) - step


def age_s(manifest: Manifest) -> float:
    """How long ago it was written, by two clocks that may differ; 0 if it does not tell."""
    if not records.is_time(manifest.time):
        return 0.0
    now = datetime.datetime.now(datetime.timezone.utc)
    return max(0.0, (now - datetime.datetime.fromisoformat(manifest.time)).total_seconds())
