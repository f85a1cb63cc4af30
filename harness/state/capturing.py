"""Capture tracked state as plain data, and note which tensors stay constant until the next update.

"Steady" in the names of this module means: constant until the next update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

import harness.state.kinds as kinds
import harness.state.parameter_names as parameter_names
from harness.distributed.parts import Part, TakenParts
from harness.distributed.wrappers import unwrap
from harness.errors import NonFiniteError, UsageError
from harness.state.plain_values import TensorRefs, fill, to_cpu

# An object with this method, such as a PyTorch optimizer, changes only in its own step.
HOOK = "register_step_pre_hook"
COPIES = ("gradients", "attributes")  # values whose tensors are copies that nobody else holds


@dataclass(frozen=True)
class Captured:
    """A whole checkpoint as plain data on the CPU, most of it still the live memory."""

    payload: dict[str, Any]
    steady: set[int]  # addresses of the memory that is constant until the next update
    parameters: dict[int, tuple[str, torch.dtype]]  # by address: name and dtype; must be finite
    tracked: Mapping[str, Any]
    seen: TensorRefs = field(default_factory=TensorRefs)
    own: Mapping[str, Any] | None = None  # what this rank's shard holds beside its parts

    def gpu_sources(self) -> dict[int, torch.Tensor]:
        """Return the GPU tensors whose bytes are missing, by the address of their CPU memory."""
        return {met.address: met.source for met in self.seen.all if met.saved is not met.source}

    @property
    def parts(self) -> Mapping[str, Part]:
        """Return this rank's parts of sharded tensors, by path."""
        return self.seen.parts or {}

    @property
    def watched(self) -> Mapping[int, torch.Tensor]:
        """Return the sharded tensors by the address of this rank's part."""
        return self.seen.parts.live if self.seen.parts is not None else {}

    def fill_payload(self) -> dict[str, Any]:
        """Copy the missing bytes of the payload alone, not those of parts of sharded tensors."""
        held = {tensor.data_ptr() for tensor in _tensors(self.payload)}
        fill(self.seen, held)
        return self.payload

    def fill(self) -> dict[str, Any]:
        """Copy the missing bytes from the GPUs; return the complete payload."""
        fill(self.seen)
        return self.payload


def captured(
    values: Mapping[str, Any],
    tracked: Mapping[str, Any],
    own: Mapping[str, Any] | None = None,
) -> Captured:
    """Capture the values and the state of every tracked object; bytes on GPUs are copied later.

    Constant until the next update (`steady`) are parameters, the state of optimizers and of any
    other object that has a step pre-hook, and copies, which nobody else holds.

    Args:
        values: the entries beside the tracked state; they must be plain data.
        tracked: the tracked objects by name.
        own: what this rank's shard holds beside its parts; it must be plain data.

    Raises:
        UsageError: for a value or a state that cannot be saved as plain data.
        NonFiniteError: as `parameters` raises it.
    """
    seen = TensorRefs(TakenParts())
    payload = _plain_values(values, seen)
    own = own and _plain_values({"own": own}, TensorRefs())["own"]
    copies = [of.get(name) for of in (payload, own or {}) for name in COPIES]
    steady = {tensor.data_ptr() for tensor in _tensors(copies)}
    for name, obj in tracked.items():
        before = len(seen.all)
        payload |= _capture({name: obj}, seen)
        if _announces(unwrap(obj)):
            steady |= {met.address for met in seen.all[before:]}
    named, frozen = parameters(tracked, seen)
    payload |= _beside(tracked, payload, seen)
    steady |= (
        named.keys() | frozen | {met.address for met in seen.all if met.source is not met.tensor}
    )
    return Captured(payload, steady, named, tracked, seen, own)


def as_captured(name: str, value: Any, parts: TakenParts | None = None) -> Captured:
    """Capture one value as plain data; the bytes of GPU tensors stay there until `fill`.

    With `parts`, to which they are added, it may hold sharded tensors.

    Raises:
        UsageError: for a value that cannot be saved as plain data.
    """
    seen = TensorRefs(parts)
    return Captured({name: to_cpu(value, name, seen)}, set(), {}, {}, seen)


def captured_object(name: str, obj: Any, *, without_parts: bool = False) -> Captured:
    """Capture the state of one tracked object, in the same way as `as_captured`.

    With `without_parts`, sharded tensors are there without this rank's part.
    """
    seen = TensorRefs(TakenParts(are_left_out=without_parts))
    return Captured(_capture({name: obj}, seen), set(), {}, {name: obj}, seen)


def capture(tracked: Mapping[str, Any]) -> dict[str, Any]:
    """Capture all tracked state on the CPU as `NAME_state_dict`, with `names` and `kinds`.

    CPU tensors are not copied: write them out, or copy them, before the next update.

    Raises:
        UsageError: for state that is not plain data.
    """
    seen = TensorRefs()
    payload = _capture(tracked, seen)
    fill(seen)
    return payload | _beside(tracked, payload, seen)


def _capture(tracked: Mapping[str, Any], seen: TensorRefs) -> dict[str, Any]:
    return {
        f"{name}_state_dict": to_cpu(state_of(obj), f"{name}_state_dict", seen)
        for name, obj in tracked.items()
    }


def _plain_values(values: Mapping[str, Any], seen: TensorRefs) -> dict[str, Any]:
    """Return the values as plain data; note the kinds of those in the user's state (`state`).

    Raises:
        UsageError: for a value that cannot be saved as plain data.
    """
    kinds.check_values(values.get("state"), "state")
    own = TensorRefs()
    payload = {name: to_cpu(value, name, own) for name, value in values.items()}
    fill(own)
    seen.kinds |= {path: kind for path, kind in own.kinds.items() if path.startswith("state[")}
    return payload


def _beside(
    tracked: Mapping[str, Any], payload: Mapping[str, Any], seen: TensorRefs
) -> dict[str, Any]:
    """Return the entries `names` and `kinds` for the tracked state, without empty ones."""
    names = parameter_names.needed(tracked, payload)
    return ({"names": names} if names else {}) | ({"kinds": dict(seen.kinds)} if seen.kinds else {})


def state_of(obj: Any) -> Any:
    """Return an object's state dict without the names of wrappers around it or its submodules."""
    inner = unwrap(obj)
    return (
        parameter_names.without_shells(inner, inner.state_dict())
        if isinstance(inner, nn.Module)
        else inner.state_dict()
    )


def check_user_state(values: Mapping[str, Any]) -> None:
    """Check that a checkpoint can restore the user's values (`run.state`) with their types.

    Raises:
        UsageError: for a value that it cannot restore.
    """
    kinds.check_values(values, "state")


def check_finite(tracked: Mapping[str, Any]) -> None:
    """Check that all parameters that are trained are finite.

    Buffers, and parameters that are frozen and that no tracked optimizer has, may hold -inf masks.

    Raises:
        NonFiniteError: for parameters that are not finite.
    """
    broken = [
        f"{name}.{key}"
        for name, key, parameter, is_trained in _parameters(tracked)
        if is_trained and not all(is_finite(part.detach()) for part in kinds.parts_of(parameter))
    ]
    if broken:
        raise not_finite(broken)


def parameters(
    tracked: Mapping[str, Any], seen: TensorRefs
) -> tuple[dict[int, tuple[str, torch.dtype]], set[int]]:
    """Return name and dtype of each trained parameter by the address of its captured memory.

    A later check reads the memory at these addresses and tests whether it is finite. A parameter
    that was not captured with its own shape and strides is checked now. The second result are the
    addresses of all other parameters.

    Raises:
        NonFiniteError: for a parameter that is checked now and is not finite.
    """
    named, frozen, elsewhere = {}, set(), []
    for name, key, parameter, is_trained in _parameters(tracked):
        for part in kinds.parts_of(parameter):
            if (met := seen.find(part.data_ptr(), part)) is not None:
                address = met.address
                if is_trained:
                    named[address] = f"{name}.{key}", part.dtype
                else:
                    frozen.add(address)
                if seen.parts is not None and address in seen.parts.live:
                    seen.parts.live[address] = parameter  # counts more than that in a state dict
            elif is_trained and not is_finite(part.detach()):
                elsewhere.append(f"{name}.{key}")
    if elsewhere:
        raise not_finite(elsewhere)
    return named, frozen


def not_finite(names: list[str]) -> NonFiniteError:
    """Return the error for parameters that are not finite."""
    return NonFiniteError(
        "nothing is saved: parameters are not finite",
        f"found: NaN or Inf in {', '.join(names[:5])}{' …' if len(names) > 5 else ''}",
        "Checkpoints from before are whole. Lower the learning rate, clip gradients, or check the "
        "data; in the first steps, whether all parameters were initialised (to_empty does not).",
    )


def _parameters(tracked: Mapping[str, Any]) -> Iterator[tuple[str, str, torch.Tensor, bool]]:
    """Yield object, name and tensor of all parameters, and whether they are trained."""
    objects = {name: unwrap(obj) for name, obj in tracked.items()}
    updated = {
        id(parameter)
        for obj in objects.values()
        if parameter_names.is_optimizer(obj)
        for group in obj.param_groups
        for parameter in group["params"]
    }
    for name, obj in objects.items():
        for key, parameter in obj.named_parameters() if isinstance(obj, nn.Module) else ():
            if type(parameter) is nn.Parameter or not is_lazy(parameter):
                is_trained = parameter.requires_grad or id(parameter) in updated
                yield name, key, parameter, is_trained


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor contains neither NaN nor Inf.

    One pass for the minimum and the maximum is enough, at a thirtieth of the cost of `isfinite`.
    """
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    numbers = (
        torch.view_as_real(tensor)
        if tensor.is_complex()
        else tensor.float()
        if tensor.itemsize == 1
        else tensor
    )
    return bool(torch.isfinite(torch.stack(torch.aminmax(numbers))).all())


def before_update(tracked: Mapping[str, Any], call: Callable[[], None]) -> None:
    """Register `call` as a step pre-hook of each tracked optimizer.

    For an object that cannot have one (a wrapper), it is registered on the optimizers in the
    attributes of the object.
    """
    parts: dict[int, Any] = {}
    for obj in map(unwrap, tracked.values()):
        held = [
            part
            for part in getattr(obj, "__dict__", {}).values()
            if issubclass(type(part), torch.optim.Optimizer)  # `__class__` of a proxy may raise
        ]
        parts |= {id(part): part for part in ([obj] if _announces(obj) else held)}
    for part in filter(_announces, parts.values()):
        getattr(part, HOOK)(lambda *_: call())


def _announces(obj: Any) -> bool:
    """Return whether an object calls hooks before each of its steps.

    An optimizer whose class does not call `Optimizer.__init__`, as some wrappers of another
    optimizer, has the method but no hooks.
    """
    return hasattr(obj, HOOK) and (
        not isinstance(obj, torch.optim.Optimizer) or hasattr(obj, "_optimizer_step_pre_hooks")
    )


def plain_data(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values as plain data; NumPy scalars become numbers, arrays become tensors.

    Raises:
        UsageError: for what is not plain data, named by its path.
    """
    return _plain_values(values, TensorRefs())


def check(tracked: Mapping[str, Any]) -> None:
    """Check at the start, and not only at the first save, that the tracked state can be saved.

    Raises:
        UsageError: for state that cannot be saved, and for parameters that would not be saved.
    """
    for name, obj in tracked.items():
        to_cpu(state_of(obj), f"{name}_state_dict", TensorRefs(TakenParts()))
    _check_covered(tracked)


def _check_covered(tracked: Mapping[str, Any]) -> None:
    """Check that a tracked object holds every parameter that a tracked optimizer updates.

    Raises:
        UsageError: for other parameters: they would start from scratch at each resume.
    """
    objects = {name: unwrap(obj) for name, obj in tracked.items()}
    held: set[int] = set()
    for obj in objects.values():
        if not isinstance(obj, torch.optim.Optimizer):
            held |= {tensor.data_ptr() for tensor in _tensors(obj.state_dict())}
    for name, obj in objects.items():
        if isinstance(obj, torch.optim.Optimizer):
            groups = [
                p
                for group in obj.param_groups
                for p in group["params"]
                if not is_lazy(p) and p.numel()
            ]
            lost = [
                tuple(p.shape)
                for p in groups
                if not {part.data_ptr() for part in kinds.parts_of(p)} <= held
            ]
            if lost:
                raise UsageError(
                    f"{name} updates {len(lost)} parameter(s) that belong to nothing tracked: "
                    "they would be lost at a restart",
                    f"found: shapes {', '.join(map(str, lost[:5]))}",
                    "Track the module that holds them too. If none does: " + kinds.IN_MODULE,
                )


def size_bytes(tracked: Mapping[str, Any]) -> int:
    """Return the size in bytes of a copy of the tensors of every tracked object."""
    sizes = {
        tensor.data_ptr(): tensor.nbytes
        for obj in tracked.values()
        for tensor in _tensors(unwrap(obj).state_dict())
    }
    return sum(sizes.values())


def _tensors(value: Any, tensors: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    tensors = [] if tensors is None else tensors
    if isinstance(value, torch.Tensor):
        if not is_lazy(value):
            tensors += [part for part in kinds.parts_of(value) if part.layout is torch.strided]
    elif isinstance(value, dict | Mapping | list | tuple):
        for item in value.values() if isinstance(value, dict | Mapping) else value:
            _tensors(item, tensors)
    return tensors
