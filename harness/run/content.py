"""Of what a checkpoint is made beside the tracked objects; `harness/state` has the list of it all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.checkpoint.format import version_of

OfRank = tuple[Any, Any, dict[str, Any]]  # what a rank gives of itself: its generators, its iterator, and what else it has for itself


def content(of_ranks: Sequence[OfRank], data: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The values, and with them what each rank gave; `data` says where the run stands in its data."""
    generators, iterators, own = zip(*of_ranks, strict=True)
    payload = {"format_version": 1} | values
    payload |= {"rng": list(generators), "data": data | {"iterators": list(iterators)}} | ({"own": list(own)} if any(own) else {})
    return payload | {"format_version": version_of(payload)}
