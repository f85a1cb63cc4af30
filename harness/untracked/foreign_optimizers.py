"""Find state that training would lose silently.

This is the state of optimizers and schedulers that nobody tracks, and of tracked objects whose
`state_dict` is empty.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from harness.distributed.wrappers import unwrap
from harness.state.kinds import parts_of


def on_untracked_update(
    tracked: Mapping[str, Any],
    call: Callable[[torch.optim.Optimizer, str], None],
    step: Callable[[], int],
) -> Callable[[], None]:
    """Report each optimizer that makes updates and whose state no tracked object saves.

    An optimizer that makes updates in only one step of the loop is not reported: it carries nothing
    to the next one. The inner loop of meta-learning makes such an optimizer anew in each step. An
    optimizer that an attribute of a tracked object holds is accepted only if the tracked state
    dicts contain its state, as it is in the second of these steps.

    Args:
        tracked: the tracked objects, by name.
        call: gets the optimizer and the report as text.
        step: returns the number of the loop's present step.

    Returns:
        A function that ends the observation.
    """
    objects = {name: unwrap(obj) for name, obj in tracked.items()}
    tracked_ids = {id(obj) for obj in objects.values()}  # they live as long as this does
    # The step in which each other optimizer was seen first; None if there is no more to find out.
    known = weakref.WeakKeyDictionary[Any, int | None]()

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if id(optimizer) in tracked_ids:
            return
        first = known.setdefault(optimizer, step())
        if first is None or first == step():
            return
        known[optimizer] = None
        inside = _holder_of(optimizer, objects)
        if inside is None:
            call(optimizer, f"({type(optimizer).__name__}) that is not tracked makes updates")
            return

        def after(*_: Any) -> None:
            hook.remove()
            if not _is_held(optimizer, objects):
                call(
                    optimizer,
                    f"({type(optimizer).__name__}) inside {inside!r} makes updates, "
                    "and no tracked object's state_dict() holds what it keeps",
                )

        hook = optimizer.register_step_post_hook(after)

    return register_optimizer_step_pre_hook(look).remove


def _holder_of(optimizer: Any, objects: Mapping[str, Any]) -> str | None:
    """Return the name of the object that holds an optimizer in an attribute; None if none does."""
    holders = (
        name for name, obj in objects.items() if any(part is optimizer for part in parts_in(obj))
    )
    return next(holders, None)


def parts_in(obj: Any) -> Iterator[Any]:
    """Yield the values of an object's attributes, and the items of lists, tuples and dicts there.

    Containers with 100 or more items are not searched.
    """
    for value in getattr(obj, "__dict__", {}).values():
        yield value
        if isinstance(value, dict) and len(value) < 100:
            yield from value.values()
        elif isinstance(value, list | tuple) and len(value) < 100:
            yield from value


def _is_held(optimizer: torch.optim.Optimizer, objects: Mapping[str, Any]) -> bool:
    """Return whether the tracked state contains every tensor of an optimizer's state.

    A tensor counts as contained if the tracked state has the same memory or an equal copy.
    """
    kept = [tensor for tensor in _tensors(optimizer.state) if tensor.numel()]
    given = (
        [tensor for obj in objects.values() for tensor in _tensors(obj.state_dict())]
        if kept
        else []
    )
    places = {tensor.data_ptr() for tensor in given}
    return all(
        tensor.data_ptr() in places or any(_is_equal(tensor, other) for other in given)
        for tensor in kept
    )


def _is_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield from (
            part for part in parts_of(value) if part.layout is torch.strided and not part.is_meta
        )
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def untracked_schedule(tracked: Mapping[str, Any]) -> str | None:
    """Return the name of a tracked optimizer that an untracked scheduler drives, else None.

    A scheduler leaves `initial_lr` in the parameter groups. The result is None if any scheduler is
    tracked.
    """
    objects = {name: unwrap(obj) for name, obj in tracked.items()}
    if any(
        "scheduler" in type(obj).__module__ or "lr_scheduler" in type(obj).__module__
        for obj in objects.values()
    ):
        return None
    moved = (
        n
        for n, t in objects.items()
        if isinstance(t, torch.optim.Optimizer) and any("initial_lr" in g for g in t.param_groups)
    )
    return next(moved, None)


def gives_nothing(obj: Any) -> bool:
    """Return whether a tracked object has values of its own, and yet an empty `state_dict`.

    None of these values would survive a restart. Gradient scalers and torch's schedulers are
    exempt.
    """
    inner = unwrap(obj)
    if (
        isinstance(inner, torch.amp.GradScaler | torch.optim.lr_scheduler.LRScheduler)
        or inner.state_dict() != {}
    ):
        return False
    parts = list(inner.modules()) if isinstance(inner, nn.Module) else [inner]
    return any(_has_values(part) for part in parts)


def _has_values(obj: Any) -> bool:
    own = {
        name: value
        for name, value in getattr(obj, "__dict__", {}).items()
        if not name.startswith("_")
    }
    if isinstance(obj, nn.Module):  # its numbers and strings are settings
        return any(
            isinstance(value, torch.Tensor | np.ndarray | list | dict | set)
            for value in own.values()
        )
    return bool(own)
