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
from harness.distributed.layout import COPIES, SHARD, STRIDED, Box, Layout, uncovered
from harness.distributed.parts import (
    Part,
    Shape,
    Wanted,
    copy_overlap,
    tensors_without_data,
)
from harness.errors import DamagedError, HarnessError, UsageError
from harness.store import Store

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
        layouts = _parsed(payload.pop("layout", None), manifest, shapes)
        if layouts.keys() != standing.keys():
            raise _other(manifest.data, "layouts of other tensors than it has")
        # Tied tensors are in the shards once, so the whole of them may be larger than these.
        if sum(tensor.nbytes for tensor in standing.values()) > MOST_TIMES * manifest.size_bytes:
            raise _other(manifest.data, "tensors that are far larger than its shards")
        # By path: the part of each rank.
        self._boxes = {path: layout.boxes(standing[path].shape) for path, layout in layouts.items()}
        self._kept = dict[int, Shard]()
        # By number of the shards that were opened: the store that had it whole, and the errors of
        # those before.
        self.found = dict[int, tuple[Store, dict[Store, HarnessError]]]()

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
                continue
            try:
                yield self._opened(number)
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
