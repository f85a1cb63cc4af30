"""Communication hooks of DistributedDataParallel: what they keep from one step to the next is another thing on each rank.

PowerSGD's hook, say, feeds the error of its compression back into the next step's gradients. Kept is what a hook's state object holds of
plain values, tensors and generators, if any of it has changed since the loop began.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from harness.data.generator_objects import generator_state, is_generator, set_generator_state
from harness.distributed.ddp import shells_of
from harness.distributed.ranks import World
from harness.errors import UsageError
from harness.tracking.sameness import is_same

PLAIN = (bool, int, float, complex, str, bytes, type(None))
STATELESS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type, torch.dtype, torch.device)
LOCAL_SGD = "PostLocalSGDState"
GENERATOR = "generator"


@dataclass(frozen=True)
class Hook:
    """A communication hook that has a state object."""

    where: str
    state: Any
    device: torch.device  # of the gradients that it sees


class Hooks:
    """The communication hooks of all that is tracked, on one rank."""

    def __init__(self) -> None:
        self.known: list[str] = []  # where there were hooks when their modules were tracked
        self._hooks: dict[str, Hook] = {}
        self._first: dict[str, Any] = {}

    def begin(self, tracked: Mapping[str, Any]) -> None:
        """The loop begins: what is changed from now on is kept. Raises UsageError for a hook whose state could not be."""
        self._hooks = {hook.where: hook for name, thing in tracked.items() for hook in _hooks(name, thing)}
        if late := [where for where in self._hooks if where not in self.known]:
            raise UsageError(
                f"a communication hook that has a state was registered after track: {late[0]}",
                "found: a hook that has not seen how DistributedDataParallel forms its buckets",
                "Call register_comm_hook before run.track(…).",
            )
        self._first = {where: _kept(hook) for where, hook in self._hooks.items()}

    def state(self) -> dict[str, Any] | None:
        """The state of each hook that has another than in the beginning, on the CPU; None if none has."""
        now = {where: _kept(hook) for where, hook in self._hooks.items()}
        return {where: kept for where, kept in now.items() if not is_same(kept, self._first[where])} or None

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Give each hook its state back. Raises UsageError."""
        for where, kept in (state or {}).items():
            if where not in self._hooks:
                raise UsageError(
                    f"the checkpoint holds the state of a communication hook that is not there: {where}",
                    f"found: {', '.join(self._hooks) or 'no hook that has any'}",
                    "Call register_comm_hook before run.track(…), as before, or take a new run directory.",
                )
            for key, value in kept.items():
                _set(self._hooks[where], key, value)


def check_hooks(name: str, module: object, world: World) -> list[str]:
    """Where a module has communication hooks with a state. Raises UsageError for one that no resume could make exact."""
    hooks = list(_hooks(name, module))
    for hook in hooks:
        _kept(hook)
        if type(hook.state).__name__ == LOCAL_SGD and world.size > 1:
            subgroup = hook.state.subgroup
            if not hook.state.post_local_gradient_allreduce or subgroup is None or subgroup.size() < world.size:
                size = "not given" if subgroup is None else f"of {subgroup.size()} of {world.size} ranks"
                raise UsageError(
                    f"{hook.where} lets groups of ranks train weights of their own, and only the writer's are saved",
                    f"found: a {LOCAL_SGD} whose subgroup is {size}, gradients summed in it: {hook.state.post_local_gradient_allreduce}",
                    "Give it a subgroup of all ranks, or leave the hook out.",
                )
    return [hook.where for hook in hooks]


def _hooks(name: str, module: object) -> Iterator[Hook]:
    for at, shell in enumerate(shells_of(module)):
        for number, (hook, state) in enumerate(shell._comm_hooks):
            if type(state) not in PLAIN and not _is_group(state):
                called = getattr(hook, "__qualname__", type(hook).__name__)
                yield Hook(f"{name}: {called} {at}.{number}", state, next(shell.module.parameters()).device)


def _is_group(value: object) -> bool:
    return any("ProcessGroup" in kind.__name__ for kind in type(value).__mro__)


def _parts(state: Any) -> dict[str, Any]:
    """What a state object holds, by name."""
    if isinstance(state, dict):
        return dict(state)
    slots = [name for kind in type(state).__mro__ for name in getattr(kind, "__slots__", ())]
    return {name: getattr(state, name) for name in (*slots, *getattr(state, "__dict__", ())) if hasattr(state, name)}


def _kept(hook: Hook) -> dict[str, Any]:
    """What a hook's state object holds, as plain data. Raises UsageError."""
    if not (isinstance(hook.state, dict) or hasattr(hook.state, "__dict__") or hasattr(hook.state, "__slots__")):
        raise UsageError(
            f"the state of the communication hook {hook.where} cannot be told",
            f"found: a {type(hook.state).__qualname__}, which has no attributes",
            "Keep it in attributes of an object: tensors, numbers, generators.",
        )
    held = {key: value for key, value in _parts(hook.state).items() if not _is_group(value) and not isinstance(value, STATELESS)}
    return {key: _plain(f"{hook.where}, {key}", value) for key, value in held.items()}


def _plain(where: str, value: Any) -> Any:
    if type(value) in PLAIN:
        return value
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        return value.detach().to("cpu", copy=True)
    if is_generator(value):
        return generator_state(value)
    if isinstance(value, Mapping) and all(type(key) in PLAIN for key in value):
        return {key: _plain(f"{where}[{key!r}]", item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(f"{where}[{at}]", item) for at, item in enumerate(value))
    raise UsageError(
        f"the state of a communication hook cannot be saved: {where}",
        f"found: a {type(value).__module__}.{type(value).__qualname__}",
        "Use a hook whose state is tensors, numbers and generators, or one without any.",
    )


def _set(hook: Hook, key: str, kept: Any) -> None:
    before = _parts(hook.state).get(key)
    if is_generator(before):
        set_generator_state(f"{hook.where}, {key}", before, kept)
    elif isinstance(before, dict):
        before.clear()
        before.update(_moved(kept, hook.device))
    elif isinstance(hook.state, dict):
        hook.state[key] = _moved(kept, hook.device)
    else:
        setattr(hook.state, key, _moved(kept, hook.device))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return type(value)(_moved(item, device) for item in value) if isinstance(value, list | tuple) else value
