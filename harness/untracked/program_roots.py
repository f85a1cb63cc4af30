"""List where a search of the program's values begins: variables, and parts of tracked objects."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import nn

from harness.data.generator_objects import drawn_from, is_generator
from harness.distributed import wrappers
from harness.source_code.loops import NO_NAMES, LoopNames, carried_outside, counted_anew, names_of
from harness.state.kinds import PLAIN
from harness.threads import current_frames, no_collection
from harness.untracked.array_changes import address_of
from harness.untracked.given_state import GivenState, are_searched
from harness.untracked.object_walk import OF_OPTIMIZERS
from harness.untracked.program_frames import is_programs_file, program_frames, stack, values_of
from harness.untracked.unkept_values import is_of_program

OWN = ("harness.run.epochs", "harness.run.api")
PASSING = (type(None), *PLAIN)
HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
)


class Roots:
    """The variables of a program, and the names among them that hold nothing between two steps."""

    def __init__(self) -> None:
        # The names of each code that its loops set, by the lines at which it was seen so far.
        self._by_line: dict[CodeType, dict[int, LoopNames | None]] = {}
        self._carried = set[str]()  # paths of variables that loops carry
        self._modules = dict[str, dict[str, Any]]()  # variables of modules, by their path
        # What loops around the seen lines count or read beside the batches, each after its path.
        self.counted_anew: dict[str, None] = {}
        # Ids of frames by path: at the first look; at the last one, with the epoch, of later ones.
        self._at_first = dict[str, int]()
        self._calls = dict[str, tuple[int, int]]()
        self._called_anew = set[str]()
        # What loops around the innermost one have made, by path: its id and the epoch at the last
        # look; and the paths where another one has come since then.
        self._made, self._made_anew = dict[str, tuple[int, int]](), set[str]()

    def of_program(self, frame: FrameType | None, epoch: int) -> Iterator[tuple[str, Any]]:
        """Yield the program's variables, each after its path: "train.py: main(): x"."""
        own_frames = list(program_frames(stack(frame)))
        self._note_calls(own_frames, epoch)
        self._made_anew = set()
        # By id of its globals: path, globals, and the names that its loops set.
        modules: dict[int, tuple[str, dict[str, Any], LoopNames | None]] = {}
        others = list(_other_threads())
        for spelled, inner in (*own_frames, *others):
            code, own = inner.f_code, inner.f_globals
            names, is_function = self._names(inner, spelled), code.co_flags & CO_OPTIMIZED
            if names and (spelled, inner) in others:  # its loops know no epoch
                names = LoopNames(names.passing | names.made, names.carried, set())
            if is_function:
                yield from self._of(spelled, values_of(inner), names, epoch)
            file = str(own.get("__file__") or code.co_filename)
            if is_programs_file(file) and (not is_function or id(own) not in modules):
                modules[id(own)] = f"{Path(file).name}: ", own, NO_NAMES if is_function else names
        for module in list(sys.modules.values()):
            path, values = getattr(module, "__file__", None), getattr(module, "__dict__", None)
            if isinstance(path, str) and isinstance(values, dict) and is_programs_file(path):
                modules.setdefault(id(values), (f"{Path(path).name}: ", values, NO_NAMES))
        for spelled, values, names in modules.values():
            self._modules[spelled] = values
            yield from self._of(spelled, values, names, epoch)

    def made(self, frame: FrameType | None) -> Iterator[tuple[str, Any]]:
        """Yield what a loop around the innermost one has made for it, each after its path."""
        for spelled, inner in program_frames(stack(frame)):
            names, is_function = self._names(inner, spelled), inner.f_code.co_flags & CO_OPTIMIZED
            values = values_of(inner) if is_function else inner.f_globals
            for name in sorted(names.made & values.keys()) if names else ():
                kind = type(value := values[name])
                is_float = issubclass(kind, float)  # most have only the epoch and its batches
                if is_float or not (issubclass(kind, PASSING) or kind.__module__ in OWN):
                    yield spelled + name, value

    def _note_calls(self, own_frames: list[tuple[str, FrameType]], epoch: int) -> None:
        """Note which functions on the stack were called anew since the last look.

        Those that were there at the first look are not. Others are in another epoch, although a
        frame may have the id of an earlier one.
        """
        frames = {path: id(own) for path, own in own_frames}
        self._at_first = self._at_first or frames
        before, first = self._calls, self._at_first
        self._calls = {path: (own, epoch) for path, own in frames.items() if first.get(path) != own}
        self._called_anew = {
            path for path, call in self._calls.items() if before.get(path, call) != call
        }

    def _of(
        self, spelled: str, own: dict[str, Any], names: LoopNames | None, epoch: int
    ) -> Iterator[tuple[str, Any]]:
        """Yield variables, each after its path, except those that hold nothing between two steps.

        If it is not known which do (None), numbers, strings, tuples and tensors are left out. Those
        that a loop over epochs sets are no state of the loop inside it, but what they hold may be.
        """
        for name, value in list(own.items()):
            if name.startswith("__") or (names is not None and name in names.passing):
                continue
            if names is None and issubclass(type(value), (*PASSING, tuple, torch.Tensor)):
                continue
            if names is not None and name in names.made:
                if issubclass(type(value), PASSING) or _is_of_plain(value) or _wraps_ours(value):
                    continue
                made = id(value), epoch
                if self._made.get(path := spelled + name, made) != made:
                    self._made_anew.add(path)
                self._made[path] = made
            yield spelled + name, value

    def is_anew(self, path: str, *, is_variable: bool) -> bool:
        """Return whether a value is another one than at the last look because of where it lies.

        It is a variable of a function that was called anew since then, or it lies in what a loop
        over epochs has made anew.
        """
        is_called_anew = f"{path.rpartition(': ')[0]}: " in self._called_anew
        return (is_variable and is_called_anew) or any(
            path == root or path.startswith((f"{root}.", f"{root}[", f"{root} ("))
            for root in self._made_anew
        )

    def is_carried(self, path: str) -> bool:
        """Return whether a loop, or a function of a module, reads a variable before it sets it."""
        module, _, name = path.rpartition(": ")
        return path in self._carried or any(
            name in carried_outside(value)
            for value in list(self._modules.get(f"{module}: ", {}).values())
            if type(value) is FunctionType and is_programs_file(value.__code__.co_filename)
        )

    def _names(self, frame: FrameType, spelled: str) -> LoopNames | None:
        """Return which variables of a frame hold nothing between two steps; None if unknown.

        In a loop over epochs, the frame is at the outer loop before the first step and at the end
        of an epoch, and at the inner one between two steps: what a loop carries at one of these
        lines is carried. A line outside of all loops says nothing.
        """
        lines = self._by_line.setdefault(frame.f_code, {})
        if frame.f_lineno not in lines:
            names = lines[frame.f_lineno] = names_of(frame)
            self._carried |= {spelled + name for name in (names.carried if names else ())}
            self.counted_anew |= {spelled + name: None for name in counted_anew(frame)}
        found = [names for names in lines.values() if names and names.passing]
        if not found:
            return lines[frame.f_lineno]
        passing = set.intersection(*(names.passing for names in found))
        carried = set[str]().union(*(names.carried for names in found))
        made = set[str]().union(*(names.made for names in found)) - carried
        return LoopNames(passing, carried, made)


def _is_of_plain(value: Any) -> bool:
    """Return whether a value is a tuple of plain values, which no step changes."""
    return type(value) is tuple and all(issubclass(type(item), PASSING) for item in value)


def _wraps_ours(value: Any) -> bool:
    """Return whether a value is an iterator of Python's own around the batches of a run.

    Its position is that of the batches, or what `counted_anew` tells of.
    """
    return type(value).__module__ in ("builtins", "itertools") and any(
        str(type(inner).__module__).startswith("harness.") for inner in gc.get_referents(value)
    )


def _other_threads() -> Iterator[tuple[str, FrameType]]:
    """Yield the frames of the program in its other threads.

    The package's own threads are left out.
    """
    left_out = {threading.get_ident()} | {
        thread.ident
        for thread in threading.enumerate()
        if str(getattr(getattr(thread, "_target", None), "__module__", "")).startswith("harness.")
    }
    interval_s = sys.getswitchinterval()
    # No other thread may return from a frame whose caller is looked up: that has crashed Python
    # 3.11. All frames are therefore found before anything else is done, and no garbage collection
    # lets another thread run meanwhile.
    sys.setswitchinterval(1)
    try:
        time.sleep(0)  # threads that wait for their turn have it now
        with no_collection():
            stacks = [
                stack(frame) for ident, frame in current_frames().items() if ident not in left_out
            ]
    finally:
        sys.setswitchinterval(interval_s)
    for frames in stacks:
        yield from program_frames(frames)


def of_tracked(tracked: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what tracked objects hold besides the state that is saved, each after its path.

    These are hooks of the program, attributes of parameters and of torch's optimizers, and the
    program's own objects. What the `state_dict` of these gives is told apart by `GivenState`.
    """
    own = are_searched(tracked)
    for name, obj in tracked.items():
        inner = wrappers.unwrap(obj)
        if isinstance(inner, nn.Module):
            holders = [part for _, part in wrappers.submodules(obj)]
            yield f"{name} (its hooks)", _hooks(holders, list(inner.parameters()))
            for path, parameter in inner.named_parameters():
                yield from ((f"{name}.{path}.{key}", v) for key, v in vars(parameter).items())
        elif isinstance(inner, torch.optim.Optimizer):
            yield f"{name} (its hooks)", _hooks([inner], [])
            if type(inner).__module__.partition(".")[0] == "torch":
                yield from (
                    (f"{name}.{key}", value)
                    for key, value in list(vars(inner).items())
                    if key not in OF_OPTIMIZERS and not key.startswith("_")
                )
        elif name in own:
            yield name, inner
        elif is_of_program(inner):
            given = GivenState({name: inner})
            yield from (
                (f"{name}.{key}", value if type(value) in PLAIN else drawn_from(value))
                for key, value in list(getattr(inner, "__dict__", {}).items())
                if (type(value) in PLAIN or is_generator(value)) and not given.has(value)
            )


def _hooks(holders: list[Any], tensors: list[torch.Tensor]) -> list[Any]:
    """Return the hooks that the program has registered."""
    hooks = [
        hook
        for holder in holders
        for name in HOOKS
        for hook in (getattr(holder, name, None) or {}).values()
    ]
    hooks += [hook for tensor in tensors for hook in (tensor._backward_hooks or {}).values()]
    return [hook for hook in hooks if _is_programs(hook)]


def _is_programs(hook: Any) -> bool:
    code = getattr(getattr(hook, "__func__", hook), "__code__", None)
    return is_of_program(hook) if code is None else is_programs_file(code.co_filename)


class Sharing:
    """Groups of tracked tensors that share memory, as built or at the last look."""

    def __init__(self, tracked: Mapping[str, Any]) -> None:
        self._tracked, self._groups = tracked, sharing(tracked)

    def changed(self) -> list[str]:
        """Return the groups that have begun or ceased to share memory since the last look."""
        now = sharing(self._tracked)
        begun = [f"{group} (shared memory)" for group in sorted(now - self._groups)]
        ended = untied(self._tracked, self._groups, now)
        self._groups = (self._groups | now).difference(ended)
        return begun + [f"{group} (no longer shared memory)" for group in ended]


def sharing(tracked: Mapping[str, Any]) -> set[str]:
    """Return groups of tracked tensors that share memory: "a.weight = b.weight".

    A restart restores each tensor by itself: only those that share memory as built do so again.
    """
    names = defaultdict[tuple[int, int], list[str]](list)
    for name, obj in tracked.items():
        inner = wrappers.unwrap(obj)
        if isinstance(inner, nn.Module):
            tensors = [
                *inner.named_parameters(remove_duplicate=False),
                *inner.named_buffers(remove_duplicate=False),
            ]
        elif isinstance(inner, torch.optim.Optimizer):
            tensors = [
                (f"state[{at}][{key!r}]", value)
                for at, state in enumerate(list(inner.state.values()))
                if isinstance(state, dict)
                for key, value in state.items()
            ]
        else:
            continue
        for path, tensor in tensors:
            if (address := address_of(tensor)) and tensor.numel():
                names[address, tensor.numel()].append(f"{name}.{path}")
    return {" = ".join(sorted(own)) for own in names.values() if len(own) > 1}


def untied(tracked: Mapping[str, Any], before: set[str], now: set[str]) -> list[str]:
    """Return the groups of parameters that shared memory before (see `sharing`) and do not now."""
    parameters = {
        f"{name}.{path}"
        for name, obj in tracked.items()
        if isinstance(inner := wrappers.unwrap(obj), nn.Module)
        for path, _ in inner.named_parameters(remove_duplicate=False)
    }
    groups = [set(group.split(" = ")) for group in now]
    return sorted(
        group
        for group in before - now
        if parameters.issuperset(names := group.split(" = "))
        and not any(map(set(names).issubset, groups))
    )


def of_torch() -> Iterator[tuple[str, Any]]:
    """Yield settings of torch that a program may change, each after the function that reads it."""
    yield "torch.get_default_dtype()", str(torch.get_default_dtype())
    yield "torch.get_float32_matmul_precision()", torch.get_float32_matmul_precision()
    yield (
        "torch.are_deterministic_algorithms_enabled()",
        torch.are_deterministic_algorithms_enabled(),
    )
