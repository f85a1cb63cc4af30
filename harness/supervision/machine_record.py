"""The machine and the software that an attempt ran on, as its record keeps them, and how two of them differ.

A model is the same bit for bit only on the same hardware and software. `harness/selfcheck/environment.py` finds out what they are; here
they are compared with those of the attempt that wrote the checkpoint gone on from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.checkpoint.catalog import Catalog

DISTRIBUTIONS = "distributions"  # what was imported beside torch and NumPy, and its version; may change what is trained, or not
NOT_EXACT = "state exact, trajectory no longer bit for bit"


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it was. `is_exact`: results need not differ by it."""

    name: str
    before: Any
    now: Any
    is_exact: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {_said(self.before)} -> {_said(self.now)}"


def _said(value: Any) -> str:
    return "not set" if value is None else str(value)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """What differs of all that both tell of, what changes results first."""
    names = [name for name in now if name in before and name != DISTRIBUTIONS]
    found = [Difference(name, before[name], now[name]) for name in names if before[name] != now[name]]
    was, are = before.get(DISTRIBUTIONS) or {}, now.get(DISTRIBUTIONS) or {}
    return found + [
        Difference(name, was[name], are[name], is_exact=True) for name in sorted(was.keys() & are.keys()) if was[name] != are[name]
    ]


def recorded(found: Catalog, attempt: int) -> Mapping[str, Any] | None:
    """What an attempt ran on, or the one whose checkpoint a rollback has copied; None if no record tells."""
    record = found.attempts.get(attempt, {})
    seen = set[int]()
    while record.get("kind") == "rollback" and attempt not in seen:
        seen.add(attempt)
        attempt = int((record.get("from") or {}).get("attempt", 0))
        record = found.attempts.get(attempt, {})
    environment = record.get("environment")
    return environment if isinstance(environment, dict) else None


def changes(found: Catalog, attempt: int) -> list[Difference]:
    """How an attempt's machine and software differ from those of the attempt that it went on from, as far as the records tell."""
    record = found.attempts.get(attempt, {})
    origin, now = record.get("from") or {}, recorded(found, attempt)
    before = recorded(found, int(origin.get("attempt", 0)))
    return differences(before, now) if before and now and record.get("kind") != "rollback" else []


def in_words(differing: Sequence[Difference]) -> str:
    """One line that names what differs, with both values, and what follows from it."""
    inexact = [str(difference) for difference in differing if not difference.is_exact]
    others = [str(difference) for difference in differing if difference.is_exact]
    parts = [f"{', '.join(inexact)} ({NOT_EXACT})"] if inexact else []
    return "; ".join(parts + ([f"other versions of what the program imports: {', '.join(others)}"] if others else []))


def told(found: Catalog) -> list[str]:
    """A line for each attempt that ran on something else than what it went on from."""
    return [f"attempt {number}: {in_words(differing)}" for number in sorted(found.attempts) if (differing := changes(found, number))]
