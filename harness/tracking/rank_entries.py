"""Keep each rank's own entries in a checkpoint: state that differs by rank, besides its generators.

A part is anything with such state: gradients in flight, a communication hook, an object that
differs from rank to rank. A checkpoint holds the parts under `own`: a list with one entry per rank,
each a dict by the name of the part. If no rank has such state, the checkpoint has no such key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from harness.distributed.ranks import World
from harness.state.plain_values import is_same

# A part that is kept once, at the top level, if it is the same on all ranks.
ATTRIBUTES = "attributes"


class Part(Protocol):
    """State that this rank keeps for itself."""

    def state(self) -> Any:
        """Return the state to keep now, as plain data; None for nothing.

        It is called at a step boundary, on every rank, and must not use a collective.
        """

    def restore(self, state: Any) -> None:
        """Restore the result of `state`; None if there is none."""


def lifted(entries: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Separate the attributes from the entries of all ranks if they are the same on each.

    Returns:
        A dict for the top level (empty if the attributes differ or are missing), and the entries
        without its content.
    """
    attributes = [entry.get(ATTRIBUTES) for entry in entries]
    if attributes[0] is None or not all(is_same(attributes[0], other) for other in attributes[1:]):
        return {}, list(entries)
    return {ATTRIBUTES: attributes[0]}, [
        {name: part for name, part in entry.items() if name != ATTRIBUTES} for entry in entries
    ]


class RankEntries:
    """The parts of one rank, by name."""

    def __init__(self) -> None:
        self._parts: dict[str, Part] = {}

    def add(self, name: str, part: Part) -> None:
        """Keep the state of `part` from now on."""
        self._parts[name] = part

    def state(self) -> dict[str, Any]:
        """Return the state of every part that has any."""
        states = {name: part.state() for name, part in self._parts.items()}
        return {name: state for name, state in states.items() if state is not None}

    def restore(self, payload: Mapping[str, Any], world: World) -> str:
        """Restore this rank's entry into each part; return a notice if that fails, or ""."""
        entries = payload.get("own")
        if not entries:
            return ""
        if len(entries) != world.size:
            names = sorted({name for entry in entries for name in entry})
            return (
                f"{len(entries)} rank(s) before, {world.size} now: "
                f"what each rank had for itself is lost ({', '.join(names)})"
            )
        for name, part in self._parts.items():
            part.restore(entries[world.rank].get(name))
        return ""
