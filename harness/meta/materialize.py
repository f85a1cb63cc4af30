"""Give a model that was made on the device meta memory and values, one module after the other.

The modules are taken children first, as `nn.Module.apply` does and as constructors draw. Those of
torch begin with what their constructors would have given them under the same seed.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.distributed import dtensors
from harness.distributed.parts import own_box
from harness.distributed.ranks import gathered
from harness.errors import UsageError
from harness.meta import uninitialised

OWN = ("reset_parameters", "_reset_parameters")  # the latter: torch's modules for attention
GENERATORS = ("torch's", "the GPU's", "Python's", "NumPy's")
Places = list[tuple[MutableMapping[str, Any], str]]  # `_parameters` or `_buffers`, and a key


def materialize(
    model: nn.Module,
    init: Callable[[nn.Module], object] | None = None,
    *,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Initialise a model made under `torch.device("meta")`, after `fully_shard` or without it.

    Of one module after the other, children first, the tensors on meta are made whole, its
    `reset_parameters()` is called if it has one, then `init(module)`, and this rank's parts are
    kept: a rank needs memory for its parts and the whole tensors of one module. Any number of ranks
    begins bit for bit as one process does that calls this without sharding. Parameters stay the
    same objects, for optimizers too; of tied ones the first module's initialiser counts.

    Initialisers draw from the global generators, on each rank what they draw in one process. So
    these must be seeded alike on all ranks (after `harness.init` they are), and are alike after it.

    Collective if the model is sharded: every rank must call it.

    Args:
        model: The model, changed in place. Tensors that are not on meta stay as they are.
        init: Function that initialises the direct parameters and buffers of a module, as for
            `nn.Module.apply`; called for each module that has some on meta, itself or below.
        device: Where tensors are made. None: the current GPU if there is one, else the CPU.

    Returns:
        The model.

    Raises:
        UsageError: Nothing writes a parameter or a buffer (a table that the constructor has
            computed, say); ranks have drawn unlike numbers; or a module initialises sharded tensors
            of its submodules by more than one value.
    """
    if names := materialized(model, init, device):
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise UsageError(
            f"{len(names)} parameter(s) or buffer(s) have no initialiser",
            f"found: neither reset_parameters() nor init writes {', '.join(names[:8])}{more}",
            "Write them in reset_parameters() of their module, or in init: "
            "harness.materialize(model, init). What the constructor computes (tables in buffers) "
            "is to be computed again there.",
        )
    return model


def place(modules: Mapping[str, nn.Module], device: torch.device) -> None:
    """Move modules to a device, but for those with tensors on meta: these are made there later."""
    for module in modules.values():
        if not _is_on_meta(module):
            module.to(device)


def materialize_task(
    modules: Mapping[str, nn.Module], copies: Mapping[str, nn.Module], device: torch.device
) -> None:
    """Initialise the modules of a task that are on meta; copies for averages only get memory.

    What has no initialiser is left to `init.from` or a checkpoint, and refused by `run.track` if
    they do not have it. Collective: every rank must call it.
    """
    for module in filter(_is_on_meta, modules.values()):
        materialized(module, None, device)
        module.to(device)  # what was not on meta beside what was
    for module in copies.values():
        _give_memory(_children_first(module), device)


def materialized(
    model: nn.Module,
    init: Callable[[nn.Module], object] | None,
    device: torch.device | str | None,
) -> list[str]:
    """Do what `materialize` does, and return the names of what no initialiser has written."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    before = _digests()
    parts = list(_children_first(model))
    on_meta = {id(part): places for _, part in parts if (places := _places(part))}
    if not on_meta:
        return []
    _give_memory(parts, device)
    begun = set[int]()  # ids of the tensors that a module has initialised
    for path, part in parts:
        if any(id(below) in on_meta for below in part.modules()):
            places = on_meta.get(id(part), [])
            with torch.device(device), torch.no_grad(), _whole(path, places, begun), _OwnOnly(path):
                own = next((name for name in OWN if hasattr(part, name)), None)
                if own and places:
                    getattr(part, own)()
                if init is not None:
                    init(part)
    names = uninitialised.names_of(model)
    if not dtensors.holds_sharded([model]):
        return names
    everyones = gathered((before, _digests(), names))
    _check_drawn([(start, end) for start, end, _ in everyones])
    return list(dict.fromkeys(name for _, _, found in everyones for name in found))


def _children_first(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield each module once, after its path; those in a module come before it."""
    known = set[int]()

    def walk(part: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        known.add(id(part))
        for name, child in part.named_children():
            if id(child) not in known:
                yield from walk(child, f"{path}.{name}" if path else name)
        yield path, part

    return walk(module, path)


def _is_on_meta(module: nn.Module) -> bool:
    """Return whether any parameter or buffer of a module is on meta."""
    return any(_places(part) for part in module.modules())


def _places(part: nn.Module) -> Places:
    """Return where a module itself holds tensors on meta."""
    stores: tuple[MutableMapping[str, Any], ...] = part._parameters, part._buffers
    return [
        (store, key)
        for store in stores
        for key, tensor in store.items()
        if tensor is not None and tensor.is_meta
    ]


def _give_memory(parts: Iterable[tuple[str, nn.Module]], device: torch.device | str) -> None:
    """Give what is on meta memory on a device: of a sharded tensor, this rank's part.

    It is `to_empty` for tensors on meta alone, which also keeps the objects and what is tied. A
    module with an `_apply` of its own (under `fully_shard`, an RNN) has to hear of it.

    Args:
        parts: all modules with their paths, children first.
        device: the device.
    """
    made = dict[int, tuple[torch.Tensor, torch.Tensor]]()  # a buffer may be in several modules

    def with_memory(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor
        if isinstance(tensor, nn.Parameter):  # it stays the object that it is
            return torch.empty_like(tensor, device=device)
        if id(tensor) not in made:
            made[id(tensor)] = tensor, torch.empty_like(tensor, device=device)
        return made[id(tensor)][1]

    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for _, part in parts:
            places = _places(part)
            if places or type(part)._apply is not nn.Module._apply:
                part._apply(with_memory, recurse=False)  # type: ignore[no-untyped-call]
            for store, key in places:
                uninitialised.fill(store[key])
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)


@contextlib.contextmanager
def _whole(path: str, places: Places, begun: set[int]) -> Iterator[None]:
    """Have a module hold whole tensors while its initialiser runs; keep this rank's parts of them.

    Args:
        path: the path of the module, for messages.
        places: where it holds the tensors that were on meta.
        begun: ids of the tensors that a module before has initialised, to which these are added.
            For them the initialiser gets others, which are dropped.
    """
    held = [store[key] for store, key in places]
    for (store, key), tensor in zip(places, held, strict=True):
        if dtensors.is_sharded(tensor) or id(tensor) in begun:
            local = dtensors.plain(tensor)
            whole = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=local.device
            )
            uninitialised.fill(whole)
            is_parameter = isinstance(tensor, nn.Parameter)
            store[key] = nn.Parameter(whole, tensor.requires_grad) if is_parameter else whole
    try:
        yield
        made = [store.get(key) for store, key in places]
    finally:
        for (store, key), tensor in zip(places, held, strict=True):
            store[key] = tensor
    for (store, key), tensor, new in zip(places, held, made, strict=True):
        if new is not None and new is not tensor and id(tensor) not in begun:
            _keep(f"{path}.{key}" if path else key, store, key, new)
        begun.add(id(tensor))


def _keep(name: str, store: MutableMapping[str, Any], key: str, new: torch.Tensor) -> None:
    """Keep what an initialiser has written: this rank's part, or a buffer that it has replaced."""
    tensor = store[key]
    if not dtensors.is_sharded(tensor) and not isinstance(tensor, nn.Parameter):
        store[key] = new.to(tensor.device)
        return
    if new.shape != tensor.shape:
        raise UsageError(
            f"the initialiser of {name} has changed its shape",
            f"found: {tuple(new.shape)}, expected: {tuple(tensor.shape)}",
            "Build the module with the shape that it is to have.",
        )
    box = own_box(name, tensor) if dtensors.is_sharded(tensor) else None
    if box is None:
        tensor.copy_(new)
    elif not uninitialised.is_uninitialised(new) or new.is_floating_point():
        slices = tuple(slice(start, end) for start, end in zip(box.begin, box.end, strict=True))
        dtensors.local_of(tensor).copy_(new[slices])


class _OwnOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuse work of an initialiser on sharded tensors: those of its module itself are whole.

    On those of submodules a random operator would draw for the part alone, and a sum be rounded as
    the ranks are. One value for all elements (`zeros_`) is the same on any number of ranks.

    Args:
        path: the path of the module, for messages.
    """

    def __init__(self, path: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._path = path or "the model itself"

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        aten: Any = torch.ops.aten
        alike = (aten.detach, aten.alias, aten.fill_, aten.zero_)
        if function.overloadpacket not in alike and any(
            map(dtensors.is_sharded, tree_leaves((args, kwargs)))
        ):
            raise UsageError(
                f"the initialiser of {self._path} initialises sharded tensors of its submodules",
                f"found: {function} on one of them, whose values would depend on the ranks",
                "Initialise only the module's own: harness.materialize(model, init) calls init for "
                "each module, as model.apply(init) does.",
            )
        return function(*args, **(kwargs or {}))


def _digests() -> list[str]:
    """Return a digest of the state of each global generator, in the order of `GENERATORS`."""
    numpys: Any = np.random.get_state()
    states = (
        torch.get_rng_state().numpy().tobytes(),
        torch.cuda.get_rng_state().numpy().tobytes() if torch.cuda.is_initialized() else b"",  # type: ignore[no-untyped-call]
        pickle.dumps(random.getstate()),
        pickle.dumps([numpys[1].tobytes(), *numpys[2:]]),
    )
    return [hashlib.sha256(state).hexdigest() for state in states]


def _check_drawn(everyones: list[tuple[list[str], list[str]]]) -> None:
    """Check that initialisers have drawn the same numbers on all ranks.

    Args:
        everyones: the digests before and after, rank by rank.

    Raises:
        UsageError: They have not, so that the parts are those of unlike models.
    """
    for at, name in enumerate(GENERATORS):
        ways = [(before[at], after[at]) for before, after in everyones]
        is_drawn = any(before != after for before, after in ways)
        if is_drawn and len(set(ways)) > 1:
            other = next(rank for rank, way in enumerate(ways) if way != ways[0])
            raise UsageError(
                "the ranks have initialised parts of unlike models",
                f"found: {name} generator of rank {other} is not where that of rank 0 is",
                "Seed the ranks alike before harness.materialize (torch.manual_seed(1)), and draw "
                "as much on each of them.",
            )
