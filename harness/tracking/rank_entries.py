"""What each rank keeps for itself in a checkpoint: state that differs by rank, beside its generators.

A part is whatever has such state: gradients under way, a communication hook, an object that is another one on each rank. It lies in the
checkpoint under `own`, a list with one entry a rank, each a dict by the part's name. A checkpoint in which no rank has any has no such key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from harness.distributed.ranks import World
from harness.tracking.sameness import is_same

ATTRIBUTES = "attributes"  # a part of which one copy is kept, at the top level, if all ranks have the same


class Part(Protocol):
    """State that this rank keeps for itself."""

    def state(self) -> Any:
        """What to keep of it now, as plain data; None for nothing. At a step boundary, on every rank, with nothing collective in it."""

    def restore(self, state: Any) -> None:
        """Take over what `state` gave; None if it gave nothing."""


def lifted(entries: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What all ranks' entries have alike and need not be kept for each of them, and what is left of the entries."""
    attributes = [entry.get(ATTRIBUTES) for entry in entries]
    if attributes[0] is None or not all(is_same(attributes[0], other) for other in attributes[1:]):
        return {}, list(entries)
    return {ATTRIBUTES: attributes[0]}, [{name: part for name, part in entry.items() if name != ATTRIBUTES} for entry in entries]


class RankEntries:
    """The parts of one rank, by name."""

    def __init__(self) -> None:
        self._parts: dict[str, Part] = {}

    def add(self, name: str, part: Part) -> None:
        """Keep the state of `part` from now on."""
        self._parts[name] = part

    def state(self) -> dict[str, Any]:
        """The state of every part that has any."""
        states = {name: part.state() for name, part in self._parts.items()}
        return {name: state for name, state in states.items() if state is not None}

    def restore(self, payload: Mapping[str, Any], world: World) -> str:
        """Give each part this rank's state back; returns in words what that cannot do, or ""."""
        entries = payload.get("own")
        if not entries:
            return ""
        if len(entries) != world.size:
            names = sorted({name for entry in entries for name in entry})
            return f"{len(entries)} rank(s) before, {world.size} now: what each rank had for itself is lost ({', '.join(names)})"
        for name, part in self._parts.items():
            part.restore(entries[world.rank].get(name))
        return ""
