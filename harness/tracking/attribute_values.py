"""Read, compare and set the attributes of one module or optimizer."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from harness.data.quantized import scale_of
from harness.distributed import wrappers
from harness.state.kinds import PLAIN
from harness.untracked.object_walk import OF_MODULES, OF_OPTIMIZERS

BARE = OF_MODULES - {"training"}


MOST_ITEMS = 1000  # a longer list, tuple or dict does not count as plain

# One that was no longer than that as built, or was not there, is kept up to this number of items.
MOST_KEPT = 100_000

IS_PLAIN = frozenset(PLAIN)


# A CPU tensor of up to this size is compared by value, any other tensor by identity and version.
COMPARED_BYTES = 64 << 10


SAMPLE = 8192  # the digest of a larger tensor covers at least this many of its elements


REQUIRES_GRAD, BUFFER = ".requires_grad", "buffer "


ABSENT = object()


# A tensor and its version counter; None if there is no tensor.
Place = tuple[weakref.ref[torch.Tensor], int] | None


Values = dict[str, Any]  # of one module, by attribute; a digest stands for a tensor


Part = nn.Module | torch.optim.Optimizer


Classes = dict[str, type]  # of the parts of one object, by their paths


def is_torchs(obj: Any) -> bool:
    """Return whether the object's class is one of torch's own."""
    return type(obj).__module__.partition(".")[0] == "torch"


def class_of(part: Part) -> type:
    """Return the class of a part; of a lazy module, the one that it has after its first use."""
    return getattr(type(part), "cls_to_become", None) or type(part)


def replaced_parts(name: str, built: Classes, now: Classes) -> dict[str, str]:
    """Say of each part whose class is not as built what it was and is, by its path.

    What lies inside such a part is left out.
    """
    differing = {path for path in built.keys() | now.keys() if built.get(path) is not now.get(path)}
    said = {}
    for path in differing:
        steps = path.split(".")
        if differing.isdisjoint(".".join(steps[:n]) for n in range(len(steps))):
            was, is_now = (
                classes[path].__name__ if path in classes else "nothing" for classes in (built, now)
            )
            said[joined(name, path)] = f"was built as {was} and is {is_now} now"
    return said


def parts(obj: Any) -> list[tuple[str, Any]]:
    """List a module's parts with their paths, the module itself first.

    An optimizer is its own only part, with an empty path; an optimizer of one of torch's classes
    has none. Wrappers (DDP, torch.compile) are removed.
    """
    if isinstance(inner := wrappers.unwrap(obj), torch.optim.Optimizer):
        return [] if is_torchs(inner) else [("", inner)]
    return list(wrappers.submodules(obj))


def own_dict(part: Part, name: str) -> dict[str, Any]:
    """Return a module's `_parameters`, `_buffers` or the like; an empty dict for an optimizer."""
    return getattr(part, name) if isinstance(part, nn.Module) else {}


def values_of(part: Part, odd: Collection[str] | None = None) -> Values:
    """Return all plain attributes, copied, and the `requires_grad` of each own parameter.

    `odd` names those that were not plain as built; None if it is being built.
    """
    own = {
        key: plain_copy(value)
        for key, value in vars(part).items()
        if is_looked_at(part, key) and is_kept(value, odd is not None and key not in odd)
    }
    return own | {
        f"{key}{REQUIRES_GRAD}": parameter.requires_grad
        for key, parameter in own_dict(part, "_parameters").items()
        if parameter is not None
    }


def is_looked_at(part: Part, key: str) -> bool:
    """Return whether an attribute may be the program's, not the bookkeeping of a torch class."""
    return key not in bookkeeping_of(part) and not (key.startswith("_") and is_torchs(part))


def bookkeeping_of(part: Part) -> frozenset[str]:
    """Return the names of the attributes that torch itself gives to a module or an optimizer."""
    return BARE if isinstance(part, nn.Module) else OF_OPTIMIZERS


def tensors_of(part: Part) -> dict[str, torch.Tensor | None]:
    """Return the non-persistent buffers and the tensors that are plain attributes.

    A buffer may be None. Only plain strided tensors with data and without `requires_grad` are
    included.
    """
    tensors = {
        key: value
        for key, value in vars(part).items()
        if issubclass(type(value), torch.Tensor) and is_looked_at(part, key)
    }
    buffers = {
        f"{BUFFER}{key}": own_dict(part, "_buffers").get(key)
        for key in sorted(own_dict(part, "_non_persistent_buffers_set"))
    }
    return {
        key: value
        for key, value in (tensors | buffers).items()
        if value is None or is_simple(value)
    }


def current_value(part: Part, key: str) -> Any:
    """Return the value of an attribute or buffer, of whatever kind, or None if it is gone."""
    if key.startswith(BUFFER):
        return own_dict(part, "_buffers").get(key.removeprefix(BUFFER))
    return vars(part).get(key)


def tensor_of(part: Part, key: str) -> torch.Tensor | None:
    """Return the tensor of an attribute or buffer, or None if it is not a simple tensor."""
    value = current_value(part, key)
    return value if value is not None and is_simple(value) else None


def is_small(value: Any) -> bool:
    """Return whether to keep a tensor that became an attribute after the start of the loop.

    A larger tensor is more often a cache than state. It is not kept, and a change is reported.
    """
    return is_simple(value) and value.nbytes <= COMPARED_BYTES


def home_device(part: Part, otherwise: torch.Tensor) -> torch.device:
    """Where a module's parameters are, or those that an optimizer updates."""
    return next(
        part.parameters() if isinstance(part, nn.Module) else iter(_updated(part)), otherwise
    ).device


def is_simple(tensor: Any) -> bool:
    """Return whether this is a plain strided tensor with data that requires no gradient."""
    return (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and not tensor.requires_grad
        and not tensor.is_meta
    )


def place_of(tensor: torch.Tensor | None) -> Place:
    """Return a weak reference to a tensor and its version counter; None for None."""
    return (
        None
        if tensor is None
        else (weakref.ref(tensor), 0 if tensor.is_inference() else tensor._version)
    )


def is_at(place: Place, tensor: torch.Tensor | None) -> bool:
    """Return whether this is the same tensor with an unchanged version counter."""
    if place is None or tensor is None:
        return place is None and tensor is None
    return place[0]() is tensor and place[1] == (0 if tensor.is_inference() else tensor._version)


def small_copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Copy a small CPU tensor for a comparison by value; return None for any other."""
    is_small = tensor is not None and tensor.is_cpu and tensor.nbytes <= COMPARED_BYTES
    return tensor.detach().clone() if tensor is not None and is_small else None


def digest_of(tensor: torch.Tensor | None) -> str:
    """Return a digest of a tensor's shape, dtype and values; a large tensor is sampled."""
    if tensor is None:
        return "none"
    flat = tensor.detach().reshape(-1)
    some = flat[:: max(1, len(flat) // SAMPLE)].cpu().contiguous()
    values = hashlib.blake2b(
        some.view(torch.uint8).numpy().tobytes() if len(some) else b"", digest_size=8
    ).hexdigest()
    scale = "".join(f" {part}" for part in scale_of(tensor))
    return f"{'x'.join(map(str, tensor.shape)) or 'scalar'} {tensor.dtype}{scale} {values}"


def is_plain(value: Any, most: int = MOST_ITEMS) -> bool:
    """Return whether this is a number, a string, None, or a small container of such values."""
    if type(value) in IS_PLAIN:
        return True
    if type(value) not in (list, tuple, dict) or len(value) > most:
        return False
    return (type(value) is not dict or IS_PLAIN.issuperset(map(type, value))) and all(
        is_plain(item, most) for item in _containers_in(value)
    )


def is_kept(value: Any, may_be_long: bool) -> bool:
    """Return whether a plain value is kept; one that was small may grow to `MOST_KEPT` items."""
    if is_plain(value):
        return True
    if not (may_be_long and _is_container(value) and len(value) <= MOST_KEPT):
        return False
    if type(value) is dict and not IS_PLAIN.issuperset(map(type, value)):
        return False
    inside = _containers_in(value)
    return not inside or (
        all(is_plain(item, MOST_KEPT) for item in inside) and _count(value) <= MOST_KEPT
    )


def _count(value: Any) -> int:
    """Return the number of items in a plain container and in those inside it."""
    return len(value) + sum(map(_count, filter(_is_container, _containers_in(value))))


def _is_container(value: Any) -> bool:
    return type(value) in (list, tuple, dict)


def _items(value: Any) -> Any:
    return value.values() if type(value) is dict else value


def _containers_in(value: Any) -> list[Any]:
    """List the items that are no numbers, strings and the like."""
    items = _items(value)
    if IS_PLAIN.issuperset(map(type, items)):  # a quick answer for long lists of numbers
        return []
    return [item for item in items if type(item) not in IS_PLAIN]


def plain_copy(value: Any) -> Any:
    """Return a copy of a plain value; faster than `copy.deepcopy`."""
    if not _is_container(value):
        return value
    if not _containers_in(value):
        return type(value)(value)
    if type(value) is dict:
        return {key: plain_copy(item) for key, item in value.items()}
    return type(value)(map(plain_copy, value))


def is_mutable(value: Any) -> bool:
    """Return whether this plain value can change in place."""
    return type(value) in (list, dict) or (type(value) is tuple and any(map(is_mutable, value)))


def containers_of(value: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """Return the dicts and lists that a plain value consists of, itself included, by their paths.

    A tuple is searched and is not in the result.
    """
    if not _is_container(value):
        return {}
    if not _containers_in(value):
        return {} if type(value) is tuple else {path: value}
    items = value.items() if type(value) is dict else enumerate(value)
    inner = [containers_of(item, (*path, key)) for key, item in items]
    own = {} if type(value) is tuple else {path: value}
    return own | {at: container for part in inner for at, container in part.items()}


def set_value(
    part: Part, key: str, now: Any, kept: Mapping[str, Any], made: dict[Any, torch.Tensor]
) -> None:
    """Set one attribute, buffer or `requires_grad`.

    It is copied into a tensor of the same shape, unless that had been replaced by another one.

    Args:
        part: the module or optimizer.
        key: the attribute, `buffer NAME` or `NAME.requires_grad`.
        now: the value; a tensor is copied. ABSENT to delete the attribute.
        kept: the entry of a checkpoint, which holds the device of a tensor that is not where the
            module is, and whether it is another one than that as built (`replaced`).
        made: the new tensors by `memory_of` the value: those that shared memory do so again.
    """
    if key.endswith(REQUIRES_GRAD) and isinstance(
        parameter := own_dict(part, "_parameters").get(key.removesuffix(REQUIRES_GRAD)),
        nn.Parameter,
    ):
        parameter.requires_grad_(now)
    elif now is ABSENT and not key.startswith(BUFFER):
        delattr(part, key)
    elif not isinstance(now, torch.Tensor):
        if key.startswith(BUFFER):
            own_dict(part, "_buffers")[key.removeprefix(BUFFER)] = None
            return
        setattr(part, key, now)
    else:
        before = tensor_of(part, key)
        own = now.to(
            kept.get("device") or (before.device if before is not None else home_device(part, now)),
            copy=True,
        )
        is_like = before is not None and (before.shape, before.dtype) == (own.shape, own.dtype)
        if before is not None and is_like and "replaced" not in kept:
            with torch.no_grad():
                before.copy_(own)
            return
        own = made.setdefault((memory_of(now), own.device), own)
        if key.startswith(BUFFER):
            own_dict(part, "_buffers")[key.removeprefix(BUFFER)] = own
        else:
            setattr(part, key, own)


def memory_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return what two tensors have in common that are the same view of one memory."""
    return tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride(), tensor.dtype


def _updated(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """List the parameters that an optimizer updates."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def spelled(value: Any) -> str:
    """Return a value in at most 60 characters, for messages."""
    text = (
        "nothing"
        if value is ABSENT
        else f"a tensor {tuple(value.shape)}"
        if isinstance(value, torch.Tensor)
        else repr(value)
    )
    return text if len(text) <= 60 else f"{text[:57]}..."


def joined(*names: str) -> str:
    """Join the names that are not empty with dots."""
    return ".".join(filter(None, names))


def add_outer_modes(tracked: Mapping[str, Any], changed: Mapping[str, Any]) -> None:
    """Add `outside` to each changed mode: the modes of the wrappers around, if one differs.

    Args:
        tracked: the objects by name.
        changed: the changed attributes, by object name, module path and attribute.
    """
    for name, of_parts in changed.items():
        if any("training" in entries for entries in of_parts.values()):
            around = wrappers.shells(tracked[name])
            for path, part in wrappers.submodules(tracked[name]):
                entry = of_parts.get(path, {}).get("training", {})
                modes = [shell.training for shell in around.get(id(part), ())]
                if entry and any(mode is not entry.get("now") for mode in modes):
                    entry["outside"] = modes


def set_outer_modes(tracked: Mapping[str, Any], changed: Mapping[str, Any]) -> None:
    """Set the modes of the wrappers around the modules whose mode was set.

    Args:
        tracked: the objects by name.
        changed: the attributes that were set, by object name, module path and attribute.
    """
    for name, of_parts in changed.items():
        if any("training" in entries for entries in of_parts.values()):
            around = wrappers.shells(tracked.get(name))
            for path, part in wrappers.submodules(tracked.get(name)):
                entry = of_parts.get(path, {}).get("training", {})
                if not entry or part.training is not entry.get("now"):
                    continue
                outer, modes = around.get(id(part), []), entry.get("outside", ())
                modes = modes if len(modes) == len(outer) else [part.training] * len(outer)
                for shell, mode in zip(outer, modes, strict=True):
                    shell.training = mode
