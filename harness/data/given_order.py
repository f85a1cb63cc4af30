"""The order of samples as a sampler, or a function of the user's, gives it: what it gave, and what it needs to go on as it would have.

The first answer for an epoch is that epoch's order. It lies in the checkpoint, as the numbers that are left, while it is no function of
(seed, epoch): while the sampler draws from a generator of its own, or has changed since the loop began, or would answer otherwise by now.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import RandomSampler, Sampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

from harness.data.generator_objects import generator_state, is_generator, set_generator_state
from harness.data.plan import Position
from harness.errors import UsageError

TORCHS = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)  # no second answer is asked of them
PLAIN = (bool, int, float, str, type(None))
CHEAP_S = 0.02  # what takes longer is kept, not asked again
MOST_BYTES = 2 << 30
DEPTH, MOST_FUNCTIONS = 3, 20
ANOTHER_EPOCH = 7919
KEPT = "kept"  # of an order: it lies in the checkpoint

State = dict[str, Any]


class GivenOrder:
    """What gives the order, with all that can be found of its state: generators, and plain attributes of a sampler."""

    def __init__(self, ask: Callable[[int], Sequence[int]], sampler: Any = None, dataset: Any = None) -> None:
        self._ask, self._sampler, self._dataset = ask, sampler, dataset
        self._told, self._as_built = set[str](), dict[str, str]()  # what the epoch's number changes; a digest of each part of the state
        self._last: tuple[int, Sequence[int]] | None = None  # an epoch, and its order
        self._kept: tuple[int, Sequence[int]] | None = None  # the same, of the checkpoint
        self._moves, self._is_costly = False, False  # whether an answer changes the state, or takes long

    def begin(self, answer: Callable[[int], list[int]], epoch: int, before: Mapping[str, Any] | None) -> str:
        """Ask twice by `answer`, to see that what is found is all there is, and take over what a checkpoint's data has; returns what has
        to be said, or "". Raises UsageError for an order that could not be found again."""
        self._as_built = self._digests()
        if hasattr(self._sampler, "set_epoch"):
            state = self._state()
            self._sampler.set_epoch(ANOTHER_EPOCH)
            self._told = {path for path, digest in self._digests().items() if digest != self._as_built.get(path)}
            self._put_back(state)
        if type(self._sampler) not in TORCHS and not self._is_costly:
            self._prove(answer, epoch)
        saved = (before or {}).get("order")
        if saved is None:
            return "the checkpoint has not kept the order of its epoch: the rest of it is dealt out anew" if before and self._moves else ""
        if left := [int(sample) for sample in saved["left"]]:
            self._kept = saved["epoch"], [left[0]] * saved["used"] + left
        lost = self._put_back(saved["state"])
        return f"the sampler has no {', '.join(lost)} any more, which the checkpoint holds" if lost else ""

    @property
    def handled(self) -> set[int]:
        """The sampler, and all of its state that is kept with an order, by identity."""
        return {id(self._sampler), *(id(thing) for *_, thing in self._parts())}

    def length(self, answer: Callable[[int], list[int]]) -> int:
        """How many samples an epoch has."""
        if hasattr(self._sampler, "__len__"):
            return len(self._sampler)
        state = self._state()
        samples = answer(0)
        self._put_back(state)
        return len(samples)

    def _prove(self, answer: Callable[[int], list[int]], epoch: int) -> None:
        state = self._state()
        first = answer(epoch)
        self._put_back(state)
        second = [] if self._is_costly else answer(epoch)
        self._put_back(state)
        if first != second and not self._is_costly:
            raise UsageError(
                "the order of samples cannot be found again after a restart",
                f"found: {self._name} gives two orders for epoch {epoch}, and no generator that it draws from",
                "Let it draw from the global generators, which are set for each epoch, from a generator that is an attribute of it,"
                " or from one made of the epoch's number.",
            )

    @property
    def _name(self) -> str:
        return f"a {type(self._sampler).__name__}" if self._sampler is not None else "order="

    def __call__(self, epoch: int) -> Sequence[int]:
        """The order of an epoch."""
        if self._kept is not None and self._kept[0] == epoch:
            return self._kept[1]
        before, began_at = self._digests(), time.perf_counter()
        samples = self._ask(epoch)
        self._is_costly = time.perf_counter() - began_at > CHEAP_S
        self._moves = self._moves or any(digest != before.get(path) for path, digest in self._digests().items() if path not in self._told)
        return samples

    def begun(self, epoch: int, samples: Sequence[int]) -> None:
        """That is the order of an epoch that begins."""
        self._last = epoch, samples

    def kept(self, position: Position, again: Callable[[int], list[int]]) -> dict[str, Any]:
        """What a checkpoint's data has of it there; {} while a new process would find the same by itself. Raises UsageError."""
        now = self._digests()
        changed = {path for path, digest in now.items() if digest != self._as_built.get(path) and path not in self._told}
        inside = self._last is not None and position.sample > 0 and self._last[0] == position.epoch
        if not (changed or self._moves or (inside and self._is_other(position.epoch, again))):
            return {}
        left = self._last[1][position.sample :] if inside and self._last else []
        if 4 * len(left) > MOST_BYTES:
            raise UsageError(
                "the order of this epoch is too long to be kept",
                f"found: {len(left)} numbers are left of what {self._name} gave",
                "Let the order follow from the epoch's number alone.",
            )
        numbers = torch.tensor(left, dtype=torch.int64 if left and max(left) >= 1 << 31 else torch.int32)
        state = {path: value for path, value in self._state().items() if path in changed}
        return {"epoch": position.epoch, "used": position.sample, "left": numbers, "state": state}

    def _is_other(self, epoch: int, again: Callable[[int], list[int]]) -> bool:
        if self._kept is not None and self._kept[0] == epoch:
            return True
        if type(self._sampler) in TORCHS:
            return False
        if self._is_costly:
            return True
        state = self._state()
        try:
            return self._last is None or again(epoch) != list(self._last[1])
        except Exception:  # noqa: BLE001 # the user's: whatever it is, the order is kept
            return True
        finally:
            self._put_back(state)

    def _digests(self) -> dict[str, str]:
        return {path: _digest(_value(thing)) for path, _, _, thing in self._parts()}

    def _state(self) -> State:
        return {path: _value(thing) for path, _, _, thing in self._parts()}

    def _put_back(self, state: Mapping[str, Any]) -> list[str]:
        """Set all that differs, in place where that can be; returns what is not there any more."""
        parts = {path: (owner, key, thing) for path, owner, key, thing in self._parts()}
        for path, value in state.items():
            if path in parts and _digest(_value(parts[path][2])) != _digest(value):
                _set(*parts[path], value)
        return [path for path in state if path not in parts]

    def _parts(self) -> Iterator[tuple[str, Any, str, Any]]:
        if self._sampler is not None:
            yield from _attributes(self._sampler, "", {id(self._dataset)}, DEPTH)
        else:
            yield from _drawn_from(self._ask, set())


def _attributes(owner: Any, path: str, met: set[int], depth: int) -> Iterator[tuple[str, Any, str, Any]]:
    """A sampler's generators and plain attributes, and those of samplers in it; of other things that it holds only the generators."""
    if id(owner) in met or depth == 0:
        return
    met.add(id(owner))
    for name, thing in getattr(owner, "__dict__", {}).items():
        if id(thing) in met:
            continue
        if is_generator(thing) or ((not path or isinstance(owner, Sampler)) and _is_plain(thing)):
            yield path + name, owner, name, thing
        elif hasattr(thing, "__dict__") and not isinstance(thing, type | torch.nn.Module) and not callable(thing):
            yield from _attributes(thing, f"{path}{name}.", met, depth - 1)


def _drawn_from(function: Any, met: set[int]) -> Iterator[tuple[str, Any, str, Any]]:
    """The generators that a function draws from: of its closure, its defaults, its object, or the globals that it names."""
    if id(function) in met or len(met) > MOST_FUNCTIONS:
        return
    met.add(id(function))
    things: dict[Any, Any] = dict(getattr(getattr(function, "__self__", function), "__dict__", {}))
    if isinstance(function, functools.partial):
        things |= {"function": function.func} | dict(enumerate(function.args)) | function.keywords
    elif hasattr(function, "__code__"):
        scope = inspect.getclosurevars(inspect.unwrap(function))
        things |= dict(scope.globals) | dict(scope.nonlocals) | dict(enumerate(function.__defaults__ or ()))
    for name, thing in things.items():
        if is_generator(thing):
            yield str(name), None, "", thing
        elif inspect.isfunction(thing) or inspect.ismethod(thing) or isinstance(thing, functools.partial):
            yield from ((f"{name}.{path}", *rest) for path, *rest in _drawn_from(thing, met))


def _is_plain(thing: Any) -> bool:
    if isinstance(thing, list | tuple):
        return all(_is_plain(item) for item in thing)
    if isinstance(thing, dict):
        return all(isinstance(key, PLAIN) and _is_plain(item) for key, item in thing.items())
    if isinstance(thing, np.ndarray):
        return bool(thing.dtype != object)
    return type(thing) in PLAIN or type(thing) is torch.Tensor


def _value(thing: Any) -> Any:
    """A copy of a part's state, as plain data."""
    if is_generator(thing):
        return generator_state(thing)
    if isinstance(thing, torch.Tensor):
        return thing.detach().clone()
    if isinstance(thing, np.ndarray):
        return thing.copy()
    if isinstance(thing, list | tuple):
        return type(thing)(_value(item) for item in thing) if type(thing) in (list, tuple) else thing
    return {key: _value(item) for key, item in thing.items()} if isinstance(thing, dict) else thing


def _set(owner: Any, name: str, thing: Any, value: Any) -> None:
    if is_generator(thing):
        set_generator_state(name or "of order=", thing, value)
    elif isinstance(thing, torch.Tensor) and isinstance(value, torch.Tensor) and thing.shape == value.shape:
        with torch.no_grad():
            thing.copy_(value)
    elif isinstance(thing, np.ndarray) and thing.shape == tuple(value.shape):
        thing[...] = np.asarray(value)
    elif type(thing) is list and isinstance(value, list):
        thing[:] = value
    else:
        setattr(owner, name, np.asarray(value) if isinstance(thing, np.ndarray) else value)


def _digest(value: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    _into(digest, value)
    return digest.hexdigest()


def _into(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        digest.update(f"{tuple(value.shape)}".encode() + value.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, list | tuple):
        for item in (len(value), *value):
            _into(digest, item)
    elif isinstance(value, dict):
        _into(digest, [part for item in value.items() for part in item])
    else:
        digest.update(repr(value).encode() + b"\0")
