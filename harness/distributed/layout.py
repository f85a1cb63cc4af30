"""Describe how sharded tensors are cut into parts, one for each rank.

This is the only module that knows `torch.distributed.tensor`. A `Layout` is plain data, which a
checkpoint holds beside the whole tensor's shape; all else follows from it by the cutting rule:

* Part i of n of a dimension of length L begins at min(i * ceil(L / n), L). It may be empty.
* A dimension that several placements cut is cut from left to right in the order of the mesh, except
  for strided placements (FSDP over tensor parallel): these are cut last, from right to left.

The rule is written down here, because `compute_local_shape_and_global_offset` of PyTorch tells
other boxes than `fully_shard` makes if tensor parallel has cut uneven rows (pytorch#161368). A
writer compares it with the shape of each local tensor that it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from harness.errors import UsageError

SHARD, STRIDED, COPIES = "shard", "strided", "copies"

# ["shard", dimension], ["strided", dimension, number of parts of it to the right] or ["copies"].
Placement = tuple[Any, ...]


@dataclass(frozen=True)
class Box:
    """A part of a whole tensor: where it begins and how large it is, along each dimension."""

    begin: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.size)

    def overlap(self, other: Box) -> Box | None:
        """Return what two parts have in common; None if that is nothing."""
        begin = tuple(map(max, self.begin, other.begin))
        end = [*map(min, self.end, other.end)]
        size = tuple(stop - start for start, stop in zip(begin, end, strict=True))
        return Box(begin, size) if all(length > 0 for length in size) else None

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Return the slices of `outer`'s own tensor that this part is."""
        starts = [mine - its for mine, its in zip(self.begin, outer.begin, strict=True)]
        return tuple(
            slice(start, start + length) for start, length in zip(starts, self.size, strict=True)
        )

    @property
    def end(self) -> tuple[int, ...]:
        """Return where the part ends along each dimension."""
        return tuple(start + length for start, length in zip(self.begin, self.size, strict=True))


@dataclass(frozen=True)
class Layout:
    """How a whole tensor is cut over the ranks of a mesh.

    Args:
        mesh: shape of the mesh.
        ranks: the ranks of the mesh, row by row.
        placements: what each dimension of the mesh does with the tensor.
    """

    mesh: tuple[int, ...]
    ranks: tuple[int, ...]
    placements: tuple[Placement, ...]

    def box(self, rank: int, shape: Sequence[int]) -> Box:
        """Return the part of a rank of the mesh; `shape` is that of the whole tensor."""
        at = self._coordinates(rank)
        begin, size = [0] * len(shape), list(shape)
        for number in _order(self.placements):
            dimension = self.placements[number][1]
            length, parts = size[dimension], self.mesh[number]
            start = min(at[number] * -(-length // parts), length)
            size[dimension] = min(start + -(-length // parts), length) - start
            begin[dimension] += start
        return Box(tuple(begin), tuple(size))

    def holders(self, rank: int) -> list[int]:
        """Return all ranks that hold the same part as a rank, in order, itself among them."""
        own = self._cut(rank)
        return sorted(other for other in self.ranks if self._cut(other) == own)

    def boxes(self, shape: Sequence[int]) -> dict[int, Box]:
        """Return each part that is not empty once, by the lowest rank that holds it."""
        found = {
            rank: self.box(rank, shape) for rank in self.ranks if self.holders(rank)[0] == rank
        }
        return {rank: box for rank, box in found.items() if box.numel or 0 in shape}

    def _cut(self, rank: int) -> tuple[int, ...]:
        """Return a rank's coordinates along the dimensions of the mesh that cut the tensor."""
        at = self._coordinates(rank)
        return tuple(
            place
            for place, placement in zip(at, self.placements, strict=True)
            if placement[0] != COPIES
        )

    def _coordinates(self, rank: int) -> list[int]:
        number, at = self.ranks.index(rank), list[int]()
        for length in reversed(self.mesh):
            number, place = divmod(number, length)
            at.insert(0, place)
        return at


def _order(placements: Sequence[Placement]) -> list[int]:
    """Return the numbers of the placements that cut, in the order in which they do."""
    plain = [number for number, placement in enumerate(placements) if placement[0] == SHARD]
    strided = [number for number, placement in enumerate(placements) if placement[0] == STRIDED]
    return plain + strided[::-1]


def is_sharded(value: object) -> bool:
    """Return whether a value is a tensor that is cut over ranks, or lies on a mesh of them."""
    return isinstance(value, DTensor)


def layout_of(name: str, tensor: DTensor) -> Layout:
    """Return the layout of a sharded tensor.

    Raises:
        UsageError: It is not cut into boxes, or its local tensor is not the part that the cutting
            rule gives; `name` is its path for the message.
    """
    mesh: Any = tensor.device_mesh
    dimensions, placements = tensor.ndim, list[Placement]()
    for number, placement in enumerate(tensor.placements):
        to_the_right = [
            mesh.size(other)
            for other, it in enumerate(tensor.placements[number + 1 :], number + 1)
            if isinstance(it, Shard | _StridedShard)
            and it.dim % dimensions == _dimension(placement, dimensions)
        ]
        placements.append(_spelled(name, placement, dimensions, math.prod(to_the_right)))
    layout = Layout(tuple(mesh.shape), tuple(mesh.mesh.flatten().tolist()), tuple(placements))
    rank = torch.distributed.get_rank()
    if rank not in layout.ranks:
        raise UsageError(
            f"{name} lies on a mesh without this rank",
            f"found: ranks {list(layout.ranks)}, not {rank}",
            "Every rank that trains must hold a part of what it tracks.",
        )
    expected, found = layout.box(rank, tensor.shape).size, tuple(tensor.to_local().shape)
    if expected != found:
        raise UsageError(
            f"{name} is not cut as torch {torch.__version__} is expected to cut it",
            f"found: a part of shape {found} on rank {rank}, expected: {expected}",
            "Take a version of PyTorch that is tested.",
        )
    return layout


def _dimension(placement: Any, dimensions: int) -> int:
    return int(placement.dim % dimensions) if hasattr(placement, "dim") else -1


def _spelled(name: str, placement: Any, dimensions: int, parts: int) -> Placement:
    """Spell a placement as plain data; `parts` is into how many those to its right cut.

    Raises:
        UsageError: as `layout_of`.
    """
    if isinstance(placement, Replicate):
        return (COPIES,)
    # In some versions a strided placement is one of `Shard`, too.
    if isinstance(placement, _StridedShard):
        if placement.split_factor == parts:
            return STRIDED, placement.dim % dimensions, placement.split_factor
    elif isinstance(placement, Shard):
        return SHARD, placement.dim % dimensions
    what = "holds sums that are not added up" if isinstance(placement, Partial) else "is in pieces"
    raise UsageError(
        f"{name} is not cut into one box for each rank",
        f"found: {placement}, which {what}",
        "Shard it with fully_shard, parallelize_module, or Shard(dim) along each dimension.",
    )


def uncovered(boxes: Iterable[Box], shape: Sequence[int]) -> str:
    """Return what is wrong if the boxes do not hold each element of a tensor exactly once.

    Returns:
        "" if they do.
    """
    whole = Box((0,) * len(shape), tuple(shape))
    held, beside = 0, list[Box]()  # those before that reach beyond the first row of the present one
    for box in sorted((box for box in boxes if box.numel), key=lambda box: box.begin):
        if len(box.begin) != len(shape) or box.overlap(whole) != box:
            return f"a part at {box.begin} of size {box.size} is outside of {tuple(shape)}"
        beside = [one for one in beside if not shape or one.end[0] > box.begin[0]]
        other = next((one for one in beside if box.overlap(one) is not None), None)
        if other is not None:
            return f"the parts at {other.begin} and {box.begin} overlap"
        held += box.numel
        beside.append(box)
    return "" if held == whole.numel else f"{held} of {whole.numel} elements are there"
