"""Take state: what is captured, as plain data, and when it may change again."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

import harness.state.kinds as kinds
import harness.state.parameter_names as parameter_names
from harness.distributed.ddp import plain
from harness.errors import NonFiniteError, UsageError
from harness.state.kinds import PLAIN, Where

MOST_BITS = 2000  # of a number; the safe loader reads none that is much longer
HOOK = "register_step_pre_hook"  # who has it, as every optimizer of PyTorch's, changes in its own step and at no other time
COPIES = ("gradients", "attributes")  # of the values: nobody else knows of their tensors


class TensorRef(NamedTuple):
    """A tensor that was met, which is kept so that its address is not given to another one."""

    tensor: torch.Tensor
    source: torch.Tensor  # where its bytes are: itself, or a copy that nobody else knows of
    saved: torch.Tensor  # what is saved of it: the source, or, if that is on a GPU, memory of its size without anything in it


class TensorRefs:
    """What was met, in that order and by where it lies; and by its path the kind of what is not plain."""

    def __init__(self) -> None:
        self.all: list[TensorRef] = []
        self.kinds: dict[str, str] = {}
        self._first: dict[int, TensorRef] = {}  # by address
        self._others: dict[Any, TensorRef] = {}  # what looks in another way into memory in which one was met

    def find(self, tensor: torch.Tensor) -> TensorRef | None:
        """What was met of this very memory, seen in the same way."""
        first = self._first.get(tensor.data_ptr())
        return first if first is None or _is_like(first.tensor, tensor) else self._others.get(_place(tensor))

    def add(self, met: TensorRef) -> None:
        """Note one that was not found."""
        self.all.append(met)
        if self._first.setdefault(met.tensor.data_ptr(), met) is not met:
            self._others[_place(met.tensor)] = met


@dataclass(frozen=True)
class Captured:
    """A whole checkpoint as plain data on the CPU, most of it still the live memory."""

    payload: dict[str, Any]
    steady: set[int]  # addresses of what does not change before the next update
    parameters: dict[int, tuple[str, torch.dtype]]  # by address: what has to be finite
    tracked: Mapping[str, Any]
    seen: TensorRefs = field(default_factory=TensorRefs)

    def elsewhere(self) -> dict[int, torch.Tensor]:
        """By the address of memory without anything in it: the tensor on a GPU whose bytes belong there."""
        return {met.saved.data_ptr(): met.source for met in self.seen.all if met.saved is not met.source}

    def fill(self) -> dict[str, Any]:
        """The payload with nothing left out of it."""
        _fill(self.seen)
        return self.payload


def captured(values: Mapping[str, Any], tracked: Mapping[str, Any]) -> Captured:
    """The values, which must be plain data, and the state of every tracked object. Raises UsageError, NonFiniteError as `parameters`.

    Steady are parameters; what optimizers keep of them, and all else that tells of its updates; and copies, which nobody else knows of.
    """
    seen = TensorRefs()
    payload = _plain_values(values, seen)
    steady = {tensor.data_ptr() for tensor in _tensors([payload.get(name) for name in COPIES])}
    for name, thing in tracked.items():
        before = len(seen.all)
        payload |= _capture({name: thing}, seen)
        if hasattr(plain(thing), HOOK):
            steady |= {met.saved.data_ptr() for met in seen.all[before:]}
    named = parameters(tracked, seen)
    payload |= _beside(tracked, payload, seen)
    steady |= named.keys() | {met.saved.data_ptr() for met in seen.all if met.source is not met.tensor}
    return Captured(payload, steady, named, tracked, seen)


def as_captured(name: str, value: Any) -> Captured:
    """One value as plain data; what is on a GPU stays there until it is filled. Raises UsageError."""
    seen = TensorRefs()
    return Captured({name: _to_cpu(value, name, seen)}, set(), {}, {}, seen)


def captured_one(name: str, thing: Any) -> Captured:
    """The state of one tracked object, as `as_captured`."""
    seen = TensorRefs()
    return Captured(_capture({name: thing}, seen), set(), {}, {name: thing}, seen)


def capture(tracked: Mapping[str, Any]) -> dict[str, Any]:
    """The state of every tracked object under `NAME_state_dict`, on the CPU, and what stands beside it: `names`, `kinds`.

    CPU tensors are not copied: write them out, or copy them, before the next update. Raises UsageError for state that is not plain
    data.
    """
    seen = TensorRefs()
    payload = _capture(tracked, seen)
    _fill(seen)
    return payload | _beside(tracked, payload, seen)


def _capture(tracked: Mapping[str, Any], seen: TensorRefs) -> dict[str, Any]:
    return {f"{name}_state_dict": _to_cpu(state_of(thing), f"{name}_state_dict", seen) for name, thing in tracked.items()}


def _plain_values(values: Mapping[str, Any], seen: TensorRefs) -> dict[str, Any]:
    """The values as plain data; of the user's own the kinds are kept, and must be known."""
    kinds.check_values(values.get("state"), "state")
    own = TensorRefs()
    payload = {name: _to_cpu(value, name, own) for name, value in values.items()}
    _fill(own)
    seen.kinds |= {path: kind for path, kind in own.kinds.items() if path.startswith("state[")}
    return payload


def _beside(tracked: Mapping[str, Any], payload: Mapping[str, Any], seen: TensorRefs) -> dict[str, Any]:
    """What stands beside the state of tracked objects, if there is anything to say: names of parameters, and kinds."""
    names = parameter_names.needed(tracked, payload)
    return ({"names": names} if names else {}) | ({"kinds": dict(seen.kinds)} if seen.kinds else {})


def state_of(thing: Any) -> Any:
    """The state of a tracked object, without the names of the shells around it or around parts of it."""
    inner = plain(thing)
    return parameter_names.without_shells(inner, inner.state_dict()) if isinstance(inner, nn.Module) else inner.state_dict()


def check_user_state(values: Mapping[str, Any]) -> None:
    """Raises UsageError for a value of the user's (`run.state`) that a checkpoint could not give back as what it is."""
    kinds.check_values(values, "state")


def check_finite(tracked: Mapping[str, Any]) -> None:
    """Raises NonFiniteError for parameters that are not finite; buffers may hold -inf masks."""
    broken = [f"{name}.{key}" for name, key, parameter in _parameters(tracked) if not is_finite(parameter.detach())]
    if broken:
        raise not_finite(broken)


def parameters(tracked: Mapping[str, Any], seen: TensorRefs) -> dict[int, tuple[str, torch.dtype]]:
    """The address of each parameter's captured memory, with its name and type: for who checks there, later, that it is finite.

    Raises NonFiniteError for a parameter that was not captured under its own shape, and is not finite now.
    """
    found, elsewhere = {}, []
    for name, key, parameter in _parameters(tracked):
        if (met := seen.find(parameter)) is not None:
            found[met.saved.data_ptr()] = f"{name}.{key}", parameter.dtype
        elif not is_finite(parameter.detach()):
            elsewhere.append(f"{name}.{key}")
    if elsewhere:
        raise not_finite(elsewhere)
    return found


def _is_like(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors that begin at the same address are the same."""
    return a is b or _place(a) == _place(b)


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """By what a tensor is found again among others of the same address."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.is_conj(), tensor.is_neg()


def not_finite(names: list[str]) -> NonFiniteError:
    """What to say of parameters that are not finite."""
    return NonFiniteError(
        "nothing is saved: parameters are not finite",
        f"found: NaN or Inf in {', '.join(names[:5])}{' …' if len(names) > 5 else ''}",
        "The newest checkpoint is from before. Lower the learning rate, clip gradients (train.clip_norm), or check the data.",
    )


def _parameters(tracked: Mapping[str, Any]) -> Iterator[tuple[str, str, torch.Tensor]]:
    for name, thing in tracked.items():
        inner = plain(thing)
        for key, parameter in inner.named_parameters() if isinstance(inner, nn.Module) else ():
            if not is_lazy(parameter):
                yield from ((name, key, part) for part in kinds.parts_of(parameter))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether there is neither NaN nor Inf in it: one pass for the least and the greatest tells, at a thirtieth of `isfinite`'s cost."""
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor.float() if tensor.itemsize == 1 else tensor
    return bool(torch.isfinite(torch.stack(torch.aminmax(numbers))).all())


def before_update(tracked: Mapping[str, Any], call: Callable[[], None]) -> None:
    """Have `call` called before each update."""
    for thing in map(plain, tracked.values()):
        if hasattr(thing, HOOK):
            getattr(thing, HOOK)(lambda *_: call())


def _to_cpu(value: Any, where: Where, seen: TensorRefs) -> Any:
    if isinstance(value, torch.Tensor):
        if type(value) is torch.Tensor and not value.requires_grad:
            bare = value
        elif is_lazy(value):
            return value
        else:
            bare = value.detach()
        if bare.is_meta:
            raise UsageError(
                f"{kinds.spelled(where)} is a tensor without data", f"found: one on the device meta, of shape {tuple(bare.shape)}",
                "Give it memory and values before run.track(…): module.to_empty(device=…), and its initialisation.",
            )  # fmt: skip
        if type(bare) is torch.Tensor and not bare.is_nested:
            return _tensor_to_cpu(bare, seen)
        return _of_kind(bare, where, seen)
    if type(value) in PLAIN and not (type(value) is int and value.bit_length() > MOST_BITS):
        return value
    if isinstance(value, dict | Mapping):  # the former is asked much faster
        return _mapping_to_cpu(value, where, seen)
    if isinstance(value, list | tuple):
        if isinstance(value, tuple) and hasattr(value, "_fields"):  # it would come back as a tuple without names
            raise kinds.not_plain(where, value)
        if type(value) is torch.Size:
            seen.kinds[kinds.spelled(where)] = "torch.Size"
        parts = [_to_cpu(item, (where, at), seen) for at, item in enumerate(value)]
        return tuple(parts) if isinstance(value, tuple) else parts
    return value if isinstance(value, kinds.NATIVE) else _of_kind(value, where, seen)


def _mapping_to_cpu(value: Mapping[Any, Any], where: Where, seen: TensorRefs) -> Any:
    if isinstance(value, defaultdict):
        return _of_kind(value, where, seen)
    items = {}
    for key, item in value.items():
        name = key if type(key) is str or (type(key) is int and key.bit_length() <= MOST_BITS) else _key(key, where)
        items[name] = item if type(item) is float else _to_cpu(item, (where, name), seen)
    if not isinstance(value, OrderedDict):
        return Counter(items) if isinstance(value, Counter) else items
    ordered = OrderedDict(items)
    if hasattr(value, "_metadata"):  # the versions of a module's parts: without them it takes the state for an old one
        ordered._metadata = value._metadata  # type: ignore[attr-defined]
    return ordered


def _of_kind(value: Any, where: Where, seen: TensorRefs) -> Any:
    """What is written in the place of a value that is not plain; its kind is noted."""
    found = kinds.taken_apart(value)
    if found is None:
        raise kinds.not_plain(where, value)
    seen.kinds[kinds.spelled(where)] = found[0]
    return _to_cpu(found[1], where, seen)


def _key(key: Any, where: Where) -> Any:
    if isinstance(key, tuple):
        return tuple(_key(part, where) for part in key)
    return key if type(key) is torch.dtype else _to_cpu(key, f"{kinds.spelled(where)}, key {key!r}", TensorRefs())


def _tensor_to_cpu(tensor: torch.Tensor, seen: TensorRefs) -> torch.Tensor:
    """Tied tensors stay tied; a view does not drag the whole storage that it looks into along."""
    if tensor.layout is not torch.strided:
        return tensor.to("cpu", copy=True)
    if (met := seen.find(tensor)) is None:
        is_whole = tensor.nbytes == tensor.untyped_storage().nbytes() and not tensor.storage_offset()
        if tensor.is_cuda and (is_whole or tensor.is_contiguous()) and not (tensor.is_conj() or tensor.is_neg()):
            met = TensorRef(tensor, tensor, _without_data(tensor))
        else:
            saved = tensor if is_whole and tensor.is_cpu else tensor.to("cpu", copy=True).contiguous()
            met = TensorRef(tensor, saved, saved)
        seen.add(met)
    return met.saved


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    """One like it on the CPU, in memory of its own that is not used, and so takes no room, until something is copied there."""
    memory = torch.UntypedStorage(tensor.nbytes, device="cpu")  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=tensor.dtype, device="cpu").set_(memory, 0, tensor.shape, tensor.stride())


def _fill(seen: TensorRefs) -> None:
    for met in seen.all:
        if met.saved is not met.source:
            raw(met.saved).copy_(raw(met.source))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor that is contiguous, or all of its memory, in the order in which they lie there."""
    at_bytes = tensor.storage_offset() * tensor.itemsize
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage(), at_bytes, (tensor.nbytes,), (1,))


def plain_data(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with NumPy scalars turned into numbers. Raises UsageError naming what is not plain data."""
    return _plain_values(values, TensorRefs())


def check(tracked: Mapping[str, Any]) -> None:
    """Raises UsageError, at the start and not at the first save, for state that cannot be saved or would be left behind."""
    for name, thing in tracked.items():
        _to_cpu(state_of(thing), f"{name}_state_dict", TensorRefs())
    _check_covered(tracked)


def _check_covered(tracked: Mapping[str, Any]) -> None:
    """Raises UsageError if an optimizer updates parameters that no tracked object holds: they would start anew at each resume."""
    things = {name: plain(thing) for name, thing in tracked.items()}
    held: set[int] = set()
    for thing in things.values():
        if not isinstance(thing, torch.optim.Optimizer):
            held |= {tensor.data_ptr() for tensor in _tensors(thing.state_dict())}
    for name, thing in things.items():
        if isinstance(thing, torch.optim.Optimizer):
            groups = [p for group in thing.param_groups for p in group["params"] if not is_lazy(p) and p.numel()]
            lost = [tuple(p.shape) for p in groups if not {part.data_ptr() for part in kinds.parts_of(p)} <= held]
            if lost:
                raise UsageError(
                    f"{name} updates {len(lost)} parameter(s) that belong to nothing tracked: they would be lost at a restart",
                    f"found: shapes {', '.join(map(str, lost[:5]))}",
                    "Track the module that holds them too.",
                )


def size_bytes(tracked: Mapping[str, Any]) -> int:
    """How much memory a copy of the tensors of every tracked object takes."""
    sizes = {tensor.data_ptr(): tensor.nbytes for thing in tracked.values() for tensor in _tensors(plain(thing).state_dict())}
    return sum(sizes.values())


def _tensors(value: Any, found: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    found = [] if found is None else found
    if isinstance(value, torch.Tensor):
        if not is_lazy(value):
            found += [part for part in kinds.parts_of(value) if part.layout is torch.strided]
    elif isinstance(value, dict | Mapping | list | tuple):
        for item in value.values() if isinstance(value, dict | Mapping) else value:
            _tensors(item, found)
    return found
