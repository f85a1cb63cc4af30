"""Take state: what is captured, as plain data, and when it may change again."""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import register_optimizer_step_pre_hook

from harness.ddp import plain
from harness.errors import NonFiniteError, UsageError

Where = str | tuple[Any, Any]  # a name, or where something is and its key or number in there
MOST_BITS = 2000  # of a number; the safe loader reads none that is much longer
HOOK = "register_step_pre_hook"  # who has it, as every optimizer of PyTorch's, changes in its own step and at no other time
PLAIN = (bool, int, float, complex, str, bytes, type(None))


class Met(NamedTuple):
    """A tensor that was met, which is kept so that its address is not given to another one."""

    tensor: torch.Tensor
    source: torch.Tensor  # where its bytes are: itself, or a copy that nobody else knows of
    saved: torch.Tensor  # what is saved of it: the source, or, if that is on a GPU, memory of its size without anything in it


Seen = dict[Any, Met]  # by where they lie


@dataclass(frozen=True)
class Captured:
    """A whole checkpoint as plain data on the CPU, most of it still the live memory."""

    payload: dict[str, Any]
    steady: set[int]  # addresses of what does not change before the next update
    parameters: dict[int, tuple[str, torch.dtype]]  # by address: what has to be finite
    tracked: Mapping[str, Any]
    seen: Seen = field(default_factory=dict)

    def elsewhere(self) -> dict[int, torch.Tensor]:
        """By the address of memory without anything in it: the tensor on a GPU whose bytes belong there."""
        return {met.saved.data_ptr(): met.source for met in self.seen.values() if met.saved is not met.source}

    def fill(self) -> dict[str, Any]:
        """The payload with nothing left out of it."""
        _fill(self.seen)
        return self.payload


def captured(values: Mapping[str, Any], tracked: Mapping[str, Any]) -> Captured:
    """The values, which must be plain data, and the state of every tracked object. Raises UsageError, NonFiniteError as `parameters`.

    Steady are parameters; what optimizers keep of them, and all else that tells of its updates; and copies, which nobody else knows of.
    """
    seen: Seen = {}
    payload, steady = plain_data(values), set[int]()
    for name, thing in tracked.items():
        before = len(seen)
        payload |= _capture({name: thing}, seen)
        if hasattr(plain(thing), HOOK):
            steady |= {met.saved.data_ptr() for met in itertools.islice(seen.values(), before, None)}
    named = parameters(tracked, seen)
    steady |= named.keys() | {met.saved.data_ptr() for met in seen.values() if met.source is not met.tensor}
    return Captured(payload, steady, named, tracked, seen)


def as_captured(name: str, value: Any) -> Captured:
    """One value as plain data; what is on a GPU stays there until it is filled. Raises UsageError."""
    seen: Seen = {}
    return Captured({name: _to_cpu(value, name, seen)}, set(), {}, {}, seen)


def captured_one(name: str, thing: Any) -> Captured:
    """The state of one tracked object, as `as_captured`."""
    seen: Seen = {}
    return Captured(_capture({name: thing}, seen), set(), {}, {name: thing}, seen)


def capture(tracked: Mapping[str, Any]) -> dict[str, Any]:
    """The state of every tracked object under `NAME_state_dict`, on the CPU.

    CPU tensors are not copied: write them out, or copy them, before the next update. Raises UsageError for state that is not plain
    data.
    """
    seen: Seen = {}
    payload = _capture(tracked, seen)
    _fill(seen)
    return payload


def _capture(tracked: Mapping[str, Any], seen: Seen) -> dict[str, Any]:
    return {f"{name}_state_dict": _to_cpu(plain(thing).state_dict(), f"{name}_state_dict", seen) for name, thing in tracked.items()}


def check_finite(tracked: Mapping[str, Any]) -> None:
    """Raises NonFiniteError for parameters that are not finite; buffers may hold -inf masks."""
    broken = [f"{name}.{key}" for name, key, parameter in _parameters(tracked) if not is_finite(parameter.detach())]
    if broken:
        raise not_finite(broken)


def parameters(tracked: Mapping[str, Any], seen: Seen) -> dict[int, tuple[str, torch.dtype]]:
    """The address of each parameter's captured memory, with its name and type: for who checks there, later, that it is finite.

    Raises NonFiniteError for a parameter that was not captured under its own shape, and is not finite now.
    """
    captured = {_place(met.tensor): met.saved.data_ptr() for met in seen.values()}
    found, elsewhere = {}, []
    for name, key, parameter in _parameters(tracked):
        if (address := captured.get(_place(parameter))) is not None:
            found[address] = f"{name}.{key}", parameter.dtype
        elif not is_finite(parameter.detach()):
            elsewhere.append(f"{name}.{key}")
    if elsewhere:
        raise not_finite(elsewhere)
    return found


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def not_finite(names: list[str]) -> NonFiniteError:
    """What to say of parameters that are not finite."""
    return NonFiniteError(
        "nothing is saved: parameters are not finite",
        f"found: NaN or Inf in {', '.join(names[:5])}{' …' if len(names) > 5 else ''}",
        "The newest checkpoint is from before. Lower the learning rate, clip gradients (train.clip_norm), or check the data.",
    )


def _parameters(tracked: Mapping[str, Any]) -> Iterator[tuple[str, str, nn.Parameter]]:
    for name, thing in tracked.items():
        inner = plain(thing)
        for key, parameter in inner.named_parameters() if isinstance(inner, nn.Module) else ():
            if not is_lazy(parameter):
                yield name, key, parameter


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


def on_untracked_update(tracked: Mapping[str, Any], call: Callable[[str], None]) -> Callable[[], None]:
    """Have `call` told the class, once, of an optimizer that updates and is neither tracked nor a part of what is; returns what ends
    that."""
    things = [plain(thing) for thing in tracked.values()]
    parts = [part for thing in things for part in getattr(thing, "__dict__", {}).values()]
    known, told = {id(thing) for thing in (*things, *parts)}, list[str]()

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not told and id(optimizer) not in known:
            told.append(type(optimizer).__name__)
            call(*told)

    return register_optimizer_step_pre_hook(look).remove


def _to_cpu(value: Any, where: Where, seen: Seen) -> Any:
    if isinstance(value, torch.Tensor):
        if is_lazy(value):
            return value
        return _tensor_to_cpu(value.detach() if type(value) is not torch.Tensor or value.requires_grad else value, seen)
    if type(value) in PLAIN and not (type(value) is int and value.bit_length() > MOST_BITS):
        return value
    if isinstance(value, dict | Mapping):  # the former is asked much faster
        items = {
            key if type(key) is str else _key(key, where): item if type(item) is float else _to_cpu(item, (where, key), seen)
            for key, item in value.items()
        }
        if not isinstance(value, OrderedDict):
            return Counter(items) if isinstance(value, Counter) else items
        ordered = OrderedDict(items)
        if hasattr(value, "_metadata"):  # the versions of a module's parts: without them it takes the state for an old one
            ordered._metadata = value._metadata  # type: ignore[attr-defined]
        return ordered
    if isinstance(value, list | tuple):
        parts = [_to_cpu(item, (where, at), seen) for at, item in enumerate(value)]
        return tuple(parts) if isinstance(value, tuple) else parts
    if isinstance(value, np.ndarray) and value.dtype != object:
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic) and type(number := value.item()) in PLAIN:
        return number
    raise UsageError(
        f"{_spelled(where)} cannot be saved as plain data",
        f"found: a {type(value).__module__}.{type(value).__qualname__}",
        "Checkpoints hold tensors, numbers, strings, lists and dicts: change the object's state_dict() accordingly.",
    )


def _spelled(where: Where) -> str:
    return where if isinstance(where, str) else f"{_spelled(where[0])}[{where[1]!r}]"


def _key(key: Any, where: Where) -> Any:
    if isinstance(key, tuple):
        return tuple(_key(part, where) for part in key)
    return key if type(key) is torch.dtype else _to_cpu(key, f"{_spelled(where)}, key {key!r}", {})


def _tensor_to_cpu(tensor: torch.Tensor, seen: Seen) -> torch.Tensor:
    """Tied tensors stay tied; a view does not drag the whole storage that it looks into along."""
    if tensor.layout is not torch.strided:
        return tensor.to("cpu", copy=True)
    storage = tensor.untyped_storage()
    place = (storage.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    if place not in seen:
        is_whole = tensor.nbytes == storage.nbytes() and not tensor.storage_offset()
        if tensor.is_cuda and (is_whole or tensor.is_contiguous()) and not (tensor.is_conj() or tensor.is_neg()):
            seen[place] = Met(tensor, tensor, _without_data(tensor))
        else:
            saved = tensor if is_whole and tensor.is_cpu else tensor.to("cpu", copy=True).contiguous()
            seen[place] = Met(tensor, saved, saved)
    return seen[place].saved


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    """One like it on the CPU, in memory of its own that is not used, and so takes no room, until something is copied there."""
    memory = torch.UntypedStorage(tensor.nbytes, device="cpu")  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=tensor.dtype, device="cpu").set_(memory, 0, tensor.shape, tensor.stride())


def _fill(seen: Seen) -> None:
    for met in seen.values():
        if met.saved is not met.source:
            raw(met.saved).copy_(raw(met.source))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor that is contiguous, or all of its memory, in the order in which they lie there."""
    at_bytes = tensor.storage_offset() * tensor.itemsize
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage(), at_bytes, (tensor.nbytes,), (1,))


def plain_data(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with NumPy scalars turned into numbers. Raises UsageError naming what is not plain data."""
    seen: Seen = {}
    payload = {name: _to_cpu(value, name, seen) for name, value in values.items()}
    _fill(seen)
    return payload


def check(tracked: Mapping[str, Any]) -> None:
    """Raises UsageError, at the start and not at the first save, for state that cannot be saved or would be left behind."""
    for name, thing in tracked.items():
        _to_cpu(plain(thing).state_dict(), f"{name}_state_dict", {})
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
            groups = [parameter for group in thing.param_groups for parameter in group["params"] if not is_lazy(parameter)]
            lost = [tuple(parameter.shape) for parameter in groups if parameter.numel() and parameter.data_ptr() not in held]
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
        if value.layout is torch.strided and not is_lazy(value):
            found.append(value)
    elif isinstance(value, dict | Mapping | list | tuple):
        for item in value.values() if isinstance(value, dict | Mapping) else value:
            _tensors(item, found)
    return found


def untracked_schedule(tracked: Mapping[str, Any]) -> str | None:
    """The name of a tracked optimizer whose learning rate a scheduler moves while no scheduler is tracked; else None."""
    things = {name: plain(thing) for name, thing in tracked.items()}
    if any("scheduler" in type(thing).__module__ or "lr_scheduler" in type(thing).__module__ for thing in things.values()):
        return None
    moved = (n for n, t in things.items() if isinstance(t, torch.optim.Optimizer) and any("initial_lr" in g for g in t.param_groups))
    return next(moved, None)
