"""Give saved state the form that live objects have: sharded as they are, or whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from harness.distributed import dtensors, layout
from harness.distributed.layout import Box
from harness.distributed.parts import Parts, Wanted, own_box
from harness.errors import UsageError

PLACED, PARTIAL = "placed", "partial"  # a key of `placed_gradient`, and a kind of placement


def as_live(
    objects: Mapping[str, Any], states: Mapping[str, Any], parts: Parts | None
) -> dict[str, Any]:
    """Return saved states with their tensors as the objects have them.

    A tensor that is sharded, here or in the checkpoint, becomes a new one: sharded as the object's
    own is, or whole. The state of an optimizer's parameter is sharded as the parameter if it has
    its shape. All other values are returned as they are.

    Args:
        objects: the objects by name, without wrappers.
        states: the saved state dict of each, by name.
        parts: the parts of the checkpoint; None if nothing in it is sharded.

    Raises:
        UsageError: an object has no tensor of that shape to shard a saved one as.
        DamagedError: a part is not what was written.
        StorageError: a part cannot be read.
    """
    taker, made = _Taker(parts), dict[str, Any]()
    for name, obj in objects.items():
        state = states[name]
        if isinstance(obj, torch.optim.Optimizer) and _is_numbered(state):
            live = _like_parameters(obj, state)
        else:
            live = obj.state_dict()
        made[name] = taker.taken(f"{name}_state_dict", state, live)
    if parts is not None:
        parts.fill(taker.wanted)
    return made


def is_concerned(tracked: Mapping[str, Any], parts: Parts | None) -> bool:
    """Return whether anything is sharded, in the checkpoint or in the tracked objects."""
    return parts is not None or dtensors.holds_sharded(tracked.values())


def made_whole(
    payload: Mapping[str, Any], parts: Parts, *, weights_only: bool = False
) -> dict[str, Any]:
    """Return the content of a checkpoint with each sharded tensor as a whole one.

    With `weights_only`, the state of optimizers stays without data.

    Raises:
        DamagedError: A part is not what was written.
        StorageError: A part cannot be read.
    """
    taker = _Taker(parts, to_whole=True)
    whole = {
        key: taker.taken(key, value, None)
        if str(key).endswith("_state_dict") and not (weights_only and _is_numbered(value))
        else value
        for key, value in payload.items()
    }
    parts.fill(taker.wanted)
    return whole


def sharded_alike(
    module: nn.Module,
    state: dict[str, Any],
    begun: Callable[[torch.Tensor], object],
    used: Callable[[torch.Tensor], object],
) -> dict[str, Any]:
    """Return a state dict for a module, with tensors of its own in place of whole ones.

    Where the module has a sharded tensor, this rank's part of the whole one is copied into it at
    once, so that no rank needs memory for a second copy of its parts. No collective is used.

    Args:
        module: the module.
        state: the state dict, which fits the module.
        begun: called with each part of a whole tensor before it is copied.
        used: called with each whole tensor that is not needed any more.
    """
    if not dtensors.holds_sharded([module]):
        return state
    own, made = module.state_dict(), type(state)()
    for key, value in state.items():
        live: Any = own.get(key)
        is_whole = isinstance(value, torch.Tensor) and not dtensors.is_sharded(value)
        if is_whole and dtensors.is_sharded(live) and live.shape == value.shape:
            whole_box = Box((0,) * value.dim(), tuple(value.shape))
            part = value[own_box(key, live).within(whole_box)]
            begun(part)
            with torch.no_grad():
                dtensors.local_of(live).copy_(part)
            used(value)
            value = live
        made[key] = value
    if hasattr(state, "_metadata"):
        made._metadata = state._metadata  # type: ignore[attr-defined]
    return made


class _Taker:
    """Walks a saved state beside a live one, and replaces what is sharded in either."""

    def __init__(self, parts: Parts | None, *, to_whole: bool = False) -> None:
        self.wanted = list[Wanted]()
        self._parts, self._to_whole = parts, to_whole
        self._whole = dict[str, torch.Tensor]()  # by path: tied tensors stay one

    def taken(self, where: str, saved: Any, live: Any) -> Any:
        """Return a saved value as the live one is; a live value of None asks for whole tensors."""
        if isinstance(saved, torch.Tensor):
            return self._tensor(where, saved, live)
        if isinstance(saved, Mapping):
            items = {
                key: self.taken(f"{where}/{key}", item, _at(live, key))
                for key, item in saved.items()
            }
            if all(items[key] is item for key, item in saved.items()):
                return saved
            made: Any = type(saved)(items) if type(saved) is not dict else items  # type: ignore[call-arg]
            if hasattr(saved, "_metadata"):
                made._metadata = saved._metadata
            return made
        if type(saved) in (list, tuple):
            each = [
                self.taken(f"{where}/{at}", item, _at(live, at)) for at, item in enumerate(saved)
            ]
            changed = any(new is not old for new, old in zip(each, saved, strict=True))
            return type(saved)(each) if changed else saved
        return saved

    def _tensor(self, where: str, saved: torch.Tensor, live: Any) -> Any:
        path = self._parts.path_of(saved) if self._parts is not None else None
        is_sharded = dtensors.is_sharded(live)
        if path is None and saved.is_meta:
            raise UsageError(
                f"{where} is in no shard of the checkpoint",
                "found: the place of a sharded tensor that each rank has kept for itself",
                "Track objects whose state_dict has the same keys on every rank.",
            )
        if path is None and not (is_sharded and live.shape == saved.shape):
            return saved
        if live is None and not self._to_whole:
            raise UsageError(
                f"{where} was sharded, and nothing tells how it is sharded now",
                "found: no tensor of that shape: neither a parameter nor state that is there",
                "Give the objects their state before run.track, or train without it.",
            )
        if isinstance(live, torch.Tensor) and live.shape != saved.shape:
            raise UsageError(
                f"{where} was sharded, and is of another shape now",
                f"found: {tuple(live.shape)}, expected: {tuple(saved.shape)}",
                "Build the objects as they were.",
            )
        whole_box = Box((0,) * saved.dim(), tuple(saved.shape))
        if not is_sharded:
            assert path is not None, "a whole tensor is returned as it is"
            if path not in self._whole:
                whole = torch.empty(saved.shape, dtype=saved.dtype, device="cpu")
                self._whole[path] = whole
                self.wanted.append(Wanted(path, whole_box, whole))
            return self._whole[path]
        made = dtensors.empty_like(live, saved.dtype)
        box = own_box(where, live)
        local = dtensors.local_of(made)
        if path is None:
            with torch.no_grad():
                local.copy_(saved[box.within(whole_box)])
        else:
            self.wanted.append(Wanted(path, box, local))
        return made


def _at(live: Any, key: Any) -> Any:
    if isinstance(live, Mapping):
        return live.get(key)
    return live[key] if isinstance(live, list | tuple) and key < len(live) else None


def _is_numbered(state: Any) -> bool:
    return isinstance(state, Mapping) and isinstance(state.get("state"), Mapping)


def _like_parameters(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> Any:
    """Return the form of an optimizer's state: that of its parameter for each tensor of its shape.

    An optimizer that has made no update has no state of its own to compare with.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    of_number = dict(zip(numbers, parameters, strict=False))
    return {
        "state": {
            number: {
                key: of_number.get(number)
                for key, value in kept.items()
                if isinstance(value, torch.Tensor)
                and value.shape == getattr(of_number.get(number), "shape", None)
            }
            for number, kept in state["state"].items()
            if isinstance(kept, Mapping)
        }
    }


def placed_gradient(gradient: Any, parameter: Any) -> dict[str, Any]:
    """Return this rank's part of a gradient that is placed otherwise than its parameter, else {}.

    Tensor and sequence parallelism leave gradients of replicated parameters as summands of each
    rank, or cut, until the optimizer uses them.
    """
    if not dtensors.is_sharded(gradient) or gradient.placements == parameter.placements:
        return {}
    placements = [
        [PARTIAL, it.reduce_op]
        if it.is_partial()
        else list(dtensors.spelled("a gradient", it, gradient.ndim, getattr(it, "split_factor", 1)))
        for it in gradient.placements
    ]
    # With the rank, no two are alike: what is alike on all ranks is given to any number of them.
    of_rank = {
        "rank": torch.distributed.get_rank(),
        "part": dtensors.local_of(gradient).cpu().clone(),
    }
    return {PLACED: placements} | of_rank


def with_placed(like: Any, kept: Mapping[str, Any]) -> torch.Tensor:
    """Return the gradient of a sharded parameter `like` from the result of `placed_gradient`.

    Raises:
        UsageError: The parameter is sharded otherwise now.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    made: dict[str, Callable[..., Any]] = {
        PARTIAL: Partial,
        layout.SHARD: Shard,
        layout.COPIES: Replicate,
        layout.STRIDED: lambda dimension, factor: _StridedShard(dimension, split_factor=factor),
    }
    placements = [made[kind](*rest) for kind, *rest in kept[PLACED]]
    if not dtensors.is_sharded(like) or len(like.placements) != len(placements):
        raise UsageError(
            "a gradient has no place in the model as it is now",
            f"found: placements {kept[PLACED]}",
            "Shard the model as before.",
        )
    local = kept["part"].to(like.device, copy=True)
    of = {"run_check": False, "shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(local, like.device_mesh, placements, **of)
