"""The files of a sharded checkpoint: a shard for each rank, and the layouts in the main file.

A shard is what `torch.save` writes of

    format_version, step, rank
    parts       by path (model_state_dict/layers.0.weight): a plain tensor, without padding
    boxes       by the same path: where the part begins in the whole tensor, and its size
    own         what the rank has for itself: rng (its generators), iterator (the state of its data
                iterator), and the entry `own` of `harness/state` for it

The main file has a tensor without data (on the device meta) for each sharded tensor, and under
`layout` how it was cut:

    meshes      the ranks of each mesh, as nested lists
    tensors     by path: the number of its mesh, and a placement for each dimension of that
                (["shard", dimension], ["strided", dimension, parts to its right], ["copies"])

Of a part that several ranks hold, the lowest of them writes it. The boxes follow from the layout;
each shard names its own as well, and a reader compares the two.

Of the ranks the main file only says how many they were, and what any of them has for itself: see
`data_ranks.put_entries`. In format version 3 it held that of all ranks, as a lone file does, and
shards had no `own`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from harness.checkpoint import format as fmt
from harness.checkpoint.format import DataFile, Manifest
from harness.checkpoint.load import (
    UNPARSEABLE,
    AbsentError,
    GoneError,
    is_plain_zip,
    unparseable,
    verified_at_start,
)
from harness.distributed import reshard
from harness.distributed.data_ranks import RANKS, put_entries, says_of_ranks
from harness.distributed.layout import Box
from harness.distributed.parts import (
    Wanted,
    copy_overlap,
    parsed,
    tensors_without_data,
)
from harness.errors import DamagedError, HarnessError, UsageError
from harness.state import Captured
from harness.store import Store

Shard = dict[str, tuple[Box, torch.Tensor]]  # by path
MOST_TIMES = 16  # the size of the whole tensors, over that of all files


def content(step: int, rank: int, captured: Captured) -> dict[str, Any]:
    """Return the content of this rank's shard, as plain data; the tensors are not copied."""
    parts = captured.parts
    of_rank = {path: part.layout.boxes(part.shape).get(rank) for path, part in parts.items()}
    boxes = {path: box for path, box in of_rank.items() if box is not None}
    return {
        "format_version": fmt.SHARDED,
        "step": step,
        "rank": rank,
        "parts": {path: parts[path].tensor for path in boxes},
        "boxes": {path: [list(box.begin), list(box.size)] for path, box in boxes.items()},
        "own": captured.own,
    }


def made_whole(
    store: Store, manifest: Manifest, payload: dict[str, Any], *, weights_only: bool = False
) -> dict[str, Any]:
    """Return the content of a checkpoint with shards as if one file held it, with whole tensors.

    With `weights_only`, the state of optimizers stays without data, and what each rank has for
    itself is left out.

    Raises:
        DamagedError: A shard is not what was written.
        StorageError: A shard cannot be read.
    """
    parts = ShardFiles((store,), manifest, payload)
    if weights_only:
        return reshard.made_whole(payload, parts, weights_only=True)
    ranks = range(len(manifest.shards))
    parts.keeps_own = set(ranks)
    whole = reshard.made_whole(payload, parts)
    parts.give_own(whole, ranks)
    return whole


class ShardFiles:
    """The parts of a checkpoint in its shards. A shard is verified each time that it is opened.

    Args:
        stores: the stores in which shards are looked for, one after the other: one that is damaged
            or missing in the first is taken from the next.
        manifest: the manifest of the checkpoint.
        payload: the content of its main file; the entry `layout` is taken out.
        are_apart: whether each machine may have stores of its own, of which this rank sees one.

    Raises:
        DamagedError: the layouts are not those of the tensors in the main file.
    """

    def __init__(
        self,
        stores: tuple[Store, ...],
        manifest: Manifest,
        payload: dict[str, Any],
        *,
        are_apart: bool = False,
    ) -> None:
        standing = {
            path: tensor
            for key, value in payload.items()
            if str(key).endswith("_state_dict")
            for path, tensor in tensors_without_data(value, key)
        }
        self._standing = standing  # keeps their identities from being used again
        self._paths = {id(tensor): path for path, tensor in standing.items()}
        self._stores, self._manifest, self._are_apart = stores, manifest, are_apart
        shapes = {path: tuple(tensor.shape) for path, tensor in standing.items()}
        try:
            layouts = parsed(payload.pop("layout", None), len(manifest.shards), shapes)
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            found = f"{type(error).__name__} in its layouts: {error}"
            raise _other(manifest.data, found) from None
        if layouts.keys() != standing.keys():
            raise _other(manifest.data, "layouts of other tensors than it has")
        # Tied tensors are in the shards once, so the whole of them may be larger than these.
        if sum(tensor.nbytes for tensor in standing.values()) > MOST_TIMES * manifest.size_bytes:
            raise _other(manifest.data, "tensors that are far larger than its shards")
        # By path: the part of each rank.
        self._boxes = {path: layout.boxes(standing[path].shape) for path, layout in layouts.items()}
        self._kept, self._own = dict[int, Shard](), dict[int, dict[str, Any]]()
        # By number of the shards that were opened: the store that had it whole, and the errors of
        # those before.
        self.found = dict[int, tuple[Store, dict[Store, HarnessError]]]()
        self.keeps_own = set[int]()  # the ranks whose own entries are kept, once they are read
        self._has_own = payload.get("format_version") == fmt.SHARDED
        if says_of_ranks(payload.get(RANKS), len(manifest.shards)) != self._has_own:
            raise _other(manifest.data, "nothing of the ranks that have written the shards")

    def keep(self, rank: int, ranks: int) -> None:
        """Verify this rank's share of the shards, and keep them in memory.

        With as many ranks as shards, that is the rank's own.

        Raises:
            DamagedError: One is not what was written.
            StorageError: One cannot be read.
        """
        for number in range(rank, len(self._manifest.shards), ranks):
            self.keeps_own.add(number)
            self._kept[number] = self._opened(number)

    def own(self, rank: int) -> dict[str, Any]:
        """Return what a rank had for itself, from its shard.

        Raises:
            DamagedError: The shard is not what was written.
            StorageError: It cannot be read.
        """
        if rank not in self._own:
            self.keeps_own.add(rank)
            self._foreign(rank)
        return self._own[rank]

    def give_own(self, payload: dict[str, Any], ranks: Iterable[int]) -> None:
        """Add what these ranks had for themselves to the content of the main file, in place.

        In format version 3 it is there already. Raises the errors of `own`.
        """
        if self._has_own:
            put_entries(payload, {rank: self.own(rank) for rank in ranks})

    def path_of(self, tensor: object) -> str | None:
        """Return the path of a tensor that stands for a sharded one; None for any other value."""
        return self._paths.get(id(tensor))

    def fill(self, wanted: Sequence[Wanted]) -> None:
        """Fill tensors from the parts, whichever rank has written them.

        Raises:
            DamagedError: A shard is not what was written, or a part is in none.
            StorageError: A shard cannot be read.
        """
        left = {number: one.box.numel for number, one in enumerate(wanted)}
        for shard in self._shards(wanted):
            for number, one in enumerate(wanted):
                if one.path in shard and left[number]:
                    left[number] -= copy_overlap(one, *shard[one.path])
        if lacking := [wanted[number].path for number, count in left.items() if count]:
            raise DamagedError(
                f"the checkpoint lacks parts of {len(lacking)} sharded tensor(s)",
                f"found: not all of {lacking[0]}",
            )

    def _shards(self, wanted: Sequence[Wanted]) -> Iterator[Shard]:
        """Yield the shards that have a part of what is wanted, one after the other."""
        needed = {
            rank
            for one in wanted
            for rank, box in self._boxes[one.path].items()
            if one.box.overlap(box)
        }
        for number in sorted(needed):
            yield self._kept[number] if number in self._kept else self._foreign(number)

    def _foreign(self, number: int) -> Shard:
        """Return the parts in a shard of another rank; raises what `_opened` does.

        Raises:
            UsageError: It is on another machine.
        """
        try:
            return self._opened(number)
        except (AbsentError, GoneError) as error:
            if not self._are_apart:
                raise
            raise UsageError(
                f"this rank needs {self._manifest.shards[number].name}, which is on another "
                "machine",
                f"found: nothing in {' nor in '.join(map(str, self._stores))}",
                "Start with the same sharding, or go back to a checkpoint that is in "
                "run.remote: harness rollback RUN STEP.",
            ) from error

    def missing_here(self) -> list[int]:
        """Return the numbers of the shards that none of the stores shows in full size.

        Raises:
            StorageError: A store cannot be listed.
        """
        folder = fmt.folder_key(self._manifest.step, self._manifest.attempt)
        missing = dict(enumerate(self._manifest.shards))
        for store in self._stores:
            if missing:
                there = {entry.key: entry.size_bytes for entry in store.entries(folder)}
                missing = {
                    number: file
                    for number, file in missing.items()
                    if there.get(file.key) != file.size_bytes
                }
        return list(missing)

    def _opened(self, number: int) -> Shard:
        """Return the parts in a shard, from the first store that has it whole.

        Raises:
            DamagedError: No store has it whole.
            StorageError: A store that may have it cannot be read.
        """
        problems = dict[Store, HarnessError]()
        for store in self._stores:
            try:
                shard = self._verified(store, number)
            except HarnessError as error:
                problems[store] = error
            else:
                self.found[number] = store, problems
                return shard
        raise _joint(problems)

    def _verified(self, store: Store, number: int) -> Shard:
        """Verify a shard in a store and return its parts, which are views of verified memory."""
        file = self._manifest.shards[number]
        with verified_at_start(store, file) as memory:
            try:
                content = torch.load(
                    memory.path, mmap=is_plain_zip(memory), map_location="cpu", weights_only=True
                )
            except UNPARSEABLE as error:
                raise unparseable(file, error) from error
        return self._checked(content, number, file)

    def _checked(self, content: Any, number: int, file: DataFile) -> Shard:
        """Return the parts in a shard. Raises DamagedError unless they are what it must hold."""
        try:
            is_it = (content["step"], content["rank"]) == (self._manifest.step, number)
            parts, own = dict(content["parts"]), content.get("own")
            boxes = {
                path: Box(tuple(begin), tuple(size))
                for path, (begin, size) in content["boxes"].items()
            }
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise _other(file, f"no shard: {type(error).__name__}: {error}") from None
        expected = {
            path: of_ranks[number] for path, of_ranks in self._boxes.items() if number in of_ranks
        }
        if not is_it or boxes != expected or parts.keys() != boxes.keys():
            raise _other(file, "other parts than those of its rank in its step")
        if self._has_own and not (isinstance(own, dict) and {"rng", "iterator"} <= own.keys()):
            raise _other(file, "nothing that its rank has for itself")
        if self._has_own and number in self.keeps_own:
            self._own[number] = copy.deepcopy(own)  # else it keeps the memory of the shard
        for path, box in boxes.items():
            part, whole = parts[path], self._standing[path]
            is_plain = type(part) is torch.Tensor and part.is_cpu and part.is_contiguous()
            if not is_plain or (tuple(part.shape), part.dtype) != (box.size, whole.dtype):
                raise _other(file, f"another part of {path} than it names")
        return {path: (boxes[path], part) for path, part in parts.items()}


def _joint(problems: Mapping[Store, HarnessError]) -> HarnessError:
    """Return the error of several stores: that of one that may have the data whole, if there is."""
    errors = list(problems.values())
    if unread := [error for error in errors if not isinstance(error, DamagedError)]:
        return unread[0]
    damaged = [error for error in errors if not isinstance(error, AbsentError | GoneError)]
    if len(errors) == 1 or not damaged:
        return errors[0]
    what = "; ".join(f"{error.what} in {store}" for store, error in problems.items())
    return DamagedError(what, damaged[0].found, damaged[0].remedy)


def _other(file: DataFile, found: str) -> DamagedError:
    return DamagedError(f"{file.name} is not what its manifest describes", f"found: {found}")
