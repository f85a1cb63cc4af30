"""Look into sharded tensors; this is the only module that knows torch.distributed.tensor.

That package takes more than half a second to import, so it is not imported before the program has
done so.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from harness.distributed.layout import COPIES, SHARD, STRIDED, Layout, Placement
from harness.distributed.wrappers import unwrap
from harness.errors import UsageError

COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
CONTEXT = ("cp", "context", "context_parallel")  # names of mesh dimensions
# By mesh, placements and shape: the layout, and the shape of this rank's part.
_layouts = dict[Any, tuple[Layout, tuple[int, ...]]]()
_groups = list[tuple[int, ...]]()  # of each rank: the ranks that average its gradients


def is_sharded(value: object) -> bool:
    """Return whether a value is a tensor that is cut over ranks, or lies on a mesh of them."""
    kind = type(value)
    if kind is torch.Tensor or kind is nn.Parameter:  # asked for every gradient in each step
        return False
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and issubclass(kind, package.DTensor)


def holds_sharded(objects: Iterable[Any]) -> bool:
    """Return whether a module has sharded parameters or buffers, or an optimizer has some."""
    return "torch.distributed.tensor" in sys.modules and any(
        is_sharded(tensor) for obj in map(unwrap, objects) for tensor in _tensors_of(obj)
    )


def holds_sharded_state(objects: Iterable[Any]) -> bool:
    """Return whether the state dict of an object of any class has sharded tensors."""

    def within(value: Any) -> bool:
        if isinstance(value, Mapping):
            return any(map(within, value.values()))
        if isinstance(value, list | tuple):
            return any(map(within, value))
        return is_sharded(value)

    return "torch.distributed.tensor" in sys.modules and any(
        within(obj.state_dict()) for obj in map(unwrap, objects)
    )


def _tensors_of(obj: Any) -> list[Any]:
    if isinstance(obj, nn.Module):
        return [*obj.parameters(), *obj.buffers()]
    groups = getattr(obj, "param_groups", ()) if isinstance(obj, torch.optim.Optimizer) else ()
    return [parameter for group in groups for parameter in group["params"]]


def class_behind(kind: type) -> type:
    """Return the class of a module before `fully_shard` made one of its own for it."""
    package = sys.modules.get("torch.distributed.fsdp")
    is_made = package is not None and package.FSDPModule in kind.__bases__
    return kind.__bases__[1] if is_made else kind


def local_of(tensor: Any) -> torch.Tensor:
    """Return the part of a sharded tensor that this rank holds, in the same memory."""
    local: torch.Tensor = tensor._local_tensor
    # The public way takes ten times as long; it also waits for a collective under way.
    return local.detach() if type(local) is torch.Tensor else tensor.detach().to_local()


def plain(value: Any) -> Any:
    """Return this rank's part of a sharded tensor; any other value as it is."""
    return local_of(value) if is_sharded(value) else value


def version_of(tensor: torch.Tensor) -> Any:
    """Return a value that changes with each write that torch counts, also to the part alone."""
    try:
        if not is_sharded(tensor):
            return tensor._version
        return tensor._version, tensor._local_tensor._version  # type: ignore[attr-defined]
    except RuntimeError:  # an inference tensor: torch does not count the writes to it
        return 0


def replicated(value: Any) -> torch.Tensor | None:
    """Return a sharded tensor as a plain one if each rank holds all of it, else None."""
    is_copied = all(placement.is_replicate() for placement in value.placements)
    return local_of(value) if is_copied else None


@contextlib.contextmanager
def without_collectives() -> Iterator[None]:
    """Refuse work on sharded tensors while the block runs, as it runs on one rank only.

    Nearly any operator on a sharded tensor is a collective: the rank would wait for the others.

    Raises:
        RuntimeError: an operator is called on a sharded tensor.
    """
    if "torch.distributed.tensor" not in sys.modules:
        yield
        return
    with _refusing()():
        yield


@functools.cache
def _refusing() -> Any:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    aten: Any = torch.ops.aten
    local = (aten.detach.default, aten.alias.default)

    class Refusing(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Refuse all but what is done on each rank's own part."""

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            is_collective = function.namespace in COLLECTIVES
            if is_collective or (
                function not in local and any(map(is_sharded, tree_leaves((args, kwargs))))
            ):
                raise RuntimeError(f"{function} on sharded tensors waits for the other ranks")
            return function(*args, **(kwargs or {}))

    return Refusing


def empty_like(tensor: Any, dtype: torch.dtype) -> Any:
    """Return a new sharded tensor that is cut as another one is, without content."""
    return torch.empty_like(tensor.detach(), dtype=dtype)


def with_part(like: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Return a copy of this rank's part as a tensor that lies as another one does.

    Raises:
        UsageError: The other one is cut otherwise.
    """
    made: torch.Tensor = empty_like(like, part.dtype) if is_sharded(like) else like
    local = plain(made)
    if local.shape != part.shape:
        raise UsageError(
            "a rank has kept a part of a sharded tensor that it does not hold now",
            f"found: {tuple(local.shape)}, expected: {tuple(part.shape)}",
            "Shard the model as before.",
        )
    if made is like:
        return part.to(like.device, copy=True)
    with torch.no_grad():
        local.copy_(part)
    return made


def fsdp_groups(modules: Iterable[nn.Module]) -> dict[int, tuple[int, ...]]:
    """Return the ranks that average the gradient of each parameter under `fully_shard`, by its id.

    Raises:
        UsageError: The mesh is one for context parallelism.
    """
    found = dict[int, tuple[int, ...]]()
    for group in (group for module in modules for group in _fsdp_groups(module)):
        mesh = group.mesh_info.mesh
        root = mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh
        sizes = dict(zip(root.mesh_dim_names or (), root.shape, strict=False))
        if any(sizes.get(name, 1) > 1 for name in CONTEXT):
            raise UsageError(
                "context parallelism is not supported",
                f"found: a mesh of {sizes}",
                "Its ranks need the same samples, and their gradients are averaged like those of "
                "ranks with other samples.",
            )
        of_group = tuple(mesh.mesh.flatten().tolist())
        found |= {id(held.sharded_param): of_group for held in group.fsdp_params}
    return found


def are_cut_unlike(tensors: Iterable[Any]) -> bool:
    """Return whether sharded tensors are cut in several ways, and some are cut at all."""
    found = {str(tensor.placements) for tensor in tensors}
    return len(found) > 1


def ranks_of(tensor: Any) -> set[int]:
    """Return the ranks of the mesh of a sharded tensor."""
    return set(tensor.device_mesh.mesh.flatten().tolist())


def summary(modules: Iterable[nn.Module]) -> str:
    """Return in a few words how the tensors of modules are sharded; "" if none is."""
    tensors = (of for module in modules for of in _tensors_of(module) if is_sharded(of))
    found = {
        f"{'x'.join(map(str, of.device_mesh.shape))} {', '.join(map(str, of.placements))}"
        for of in tensors
    }
    return "; ".join(sorted(found))[:200]


def note_groups(groups: Sequence[tuple[int, ...]]) -> None:
    """Note which ranks average their gradients; a tensor on these alone has copies on others."""
    if list(groups) != _groups:
        _groups[:] = groups
        _layouts.clear()


def check_optimizer_state(name: str, optimizer: object) -> None:
    """Check that an optimizer shards its state as it does the parameters.

    Raises:
        UsageError: It does not, so that no resume could tell how to shard it.
    """
    inner = unwrap(optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        return
    held: Mapping[Any, Any] = inner.state
    for parameter, kept in held.items():
        for key, value in kept.items() if isinstance(kept, Mapping) else ():
            if is_sharded(value) and not (
                is_sharded(parameter)
                and value.shape == parameter.shape
                and (value.device_mesh, value.placements)
                == (parameter.device_mesh, parameter.placements)
            ):
                raise UsageError(
                    f"{name} keeps state that is sharded otherwise than its parameter",
                    f"found: {key}, {tuple(value.shape)}, {value.placements}",
                    "Take an optimizer whose state has the shapes of the parameters.",
                )


def hidden_gradients(module: object) -> set[int]:
    """Return the ids of parameters whose gradients are accumulated where no state holds them.

    That is so between `set_requires_gradient_sync(False)`, or `set_requires_all_reduce(False)` with
    a mesh of two dimensions, and the next synchronisation.
    """
    found = set[int]()
    for group in _fsdp_groups(module):
        is_summed = getattr(group, "_partial_reduce_output", None) is not None
        for held in group.fsdp_params:
            if (
                is_summed
                or getattr(held, "unsharded_accumulated_grad", None) is not None
                or getattr(getattr(held, "_unsharded_param", None), "grad", None) is not None
            ):
                found.add(id(held.sharded_param))
    return found


def reshard(modules: Iterable[nn.Module]) -> None:
    """Have modules under `fully_shard` hold their parts alone, as before a forward pass.

    After one without a backward pass the outermost module still holds whole parameters.
    """
    for module in modules:
        for part in _fsdp_modules(module):
            part.reshard()


def _fsdp_groups(module: object) -> Iterator[Any]:
    """Yield what `fully_shard` keeps of the parameters. There is no public way to it."""
    for part in _fsdp_modules(module):
        held = part._get_fsdp_state()
        groups = getattr(held, "_fsdp_param_groups", [getattr(held, "_fsdp_param_group", None)])
        yield from filter(None, groups)


def _fsdp_modules(module: object) -> Iterator[Any]:
    inner, package = unwrap(module), sys.modules.get("torch.distributed.fsdp")
    if package is None or not package.FSDPModule.__subclasses__():  # one for each kind of module
        return
    if isinstance(inner, nn.Module):
        yield from (part for part in inner.modules() if isinstance(part, package.FSDPModule))


def layout_of(name: str, tensor: Any) -> Layout:
    """Return the layout of a sharded tensor.

    Raises:
        UsageError: It is not cut into boxes, a rank has no part of it, or its local tensor is not
            the part that the cutting rule gives; `name` is its path for the message.
    """
    key = tensor.device_mesh, tensor.placements, tensor.shape
    if (known := _layouts.get(key)) is None:
        layout = own_layout(name, tensor)
        everyone = range(torch.distributed.get_world_size())
        if lacking := [rank for rank in everyone if rank not in layout.ranks]:
            raise UsageError(
                f"{name} lies on a mesh without all ranks",
                f"found: ranks {list(layout.ranks)}, not {lacking}",
                "Every rank that trains must hold a part, or a copy, of what it tracks: shard it, "
                "or replicate it, along each dimension of the mesh.",
            )
        expected = layout.box(torch.distributed.get_rank(), tensor.shape).size
        known = _layouts[key] = layout, expected
    layout, expected = known
    if (found := tuple(tensor._local_tensor.shape)) != expected:
        raise UsageError(
            f"{name} is not cut as torch {torch.__version__} is expected to cut it",
            f"found: a part of shape {found} on this rank, expected: {expected}",
            "Take a version of PyTorch that is tested.",
        )
    return layout


def own_layout(name: str, tensor: Any) -> Layout:
    """Return the layout of a sharded tensor, on all ranks or some; errors as `spelled`."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh: Any = tensor.device_mesh
    dimensions, placements = tensor.ndim, list[Placement]()
    for number, placement in enumerate(tensor.placements):
        to_the_right = [
            mesh.size(other)
            for other, it in enumerate(tensor.placements[number + 1 :], number + 1)
            if isinstance(it, Shard | _StridedShard)
            and it.dim % dimensions == _dimension(placement, dimensions)
        ]
        placements.append(spelled(name, placement, dimensions, math.prod(to_the_right)))
    return _on_whole_mesh(mesh, placements)


def _on_whole_mesh(mesh: Any, placements: Sequence[Placement]) -> Layout:
    """Return a layout over all ranks.

    A tensor that `fully_shard` alone has sharded, beside tensor parallelism, lies on those ranks
    that average its gradient, and the other groups of ranks have copies.
    """
    own = tuple(mesh.mesh.flatten().tolist())
    if own not in _groups:
        return Layout(tuple(mesh.shape), own, tuple(placements))
    groups = list(dict.fromkeys(_groups))
    ranks = tuple(rank for group in groups for rank in group)
    if len(groups) == 1:
        return Layout(tuple(mesh.shape), own, tuple(placements))
    return Layout((len(groups), *mesh.shape), ranks, ((COPIES,), *placements))


def _dimension(placement: Any, dimensions: int) -> int:
    return int(placement.dim % dimensions) if hasattr(placement, "dim") else -1


def spelled(name: str, placement: Any, dimensions: int, parts: int) -> Placement:
    """Spell a placement as plain data; `parts` is into how many those to its right cut.

    Raises:
        UsageError: as `layout_of`.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

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
