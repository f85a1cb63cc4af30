"""Assemble the contents of a checkpoint that are not the state of tracked objects.

`harness/state` lists everything that a checkpoint contains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness import state
from harness.checkpoint.format import version_of
from harness.state import Captured
from harness.tracking.rank_entries import lifted

# One rank's contribution to a checkpoint: the state of its generators, the state of its data
# iterator, and its own entries.
OfRank = tuple[Any, Any, dict[str, Any]]


def assembled(
    of_ranks: Sequence[OfRank], data: dict[str, Any], values: dict[str, Any]
) -> dict[str, Any]:
    """Combine the values and the contributions of all ranks.

    Args:
        of_ranks: the contribution of each rank, in the order of ranks.
        data: the run's data and its position in it.
        values: what else the checkpoint contains, at the top level.
    """
    generators, iterators, of_each = zip(*of_ranks, strict=True)
    alike, own = lifted(of_each)
    payload = {"format_version": 1} | values | alike
    return (
        payload
        | {"rng": list(generators), "data": data | {"iterators": list(iterators)}}
        | ({"own": own} if any(own) else {})
    )


def captured(
    of_ranks: Sequence[OfRank],
    data: dict[str, Any],
    values: dict[str, Any],
    tracked: Mapping[str, Any],
) -> Captured:
    """Capture a whole checkpoint.

    Args:
        of_ranks: the contribution of each rank, in the order of ranks.
        data: the run's data and its position in it.
        values: what else the checkpoint contains, at the top level.
        tracked: the tracked objects, by name.

    Raises:
        UsageError: if something is not plain data.
        NonFiniteError: if a parameter is not finite.
    """
    whole = state.captured(assembled(of_ranks, data, values), tracked)
    whole.payload["format_version"] = version_of(whole.payload)
    return whole
