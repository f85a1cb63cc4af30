"""Keep values of `run.state` and of tracked objects for each rank, where they differ by rank.

A rank's own entry of a checkpoint holds pairs of a path and a value under the name of the object.
If the whole object is kept, because paths or kinds of values differ, the entry also holds the kinds
of its values, under `kinds`, unless all ranks have the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from harness import state
from harness.distributed.data_ranks import DATA_RANK, RANKS
from harness.distributed.ranks import World
from harness.distributed.wrappers import ddp_wrappers
from harness.errors import UsageError
from harness.text import size
from harness.tracking.payload import ATTRIBUTES, Given, OfRank
from harness.tracking.tensor_leaves import Leaves, Path, digest_of, leaves_of, put_leaf

STATE = "state"  # the key of `run.state` in a checkpoint
SYNCS = "ddp"  # the key of `ForwardSyncs` in a rank's own entry
MOST_BYTES = 64 << 20  # limit per rank: a larger difference is not kept, a larger sum is reported
KINDS = "kinds"  # the key of the kinds of values, in a checkpoint and in a rank's own entry


@dataclass
class OwnValues:
    """The parts of one object's state that each rank keeps for itself."""

    paths: set[Path] = field(default_factory=set)
    value: list[tuple[Path, Any]] | None = None

    def look(self, leaves: Leaves) -> None:
        """Take the present values of this rank."""
        self.value = (
            [((), leaves.whole)]
            if () in self.paths
            else [(path, leaf.value()) for path, leaf in leaves.items() if path in self.paths]
        )

    def state(self) -> list[tuple[Path, Any]] | None:
        """Return the paths and values of this rank."""
        return self.value

    def restore(self, state: Any) -> None:
        """Do nothing: `give_own` has replaced the writer's values before any restore."""


class OwnKinds:
    """The kinds of values in the objects that each rank keeps whole, by the key of the object."""

    def __init__(self) -> None:
        self._of_whole: dict[str, dict[str, str]] = {}

    def look(self, kept: Mapping[str, OwnValues], leaves: Mapping[str, Leaves]) -> None:
        """Take the present kinds of this rank."""
        self._of_whole = {key: leaves[key].kinds for key, own in kept.items() if () in own.paths}

    def state(self) -> dict[str, dict[str, str]] | None:
        """Return the kinds on this rank."""
        return self._of_whole or None

    def restore(self, state: Any) -> None:
        """Do nothing: `give_own` has replaced the writer's kinds before any restore."""


class ForwardSyncs:
    """Whether the next forward pass of a DDP module broadcasts the writer's buffers.

    It does not after a pass within `no_sync`, where each rank's own buffers are to go on. This is
    kept for modules that differ by rank.
    """

    def __init__(self) -> None:
        self._shells: dict[str, list[DistributedDataParallel]] = {}
        self._kept: dict[str, list[bool]] = {}

    def begin(self, tracked: Mapping[str, Any]) -> None:
        """Find the DDP modules, by the keys of the objects that hold them."""
        self._shells = {f"{name}_state_dict": ddp_wrappers(obj) for name, obj in tracked.items()}

    def look(self, kept: Collection[str]) -> None:
        """Take the present values for the objects that are kept for each rank."""
        self._kept = {
            key: [shell.require_forward_param_sync for shell in shells]
            for key, shells in self._shells.items()
            if shells and key in kept
        }

    def state(self) -> dict[str, list[bool]] | None:
        """Return the values on this rank."""
        return self._kept or None

    def restore(self, state: Mapping[str, list[bool]] | None) -> None:
        """Set the values again."""
        for key, flags in (state or {}).items():
            for shell, flag in zip(self._shells.get(key, []), flags, strict=False):
                shell.require_forward_param_sync = flag


@dataclass(frozen=True)
class _Told:
    """What the writer learns of a rank's contribution."""

    names: list[str]  # of its own entries
    has_iterator: bool
    generators: bytes  # a digest; empty where no two ranks need the same ones
    size_bytes: int  # of its own entries
    sizes: str  # of each of them, in words, if they are too large together


class Contributions:
    """What all ranks give to a checkpoint, and warnings about it, each made once, on the writer.

    Args:
        world: the ranks of this attempt.
        say: prints a message to the user.
        note: records an event.
    """

    def __init__(self, world: World, say: Callable[[str], None], note: Callable[..., None]) -> None:
        self._world, self._say, self._note = world, say, note
        self._is_big_reported = self._are_generators_reported = False

    def gathered(self, mine: OfRank, *, has_shards: bool) -> Given:
        """Return what the ranks give to a checkpoint.

        Without shards the writer has all of it afterwards. With shards each rank keeps its own, but
        for what is the same on all: the writer learns what it is, and not its content.
        Collective: every rank must call it.

        Args:
            mine: this rank's contribution; what the main file holds is taken out of it.
            has_shards: whether each rank writes a shard.
        """
        if not has_shards:
            given = self._world.to_writer(mine)
            _without_same_kinds(given)
            self._look([self._told(*each) for each in given], ", which all ranks read at a restart")
            return Given(given)
        generators, iterator, own = mine
        main, numbers = dict[str, Any](), [0, 0]
        with contextlib.suppress(UsageError):  # `captured` raises it, where all ranks hear of it
            numbers = [number_of(digest_of("own", own.get(key))) for key in (KINDS, ATTRIBUTES)]
        same_kinds, same_attributes = same_on_all(self._world, numbers)
        if same_kinds:  # those of the checkpoint
            own.pop(KINDS, None)
        if same_attributes and ATTRIBUTES in own:
            main[ATTRIBUTES] = own.pop(ATTRIBUTES)
        told = self._world.to_writer(self._told(generators, iterator, own))
        self._look(told)
        if not told:
            return Given([mine], {})
        main[RANKS] = {
            "data_ranks": list(self._world.data_ranks),
            "own": sorted({name for each in told for name in each.names}),
            "has_iterators": any(each.has_iterator for each in told),
        } | {name: of for name, of in own.items() if name == ATTRIBUTES}
        return Given([mine], main)

    def _told(self, generators: Any, iterator: Any, own: Mapping[str, Any]) -> _Told:
        """Return what the writer learns of a contribution."""
        is_shared = len({*self._world.data_ranks}) < self._world.size
        sizes = dict[str, int]()
        with contextlib.suppress(UsageError):  # as above
            for name, part in own.items():
                leaves = leaves_of(state.as_captured(name, part))
                sizes[name] = sum(leaf.size_bytes for leaf in leaves.values())
        total = sum(sizes.values())
        return _Told(
            sorted(own),
            iterator is not None,
            digest_of("rng", generators) if is_shared else b"",
            total,
            ", ".join(f"{name}: {size(number)}" for name, number in sizes.items())
            if total > MOST_BYTES
            else "",
        )

    def _look(self, told: Sequence[_Told], read_by: str = "") -> None:
        """Warn about the contributions of all ranks; there are none on others than the writer."""
        for rank, each in enumerate(told):
            if each.size_bytes > MOST_BYTES and not self._is_big_reported:
                self._is_big_reported = True
                self._note("big_own_state", rank=rank, size_bytes=each.size_bytes)
                self._say(
                    f"harness: warning: rank {rank} keeps {size(each.size_bytes)} for itself "
                    f"in each checkpoint ({each.sizes}){read_by}: "
                    f"expected at most {size(MOST_BYTES)}. Let less state differ by rank."
                )
        pair = _unlike([each.generators for each in told], self._world.data_ranks) if told else None
        if pair is not None and not self._are_generators_reported:
            self._are_generators_reported = True
            self._note("generators_parted", ranks=list(pair))
            self._say(
                f"harness: warning: ranks {pair[0]} and {pair[1]} compute each step together, and "
                "their generators are not the same any more: one of them has drawn numbers alone. "
                "Draw on every rank, or from a generator of your own"
            )


def _unlike(values: Sequence[Any], data_ranks: Sequence[int]) -> tuple[int, int] | None:
    """Return two ranks with one data rank whose values differ; None if there are none."""
    first = {number: rank for rank, number in reversed([*enumerate(data_ranks)])}
    pairs = ((first[number], rank) for rank, number in enumerate(data_ranks))
    return next(((a, b) for a, b in pairs if a != b and values[a] != values[b]), None)


def same_on_all(world: World, numbers: Sequence[int]) -> list[bool]:
    """Return of each number whether it is the same on all ranks.

    Collective: every rank must call it.
    """
    greatest = world.agree([*numbers, *(-number for number in numbers)])
    pairs = zip(greatest, greatest[len(numbers) :], strict=False)
    return [most == -least for most, least in pairs]


def number_of(digest: bytes) -> int:
    """Return a digest as a number that ranks can agree on."""
    return int.from_bytes(digest[:7], "big")


def _without_same_kinds(given: Sequence[OfRank]) -> None:
    """Leave out the kinds of all ranks, in place, if they are the same: those of the checkpoint."""
    kinds = [own.get(KINDS) for _, _, own in given]
    if all(of_rank == kinds[0] for of_rank in kinds):
        for _, _, own in given:
            own.pop(KINDS, None)


def give_own(payload: dict[str, Any], world: World) -> dict[str, Any]:
    """Replace the writer's values by this rank's own, and drop those of other ranks.

    Nothing changes if the number of ranks is not the same as at the time of the save.

    Returns:
        The payload, which is changed in place.
    """
    entries = payload.get("own")
    if not entries or len(entries) != world.size:
        return payload
    for key, kept in entries[world.rank].items():
        if key == STATE or key.endswith("_state_dict"):
            for path, value in kept or ():
                payload[key] = put_leaf(payload[key], tuple(path), value)
    for key, kinds in (entries[world.rank].get(KINDS) or {}).items():
        others = {
            path: kind
            for path, kind in payload.get(KINDS, {}).items()
            if path != key and not path.startswith(f"{key}[")
        }
        payload[KINDS] = others | kinds
    payload["own"] = [
        entry
        if rank == world.rank
        else {name: part if name == DATA_RANK else None for name, part in entry.items()}
        for rank, entry in enumerate(entries)
    ]
    return payload


def renewed(
    payload: Mapping[str, Any], live: Mapping[str, Any], values: Mapping[str, Any], rank: int
) -> dict[str, Any]:
    """Return the contents of a checkpoint with what one rank has changed since.

    Args:
        payload: the contents.
        live: the state of the tracked objects; empty if it has not changed.
        values: `run.state`.
        rank: the rank.
    """
    rng = list(payload["rng"])
    rng += [None] * (rank + 1 - len(rng))
    rng[rank] = state.rng_state(rank)
    user = state.as_captured(STATE, dict(values))
    now: dict[str, Any] = state.copied({**live, **user.fill()})
    kinds = {
        path: kind
        for path, kind in (live or payload).get(KINDS, {}).items()
        if not path.startswith(f"{STATE}[")
    } | user.seen.kinds
    own = [  # the values that differ by rank are in `now` already
        {
            name: part
            for name, part in entry.items()
            if name not in (STATE, KINDS) and not name.endswith("_state_dict")
        }
        for entry in payload.get("own", ())
    ]
    before = {name: part for name, part in payload.items() if name != "names" or not live}
    return before | now | {KINDS: kinds, "own": own, "rng": rng}
