"""Find state that differs from rank to rank by comparing digests, and keep it for each rank.

The modules in DistributedDataParallel, and optimizers with no other parameters than theirs, are the
same on all ranks by construction, but for what it is set to ignore or not to broadcast. They are
trusted, but a program may keep DDP from synchronising (`no_sync`, a hook that does not reduce,
parameters that were frozen when it was made). So at saves 1, 2, 4, 8 … of an attempt some elements
of each of their tensors are compared, and of each tensor of other large objects. The first save
compares everything that is tracked and not trusted in full. All saves compare small objects and
`run.state`.

If an object differs, only its differing parts are kept for each rank. They are stored in `own`,
under the object's name in the checkpoint (see `own_values`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from harness import state
from harness.distributed import ddp, wrappers
from harness.distributed.parts import hold_parts
from harness.distributed.ranks import World
from harness.state.capturing import state_of
from harness.state.raw_bytes import digest_of_samples
from harness.text import size
from harness.tracking.own_values import (
    KINDS,
    MOST_BYTES,
    STATE,
    SYNCS,
    Contributions,
    ForwardSyncs,
    OwnKinds,
    OwnValues,
    number_of,
    same_on_all,
)
from harness.tracking.payload import Given, RankEntries
from harness.tracking.tensor_leaves import (
    Leaf,
    Leaves,
    Path,
    leaves_of,
    short_digest,
)

SMALL_BYTES = 1 << 20  # an object below this size is compared at each save
SETTINGS = ((), ("param_groups",))  # where the paths of an optimizer's settings begin

UNWRAPPED = "Wrap it in DistributedDataParallel, or make it alike on all ranks."
UNSYNCHRONISED = (
    "DistributedDataParallel does not keep it alike (no_sync, a communication hook, parameters that"
    " were frozen when it was made): save at steps at which it is alike on all ranks."
)


@dataclass(frozen=True)
class _Report:
    """One rank's report on an object: a digest of its structure, and of each compared leaf."""

    structure: bytes
    leaves: dict[Path, bytes]
    copies: frozenset[Path] = frozenset()  # leaves equal to a buffer in a DDP module


class RankDifferences:
    """A comparison of the tracked objects on all ranks, at each save.

    Args:
        world: the ranks of this attempt.
        own: the per-rank entries of a checkpoint, to which differing state is added.
        say: prints a message to the user.
        note: records an event.
    """

    def __init__(
        self, world: World, own: RankEntries, say: Callable[[str], None], note: Callable[..., None]
    ) -> None:
        self._world, self._own, self._say, self._note = world, own, say, note
        self._kept: dict[str, OwnValues] = {}
        self._kinds = OwnKinds()
        own.add(KINDS, self._kinds)
        self._syncs = ForwardSyncs()
        own.add(SYNCS, self._syncs)
        self._passed: dict[str, set[Path]] = {}  # differences that are not kept
        self._structures: dict[str, bytes] = {}
        self._small: set[str] = set()
        self._saves, self._contributions = 0, Contributions(world, say, note)
        self._has_shards = False
        # Objects of DDP are trusted to be the same until samples or an optimizer's settings differ.
        self._trusts_ddp, self._trusted, self._of_ddp = True, set[str](), set[str]()

    def begin(self, tracked: Mapping[str, Any]) -> None:
        """Note the DDP modules, before each rank's own entry is restored, and who saves what."""
        self._syncs.begin(tracked)
        self._has_shards = hold_parts(tracked.values())

    def of_ranks(
        self, tracked: Mapping[str, Any], values: Mapping[str, Any], iterator: Any
    ) -> Given:
        """Return what the ranks give to a checkpoint: among it the state that differs by rank.

        Collective: every rank must call it.

        Args:
            tracked: the tracked objects, by name.
            values: `run.state`.
            iterator: the state of this rank's data iterator.

        Raises:
            UsageError: if state is not plain data.
        """
        if self._world.size > 1:
            self._saves += 1
            is_sampled = self._saves.bit_count() == 1
            self._look(tracked, values, in_full=self._saves == 1, is_sampled=is_sampled)
        mine = state.rng_state(self._world.rank), iterator, self._own.state()
        return self._contributions.gathered(mine, has_shards=self._has_shards)

    def _look(
        self,
        tracked: Mapping[str, Any],
        values: Mapping[str, Any],
        *,
        in_full: bool = True,
        is_sampled: bool = True,
    ) -> None:
        """Compare the digests of all ranks, and collect this rank's differing state.

        Digests are exchanged only if a checksum over all of them differs. The comparison is
        repeated in full if the structure or the samples of an object that was left out differ, or
        if objects of DDP are no longer trusted.

        Args:
            tracked: the tracked objects, by name.
            values: `run.state`.
            in_full: compare large objects in full.
            is_sampled: compare samples of objects of DDP, and of large objects.
        """
        leaves = {
            key: leaves_of(value)
            for key, value in self._states(tracked, values, is_sampled).items()
        }
        if is_sampled:
            self._small = {STATE} | {key for key, own in leaves.items() if _is_small(own)}
        structures = {key: own.structure for key, own in leaves.items()}
        compared = leaves.keys() if in_full else self._small & leaves.keys()
        reports = {key: self._report(key, structures[key], leaves[key]) for key in compared}
        others = {key: own for key, own in leaves.items() if key not in reports}
        has_grown = any(self._structures.get(key) != structures[key] for key in others)
        sampled = (self._of_trusted(tracked), self._unknown(others)) if is_sampled else ((), ())
        digests = [short_digest(repr(reports).encode()), *map(digest_of_samples, sampled)]
        is_same, is_ddp_same, *are_same = same_on_all(
            self._world, [*map(number_of, digests), int(has_grown)]
        )
        self._structures |= structures
        self._trusts_ddp = self._trusts_ddp and is_ddp_same
        is_again = has_grown or not (is_ddp_same and all(are_same))
        if is_again or (not is_same and self._compare(tracked, reports, leaves)):
            self._look(tracked, values)
            return
        for key, kept in self._kept.items():
            kept.look(leaves[key])
        self._kinds.look(self._kept, leaves)
        self._syncs.look(self._kept)

    def _states(
        self, tracked: Mapping[str, Any], values: Mapping[str, Any], is_sampled: bool
    ) -> dict[str, state.Captured]:
        """Capture the objects to compare this time, by their names in the checkpoint.

        Of a trusted object only the settings of the parameter groups are compared, and what DDP
        ignores.
        """
        if is_sampled:
            held = {id(part) for obj in tracked.values() for part in ddp.parameters_of(obj)}
            self._of_ddp = {
                f"{name}_state_dict" for name, obj in tracked.items() if ddp.keeps_alike(obj, held)
            }
            self._trusted = self._of_ddp - self._kept.keys() if self._trusts_ddp else set()
        states = {STATE: state.as_captured(STATE, dict(values))}
        for name, obj in tracked.items():
            key = f"{name}_state_dict"
            if key in self._trusted:
                groups = [
                    {n: item for n, item in group.items() if n != "params"}
                    for group in getattr(wrappers.unwrap(obj), "param_groups", ())
                ]
                states[key] = state.as_captured(key, {"param_groups": groups} | _ignored(obj))
            elif is_sampled or key in self._small or key in self._kept:
                states[key] = state.captured_object(name, obj, without_parts=True)
        return states

    def _unknown(self, leaves: Mapping[str, Leaves]) -> Iterator[torch.Tensor]:
        """Yield the tensors of these objects that are not known to differ."""
        for key, own in leaves.items():
            known = self._known(key)
            for path, leaf in own.items():
                if isinstance(leaf.live, torch.Tensor) and not known & {(), path}:
                    yield leaf.live

    def _of_trusted(self, tracked: Mapping[str, Any]) -> Iterator[torch.Tensor]:
        """Yield the tensors of all objects of DDP that are trusted."""
        for name, obj in tracked.items():
            if f"{name}_state_dict" in self._trusted:
                yield from ddp.parameters_of(obj)
                yield from ddp.moments_of(obj)

    def _report(self, key: str, structure: bytes, leaves: Mapping[Path, Leaf]) -> _Report:
        """Report on one object, without the leaves that are known to differ."""
        known = self._known(key)
        if () in known:
            return _Report(b"", {})
        return _Report(
            structure, {path: leaf.digest() for path, leaf in leaves.items() if path not in known}
        )

    def _known(self, key: str) -> set[Path]:
        """Return the paths of the leaves of an object that are known to differ."""
        kept = self._kept[key].paths if key in self._kept else set[Path]()
        return self._passed.get(key, set()) | kept

    def _compare(
        self, tracked: Mapping[str, Any], reports: dict[str, _Report], leaves: Mapping[str, Leaves]
    ) -> bool:
        """Find the differing leaves, and keep them for each rank if they are small enough.

        Collective: every rank must call it.

        Args:
            tracked: the tracked objects, by name.
            reports: this rank's report on each object.
            leaves: the leaves of each object.

        Returns:
            Whether to compare everything again, because objects of DDP are no longer trusted.
        """
        buffers = {leaf.digest() for leaf in _ddp_buffers(tracked)}
        for name in (
            name
            for name, obj in tracked.items()
            if ddp.copies_buffers(obj) and f"{name}_state_dict" in reports
        ):
            report = reports[f"{name}_state_dict"]
            reports[f"{name}_state_dict"] = replace(
                report,
                copies=frozenset(p for p, digest in report.leaves.items() if digest in buffers),
            )
        everyones = self._world.gather(reports)
        trusted = self._trusts_ddp
        for key in reports:
            of_key = [theirs[key] for theirs in everyones if key in theirs]
            if len(of_key) < self._world.size:
                continue
            differing = _differing(of_key)
            copied = (
                set()
                if () in differing
                else {path for path in differing if all(path in report.copies for report in of_key)}
            )
            self._passed.setdefault(key, set()).update(copied)
            if differing := differing - copied:
                own = sum(
                    leaf.size_bytes
                    for path, leaf in leaves[key].items()
                    if () in differing or path in differing
                )
                self._take(key, differing, self._world.agree([own])[0])
                # With different settings, optimizers make different updates.
                if key in self._trusted and any(path[:1] in SETTINGS for path in differing):
                    self._trusts_ddp = False
        return trusted and not self._trusts_ddp

    def _take(self, key: str, paths: set[Path], size_bytes: int) -> None:
        """Keep the differing leaves of one object for each rank; if they are too large, warn."""
        name = "run.state" if key == STATE else key.removesuffix("_state_dict")
        fits = size_bytes <= MOST_BYTES
        self._note("differs_by_rank", object=name, size_bytes=size_bytes, kept=fits)
        if fits:
            if key not in self._kept:
                self._kept[key] = OwnValues()
                self._own.add(key, self._kept[key])
                self._say(f"harness: {name} is another one on each rank: each keeps its own")
            self._kept[key].paths |= paths
        else:
            self._passed.setdefault(key, set()).update(paths)
            self._say(
                f"harness: warning: {name} is another one on each rank, "
                f"and {size(size_bytes)} of it differ: only the writer's is saved, "
                "and all ranks go on with that after a restart; "
                f"each can keep {size(MOST_BYTES)}. "
                f"{UNSYNCHRONISED if key in self._of_ddp else UNWRAPPED}"
            )


def _ignored(obj: Any) -> dict[str, Any]:
    """Return what a module in DDP holds that DDP does not keep alike, as in its state dict."""
    shells = wrappers.ddp_wrappers(obj)
    names = {name for shell in shells for name in ddp.names_unsynchronised(shell)}
    return {name: value for name, value in state_of(obj).items() if name in names} if names else {}


def _is_small(leaves: Mapping[Path, Leaf]) -> bool:
    """Return whether an object is below SMALL_BYTES and has no tensor on a GPU."""
    return (
        not any(leaf.is_on_device for leaf in leaves.values())
        and sum(leaf.size_bytes for leaf in leaves.values()) < SMALL_BYTES
    )


def _ddp_buffers(tracked: Mapping[str, Any]) -> list[Leaf]:
    shells = [shell for obj in tracked.values() for shell in wrappers.ddp_wrappers(obj)]
    return [
        leaf
        for shell in shells
        if shell.broadcast_buffers
        for leaf in leaves_of(state.as_captured("", dict(shell.module.named_buffers()))).values()
    ]


def _differing(reports: list[_Report]) -> set[Path]:
    """Return the paths of leaves that differ; only the root path `()` if the structures differ."""
    if len({report.structure for report in reports}) > 1:
        return {()}
    return {
        path
        for path, digest in reports[0].leaves.items()
        if any(report.leaves[path] != digest for report in reports)
    }
