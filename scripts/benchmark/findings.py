"""Numbers, and what they are held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

HARNESS = "harness"
DISK = "the disk itself, O_DIRECT + fsync"  # a limit, no contender


@dataclass(frozen=True)
class Finding:
    """One quantity of one contender: all samples, in the order in which they were taken."""

    row: str
    what: str
    who: str
    unit: str
    samples: tuple[float, ...]
    most: float | None = None  # what is required: at most, or at least
    least: float | None = None
    more_is_better: bool = False
    note: str = ""

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def holds(self) -> bool | None:
        """Whether the median is as required; None if nothing is."""
        if self.most is None and self.least is None:
            return None
        return (self.most is None or self.median <= self.most) and (
            self.least is None or self.median >= self.least
        )

    @property
    def share_of_limit(self) -> float:
        """The median as a share of what is allowed: at most 1 if it holds, whichever way the limit
        goes."""
        if self.least is not None:
            return self.least / self.median if self.median else float("inf")
        assert self.most is not None
        return max(0.0, self.median / self.most)

    def beats(self, other: Finding) -> bool:
        return self.median > other.median if self.more_is_better else self.median < other.median

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"median": self.median, "holds": self.holds}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, ...]:
    """One ratio a turn: what was measured in the same turn is compared."""
    return tuple(a / b for a, b in zip(ours, theirs, strict=True))


def percentile(values: Sequence[float], share: float) -> float:
    """The value that so large a share of the values does not exceed."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


def wins(findings: Sequence[Finding]) -> list[str]:
    """Where somebody is ahead of the harness, in words; the best comes first."""
    lines = []
    for own in findings:
        if own.who == HARNESS:
            same = [
                found
                for found in findings
                if (found.row, found.what) == (own.row, own.what)
                and found.beats(own)
                and found.who != DISK
            ]
            ahead = sorted(same, key=lambda found: found.median, reverse=own.more_is_better)
            if ahead:
                names = ", ".join(f"{found.who} {shown(found)}" for found in ahead)
                lines.append(f"{own.what}: {names}; {HARNESS} {shown(own)}")
    return lines


def shown(found: Finding) -> str:
    return f"{figure(found.median)} {found.unit}".strip()


def figure(value: float) -> str:
    """Three digits that mean something."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 0.1 else f"{value:.3f}"
