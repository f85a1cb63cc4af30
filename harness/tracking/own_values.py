"""Keep values of `run.state` and of tracked objects for each rank, where they differ by rank.

A rank's own entry of a checkpoint holds pairs of a path and a value under the name of the object.
If the whole object is kept, because paths or kinds of values differ, the entry also holds the kinds
of its values, under `kinds`, unless all ranks have the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from harness import state
from harness.distributed.data_ranks import DATA_RANK
from harness.distributed.ranks import World
from harness.distributed.wrappers import ddp_wrappers
from harness.tracking.payload import OfRank
from harness.tracking.tensor_leaves import Leaves, Path, put_leaf

STATE = "state"  # the key of `run.state` in a checkpoint
SYNCS = "ddp"  # the key of `ForwardSyncs` in a rank's own entry
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


def without_same_kinds(given: Sequence[OfRank]) -> None:
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
