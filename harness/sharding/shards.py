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
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from harness.checkpoint import format as fmt
from harness.checkpoint.format import DataFile, Manifest
from harness.checkpoint.load import (
    UNPARSEABLE,
    GoneError,
    check_bytes,
    is_plain_zip,
    unparseable,
    verified,
)
from harness.distributed import reshard
from harness.distributed.data_ranks import RANKS, put_entries, says_of_ranks
from harness.distributed.layout import Box
from harness.distributed.parts import (
    PARTS,
    Wanted,
    copy_overlap,
    parsed,
    tensors_without_data,
)
from harness.distributed.ranks import World
from harness.errors import DamagedError, HarnessError, StorageError
from harness.retry import reading
from harness.state import Captured
from harness.store import SealedMemory, Store

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


def add_parts(
    store: Store, manifest: Manifest, payload: dict[str, Any] | None, world: World
) -> None:
    """Verify this rank's share of a checkpoint's shards, and add the parts to its content.

    A shard that is damaged for another rank than the writer alone is not damaged: it was so on the
    way, or this rank's machine does not see it.
    Collective: every rank must call it, with None where the main file could not be read.

    Raises:
        DamagedError: A shard is not what was written.
        StorageError: A shard cannot be read by this rank.
    """
    problem: HarnessError | None = None

    def read() -> bool:
        nonlocal problem
        try:
            if payload is not None:
                parts = payload[PARTS] = ShardFiles(store, manifest, payload)
                parts.keep(world.rank, world.size)
                same_ranks = world.size == len(manifest.shards)
                parts.give_own(payload, [world.rank] if same_ranks else [])
        except HarnessError as error:
            problem = error
        return isinstance(problem, DamagedError)

    is_damaged = world.on_each(read)
    if ranks := [rank for rank, found in enumerate(is_damaged) if found and rank]:
        shares = [manifest.shards[rank :: world.size] for rank in ranks]
        whole = world.on_writer(lambda: [_are_whole(store, share) for share in shares])
        if problem is not None and world.rank in ranks and whole[ranks.index(world.rank)]:
            raise StorageError(
                f"{problem.what}, for this rank alone",
                problem.found,
                "Is run.dir on a file system that all nodes share? Else start again.",
            )
    if problem is not None:
        raise problem


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
    parts = ShardFiles(store, manifest, payload)
    if weights_only:
        return reshard.made_whole(payload, parts, weights_only=True)
    ranks = range(len(manifest.shards))
    parts.keeps_own = set(ranks)
    whole = reshard.made_whole(payload, parts)
    parts.give_own(whole, ranks)
    return whole


def _are_whole(store: Store, files: Sequence[DataFile]) -> bool:
    """Return whether none of the files is damaged, as far as they can be read."""
    try:
        check_bytes(store, files)
    except DamagedError:
        return False
    except HarnessError:
        pass
    return True


class ShardFiles:
    """The parts of a checkpoint in its store. A shard is verified each time that it is opened.

    Args:
        store: the store that holds the checkpoint.
        manifest: the manifest of the checkpoint.
        payload: the content of its main file; the entry `layout` is taken out.

    Raises:
        DamagedError: the layouts are not those of the tensors in the main file.
    """

    def __init__(self, store: Store, manifest: Manifest, payload: dict[str, Any]) -> None:
        standing = {
            path: tensor
            for key, value in payload.items()
            if str(key).endswith("_state_dict")
            for path, tensor in tensors_without_data(value, key)
        }
        self._standing = standing  # keeps their identities from being used again
        self._paths = {id(tensor): path for path, tensor in standing.items()}
        self._store, self._manifest = store, manifest
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
            self._opened(rank)
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
            if number in self._kept:
                yield self._kept[number]
            else:
                yield self._opened(number)

    def _opened(self, number: int) -> Shard:
        """Verify a shard and return its parts, which are views of verified memory."""
        store, file = self._store, self._manifest.shards[number]
        with (
            reading(partial(verified, store, file))
            if store.is_local
            else _read(store, file) as memory
        ):
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


def _read(store: Store, file: DataFile) -> SealedMemory:
    """Read and verify a shard; once more if it is damaged, as it may be so on the way only."""
    try:
        return verified(store, file)
    except GoneError:
        raise
    except DamagedError:
        return verified(store, file)


def _other(file: DataFile, found: str) -> DamagedError:
    return DamagedError(f"{file.name} is not what its manifest describes", f"found: {found}")
