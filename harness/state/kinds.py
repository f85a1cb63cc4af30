"""Replace values that are not plain data by plain data, and rebuild them from it.

A checkpoint holds plain values. If one of them represents something else (a NumPy array, a
`defaultdict`, a tensor of its own class), its path and its kind are stored beside the values, under
`kinds`. Rebuilding never imports anything that a file names. It makes only the kinds that this
module lists: kinds of the standard library and of NumPy, and tensor classes that the program itself
has imported.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from harness.distributed.dtensors import is_sharded, local_of
from harness.errors import UsageError

Where = str | tuple[Any, Any]  # a name, or the path of a container and a key or index in it
PLAIN = (bool, int, float, complex, str, bytes, type(None))
NATIVE = (torch.dtype, torch.device)  # torch's own loader supports them
FACTORIES: dict[Any, str] = {
    None: "None",
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
    list: "list",
    tuple: "tuple",
    dict: "dict",
}
IN_MODULE = "run.track(…, own=torch.nn.ParameterList([tensor]))"
CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, tuple, deque, torch.Size)
MADE = {name: factory for factory, name in FACTORIES.items()}


def spelled(where: Where) -> str:
    """Return a path in the form used in messages and files: state['seen'][3]."""
    return where if isinstance(where, str) else f"{spelled(where[0])}[{where[1]!r}]"


def taken_apart(value: Any) -> tuple[str, Any] | None:
    """Return the kind of a value that is not plain, and what to write in its place; else None.

    What is written in its place may contain further values that are not plain. The result is None
    for a value of no supported kind.
    """
    if isinstance(value, torch.Tensor):
        return _of_tensor(value)
    if isinstance(value, np.ndarray):
        return _of_array(value) if type(value) in (np.ndarray, np.memmap) else None
    if isinstance(value, np.generic):
        number = value.item()
        name = type(value).__name__ if isinstance(number, str | bytes) else value.dtype.name
        return (f"np.{name}", number) if type(number) in PLAIN else None
    if isinstance(value, defaultdict):
        made_by = next(
            (name for factory, name in FACTORIES.items() if factory is value.default_factory), None
        )
        return (f"defaultdict {made_by}", dict(value)) if made_by else None
    if type(value) is deque:
        return f"deque {value.maxlen}", list(value)
    return ("torch.Size", tuple(value)) if type(value) is torch.Size else None


def _of_array(array: np.ndarray[Any, Any]) -> tuple[str, Any] | None:
    own = array.copy(order="K")  # the memory order determines the order of sums
    try:
        return "ndarray", torch.from_numpy(own)
    except (TypeError, ValueError):  # text, dates, foreign byte order
        if array.dtype.hasobject or array.dtype.names:
            return None
        raw = np.frombuffer(own.tobytes(), dtype=np.uint8).copy()
        return f"ndarray {array.dtype.str} {'x'.join(map(str, array.shape))}", torch.from_numpy(raw)


def _of_tensor(tensor: torch.Tensor) -> tuple[str, Any] | None:
    if tensor.is_nested:
        held: Any = tensor
        is_plain = tensor.layout is torch.strided or (
            held._lengths is None and held._ragged_idx == 1
        )
        return (
            ("nested" if tensor.layout is torch.strided else "nested jagged", list(tensor.unbind()))
            if is_plain
            else None
        )
    kind = f"tensor {type(tensor).__module__}.{type(tensor).__qualname__}"
    if is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        parts = {name: getattr(tensor, name) for name in names}
        return kind, {
            "parts": parts,
            "context": context,
            "size": list(tensor.shape),
            "stride": list(tensor.stride()),
        }
    # A class with operators of its own may hold its numbers anywhere, or none.
    is_plain = type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    is_whole = is_plain and not vars(tensor)
    return (kind, tensor.as_subclass(torch.Tensor)) if is_whole else None


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors that a tensor consists of: the tensor itself if it is plain.

    Of a sharded tensor it is the part of this rank.
    """
    if type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_nested:
        return [tensor]
    if is_sharded(tensor):
        return [local_of(tensor)]
    if tensor.is_nested:
        return list(tensor.unbind())
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in parts_of(getattr(tensor, name))]
    return [tensor]


def rebuilt(payload: Mapping[str, Any], root: str) -> Any:
    """Return the value under a key of a checkpoint, with all kinds rebuilt.

    Raises:
        UsageError: for a kind that cannot be rebuilt.
    """
    of_root = {
        path: kind
        for path, kind in payload.get("kinds", {}).items()
        if path == root or path.startswith(f"{root}[")
    }
    return _rebuilt(payload[root], root, of_root) if of_root else payload[root]


def _rebuilt(value: Any, where: Where, kinds: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        items = {key: _rebuilt(item, (where, key), kinds) for key, item in value.items()}
        made: Any = type(value)(items) if isinstance(value, OrderedDict | Counter) else items
        if hasattr(value, "_metadata"):
            made._metadata = value._metadata
    elif isinstance(value, list | tuple) and type(value) in (list, tuple):
        made = type(value)(_rebuilt(item, (where, at), kinds) for at, item in enumerate(value))
    else:
        made = value
    kind = kinds.get(path := spelled(where))
    return made if kind is None else _made(path, kind, made)


def _made(path: str, kind: str, value: Any) -> Any:
    word, _, rest = kind.partition(" ")
    try:
        if word == "ndarray":
            return _array(rest, value)
        if word == "defaultdict":
            return defaultdict(MADE[rest], value)
        if word == "deque":
            return deque(value, None if rest == "None" else int(rest))
        if word == "nested":
            return torch.nested.nested_tensor(value, layout=torch.jagged if rest else torch.strided)
        if word == "tensor":
            return _tensor(_class(rest), value)
        if word == "torch.Size":
            return torch.Size(value)
        if word in ("np.str_", "np.bytes_"):
            return np.str_(value) if word == "np.str_" else np.bytes_(value)
        if word.startswith("np.") and word[3:] in np.sctypeDict:
            return np.dtype(word[3:]).type(value)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UsageError(
            f"{path} cannot be made a {kind} again",
            f"found: {error}",
            "Was it written by a newer harness?",
        ) from error
    raise UsageError(
        f"{path} is of a kind that this harness does not know",
        f"found: {kind}",
        "Read it with a newer harness.",
    )


def _array(rest: str, value: torch.Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any]
    if not rest:
        array = value.numpy().copy(order="K")
        return array
    dtype, _, shape = rest.partition(" ")
    items = np.frombuffer(value.numpy().tobytes(), dtype=np.dtype(dtype))
    array = items.reshape([int(n) for n in shape.split("x") if n]).copy()
    return array


def _tensor(made: Any, value: Any) -> Any:
    """Rebuild a tensor of its own class, in its own memory.

    Code that copies the state therefore need not know how to copy such a tensor.
    """
    if isinstance(value, torch.Tensor):
        return value.clone().as_subclass(made)
    size, stride = torch.Size(value["size"]), tuple(value["stride"])
    return made.__tensor_unflatten__(
        {name: part.clone() for name, part in value["parts"].items()},
        value["context"],
        size,
        stride,
    )


def copied(value: Any) -> Any:
    """Return a deep copy of a result of `rebuilt`.

    Nested tensors and tensors of their own class are not copied again: they have their own memory.
    """
    return copy.deepcopy(value, {id(tensor): tensor for tensor in _of_own_kind(value)})


def _of_own_kind(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if type(value) is not torch.Tensor or value.is_nested:
            yield value
    elif isinstance(value, Mapping | list | tuple | deque):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _of_own_kind(item)


def _class(name: str) -> type[torch.Tensor]:
    """Return the tensor class of this name that the program has imported.

    Raises:
        KeyError: if there is none.
    """
    for known in _subclasses(torch.Tensor):
        if f"{known.__module__}.{known.__qualname__}" == name:
            return known
    raise KeyError(
        f"no class of tensors is called {name} in this program: "
        "import its package before run.track(…)"
    )


def _subclasses(base: type[torch.Tensor]) -> Iterator[type[torch.Tensor]]:
    for each in base.__subclasses__():
        yield each
        yield from _subclasses(each)


def check_values(value: Any, where: Where) -> None:
    """Check that a value comes back from a checkpoint with its type.

    Raises:
        UsageError: for user-defined container classes, and for values that cannot be saved.
    """
    if type(value) in PLAIN:
        return
    if isinstance(value, Mapping | list | tuple | deque):
        if type(value) not in CONTAINERS:
            plain = (
                "tuple"
                if isinstance(value, tuple)
                else "dict"
                if isinstance(value, Mapping)
                else "list"
            )
            raise UsageError(
                f"{spelled(where)} would not come back as what it is",
                f"found: a {type(value).__module__}.{type(value).__qualname__}",
                f"Put plain values there: {plain}(value), say.",
            )
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            if type(item) not in PLAIN:
                check_values(item, (where, key))
        if not isinstance(value, defaultdict) or taken_apart(value):
            return
    elif _is_trained(value):
        raise UsageError(
            f"{spelled(where)} would not come back as what it is",
            f"found: a {type(value).__module__}.{type(value).__qualname__} that requires a"
            " gradient, of which only the numbers can be saved",
            "Put tensor.detach() there. What is trained belongs into a tracked module: "
            f"{IN_MODULE}.",
        )
    elif _is_leaf(value):
        return
    raise not_plain(where, value)


def _is_trained(value: Any) -> bool:
    """Return whether a value is a parameter, or a tensor that could be one.

    Not the result of a forward pass, of which the program can use no more than the numbers.
    """
    is_leaf = isinstance(value, torch.Tensor) and value.is_leaf
    return isinstance(value, torch.nn.Parameter) or (is_leaf and value.requires_grad)


def _is_leaf(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return type(value) in (np.ndarray, np.memmap) and not (
            value.dtype.hasobject or value.dtype.names
        )
    return isinstance(value, (torch.Tensor, *NATIVE)) or taken_apart(value) is not None


def not_plain(where: Where, value: Any) -> UsageError:
    """Return the error for a value that no checkpoint can hold."""
    path, description = (
        spelled(where),
        f"found: a {type(value).__module__}.{type(value).__qualname__}",
    )
    if isinstance(value, defaultdict):
        description += (
            " whose factory is "
            f"{getattr(value.default_factory, '__qualname__', value.default_factory)}"
        )
    if isinstance(value, set | frozenset):
        description += ", which has no order that could be kept"
    change = "Change the object's state_dict() accordingly."
    if path.startswith(("state[", "own[", "config")):
        change = (
            "Keep what it is made of: vars(value), tuple(value), sorted(value), str(value), say."
        )
    held = "Checkpoints hold tensors, arrays, numbers, strings, lists and dicts."
    return UsageError(f"{path} cannot be saved as plain data", description, f"{held} {change}")
