"""Compare the hardware and software of attempts, as their records contain them.

Training is bitwise reproducible only on the same hardware and software.
`harness/selfcheck/environment.py` detects them. This module compares them with those of the attempt
that wrote the checkpoint of the resume point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.checkpoint.catalog import Catalog

# Field with the versions of the distributions that were imported besides torch and NumPy. Another
# version of one of them may or may not change the results.
DISTRIBUTIONS = "distributions"
# Field with what the hashes of strings are made with: a program may depend on the order of a set.
HASHING, RANDOM = "string hashing", "random"
NOT_EXACT = "state exact, trajectory no longer bit for bit"


@dataclass(frozen=True)
class Difference:
    """A value of the machine record that has changed.

    `is_exact` is True if the results may be the same, bit for bit, in spite of the change: another
    version of an imported distribution, or another order of sets of strings.
    """

    name: str
    before: Any
    now: Any
    is_exact: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {_text(self.before)} -> {_text(self.now)}"


def _text(value: Any) -> str:
    return "not set" if value is None else str(value)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Return the differences in the fields that both records have.

    Those that change the results come first, those in `DISTRIBUTIONS` last.
    """
    names = [name for name in now if name in before and name != DISTRIBUTIONS]
    changed = [
        Difference(name, before[name], now[name], is_exact=name == HASHING)
        for name in names
        if before[name] != now[name]
    ]
    was, are = before.get(DISTRIBUTIONS) or {}, now.get(DISTRIBUTIONS) or {}
    return changed + [
        Difference(name, was[name], are[name], is_exact=True)
        for name in sorted(was.keys() & are.keys())
        if was[name] != are[name]
    ]


def recorded(catalog: Catalog, attempt: int) -> Mapping[str, Any] | None:
    """Return the hardware and software of an attempt, or None if they are not recorded.

    For a rollback, they are those of the attempt whose checkpoint it has copied.
    """
    record = catalog.attempts.get(attempt, {})
    seen = set[int]()
    while record.get("kind") == "rollback" and attempt not in seen:
        seen.add(attempt)
        attempt = int((record.get("from") or {}).get("attempt", 0))
        record = catalog.attempts.get(attempt, {})
    environment = record.get("environment")
    return environment if isinstance(environment, dict) else None


def changes(catalog: Catalog, attempt: int) -> list[Difference]:
    """Return how an attempt's hardware and software differ from those at its resume point.

    The latter are those of the attempt that it resumed from. The list is empty for a rollback, and
    if one of the two is not recorded.
    """
    record = catalog.attempts.get(attempt, {})
    origin, now = record.get("from") or {}, recorded(catalog, attempt)
    before = recorded(catalog, int(origin.get("attempt", 0)))
    return differences(before, now) if before and now and record.get("kind") != "rollback" else []


def describe(differing: Sequence[Difference]) -> str:
    """Return one line with all differences, both values of each, and the consequence."""
    inexact = [str(difference) for difference in differing if not difference.is_exact]
    hashing = [
        f"{difference} (sets of strings have another order)"
        for difference in differing
        if difference.name == HASHING
    ]
    others = [
        str(difference)
        for difference in differing
        if difference.is_exact and difference.name != HASHING
    ]
    parts = [f"{', '.join(inexact)} ({NOT_EXACT})"] if inexact else []
    return "; ".join(
        parts
        + hashing
        + ([f"other versions of what the program imports: {', '.join(others)}"] if others else [])
    )


def messages(catalog: Catalog) -> list[str]:
    """Return a line for each attempt with other hardware or software than at its resume point."""
    return [
        f"attempt {number}: {describe(differing)}"
        for number in sorted(catalog.attempts)
        if (differing := changes(catalog, number))
    ]
