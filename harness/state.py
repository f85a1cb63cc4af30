"""What survives a kill: the one list of everything that a checkpoint captures, and how it is given back.

    step, epoch, loss, metrics    where the run stands, and how well
    N_state_dict                  every tracked object N: modules (without DDP's "module." prefix), optimizers, schedulers,
                                  gradient scaler, averaged weights, and whatever else has state_dict and load_state_dict
    rng                           one entry a rank: Python, NumPy, torch's CPU generator, each GPU's generator
    data                          epoch, position in it, seed, global batch size, dataset size and fingerprint; for iterable
                                  datasets the state of each rank's own iterator
    state                         the user's plain values (`run.state`)
    best                          the best value so far of the metric that checkpoints are ranked by
    config                        the settings of the run
    format_version                of this list

Capturing never moves or changes a live module. Everything is plain: tensors, numbers, strings, lists, tuples and dicts, so
that it loads with `weights_only=True`.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from harness.data.order import seed_cpu, seed_of
from harness.ddp import plain
from harness.errors import NonFiniteError, UsageError, printable

Seen = dict[Any, tuple[torch.Tensor, torch.Tensor]]  # where a tensor lies -> itself and what is saved of it
MOST_BITS = 2000  # of a number; the safe loader reads none that is much longer
PLAIN = (bool, int, float, complex, str, bytes, type(None))


def capture(tracked: Mapping[str, Any]) -> dict[str, Any]:
    """The state of every tracked object under `NAME_state_dict`, on the CPU.

    CPU tensors are not copied: write them out, or copy them, before the next update. Raises UsageError for state that is not
    plain data, NonFiniteError for parameters that are not finite (buffers may hold -inf masks).
    """
    for name, thing in tracked.items():
        _check_finite(name, plain(thing))
    seen: Seen = {}
    return {f"{name}_state_dict": _to_cpu(plain(thing).state_dict(), f"{name}_state_dict", seen) for name, thing in tracked.items()}


def _check_finite(name: str, thing: Any) -> None:
    if isinstance(thing, nn.Module):
        parameters = [(key, parameter) for key, parameter in thing.named_parameters() if not is_lazy(parameter)]
        broken = [key for key, parameter in parameters if not torch.isfinite(parameter).all()]
        if broken:
            raise NonFiniteError(
                f"{name} is not saved: parameters are not finite",
                f"found: NaN or Inf in {', '.join(broken[:5])}{' …' if len(broken) > 5 else ''}",
                "The newest checkpoint is from before. Lower the learning rate, clip gradients (train.clip_norm), or check the data.",
            )


def _to_cpu(value: Any, where: str, seen: Seen) -> Any:
    if isinstance(value, torch.Tensor):
        return value if is_lazy(value) else _tensor_to_cpu(value.detach(), seen)
    if isinstance(value, Mapping):
        items = ((_key(key, where), _to_cpu(item, f"{where}[{key!r}]", seen)) for key, item in value.items())
        if not isinstance(value, OrderedDict):
            return Counter(dict(items)) if isinstance(value, Counter) else dict(items)
        ordered = OrderedDict(items)
        if hasattr(value, "_metadata"):  # the versions of a module's parts: without them it takes the state for an old one
            ordered._metadata = value._metadata  # type: ignore[attr-defined]
        return ordered
    if isinstance(value, list | tuple):
        parts = [_to_cpu(item, f"{where}[{at}]", seen) for at, item in enumerate(value)]
        return tuple(parts) if isinstance(value, tuple) else parts
    if isinstance(value, np.ndarray) and value.dtype != object:
        return torch.from_numpy(value.copy())
    value = value.item() if isinstance(value, np.generic) else value
    if type(value) in PLAIN and not (isinstance(value, int) and value.bit_length() > MOST_BITS):
        return value
    raise UsageError(
        f"{where} cannot be saved as plain data",
        f"found: a {type(value).__module__}.{type(value).__qualname__}",
        "Checkpoints hold tensors, numbers, strings, lists and dicts: change the object's state_dict() accordingly.",
    )


def _key(key: Any, where: str) -> Any:
    if isinstance(key, tuple):
        return tuple(_key(part, where) for part in key)
    return key if type(key) is torch.dtype else _to_cpu(key, f"{where}, key {key!r}", {})


def _tensor_to_cpu(tensor: torch.Tensor, seen: Seen) -> torch.Tensor:
    """Tied tensors stay tied; a view does not drag the whole storage that it looks into along.

    The original is kept beside its copy, so that its address is not given to another tensor while it stands for this one.
    """
    if tensor.layout is not torch.strided:
        return tensor.to("cpu", copy=True)
    storage = tensor.untyped_storage()
    place = (storage.data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device)
    if place not in seen:
        whole = tensor.numel() * tensor.element_size() == storage.nbytes()
        seen[place] = tensor, tensor if tensor.device.type == "cpu" and whole else tensor.to("cpu", copy=True).contiguous()
    return seen[place][1]


def plain_data(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with NumPy scalars turned into numbers. Raises UsageError naming what is not plain data."""
    return {name: _to_cpu(value, name, {}) for name, value in values.items()}


def restore(tracked: Mapping[str, Any], classes: Mapping[str, str], payload: Mapping[str, Any], source: str) -> None:
    """Give every tracked object its state back, bit for bit. Raises UsageError, before anything is changed, on a mismatch.

    `classes` are the class names at the time of saving; a state dict alone does not tell which optimizer it is of.
    """
    for name, thing in tracked.items():
        state = payload.get(f"{name}_state_dict")
        if state is None:
            saved = [key.removesuffix("_state_dict") for key in payload if key.endswith("_state_dict")]
            raise UsageError(
                f"{source} has no {name!r}", f"found: {', '.join(saved)}", "Track the same names as before, or take a new run directory."
            )
        if name in classes and classes[name] != class_name(thing):
            raise UsageError(
                f"{name} is not what {source} was saved from", f"found: {class_name(thing)}, expected: {classes[name]}",
                "Put the old one back, or take a new run directory.",
            )  # fmt: skip
        if isinstance(plain(thing), nn.Module) and not any(is_lazy(value) for value in plain(thing).state_dict().values()):
            check_tensors(name, plain(thing).state_dict(), state, source)
    for name, thing in tracked.items():
        restore_one(name, plain(thing), payload[f"{name}_state_dict"], source)


def restore_one(name: str, thing: Any, state: Any, source: str) -> None:
    """Give one object its state back, bit for bit. Raises UsageError."""
    try:
        thing.load_state_dict(state)
    except (ValueError, KeyError, RuntimeError) as error:
        raise UsageError(
            f"{name} does not take the state in {source}", f"found: {str(error).splitlines()[0]}",
            "The model or its optimizer has changed: put the old one back, or take a new run directory.",
        ) from error  # fmt: skip
    if isinstance(thing, torch.optim.Optimizer):
        _mend_casts(thing, state)


def _mend_casts(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """`Optimizer.load_state_dict` casts state to its parameter's dtype; state that was kept in another one is put back as saved."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in state["state"]:
            optimizer.state[parameter] = _mended(optimizer.state[parameter], state["state"][number])


def _mended(held: Any, saved: Any) -> Any:
    if isinstance(saved, torch.Tensor) and isinstance(held, torch.Tensor):
        return held if held.dtype == saved.dtype else saved.to(held.device)
    if isinstance(saved, Mapping) and isinstance(held, Mapping):
        return {key: _mended(held[key], value) for key, value in saved.items()}
    if isinstance(saved, list | tuple) and isinstance(held, list | tuple):
        return type(saved)(_mended(mine, value) for mine, value in zip(held, saved, strict=True))
    return held


def class_name(thing: Any) -> str:
    """The name of the class inside the shells of DDP and torch.compile."""
    return type(plain(thing)).__name__


def check_tensors(name: str, own: Mapping[str, Any], saved: Mapping[str, Any], source: str) -> None:
    """Raises UsageError with a table of missing, unexpected and mis-shaped tensors, if there are any."""
    if rows := mismatches(own, saved):
        raise UsageError(
            f"{source} is a checkpoint of another {name}: {len(rows)} tensor(s) differ",
            mismatch_table(rows),
            "Put the old model back, or take a new run directory.",
        )


def mismatches(own: Mapping[str, Any], saved: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """What keeps one state dict from taking the place of another: (missing | unexpected | mis-shaped, name, own shape, saved shape)."""

    def shape(value: Any) -> str:
        if not isinstance(value, torch.Tensor):
            return type(value).__name__
        odd = "" if value.layout is torch.strided and not value.is_quantized else " quantized" if value.is_quantized else " sparse"
        return ("x".join(map(str, value.shape)) or "scalar") + (" without data" if value.is_meta else odd)

    rows = [("missing", key, shape(own[key]), "-") for key in own if key not in saved]
    rows += [("unexpected", key, "-", shape(saved[key])) for key in saved if key not in own]
    return rows + [
        ("mis-shaped", key, shape(own[key]), shape(saved[key])) for key in own if key in saved and shape(own[key]) != shape(saved[key])
    ]


def mismatch_table(rows: list[tuple[str, str, str, str]]) -> str:
    """The mismatches for people, the first forty."""
    width = max(len(row[1]) for row in rows)
    lines = [f"  {'':<10}  {'tensor':<{width}}  {'this model':>14}  {'checkpoint':>14}"]
    lines += [f"  {kind:<10}  {printable(key):<{width}}  {mine:>14}  {theirs:>14}" for kind, key, mine, theirs in rows[:40]]
    return "\n".join([*lines, f"  … and {len(rows) - 40} more"] if len(rows) > 40 else lines)


def as_built(thing: Any) -> dict[str, Any]:
    """The settings that an optimizer or a scheduler has before anything is restored into it; {} for anything else."""
    inner = plain(thing)
    if isinstance(inner, torch.optim.Optimizer):
        return {"param_groups": [{key: value for key, value in group.items() if key != "params"} for group in inner.param_groups]}
    return copy.deepcopy(inner.state_dict()) if isinstance(inner, torch.optim.lr_scheduler.LRScheduler) else {}


def check(tracked: Mapping[str, Any]) -> None:
    """Raises UsageError, at the start and not at the first save, for state that cannot be saved or would be left behind."""
    for name, thing in tracked.items():
        _to_cpu(plain(thing).state_dict(), f"{name}_state_dict", {})
    _check_covered(tracked)


def _check_covered(tracked: Mapping[str, Any]) -> None:
    """Raises UsageError if an optimizer updates parameters that no tracked object holds: they would start anew at each resume."""
    things = {name: plain(thing) for name, thing in tracked.items()}
    held: set[int] = set()
    for thing in things.values():
        if not isinstance(thing, torch.optim.Optimizer):
            _collect_addresses(thing.state_dict(), held)
    for name, thing in things.items():
        if isinstance(thing, torch.optim.Optimizer):
            groups = [parameter for group in thing.param_groups for parameter in group["params"] if not is_lazy(parameter)]
            lost = [tuple(parameter.shape) for parameter in groups if parameter.numel() and parameter.data_ptr() not in held]
            if lost:
                raise UsageError(
                    f"{name} updates {len(lost)} parameter(s) that belong to nothing tracked: they would be lost at a restart",
                    f"found: shapes {', '.join(map(str, lost[:5]))}",
                    "Track the module that holds them too.",
                )


def _collect_addresses(value: Any, into: set[int]) -> None:
    if isinstance(value, torch.Tensor):
        if value.layout is torch.strided and not is_lazy(value):
            into.add(value.data_ptr())
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect_addresses(item, into)
    elif isinstance(value, list | tuple):
        for item in value:
            _collect_addresses(item, into)


def untracked_schedule(tracked: Mapping[str, Any]) -> str | None:
    """The name of a tracked optimizer whose learning rate a scheduler moves while no scheduler is tracked; else None."""
    things = {name: plain(thing) for name, thing in tracked.items()}
    if any("scheduler" in type(thing).__module__ or "lr_scheduler" in type(thing).__module__ for thing in things.values()):
        return None
    moved = (n for n, t in things.items() if isinstance(t, torch.optim.Optimizer) and any("initial_lr" in g for g in t.param_groups))
    return next(moved, None)


def apply_override(built: Mapping[str, Any], tracked: Mapping[str, Any]) -> list[str]:
    """Put the settings that optimizers and schedulers were built with over those that came out of a checkpoint.

    `built` holds what `as_built` gave before the restore. A learning rate that a schedule has moved keeps its place in the
    schedule: it is scaled by new over old initial value. How far a scheduler has come is kept. Returns what changed, in words.
    """
    said = []
    for name, thing in tracked.items():
        if isinstance(plain(thing), torch.optim.Optimizer):
            for at, (group, fresh) in enumerate(zip(plain(thing).param_groups, built[name]["param_groups"], strict=True)):
                before = {key: value for key, value in group.items() if key != "params"}
                group.update(_overridden(before, fresh))
                said += [f"{name}[{at}].{key}: {before[key]} -> {group[key]}" for key in before if before[key] != group[key]]
        elif isinstance(plain(thing), torch.optim.lr_scheduler.LRScheduler):
            progress = (
                "last_epoch",
                "_step_count",
                "_last_lr",
                "_is_initial",
                "T_cur",
                "_schedulers",
                "best",
                "num_bad_epochs",
                "cooldown_counter",
            )
            values = vars(plain(thing))
            for key, value in built[name].items():
                settings = value if isinstance(value, list) else [value]  # base_lrs, say; not the functions of a LambdaLR
                if key not in progress and all(type(item) in (int, float, str, bool) for item in settings) and values.get(key) != value:
                    said.append(f"{name}.{key}: {values.get(key)} -> {value}")
                    values[key] = value
    return said


def _overridden(group: dict[str, Any], fresh: Mapping[str, Any]) -> dict[str, Any]:
    new = {key: value for key, value in fresh.items() if key != "params"}
    old_initial, new_initial = group.get("initial_lr"), fresh.get("initial_lr")
    if old_initial and new_initial is not None:
        new["lr"] = group["lr"] if new_initial == old_initial else group["lr"] * (new_initial / old_initial)
    return new


def rng_state() -> dict[str, Any]:
    """The state of this process's generators, as plain data."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Give this process's generators a state back."""
    python, numpy_state = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": numpy_state["key"].numpy().astype(np.uint32), "pos": numpy_state["pos"]},
            "has_gauss": numpy_state["has_gauss"],
            "gauss": numpy_state["gauss"],
        }
    )
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextlib.contextmanager
def kept_generators() -> Iterator[None]:
    """What happens inside leaves this process's generators, those of its GPUs too, as they were."""
    generators = rng_state()
    try:
        yield
    finally:
        set_rng_state(generators)


def seed_rank(*parts: int | str) -> None:
    """Seed all generators of this process from the parts; give a rank its own by naming it."""
    seed = seed_of(*parts)
    seed_cpu(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
