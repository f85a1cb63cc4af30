"""Turn values into plain data on the CPU, with references to the tensors in them."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.parameter import is_lazy

import harness.state.kinds as kinds
from harness.distributed.dtensors import is_sharded
from harness.distributed.parts import TakenParts, take
from harness.errors import UsageError
from harness.state.kinds import PLAIN, Where
from harness.state.raw_bytes import raw

# The longest integer that is saved: the safe loader (`weights_only`) reads none much longer.
MOST_BITS = 2000

NUMBERS = (float, complex, np.inexact)  # those that may be NaN


class TensorRef(NamedTuple):
    """A captured tensor. The reference keeps its address from being reused for another tensor."""

    tensor: torch.Tensor
    source: torch.Tensor  # holds the bytes: the tensor itself, or a copy that nobody else holds
    # The tensor in the payload: the source, or unfilled CPU memory of its size if that is on a GPU.
    saved: torch.Tensor
    address: int  # of the memory of `saved`


class TensorRefs:
    """The captured tensors, in order and by memory location, and the kinds of non-plain values."""

    def __init__(self, parts: TakenParts | None = None) -> None:
        self.all: list[TensorRef] = []
        self.kinds: dict[str, str] = {}
        self.parts = parts  # of sharded tensors, by path; None where there may be none
        self._first: dict[int, TensorRef] = {}  # by address
        # Further tensors at an address where one was captured, by `_place`: other shapes or dtypes.
        self._others: dict[Any, TensorRef] = {}

    def find(self, address: int, tensor: torch.Tensor) -> TensorRef | None:
        """Return the captured tensor with the same memory, shape, strides and dtype, or None."""
        if (first := self._first.get(address)) is None or _is_like(first.tensor, tensor):
            return first
        return self._others.get(_place(tensor))

    def add(self, address: int, met: TensorRef) -> None:
        """Add a tensor at an address that `find` has not found."""
        self.all.append(met)
        if self._first.setdefault(address, met) is not met:
            self._others[_place(met.tensor)] = met


def _is_like(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors at the same address are the same view of it."""
    is_known = (  # a quick check, which is enough for most
        a.dtype is b.dtype
        and ((a.is_cpu and b.is_cpu) or (a.is_cuda and a.device == b.device))
        and not a.is_quantized
        and a.is_set_to(b)  # the same storage, offset, shape and strides
        and a.is_conj() == b.is_conj()
        and a.is_neg() == b.is_neg()
    )
    return a is b or is_known or _place(a) == _place(b)


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return the key that tells tensors of the same address apart."""
    return (
        tensor.data_ptr(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.device,
        tensor.is_conj(),
        tensor.is_neg(),
    )


def _tensor_to_cpu(tensor: torch.Tensor, seen: TensorRefs) -> torch.Tensor:
    """Return the tensor to save on the CPU: tied tensors stay tied, and a view is saved by itself.

    A view is copied without the rest of the storage that it belongs to. For a dense GPU tensor the
    result is CPU memory that is filled later.
    """
    if tensor.layout is not torch.strided:
        return tensor.to("cpu", copy=True)
    if (met := seen.find(address := tensor.data_ptr(), tensor)) is None:
        is_whole = (
            tensor.nbytes == tensor.untyped_storage().nbytes() and not tensor.storage_offset()
        )
        if is_whole and tensor.is_cpu:
            source = saved = tensor
        elif (
            tensor.is_cuda
            and (is_whole or tensor.is_contiguous())
            and not (tensor.is_conj() or tensor.is_neg())
        ):
            source, saved = tensor, _without_data(tensor)
        else:
            source = saved = tensor.to("cpu", copy=True).contiguous()
        met = TensorRef(tensor, source, saved, saved.data_ptr())
        seen.add(address, met)
    return met.saved


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    """Return a CPU tensor of the same dtype, shape and strides, in new memory without content.

    The memory is not touched, so it takes no physical memory until something is copied there.
    """
    memory = torch.UntypedStorage(tensor.nbytes, device="cpu")  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=tensor.dtype, device="cpu").set_(
        memory, 0, tensor.shape, tensor.stride()
    )


def fill(seen: TensorRefs, only: Collection[int] | None = None) -> None:
    """Copy GPU tensors into the CPU memory that stands for them; `only` to these addresses."""
    for met in seen.all:
        if met.saved is not met.source and (only is None or met.address in only):
            raw(met.saved).copy_(raw(met.source))


def to_cpu(value: Any, where: Where, seen: TensorRefs) -> Any:
    """Return a value as plain data on the CPU; add its tensors, and kinds that are not plain.

    CPU tensors are not copied, if they cover their storage. The result for a dense GPU tensor is
    memory that `fill` fills.

    Args:
        value: any value.
        where: its path, for messages and for `seen.kinds`.
        seen: the tensors that are captured so far, to which those of the value are added.

    Raises:
        UsageError: for what cannot be saved as plain data, named by its path.
    """
    if isinstance(value, torch.Tensor):
        if type(value) is torch.Tensor and not value.requires_grad:
            bare = value
        elif is_lazy(value):
            return value
        else:
            bare = value if is_sharded(value) else value.detach()
        if bare.is_meta:
            raise UsageError(
                f"{kinds.spelled(where)} is a tensor without data",
                f"found: one on the device meta, of shape {tuple(bare.shape)}",
                "Give it memory and values before run.track(…): "
                "module.to_empty(device=…), and its initialisation.",
            )
        if type(bare) is torch.Tensor and not bare.is_nested:
            return _tensor_to_cpu(bare, seen)
        if is_sharded(bare):
            return take(seen.parts, where, bare, lambda part: _tensor_to_cpu(part, seen))
        return _of_kind(bare, where, seen)
    if type(value) in PLAIN and not (type(value) is int and value.bit_length() > MOST_BITS):
        return value
    if isinstance(value, dict | Mapping):  # the check for dict is much faster
        return _mapping_to_cpu(value, where, seen)
    if isinstance(value, list | tuple):
        # A named tuple would come back as a tuple without names.
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            raise kinds.not_plain(where, value)
        if type(value) is torch.Size:
            seen.kinds[kinds.spelled(where)] = "torch.Size"
        parts = [to_cpu(item, (where, at), seen) for at, item in enumerate(value)]
        return tuple(parts) if isinstance(value, tuple) else parts
    return value if isinstance(value, kinds.NATIVE) else _of_kind(value, where, seen)


def _mapping_to_cpu(value: Mapping[Any, Any], where: Where, seen: TensorRefs) -> Any:
    if isinstance(value, defaultdict):
        return _of_kind(value, where, seen)
    items = {}
    for key, item in value.items():
        name = (
            key
            if type(key) is str or (type(key) is int and key.bit_length() <= MOST_BITS)
            else _key(key, where)
        )
        kind = type(item)
        if kind is torch.Tensor and item.is_cpu and not (item.requires_grad or item.is_nested):
            items[name] = _tensor_to_cpu(item, seen)  # most of them: two calls less
        else:
            items[name] = item if kind is float else to_cpu(item, (where, name), seen)
    if not isinstance(value, OrderedDict):
        return Counter(items) if isinstance(value, Counter) else items
    ordered = OrderedDict(items)
    # The versions of a module's submodules: without them the module treats the state as an old one.
    if hasattr(value, "_metadata"):
        ordered._metadata = value._metadata  # type: ignore[attr-defined]
    return ordered


def _of_kind(value: Any, where: Where, seen: TensorRefs) -> Any:
    """Return the plain data that replaces a value that is not plain; note its kind."""
    parts = kinds.taken_apart(value)
    if parts is None:
        raise kinds.not_plain(where, value)
    seen.kinds[kinds.spelled(where)] = parts[0]
    return to_cpu(parts[1], where, seen)


def _key(key: Any, where: Where) -> Any:
    if isinstance(key, tuple):
        return tuple(_key(part, where) for part in key)
    return (
        key
        if type(key) is torch.dtype
        else to_cpu(key, f"{kinds.spelled(where)}, key {key!r}", TensorRefs())
    )


def put_into(held: Any, new: Any, filled: dict[int, Any] | None = None) -> Any:
    """Put a nested value into the containers and tensors of another one, as far as they match.

    Other variables may refer to the same containers and tensors: they see the new values.

    Args:
        held: the value whose containers and tensors are filled.
        new: the value that they get.
        filled: what was filled already, by identity; for nested calls.

    Returns:
        `held`, or `new` where the two do not match.
    """
    filled = {} if filled is None else filled
    if id(held) in filled:  # held twice: it can be filled with one value only
        return held if is_same(filled[id(held)], new) else new
    if type(held) is type(new) is tuple and len(held) == len(new):
        return tuple(put_into(*pair, filled) for pair in zip(held, new, strict=True))
    if not (_is_container(held) and type(held) is type(new)) and not _takes(held, new):
        return new
    filled[id(held)] = new
    if isinstance(held, dict):
        by_key = {
            key: put_into(held[key], item, filled) if key in held else item
            for key, item in new.items()
        }
        held.clear()
        held.update(by_key)
    elif isinstance(held, list | deque):
        items = [put_into(*pair, filled) for pair in zip(held, new, strict=False)]
        items += list(new)[len(held) :]
        held.clear()
        held.extend(items)
    elif held is not new:
        with torch.no_grad():
            held.copy_(new) if isinstance(held, torch.Tensor) else np.copyto(held, new)
    return held


def _is_container(value: Any) -> bool:
    return isinstance(value, dict | list | deque)


@contextlib.contextmanager
def in_place(obj: Any) -> Iterator[None]:
    """Keep the groups and the state of an optimizer the same objects when the block loads it.

    What refers to them, or to their tensors, then sees the restored values: a schedule that holds
    `optimizer.param_groups`, or a wrapper around the optimizer. The same is done for optimizers
    that are attributes of the object.
    """
    parts = (obj, *getattr(obj, "__dict__", {}).values())
    optimizers = [part for part in parts if isinstance(part, torch.optim.Optimizer)]
    before = [
        (own, key, own[key])
        for own in map(vars, optimizers)
        for key in ("state", "param_groups")
        if key in own
    ]

    def put() -> None:
        for own, key, held in before:
            if own[key] is not held:
                own[key] = put_into(held, placed(own[key], held, {}))

    def set_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        type(optimizer).__setstate__(optimizer, state)
        put()

    # Hooks, and an own `load_state_dict`, that go on after torch's already see the kept objects.
    for optimizer in optimizers:
        vars(optimizer)["__setstate__"] = functools.partial(set_state, optimizer)
    try:
        yield
    finally:
        for optimizer in optimizers:
            vars(optimizer).pop("__setstate__", None)
    put()


def placed(saved: Any, present: Any, moved: dict[int, torch.Tensor]) -> Any:
    """Move the tensors of a saved state to the devices of those in the present one, in place.

    Args:
        saved: the saved state or a part of it, a copy.
        present: the object's own state dict, or the part of it in the same place.
        moved: the tensors that were moved already, by the id of the saved one: shared ones stay so.
    """
    if isinstance(saved, torch.Tensor) and isinstance(present, torch.Tensor):
        if saved.device != present.device:
            return moved.setdefault(id(saved), saved.to(present.device))
    elif isinstance(saved, dict) and isinstance(present, Mapping):
        saved.update(
            {key: placed(saved[key], present[key], moved) for key in saved if key in present}
        )
    elif isinstance(saved, list) and isinstance(present, list | tuple):
        items = [placed(mine, its, moved) for mine, its in zip(saved, present, strict=False)]
        saved[: len(items)] = items
    elif type(saved) is tuple and isinstance(present, list | tuple) and len(saved) == len(present):
        return tuple(placed(mine, its, moved) for mine, its in zip(saved, present, strict=True))
    return saved


def is_same(a: Any, b: Any) -> bool:
    """Return whether two pieces of plain data have the same types, order of keys and values.

    Tensors are the same if device, dtype, shape and numbers are equal. Numbers are compared by
    value: -0.0 equals 0.0. A NaN is the same as another, but two separate tensors with NaNs differ.
    """
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (a.device, a.dtype) == (b.device, b.dtype) and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple | deque) and isinstance(b, list | tuple | deque):
        return type(a) is type(b) and len(a) == len(b) and all(map(is_same, a, b))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if a is b or type(a) is not type(b):
        return a is b
    return bool(a == b) or (isinstance(a, NUMBERS) and a != a and repr(a) == repr(b))


def _takes(held: Any, new: Any) -> bool:
    """Return whether a tensor or an array can be overwritten with the other one."""
    if type(held) is not type(new) or not isinstance(held, torch.Tensor | np.ndarray):
        return False
    if (held.shape, held.dtype) != (new.shape, new.dtype):
        return False
    if isinstance(held, np.ndarray):
        return held.flags.writeable
    return type(held) is torch.Tensor and all(
        tensor.layout is torch.strided and not tensor.is_inference() and 0 not in tensor.stride()
        for tensor in (held, new)
    )
