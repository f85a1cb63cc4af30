"""The parts of sharded tensors: those that this rank holds, and those of a checkpoint."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from harness.distributed import dtensors
from harness.distributed.layout import COPIES, SHARD, STRIDED, Box, Layout, uncovered
from harness.errors import UsageError

PARTS = "parts"  # the key of a loaded checkpoint under which its `Parts` are
LEFT_OUT = torch.empty(0, device="meta")  # stands for all tensors whose parts are left out
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """This rank's part of a sharded tensor, as plain data."""

    tensor: torch.Tensor
    layout: Layout
    shape: Shape  # of the whole tensor
    standing: torch.Tensor  # stands for it in the main file; one for tied tensors


class TakenParts(dict[str, Part]):
    """The parts that this rank holds, by path; or none of them, if they are of no interest."""

    def __init__(self, *, are_left_out: bool = False) -> None:
        super().__init__()
        self.are_left_out = are_left_out
        self.by_identity = dict[int, Part]()  # of the plain tensor
        # By address of the plain tensor: the sharded one, which counts writes that it does not.
        self.live = dict[int, Any]()

    def take(self, path: str, part: Part) -> None:
        """Add a part."""
        self[path] = self.by_identity[id(part.tensor)] = part


@dataclass(frozen=True)
class Wanted:
    """A part of a whole tensor to be filled from a checkpoint, whoever has written it."""

    path: str
    box: Box
    into: torch.Tensor


class Parts(Protocol):
    """The parts of all sharded tensors of a checkpoint."""

    def path_of(self, tensor: object) -> str | None:
        """Return the path of a tensor that stands for a sharded one; None for any other value."""

    def fill(self, wanted: Sequence[Wanted]) -> None:
        """Fill tensors from the parts.

        Raises:
            DamagedError: A part is not what was written.
            StorageError: A part cannot be read.
        """


def hold_parts(objects: Collection[Any]) -> bool:
    """Return whether a rank has only parts of the state of any object, so that there are shards."""
    return dtensors.holds_sharded(objects) or dtensors.holds_sharded_state(objects)


def own_box(where: str, tensor: Any) -> Box:
    """Return the part of a sharded tensor that this rank holds; `where` is its path.

    The tensor may lie on a mesh of some ranks: before `run.track` it is not known which have copies
    of those that `fully_shard` alone has sharded, beside tensor parallelism.

    Raises:
        UsageError: The part is not the one that the cutting rule gives.
    """
    layout = dtensors.own_layout(where, tensor)
    box = layout.box(torch.distributed.get_rank(), tuple(tensor.shape))
    if (found := tuple(dtensors.local_of(tensor).shape)) != box.size:
        raise UsageError(
            f"{where} is not cut as torch {torch.__version__} is expected to cut it",
            f"found: a part of shape {found} on this rank, expected: {box.size}",
            "Take a version of PyTorch that is tested.",
        )
    return box


def path_of(where: Any) -> str:
    """Return the path of a value in a checkpoint: its keys, with slashes between them."""
    return where if isinstance(where, str) else f"{path_of(where[0])}/{where[1]}"


def take(parts: TakenParts | None, where: Any, tensor: Any, saved: Any) -> torch.Tensor:
    """Add this rank's part of a sharded tensor; return what stands for it in the main file.

    Args:
        parts: where to add it, by path; None where no part can be kept.
        where: the path of the tensor, nested as in `kinds.spelled`.
        tensor: the sharded tensor.
        saved: function that returns what is saved of a plain tensor.

    Raises:
        UsageError: The tensor cannot be kept.
    """
    if parts is not None and parts.are_left_out:
        return LEFT_OUT
    path = path_of(where)
    if parts is None or path in parts:
        raise UsageError(
            f"{path} is a sharded tensor, which cannot be kept",
            "found: a DTensor, where whole tensors alone are kept",
            "Those in the state_dicts of tracked objects are kept while their model is trained. "
            "Others: tensor.full_tensor(), or track the object that holds them.",
        )
    layout, local = dtensors.layout_of(path, tensor), dtensors.local_of(tensor).contiguous()
    if type(local) is not torch.Tensor:
        raise UsageError(
            f"{path} cannot be saved as plain data",
            f"found: a part of the class {type(local).__name__}",
            "Shard a tensor of an ordinary class.",
        )
    kept = saved(local)
    tied = parts.by_identity.get(id(kept))
    if tied is not None and (tied.layout, tied.shape) == (layout, tuple(tensor.shape)):
        standing = tied.standing
    else:
        standing = _standing(path, tensor.shape, tensor.dtype)
    parts.take(path, Part(kept, layout, tuple(tensor.shape), standing))
    parts.live[kept.data_ptr()] = tensor
    return standing


@functools.lru_cache(1 << 16)
def _standing(path: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor without data that stands for that at a path; the same one at each save."""
    return torch.empty(shape, dtype=dtype, device="meta")


def described(parts: Mapping[str, Part]) -> dict[str, Any]:
    """Return how tensors are cut, as the main file of a checkpoint has it under `layout`."""
    meshes, known = list[Any](), dict[int, list[Any]]()  # by the identity of the layout: few
    for layout in {id(part.layout): part.layout for part in parts.values()}.values():
        nested = torch.tensor(layout.ranks).reshape(layout.mesh).tolist()
        if nested not in meshes:
            meshes.append(nested)
        known[id(layout)] = [meshes.index(nested), [*map(list, layout.placements)]]
    return {
        "meshes": meshes,
        "tensors": {path: known[id(part.layout)] for path, part in parts.items()},
    }


def parsed(described: Any, ranks: int, shapes: Mapping[str, Shape]) -> dict[str, Layout]:
    """Return the layouts by path from what `described` has returned.

    Args:
        described: the entry `layout` of a main file.
        ranks: how many ranks have written the checkpoint.
        shapes: by path: the shape of the whole tensor.

    Raises:
        TypeError: They are no such layouts; or ValueError, LookupError, AttributeError,
            RuntimeError.
    """
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
        if not _is_possible(layout, ranks, len(shapes[path])):
            raise ValueError(f"{path} cannot be cut so")
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


def tensors_without_data(value: Any, where: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in plain data that stand for sharded ones, each after its path."""
    if isinstance(value, torch.Tensor):
        if value.is_meta:
            yield path_of(where), value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_without_data(item, (where, key))
    elif isinstance(value, list | tuple):
        for at, item in enumerate(value):
            yield from tensors_without_data(item, (where, at))


def copy_overlap(wanted: Wanted, box: Box, part: torch.Tensor) -> int:
    """Copy what a part has of a wanted one; return the number of elements."""
    if (overlap := wanted.box.overlap(box)) is None:
        return 0
    with torch.no_grad():
        wanted.into[overlap.within(wanted.box)].copy_(part[overlap.within(box)])
    return overlap.numel


def save_dcp(folder: Path, state: Mapping[str, Any]) -> None:
    """Write nested state into a folder of DCP, durably, without a process group.

    Args:
        folder: The folder, which is there and empty.
        state: The state: plain values and tensors.

    Raises:
        OSError: The disk refuses.
    """
    import torch.distributed.checkpoint as dcp

    writer = dcp.FileSystemWriter(folder, sync_files=True)  # type: ignore[attr-defined]
    with warnings.catch_warnings():  # that no other process takes part
        warnings.simplefilter("ignore")
        dcp.save(dict(state), storage_writer=writer, no_dist=True)  # type: ignore[attr-defined]
