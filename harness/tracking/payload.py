"""Of what a checkpoint is made beside the tracked objects; `harness/state` has the list of it all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness import state
from harness.checkpoint.format import version_of
from harness.state import Captured
from harness.tracking.rank_entries import lifted

OfRank = tuple[Any, Any, dict[str, Any]]  # what a rank gives of itself: its generators, its iterator, and what else it has for itself


def assembled(of_ranks: Sequence[OfRank], data: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The values, and with them what each rank gave; `data` says where the run stands in its data."""
    generators, iterators, of_each = zip(*of_ranks, strict=True)
    alike, own = lifted(of_each)
    payload = {"format_version": 1} | values | alike
    return payload | {"rng": list(generators), "data": data | {"iterators": list(iterators)}} | ({"own": own} if any(own) else {})


def captured(of_ranks: Sequence[OfRank], data: dict[str, Any], values: dict[str, Any], tracked: Mapping[str, Any]) -> Captured:
    """All of a checkpoint. Raises UsageError for what is not plain data, NonFiniteError."""
    whole = state.captured(assembled(of_ranks, data, values), tracked)
    whole.payload["format_version"] = version_of(whole.payload)
    return whole
