"""Fit the weights of a file into a module: by name and shape, renamed where names have changed. What does not fit is said in a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness import preemption, state
from harness.distributed.ddp import plain
from harness.errors import UsageError
from harness.exchange import files, recognise
from harness.exchange.recognise import MODULE, Part
from harness.task import named

if TYPE_CHECKING:
    from harness.run import Run


def load_weights(
    module: nn.Module,
    source: str | Path,
    *,
    which: str | int = "newest",
    strict: bool = True,
    rename: Mapping[str, str] | None = None,
    part: str | None = None,
    trust: bool = False,
) -> str:
    """Load the weights in `source`, a run, a checkpoint or anybody's file, into a module; returns a table of what was loaded.

    `rename` holds regular expressions for names in the file and what to put in their place. Without `strict` what fits is taken.
    `part` names the state dict to take where there are several. Raises UsageError, before anything is changed, if something does not
    fit, or nothing; DamagedError, StorageError.
    """
    if not isinstance(module, nn.Module):
        raise UsageError("load_weights takes a module, and then a file", f"found: first a {type(module).__name__}")
    loaded = files.read_any(source, which, trust=trust)
    chosen = choose(["model"], recognise.recognise(loaded), {"model": part} if part else {}, loaded.file.where)["model"]
    return fit({"model": (module, chosen)}, strict=strict, rename=rename or {}, where=loaded.file.where)


def warm_start(
    run: Run,
    modules: nn.Module | Mapping[str, nn.Module],
    source: str | Path,
    *,
    strict: bool = True,
    rename: Mapping[str, str] | None = None,
) -> None:
    """Let a run that has no checkpoint of its own begin with the weights in `source`, as `load_weights` takes them; the writer reads
    them, the others get them from it. Call it before `run.track`. Collective: every rank must call it."""
    if run.origin is not None:
        run.say("harness: init.from is not read: the run has a checkpoint of its own; for other weights take another run directory")
        return
    mine = named(modules, "model")

    def load() -> str:
        loaded = files.read_any(source)
        where = loaded.file.where
        chosen = choose(list(mine), recognise.recognise(loaded), {}, where, partly=not strict)
        return fit({name: (mine[name], part) for name, part in chosen.items()}, strict=strict, rename=rename or {}, where=where)

    run.say(f"harness: {run.world.on_writer(load, give_up=preemption.requested)}")
    for module in mine.values():
        run.world.share_state(plain(module))


def choose(names: Sequence[str], parts: Sequence[Part], called: Mapping[str, str], where: str, *, partly: bool = False) -> dict[str, Part]:
    """Which state dict of a file is for which module: as `called` says, by its name, or because there is only one. With `partly` a
    module may find none. Raises UsageError."""
    modules = [part for part in parts if part.kind == MODULE]
    found: dict[str, Part] = {}
    for name in names:
        wanted = [part for part in modules if name in called and called[name] in (part.key, part.name)]
        if not wanted and name not in called:
            wanted = [part for part in modules if part.name == name] or (modules if len(names) == len(modules) == 1 else [])
        if wanted:
            found[name] = wanted[0]
        elif not partly or name in called:
            held = ", ".join(part.key or part.name for part in modules)
            raise UsageError(
                f"{where}: which of its state dicts is {name!r} cannot be told"
                + (f" ({called[name]!r} is none)" if name in called else ""),
                f"found: {held}",
                f"Name it: --as {name}={modules[0].key or modules[0].name} of `harness import`, part={modules[0].key!r} in Python.",
            )
    if not found:
        raise UsageError(f"{where} has nothing for {', '.join(names)}", f"found: {', '.join(part.key or part.name for part in modules)}")
    return found


def fit(pairs: Mapping[str, tuple[nn.Module, Part]], *, strict: bool, rename: Mapping[str, str], where: str) -> str:
    """Load each part into its module, all or none; returns what was done, as a table. Raises UsageError."""
    saved = {name: _renamed(state.to_live(plain(module), part.value), rename, where) for name, (module, part) in pairs.items()}
    fits = {name: _fitted(plain(module), saved[name][0]) for name, (module, _) in pairs.items()}
    rows = [(kind, _full(name, key, fits), mine, theirs) for name, (_, _, found) in fits.items() for kind, key, mine, theirs in found]
    count = sum(len(taken) for _, taken, _ in fits.values())
    total = sum(len(whole) for whole, _, _ in fits.values())
    idle = [pattern for pattern in rename if not any(pattern in used for _, used in saved.values())]
    idle_note = f"init.rename: nothing is called like {', '.join(map(repr, idle))}." if idle else ""
    if not count or (strict and rows):
        hints = [_hint(plain(module), saved[name][0]) for name, (module, _) in pairs.items()]
        insist = "init.strict=false (strict=False) takes what fits." if count else "Nothing fits: is it the file of another model?"
        what = f"{where} does not fit: {count} of {total} tensors do, {len(rows)} do not"
        raise UsageError(what, state.mismatch_table(rows), " ".join(filter(None, [idle_note, *hints, insist])))
    for name, (module, _) in pairs.items():
        plain(module).load_state_dict(fits[name][0])
    notes = [part.note for _, part in pairs.values() if part.note] + ([idle_note] if idle else [])
    text = "; ".join([f"loaded {count} of {total} tensors from {where}", *notes])
    return f"{text}\n{state.mismatch_table(rows)}" if rows else text


def _full(name: str, key: str, several: Mapping[str, Any]) -> str:
    return f"{name}: {key}" if len(several) > 1 else key


def _renamed(saved: Mapping[str, Any], rename: Mapping[str, str], where: str) -> tuple[dict[str, Any], set[str]]:
    """A state dict under its new names, and the patterns that something was called like."""
    renamed, used = {key: key for key in saved}, set()
    for pattern, replacement in rename.items():
        try:
            used |= {pattern} if any(re.search(pattern, new) for new in renamed.values()) else set()
            renamed = {key: re.sub(pattern, replacement, new) for key, new in renamed.items()}
        except (re.error, IndexError) as error:
            raise UsageError(f"init.rename: {pattern!r} -> {replacement!r} cannot be used", f"found: {error}") from None
    if len(set(renamed.values())) < len(renamed):
        twice = next(new for new in renamed.values() if list(renamed.values()).count(new) > 1)
        raise UsageError(f"init.rename gives two tensors of {where} one name", f"found: {twice}")
    return {new: saved[key] for key, new in renamed.items()}, used


def _fitted(module: nn.Module, saved: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[tuple[str, str, str, str]]]:
    """The module's whole state with what fits put in, the names of that, and what does not fit."""
    own = module.state_dict()
    saved = dict(saved)
    places = {_place(own[key]): key for key in own if key in saved and isinstance(own[key], torch.Tensor)}
    for key in own:
        if key not in saved and isinstance(own[key], torch.Tensor) and _place(own[key]) in places:
            saved[key] = saved[places[_place(own[key])]]  # tied weights, which safetensors keeps once
    rows = state.mismatches(own, saved)
    if {key for kind, key, _, _ in rows if kind == "missing"} == {key for key in own if key.endswith("num_batches_tracked")}:
        rows = [row for row in rows if row[0] != "missing"]  # of before PyTorch 0.4.1, whose BatchNorm did not count
    bad = {key for _, key, _, _ in rows}
    taken = [key for key in own if key in saved and key not in bad]
    return {key: saved[key] if key in taken else own[key] for key in own}, taken, rows


def _place(tensor: torch.Tensor) -> tuple[int, int, tuple[int, ...]]:
    empty = tensor.numel() == 0 or tensor.layout is not torch.strided
    return (id(tensor), 0, ()) if empty else (tensor.data_ptr(), int(tensor.storage_offset()), tuple(tensor.shape))


def _hint(module: nn.Module, saved: Mapping[str, Any]) -> str:
    """A renaming that lets more tensors fit: a prefix that one side has and the other has not."""
    own = module.state_dict()
    heads = dict.fromkeys(f"{key.partition('.')[0]}." for key in saved if "." in key)
    candidates = {f"'^{re.escape(head)}': ''": {key.removeprefix(head): value for key, value in saved.items()} for head in heads}
    for head in dict.fromkeys(f"{key.partition('.')[0]}." for key in own if "." in key):
        candidates[f"'^': '{head}'"] = {f"{head}{key}": value for key, value in saved.items()}
    count = len(_fitted(module, saved)[1])
    best, fitting = max(
        ((text, len(_fitted(module, new)[1])) for text, new in candidates.items()), key=lambda pair: pair[1], default=("", 0)
    )
    return f'With "init.rename={{{best}}}" {fitting} of {len(own)} would.' if fitting > count else ""
