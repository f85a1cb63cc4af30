"""The files of a sharded checkpoint: a shard for each rank, and the layouts in the main file.

A shard is what `torch.save` writes of

    format_version, step, rank
    parts       by path (model_state_dict/layers.0.weight): a plain tensor, without padding
    boxes       by the same path: where the part begins in the whole tensor, and its size

The main file has a tensor without data (on the device meta) for each sharded tensor, and under
`layout` how it was cut:

    meshes      the ranks of each mesh, as nested lists
    tensors     by path: the number of its mesh, and a placement for each dimension of that
                (["shard", dimension], ["strided", dimension, parts to its right], ["copies"])

Of a part that several ranks hold, the lowest of them writes it. The boxes follow from the layout;
each shard names its own as well, and a reader compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from harness.distributed.layout import COPIES, SHARD, STRIDED, Box, Layout, uncovered
from harness.distributed.parts import (
    PARTS,
    Part,
    Shape,
    Wanted,
    copy_overlap,
    tensors_without_data,
)
from harness.distributed.ranks import World
from harness.errors import DamagedError, HarnessError, StorageError, UsageError
from harness.retry import reading
from harness.store import SealedMemory, Store

Shard = dict[str, tuple[Box, torch.Tensor]]  # by path
MOST_TIMES = 16  # the size of the whole tensors, over that of all files


def content(step: int, rank: int, parts: Mapping[str, Part]) -> dict[str, Any]:
    """Return the content of this rank's shard, as plain data; the tensors are not copied."""
    of_rank = {path: part.layout.boxes(part.shape).get(rank) for path, part in parts.items()}
    boxes = {path: box for path, box in of_rank.items() if box is not None}
    return {
        "format_version": fmt.SHARDED,
        "step": step,
        "rank": rank,
        "parts": {path: parts[path].tensor for path in boxes},
        "boxes": {path: [list(box.begin), list(box.size)] for path, box in boxes.items()},
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


def _are_whole(store: Store, files: Sequence[DataFile]) -> bool:
    """Return whether none of the files is damaged, as far as they can be read."""
    try:
        check_bytes(store, files)
    except DamagedError:
        return False
    except HarnessError:
        pass
    return True


def check_covered(parts: Mapping[str, Part]) -> None:
    """Check that the parts of all ranks hold each element exactly once.

    Raises:
        UsageError: They do not.
    """
    cuts = {(id(part.layout), part.shape): (path, part) for path, part in parts.items()}
    for path, part in cuts.values():  # far fewer than tensors
        if problem := uncovered(part.layout.boxes(part.shape).values(), part.shape):
            raise UsageError(
                f"{path} is not held whole by all ranks together",
                f"found: {problem}",
                "Take a version of PyTorch that is tested.",
            )


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
        layouts = _parsed(payload.pop("layout", None), manifest, shapes)
        if layouts.keys() != standing.keys():
            raise _other(manifest.data, "layouts of other tensors than it has")
        # Tied tensors are in the shards once, so the whole of them may be larger than these.
        if sum(tensor.nbytes for tensor in standing.values()) > MOST_TIMES * manifest.size_bytes:
            raise _other(manifest.data, "tensors that are far larger than its shards")
        # By path: the part of each rank.
        self._boxes = {path: layout.boxes(standing[path].shape) for path, layout in layouts.items()}
        self._kept = dict[int, Shard]()

    def keep(self, rank: int, ranks: int) -> None:
        """Verify this rank's share of the shards, and keep them in memory.

        With as many ranks as shards, that is the rank's own.

        Raises:
            DamagedError: One is not what was written.
            StorageError: One cannot be read.
        """
        for number in range(rank, len(self._manifest.shards), ranks):
            self._kept[number] = self._opened(number)

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
            parts = dict(content["parts"])
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


def _parsed(described: Any, manifest: Manifest, shapes: Mapping[str, Shape]) -> dict[str, Layout]:
    """Return the layouts in a main file, by path. Raises DamagedError if they are none."""
    try:
        meshes = [torch.tensor(nested) for nested in described["meshes"]]
        made = {
            str(path): Layout(
                tuple(meshes[number].shape),
                tuple(meshes[number].flatten().tolist()),
                tuple(map(tuple, placements)),
            )
            for path, (number, placements) in described["tensors"].items()
        }
        for path, layout in made.items():
            if not _is_possible(layout, len(manifest.shards), len(shapes[path])):
                raise ValueError(f"{path} cannot be cut so")
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise _other(manifest.data, f"{type(error).__name__} in its layouts: {error}") from None
    return made


def _is_possible(layout: Layout, ranks: int, dimensions: int) -> bool:
    """Return whether a layout is over these ranks, for a tensor of so many dimensions."""
    return (
        sorted(layout.ranks) == list(range(ranks))
        and len(layout.placements) == len(layout.mesh)
        and all(
            placement == (COPIES,)
            or (
                len(placement) == (3 if placement[0] == STRIDED else 2)
                and placement[0] in (SHARD, STRIDED)
                and type(placement[1]) is int
                and 0 <= placement[1] < dimensions
            )
            for placement in layout.placements
        )
    )
