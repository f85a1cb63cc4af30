"""Save and restore the state of DDP communication hooks, which differs from rank to rank.

PowerSGD's hook, for example, adds the error of its compression to the gradients of the next step.
The plain values, tensors and generators in a hook's state object are kept if any of them has
changed since the start of the loop.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from harness.data.generator_objects import generator_state, is_generator, set_generator_state
from harness.distributed.ranks import World
from harness.distributed.wrappers import ddp_wrappers
from harness.errors import UsageError
from harness.state.kinds import PLAIN
from harness.state.plain_values import is_same, put_into

STATELESS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    type,
    torch.dtype,
    torch.device,
)
LOCAL_SGD = "PostLocalSGDState"
GENERATOR = "generator"


@dataclass(frozen=True)
class Hook:
    """A communication hook with a state object."""

    where: str
    state: Any
    device: torch.device  # of the gradients that the hook receives


class Hooks:
    """The communication hooks of all tracked objects, on one rank."""

    def __init__(self) -> None:
        self.known: list[str] = []  # the hooks that existed when their modules were tracked
        self._hooks: dict[str, Hook] = {}
        self._first: dict[str, Any] = {}

    def begin(self, tracked: Mapping[str, Any]) -> None:
        """Find the hooks and record their state, at the start of the loop.

        Raises:
            UsageError: if the state of a hook cannot be saved, or if a hook was registered after
                `track`.
        """
        self._hooks = {
            hook.where: hook for name, obj in tracked.items() for hook in _hooks(name, obj)
        }
        if late := [where for where in self._hooks if where not in self.known]:
            raise UsageError(
                f"a communication hook that has a state was registered after track: {late[0]}",
                "found: a hook that has not seen how DistributedDataParallel forms its buckets",
                "Call register_comm_hook before run.track(…).",
            )
        self._first = {where: _kept(hook) for where, hook in self._hooks.items()}

    def state(self) -> dict[str, Any] | None:
        """Return the state of each hook whose state has changed, on the CPU; None if none has."""
        now = {where: _kept(hook) for where, hook in self._hooks.items()}
        return {
            where: kept for where, kept in now.items() if not is_same(kept, self._first[where])
        } or None

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Restore the state of each hook.

        Raises:
            UsageError: if a hook is not registered, or if a generator is of another kind.
        """
        for where, kept in (state or {}).items():
            if where not in self._hooks:
                raise UsageError(
                    "the checkpoint holds the state of a communication hook that is not there: "
                    f"{where}",
                    f"found: {', '.join(self._hooks) or 'no hook that has any'}",
                    "Call register_comm_hook before run.track(…), as before, "
                    "or take a new run directory.",
                )
            for key, value in kept.items():
                _set(self._hooks[where], key, value)

    def put_back(self, state: Mapping[str, Any] | None) -> None:
        """Restore the state of each hook once more; a state that is not kept is as at `begin`."""
        self.restore(self._first | dict(state or {}))


def check_hooks(name: str, module: object, world: World) -> list[str]:
    """List the locations of a module's communication hooks that have a state.

    Raises:
        UsageError: if the state of a hook cannot be saved, or if no resume could be exact because
            a post-local SGD hook trains separate weights in each group of ranks. Only the writer's
            weights are saved.
    """
    hooks = list(_hooks(name, module))
    for hook in hooks:
        _kept(hook)
        if type(hook.state).__name__ == LOCAL_SGD and world.size > 1:
            subgroup = hook.state.subgroup
            if (
                not hook.state.post_local_gradient_allreduce
                or subgroup is None
                or subgroup.size() < world.size
            ):
                size = (
                    "not given"
                    if subgroup is None
                    else f"of {subgroup.size()} of {world.size} ranks"
                )
                raise UsageError(
                    f"{hook.where} lets groups of ranks train weights of their own, "
                    "and only the writer's are saved",
                    f"found: a {LOCAL_SGD} whose subgroup is {size}, "
                    f"gradients summed in it: {hook.state.post_local_gradient_allreduce}",
                    "Give it a subgroup of all ranks, or leave the hook out.",
                )
    return [hook.where for hook in hooks]


def _hooks(name: str, module: object) -> Iterator[Hook]:
    """Yield the hooks whose state is neither a plain value nor a process group."""
    for at, shell in enumerate(ddp_wrappers(module)):
        for number, (hook, state) in enumerate(shell._comm_hooks):
            if type(state) not in PLAIN and not _is_group(state):
                called = getattr(hook, "__qualname__", type(hook).__name__)
                yield Hook(
                    f"{name}: {called} {at}.{number}", state, next(shell.module.parameters()).device
                )


def _is_group(value: object) -> bool:
    return any("ProcessGroup" in kind.__name__ for kind in type(value).__mro__)


def _parts(state: Any) -> dict[str, Any]:
    """Return the attributes (also slots) or the items of a state object, by name."""
    if isinstance(state, dict):
        return dict(state)
    slots = [name for kind in type(state).__mro__ for name in getattr(kind, "__slots__", ())]
    return {
        name: getattr(state, name)
        for name in (*slots, *getattr(state, "__dict__", ()))
        if hasattr(state, name)
    }


def _kept(hook: Hook) -> dict[str, Any]:
    """Return the contents of a hook's state object as plain data.

    Process groups, functions, classes, dtypes and devices are left out.

    Raises:
        UsageError: if the object has no attributes, or if a value cannot be saved.
    """
    if not (
        isinstance(hook.state, dict)
        or hasattr(hook.state, "__dict__")
        or hasattr(hook.state, "__slots__")
    ):
        raise UsageError(
            f"the state of the communication hook {hook.where} cannot be told",
            f"found: a {type(hook.state).__qualname__}, which has no attributes",
            "Keep it in attributes of an object: tensors, numbers, generators.",
        )
    held = {
        key: value
        for key, value in _parts(hook.state).items()
        if not _is_group(value) and not isinstance(value, STATELESS)
    }
    return {key: _plain(f"{hook.where}, {key}", value) for key, value in held.items()}


def _plain(where: str, value: Any) -> Any:
    """Copy a value as plain data. Raises UsageError if it cannot be saved."""
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
    """Restore one value of a hook's state; fill containers, and set a generator, in place."""
    before = _parts(hook.state).get(key)
    if is_generator(before):
        set_generator_state(f"{hook.where}, {key}", before, kept)
        return
    now = put_into(before, _moved(kept, hook.device))
    if isinstance(hook.state, dict):
        hook.state[key] = now
    else:
        setattr(hook.state, key, now)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return (
        type(value)(_moved(item, device) for item in value)
        if isinstance(value, list | tuple)
        else value
    )
