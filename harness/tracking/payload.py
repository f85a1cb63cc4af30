"""Assemble the contents of a checkpoint that are not the state of tracked objects.

`harness/state` lists everything that a checkpoint contains. Under `own` it holds the state that
differs by rank, besides the generators: a list with one entry per rank, each a dict of its parts by
name. A part is anything with such state: gradients in flight, a communication hook, an object that
differs from rank to rank. If no rank has such state, the checkpoint has no such key.

If there are shards, each holds the entry of its rank, with that rank's generators and the state of
its data iterator, and the main file only says something of all ranks (`data_ranks.put_entries`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from harness import state
from harness.checkpoint.format import version_of
from harness.distributed.data_ranks import DATA_RANK, RANKS, changed_ranks, dealt_to
from harness.distributed.parts import described
from harness.distributed.ranks import World
from harness.errors import UsageError
from harness.state import Captured
from harness.state.plain_values import is_same
from harness.tracking.attribute_values import ABSENT, BUFFER, REQUIRES_GRAD, joined, spelled

MOST_NAMED = 5  # attributes in one line
# One rank's contribution to a checkpoint: the state of its generators, the state of its data
# iterator, and its own entries.
OfRank = tuple[Any, Any, dict[str, Any]]
# A part that is kept once, at the top level, if it is the same on all ranks.
ATTRIBUTES = "attributes"
# A part that is kept only inside an epoch: the generators before the head of the epoch.
HEAD = "head"


@dataclass(frozen=True)
class Given:
    """What the ranks give to a checkpoint.

    Args:
        of_ranks: the contribution of each rank, in the order of ranks; if there are shards, that of
            this rank alone.
        main: if there are shards: what the main file holds of all ranks; {} on other ranks than the
            writer. None if there are none.
    """

    of_ranks: Sequence[OfRank]
    main: dict[str, Any] | None = None


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
        return {name: of for name, of in states.items() if of is not None}

    def restore(self, payload: Mapping[str, Any], world: World) -> str:
        """Restore this rank's entry into each part; return a notice if that fails, or ""."""
        entries = payload.get("own")
        if not entries:
            return ""
        if dealt_to(payload) == list(world.data_ranks):
            for name, part in self._parts.items():
                part.restore(entries[world.rank].get(name))
            return ""
        names = sorted({name for entry in entries for name in entry} - {DATA_RANK})
        of_values = [name for name in names if name == "state" or name.endswith("_state_dict")]
        if of_values and len(entries) == world.size:
            raise UsageError(
                "other ranks train on the same samples than before, and each rank has values of "
                "its own",
                f"found: {', '.join(of_values)} differ by rank; data ranks "
                f"{dealt_to(payload)} before, {list(world.data_ranks)} now",
                "Go on with the same mesh, or on another number of ranks: then all have the values "
                "of rank 0.",
            )
        of_writer = [name.removesuffix("_state_dict") for name in of_values if name != "state"]
        return (
            f"{changed_ranks(payload, world)}: "
            f"what each rank had for itself is lost ({', '.join(names)})"
            + (f"; of {', '.join(of_writer)} all have that of rank 0" if of_writer else "")
        ) * bool(names)


def own_entry(payload: Mapping[str, Any], world: World) -> dict[str, Any]:
    """Return what a checkpoint holds for this rank alone; {} if the ranks are others now."""
    entries = payload.get("own")
    is_same = entries and dealt_to(payload) == list(world.data_ranks)
    return entries[world.rank] if entries and is_same else {}


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
    given: Given,
    data: dict[str, Any],
    values: dict[str, Any],
    tracked: Mapping[str, Any],
) -> Captured:
    """Capture a whole checkpoint; if there are shards, the main file and this rank's shard.

    Args:
        given: what the ranks give to it.
        data: the run's data and its position in it.
        values: what else the checkpoint contains, at the top level.
        tracked: the tracked objects, by name.

    Raises:
        UsageError: if something is not plain data.
        NonFiniteError: if a parameter is not finite.
    """
    of_ranks, main = given.of_ranks, given.main
    if not data["sample"]:
        of_ranks = [(rng, iterator, _without_head(own)) for rng, iterator, own in of_ranks]
    if main is None:
        content = assembled(of_ranks, data, values)
    elif main:
        content = {"format_version": 1} | values | main | {"data": data}
        if not data["sample"]:
            names = [name for name in main[RANKS]["own"] if name != HEAD]
            content[RANKS] = main[RANKS] | {"own": names}
    else:  # not the writer
        content = {"step": values["step"]}
    entry = None
    if main is not None:
        ((rng, iterator, own),) = of_ranks
        entry = {"rng": rng, "iterator": iterator} | own
    whole = state.captured(content, tracked, entry)
    if main == {}:
        return whole
    if main or whole.parts:
        whole.payload["layout"] = described(whole.parts)
    whole.payload["format_version"] = version_of(whole.payload)
    return whole


def _without_head(own: dict[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in own.items() if name != HEAD}


def changed_in(payload: Mapping[str, Any], name: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Return what a checkpoint holds of one object beside its state dict, for use without a run.

    The modes are left out, and the devices of tensors. What differs from rank to rank is that of
    the first rank, as the state dict is.

    Returns:
        The entries by module path and attribute.
    """
    first = payload.get(RANKS) or (payload.get("own") or [{}])[0]
    of_parts = (payload.get(ATTRIBUTES) or first.get(ATTRIBUTES) or {}).get(name, {})
    kept = {
        path: {
            key: {word: each for word, each in entry.items() if word != "device"}
            for key, entry in of_part.items()
            if key != "training"
        }
        for path, of_part in of_parts.items()
    }
    return {path: of_part for path, of_part in kept.items() if of_part}


def spelled_out(kept: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Name what `changed_in` has returned, without what is frozen; return "" if it is nothing."""
    names = [
        f"{joined(path, key.removeprefix(BUFFER))} = {spelled(entry.get('now', ABSENT))}"
        for path, of_part in kept.items()
        for key, entry in of_part.items()
        if not key.endswith(REQUIRES_GRAD)
    ]
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    named = ", ".join(names[:MOST_NAMED])
    return f"changed in training and in no state dict: {named}{more}" if names else ""
