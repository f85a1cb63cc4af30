"""What a program changes of its modules while it trains, and no `state_dict` tells: what is frozen, modes, plain attributes, and buffers
that are not persistent; and the same of its optimizers, if they are of classes that are not torch's.

Kept is the difference between now and the module as built, with the value as built beside it:

    {"model": {"body.0": {"training": {"built": True, "now": False}, "p": {"built": 0.1, "now": 0.3}},
               "body.1": {"weight.requires_grad": …, "buffer mask": {"built": DIGEST, "now": tensor}}}}

As built is what the loop begins with, before anything of a checkpoint is put into it: a program may freeze a part after `track`. What a
module's own `load_state_dict` has set by then counts as it was before that. A restore sets only what had changed, and only where the
value as built is the one that it was then: otherwise the program is another one, and what it says stands.

Taken are plain values, and tensors that were there from the beginning. Of what else changes the names are told (`unkept`).
"""

from __future__ import annotations

import copy
import hashlib
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from harness.distributed import ddp
from harness.tracking.sameness import is_same
from harness.untracked.unkept_values import UnkeptValues, is_programs

BARE = frozenset(vars(nn.Module())) - {"training"}  # what every module has for its own bookkeeping
OF_OPTIMIZERS = frozenset(vars(torch.optim.SGD([torch.zeros(1)], 0.1))) | {"step", "_opt_called"}  # the last two by schedulers
PLAIN = (bool, int, float, complex, str, bytes, type(None))
MOST_ITEMS = 1000  # in a list or dict that is looked into
COMPARED_BYTES = 64 << 10  # a tensor up to this size, on the CPU, is compared whole; a greater one by what PyTorch has counted
SAMPLE = 8192  # elements of a greater one that its digest is made of
REQUIRES_GRAD, BUFFER = ".requires_grad", "buffer "
ABSENT = object()
Place = tuple[weakref.ref[torch.Tensor], int] | None  # which tensor, and how often it was written to; None for none
Values = dict[str, Any]  # of one module, by attribute; a tensor's is its digest
Built = dict[str, dict[str, Values]]  # by object and module
Part = nn.Module | torch.optim.Optimizer
Changed = dict[str, dict[str, dict[str, dict[str, Any]]]]  # by object, module and attribute: "built" and "now", if there was any, is any


def parts(thing: Any) -> list[tuple[str, Any]]:
    """A module's parts with their paths, itself first; an optimizer, unless its class is torch's."""
    if isinstance(inner := ddp.plain(thing), torch.optim.Optimizer):
        return [] if _is_torchs(inner) else [("", inner)]
    return list(ddp.parts(thing))


def as_built(tracked: Mapping[str, Any]) -> Built:
    """The values of every tracked module, and digests of its tensors that no `state_dict` tells of."""
    return {
        name: {path: _values(part) | {key: _digest(tensor) for key, tensor in _tensors(part).items()} for path, part in parts(thing)}
        for name, thing in tracked.items()
    }


class Attributes:
    """The attributes of all tracked modules, as seen from one rank."""

    def __init__(self) -> None:
        self._before: Built = {}  # as tracked, before anything was restored
        self._after: Built = {}  # as tracked, after it was
        self._built: Built = {}
        self._tracked: Mapping[str, Any] = {}
        self._watched: dict[str, list[_Watched]] = {}
        self.unkept = UnkeptValues()

    def before_restore(self, tracked: Mapping[str, Any]) -> None:
        """These are as built: nothing was restored into them so far."""
        self._before |= as_built(tracked)

    def after_restore(self, tracked: Mapping[str, Any]) -> None:
        """All of these have their state back."""
        self._after = as_built(tracked)

    def begin(self, tracked: Mapping[str, Any]) -> None:
        """The loop begins: what is changed from now on is kept."""
        self._tracked, self._built = tracked, as_built(tracked)
        for name, of_parts in self._before.items():
            for path, before in of_parts.items():
                here, after = self._built.get(name, {}).get(path, {}), self._after.get(name, {}).get(path, {})
                for key, value in before.items():
                    if key in here and key in after and is_same(here[key], after[key]):
                        here[key] = value  # if it is another now, the module's own load_state_dict has made it so
        self._watched = {name: [_Watched(path, part) for path, part in parts(thing)] for name, thing in tracked.items()}
        for name, watched in self._watched.items():
            for one in watched:
                kept = {key: value for key in one.tensors if (value := _value(one.part, key)) is not None}  # what one becomes may be odd
                self.unkept.begin(_joined(name, one.path), one.odd_values() | kept)

    def state(self) -> Changed | None:
        """What differs from the modules as built, with tensors copied to the CPU; None if nothing does."""
        changed = {name: found for name in self._tracked if (found := self._changed(name))}
        if self.unkept.is_time():
            for name, watched in self._watched.items():
                for one in watched:
                    self.unkept.look(_joined(name, one.path), one.odd_values())
        return changed or None

    def _changed(self, name: str) -> dict[str, dict[str, dict[str, Any]]]:
        if any(one.has_other_parts() for one in self._watched[name]):
            known = {id(one.part): one for one in self._watched[name]}
            self._watched[name] = [known.get(id(part), _Watched(path, part)) for path, part in parts(self._tracked[name])]
        found = {}
        for one in self._watched[name]:
            built = self._built[name].get(one.path)
            if built is not None and one.may_have_changed() and (differs := one.differences(built)):
                found[one.path] = differs
        return found

    def restore(self, changed: Changed) -> list[str]:
        """Set again what had changed; returns, in words, what stays as the program has it now."""
        said = []
        for name, of_parts in changed.items():
            modules = dict(parts(self._tracked.get(name)))
            for path, of_part in of_parts.items():
                here = self._built.get(name, {}).get(path, {})
                for key, kept in of_part.items():
                    then, now, built = kept.get("built", ABSENT), kept.get("now", ABSENT), here.get(key, ABSENT)
                    if path in modules and is_same(then, built):
                        _set(modules[path], key, now, kept.get("device"))
                    elif not is_same(now, built):
                        was = f"was built as {_spelled(then)} and had become {_spelled(now)}"
                        said.append(f"{_joined(name, path, key)} {was}; it is built as {_spelled(built)} now, and that stands")
        return said


class _Watched:
    """One module, or optimizer, as the loop found it, and how to tell quickly that it still is."""

    def __init__(self, path: str, part: Part) -> None:
        self.path, self.part = path, part
        own = {key: value for key, value in vars(part).items() if _is_looked_at(part, key)}
        self.tensors = {key: (_place(tensor), _copied(tensor)) for key, tensor in _tensors(part).items()}
        odd = {key: id(value) for key, value in own.items() if not _is_plain(value)}
        mutable = [key for key, value in own.items() if _is_mutable(value)]
        self._same = {key: value for key, value in own.items() if key not in odd and key not in mutable}
        self._odd = [(key, number) for key, number in odd.items() if key not in self.tensors]
        self._has_mutable = any(key not in odd for key in mutable)
        self._kinds, self._children = list(map(type, vars(part).values())), list(_own(part, "_modules").values())
        self._trained = self._which_are_trained()

    def _which_are_trained(self) -> list[bool]:
        return [parameter is not None and parameter.requires_grad for parameter in _own(self.part, "_parameters").values()]

    def odd_values(self) -> dict[str, Any]:
        """The attributes that are no plain data and no tensor that is kept, and whose change would be the program's doing."""
        buffers = {key: _value(self.part, key) for key in self.tensors if key.startswith(BUFFER)}
        return {key: value for key, value in buffers.items() if value is not None and not _is_simple(value)} | {
            key: value
            for key, value in vars(self.part).items()
            if not (_is_simple(value) if key in self.tensors else _is_small(value))
            and _is_looked_at(self.part, key)
            and not (key.startswith("_") and not is_programs(type(self.part)))
            and not _is_plain(value)
        }

    def has_other_parts(self) -> bool:
        return list(_own(self.part, "_modules").values()) != self._children

    def may_have_changed(self) -> bool:
        """Whether something may be another than it was when the loop began, or when this was first looked at."""
        now = vars(self.part)
        return (
            self._has_mutable
            or list(map(type, now.values())) != self._kinds  # True is equal to 1
            or not self._same.items() <= now.items()
            or (bool(self._odd) and any(id(now.get(key)) != number for key, number in self._odd))
            or (bool(self._trained) and self._which_are_trained() != self._trained)
            or (bool(self.tensors) and any(map(self._is_another, self.tensors)))
        )

    def differences(self, built: Values) -> dict[str, dict[str, Any]]:
        """What is another than as built, but for what cannot be kept."""
        now, found = _values(self.part), dict[str, dict[str, Any]]()
        made = [
            key for key, value in vars(self.part).items() if key not in self.tensors and _is_small(value) and _is_looked_at(self.part, key)
        ]
        for key in dict.fromkeys((*built, *now, *made)):
            if (key in made or self._has_changed(key, built, now)) and (kept := self._kept(key, now)) is not None:
                found[key] = ({"built": built[key]} if key in built else {}) | kept
        return found

    def _has_changed(self, key: str, built: Values, now: Values) -> bool:
        if key in self.tensors:
            return self._is_another(key)
        if key in now:
            return not is_same(built.get(key, ABSENT), now[key])
        return key not in vars(self.part) and not key.endswith(REQUIRES_GRAD)

    def _kept(self, key: str, now: Values) -> dict[str, Any] | None:
        """What an attribute is now, as a checkpoint has it: nothing of one that is gone; None if it cannot be kept."""
        if (tensor := _tensor(self.part, key)) is not None:
            elsewhere = {"device": tensor.device.type} if _device(self.part, tensor).type != tensor.device.type else {}
            return {"now": tensor.detach().to("cpu", copy=True)} | elsewhere
        if key in now:
            return {"now": now[key]}
        return {} if _value(self.part, key) is None and key not in vars(self.part) else None

    def _is_another(self, key: str) -> bool:
        """Whether this tensor was replaced, or written to; if it is small, whether its values are others."""
        now, (place, before) = _tensor(self.part, key), self.tensors[key]
        if now is None or before is None or (now.shape, now.dtype, now.device) != (before.shape, before.dtype, before.device):
            return not _is_at(place, now)
        return not torch.equal(now.detach(), before)


def _is_torchs(thing: Any) -> bool:
    return type(thing).__module__.partition(".")[0] == "torch"


def _own(part: Part, name: str) -> dict[str, Any]:
    """A module's own parameters, buffers or parts; an optimizer has none."""
    return getattr(part, name) if isinstance(part, nn.Module) else {}


def _values(part: Part) -> Values:
    """All of a module that is plain, copied."""
    own = {
        key: copy.deepcopy(value) if type(value) in (list, dict, tuple) else value
        for key, value in vars(part).items()
        if _is_looked_at(part, key) and _is_plain(value)
    }
    return own | {
        f"{key}{REQUIRES_GRAD}": parameter.requires_grad for key, parameter in _own(part, "_parameters").items() if parameter is not None
    }


def _is_looked_at(part: Part, key: str) -> bool:
    """Whether this attribute may be the program's: what torch keeps for itself in its own classes is not."""
    return key not in (BARE if isinstance(part, nn.Module) else OF_OPTIMIZERS) and not (key.startswith("_") and _is_torchs(part))


def _tensors(part: Part) -> dict[str, torch.Tensor | None]:
    """The buffers that are not persistent, be they empty, and the tensors that are plain attributes and of no graph."""
    found = {key: value for key, value in vars(part).items() if issubclass(type(value), torch.Tensor) and _is_looked_at(part, key)}
    buffers = {f"{BUFFER}{key}": _own(part, "_buffers").get(key) for key in sorted(_own(part, "_non_persistent_buffers_set"))}
    return {key: value for key, value in (found | buffers).items() if value is None or _is_simple(value)}


def _value(part: Part, key: str) -> Any:
    """What an attribute or a buffer is, whatever that may be; None of one that is gone."""
    return _own(part, "_buffers").get(key.removeprefix(BUFFER)) if key.startswith(BUFFER) else vars(part).get(key)


def _tensor(part: Part, key: str) -> torch.Tensor | None:
    value = _value(part, key)
    return value if value is not None and _is_simple(value) else None


def _is_small(value: Any) -> bool:
    """Whether a tensor that an attribute became is kept: a greater one is a cache more often than a state, and is told when it changes."""
    return _is_simple(value) and value.nbytes <= COMPARED_BYTES


def _device(part: Part, otherwise: torch.Tensor) -> torch.device:
    """Where a module's parameters are, or those that an optimizer updates."""
    return next(part.parameters() if isinstance(part, nn.Module) else iter(_updated(part)), otherwise).device


def _is_simple(tensor: Any) -> bool:
    return type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.requires_grad and not tensor.is_meta


def _place(tensor: torch.Tensor | None) -> Place:
    return None if tensor is None else (weakref.ref(tensor), 0 if tensor.is_inference() else tensor._version)


def _is_at(place: Place, tensor: torch.Tensor | None) -> bool:
    """Whether this is still that tensor, and nothing that PyTorch has counted was written to it."""
    if place is None or tensor is None:
        return place is None and tensor is None
    return place[0]() is tensor and place[1] == (0 if tensor.is_inference() else tensor._version)


def _copied(tensor: torch.Tensor | None) -> torch.Tensor | None:
    is_small = tensor is not None and tensor.is_cpu and tensor.nbytes <= COMPARED_BYTES
    return tensor.detach().clone() if tensor is not None and is_small else None


def _digest(tensor: torch.Tensor | None) -> str:
    """Of a tensor's kind and values; of a great one only some."""
    if tensor is None:
        return "none"
    flat = tensor.detach().reshape(-1)
    some = flat[:: max(1, len(flat) // SAMPLE)].cpu().contiguous()
    values = hashlib.blake2b(some.view(torch.uint8).numpy().tobytes() if len(some) else b"", digest_size=8).hexdigest()
    return f"{'x'.join(map(str, tensor.shape)) or 'scalar'} {tensor.dtype} {values}"


def _is_plain(value: Any) -> bool:
    if type(value) in PLAIN:
        return True
    if type(value) in (list, tuple):
        return len(value) <= MOST_ITEMS and all(map(_is_plain, value))
    return type(value) is dict and len(value) <= MOST_ITEMS and all(type(k) in PLAIN and _is_plain(item) for k, item in value.items())


def _is_mutable(value: Any) -> bool:
    return type(value) in (list, dict) or (type(value) is tuple and any(map(_is_mutable, value)))


def _set(part: Part, key: str, now: Any, device: str | None) -> None:
    if key.endswith(REQUIRES_GRAD) and isinstance(
        parameter := _own(part, "_parameters").get(key.removesuffix(REQUIRES_GRAD)), nn.Parameter
    ):
        parameter.requires_grad_(now)
    elif now is ABSENT and not key.startswith(BUFFER):
        delattr(part, key)
    elif not isinstance(now, torch.Tensor):
        _own(part, "_buffers").update({key.removeprefix(BUFFER): None}) if key.startswith(BUFFER) else setattr(part, key, now)
    else:
        before = _tensor(part, key)
        own = now.to(device or (before.device if before is not None else _device(part, now)), copy=True)
        if before is not None and (before.shape, before.dtype) == (own.shape, own.dtype):
            with torch.no_grad():
                before.copy_(own)
        elif key.startswith(BUFFER):
            _own(part, "_buffers")[key.removeprefix(BUFFER)] = own
        else:
            setattr(part, key, own)


def _updated(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _spelled(value: Any) -> str:
    text = "nothing" if value is ABSENT else f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))
