"""Describe how sharded tensors are cut into parts, one for each rank.

A `Layout` is plain data, which a checkpoint holds beside the whole tensor's shape; all else follows
from it by the cutting rule:

* Part i of n of a dimension of length L begins at min(i * ceil(L / n), L). It may be empty.
* A dimension that several placements cut is cut from left to right in the order of the mesh, except
  for strided placements (FSDP over tensor parallel): these are cut last, from right to left.

The rule is written down here, because `compute_local_shape_and_global_offset` of PyTorch tells
other boxes than `fully_shard` makes if tensor parallel has cut uneven rows (pytorch#161368). A
writer compares it with the shape of each local tensor that it has (`dtensors.layout_of`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

    def boxes(self, shape: Sequence[int]) -> Mapping[int, Box]:
        """Return each part that is not empty, by the lowest rank that holds it, which writes it."""
        return _boxes(self, tuple(shape))

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


@functools.lru_cache(maxsize=4096)
def _boxes(layout: Layout, shape: tuple[int, ...]) -> Mapping[int, Box]:
    first = dict[tuple[int, ...], int]()  # by the coordinates that cut
    for rank in sorted(layout.ranks):
        first.setdefault(layout._cut(rank), rank)
    found = {rank: layout.box(rank, shape) for rank in first.values()}
    return {rank: box for rank, box in found.items() if box.numel}


def _order(placements: Sequence[Placement]) -> list[int]:
    """Return the numbers of the placements that cut, in the order in which they do."""
    plain = [number for number, placement in enumerate(placements) if placement[0] == SHARD]
    strided = [number for number, placement in enumerate(placements) if placement[0] == STRIDED]
    return plain + strided[::-1]


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
