"""Load the weights of a file into a module, by name and shape.

Tensors can be renamed where names have changed. A table lists what does not fit.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness import preemption, state
from harness.distributed import dtensors
from harness.distributed.reshard import sharded_alike
from harness.distributed.shared_tensors import share_state
from harness.distributed.wrappers import unwrap
from harness.errors import UsageError
from harness.exchange import files, recognise
from harness.exchange.recognise import MODULE, Part
from harness.hf.safetensors_file import let_go, read_alone
from harness.meta.uninitialised import check_memory
from harness.task import named

if TYPE_CHECKING:
    from harness.run import Run

INSIST = "init.strict=false (strict=False) takes what fits."
NOTHING_FITS = "Nothing fits: is it the file of another model?"


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
    """Load the weights of a run, a checkpoint or any model file into a module.

    Args:
        module: The module to load into.
        source: Path or URL of a run, a checkpoint or a file.
        which: Checkpoint of a run: "newest", "best" or a step.
        strict: Refuse the file unless everything fits; otherwise load what fits.
        rename: Regular expressions for tensor names in the file, and their replacements.
        part: Name or key of the state dict to load, where the file holds several.
        trust: Let a pickle run the code that it names.

    Returns:
        A text with the number of tensors loaded and a table of those that do not fit.

    Raises:
        UsageError: With `strict`, something does not fit; without it, nothing fits; or the source
            cannot be used. The module has not been changed.
        DamagedError: The file is damaged or cut short.
        StorageError: The store cannot be read.
    """
    if not isinstance(module, nn.Module):
        raise UsageError(
            "load_weights takes a module, and then a file",
            f"found: first a {type(module).__name__}",
        )
    maps = dtensors.holds_sharded([module])
    loaded = files.read_any(source, which, trust=trust, weights_only=True, maps=maps)
    where, called = loaded.file.where, {"model": part} if part else {}
    chosen = choose(["model"], recognise.recognise(loaded), called, where)["model"]
    return fit({"model": (module, chosen)}, strict=strict, rename=rename or {}, where=where)


def warm_start(
    run: Run,
    modules: nn.Module | Mapping[str, nn.Module],
    source: str | Path,
    *,
    strict: bool = True,
    rename: Mapping[str, str] | None = None,
) -> None:
    """Initialise a run that has no checkpoint of its own from the weights in a file.

    Rank 0 (the writer) reads the file and broadcasts the weights to the other ranks; into a module
    that is sharded, each rank reads its parts. Call it before `run.track`. Collective: every rank
    must call it.

    Args:
        run: The run. If it resumes from a checkpoint, the file is not read.
        modules: The module, or the modules by name.
        source: Path or URL of a run, a checkpoint or a file.
        strict: Refuse the file unless everything fits; otherwise load what fits.
        rename: Regular expressions for tensor names in the file, and their replacements.
    """
    if run.origin is not None:
        run.say(
            "harness: init.from is not read: the run has a checkpoint of its own; for other "
            "weights take another run directory"
        )
        return
    mine = named(modules, "model")
    is_sharded = dtensors.holds_sharded(mine.values())

    def load() -> str:
        loaded = files.read_any(source, weights_only=True, maps=is_sharded)
        where = loaded.file.where
        chosen = choose(list(mine), recognise.recognise(loaded), {}, where, partly=not strict)
        pairs = {name: (mine[name], part) for name, part in chosen.items()}
        return fit(pairs, strict=strict, rename=rename or {}, where=where)

    if is_sharded:  # each rank reads what it holds
        text = _same(run.world.on_each(load, give_up=preemption.requested), source)
    else:
        text = run.world.on_writer(load, give_up=preemption.requested)
        for module in mine.values():
            share_state(unwrap(module), run.world)
    run.say(f"harness: {text}")


def _same(texts: Sequence[str], source: str | Path) -> str:
    """Return what all ranks have loaded. Raises UsageError if they differ."""
    if unlike := [text for text in texts if text != texts[0]]:
        raise UsageError(
            f"the ranks have not read the same weights from {source}",
            f"found: {unlike[0]}; {texts[0]} (rank 0)",
            "Name a file that all nodes see, and that nobody writes.",
        )
    return texts[0]


def choose(
    names: Sequence[str],
    parts: Sequence[Part],
    called: Mapping[str, str],
    where: str,
    *,
    partly: bool = False,
) -> dict[str, Part]:
    """Assign the state dicts of a file to modules.

    A state dict is assigned because `called` names it, because it has the module's name, or because
    there is only one state dict and one module.

    Args:
        names: The names of the modules.
        parts: The recognised parts of the file.
        called: Key or name of the part to use, by module name.
        where: Name of the file in error messages.
        partly: Allow modules without a state dict, unless `called` names one for them.

    Raises:
        UsageError: A module has no state dict, or with `partly` none of them has one.
    """
    modules = [part for part in parts if part.kind == MODULE]
    chosen: dict[str, Part] = {}
    for name in names:
        wanted = [
            part for part in modules if name in called and called[name] in (part.key, part.name)
        ]
        if not wanted and name not in called:
            wanted = [part for part in modules if part.name == name] or (
                modules if len(names) == len(modules) == 1 else []
            )
        if wanted:
            chosen[name] = wanted[0]
        elif not partly or name in called:
            held = ", ".join(part.key or part.name for part in modules)
            raise UsageError(
                f"{where}: which of its state dicts is {name!r} cannot be told"
                + (f" ({called[name]!r} is none)" if name in called else ""),
                f"found: {held}",
                f"Name it: --as {name}={modules[0].key or modules[0].name} of `harness import`, "
                f"part={modules[0].key!r} in Python.",
            )
    if not chosen:
        raise UsageError(
            f"{where} has nothing for {', '.join(names)}",
            f"found: {', '.join(part.key or part.name for part in modules)}",
        )
    return chosen


def fit(
    pairs: Mapping[str, tuple[nn.Module, Part]],
    *,
    strict: bool,
    rename: Mapping[str, str],
    where: str,
) -> str:
    """Load each part into its module, all of them or none.

    Args:
        pairs: Module and part, by module name.
        strict: Refuse the parts unless everything fits; otherwise load what fits.
        rename: Regular expressions for tensor names in the file, and their replacements.
        where: Name of the file in messages.

    Returns:
        A text with the number of tensors loaded and a table of those that do not fit.

    Raises:
        UsageError: With `strict`, something does not fit; without it, nothing fits; `rename` is
            not valid, or a module is on meta. No module has been changed.
    """
    for module, _ in pairs.values():
        check_memory(unwrap(module))
    saved = {
        name: with_new_names(unwrap(module), part.value, rename, where)
        for name, (module, part) in pairs.items()
    }
    fits = {name: _fitted(unwrap(module), saved[name][0]) for name, (module, _) in pairs.items()}
    rows = [
        (kind, _full(name, key, fits), mine, theirs)
        for name, (_, _, misfits) in fits.items()
        for kind, key, mine, theirs in misfits
    ]
    count = sum(len(taken) for _, taken, _ in fits.values())
    total = sum(len(whole) for whole, _, _ in fits.values())
    idle = [pattern for pattern in rename if not any(pattern in used for _, used in saved.values())]
    idle_note = f"init.rename: nothing is called like {', '.join(map(repr, idle))}." if idle else ""
    if not count or (strict and rows):
        hints = [_hint(unwrap(module), saved[name][0]) for name, (module, _) in pairs.items()]
        problem = f"{where} does not fit: {count} of {total} tensors do, {len(rows)} do not"
        notes = [idle_note, *hints, INSIST if count else NOTHING_FITS]
        raise UsageError(problem, state.mismatch_table(rows), " ".join(filter(None, notes)))
    for name, own in ((name, unwrap(module)) for name, (module, _) in pairs.items()):
        own.load_state_dict(sharded_alike(own, fits[name][0], read_alone, let_go))
    notes = [part.note for _, part in pairs.values() if part.note] + ([idle_note] if idle else [])
    text = "; ".join([f"loaded {count} of {total} tensors from {where}", *notes])
    return f"{text}\n{state.mismatch_table(rows)}" if rows else text


def _full(name: str, key: str, several: Mapping[str, Any]) -> str:
    return f"{name}: {key}" if len(several) > 1 else key


def with_new_names(
    module: nn.Module, saved: Mapping[str, Any], rename: Mapping[str, str], where: str
) -> tuple[Mapping[str, Any], set[str]]:
    """Return the state dict under the module's names, and the patterns that matched a name."""
    renamed, used = {key: key for key in saved}, set()
    for pattern, replacement in rename.items():
        try:
            used |= {pattern} if any(re.search(pattern, new) for new in renamed.values()) else set()
            renamed = {key: re.sub(pattern, replacement, new) for key, new in renamed.items()}
        except (re.error, IndexError) as error:
            raise UsageError(
                f"init.rename: {pattern!r} -> {replacement!r} cannot be used", f"found: {error}"
            ) from None
    if len(set(renamed.values())) < len(renamed):
        twice = next(new for new in renamed.values() if list(renamed.values()).count(new) > 1)
        raise UsageError(f"init.rename gives two tensors of {where} one name", f"found: {twice}")
    made = OrderedDict((new, saved[key]) for key, new in renamed.items())
    if hasattr(saved, "_metadata"):
        paths: dict[str, str] = {}
        for key, new in renamed.items():
            while key and key.rpartition(".")[2] == new.rpartition(".")[2]:
                key, new = _path(key), _path(new)
                paths.setdefault(key, new)
        made._metadata = {  # type: ignore[attr-defined]
            paths.get(path, path): version for path, version in saved._metadata.items()
        }
    return state.to_live(module, made), used


def _fitted(
    module: nn.Module, saved: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str], list[tuple[str, str, str, str]]]:
    """Merge the tensors that fit into the module's state dict, without loading it.

    Returns:
        The module's complete state dict with the saved values that fit and the versions of the
        submodules that they are of, their names, and the mismatches as rows (kind, name, own shape,
        saved shape).
    """
    own = module.state_dict()
    versions = getattr(saved, "_metadata", {})
    saved = dict(saved)
    places = {
        _place(own[key]): key for key in own if key in saved and isinstance(own[key], torch.Tensor)
    }
    for key in own:
        if key not in saved and isinstance(own[key], torch.Tensor) and _place(own[key]) in places:
            # Tied weights: safetensors files hold them only once.
            saved[key] = saved[places[_place(own[key])]]
    rows = state.mismatches(own, saved)
    if {key for kind, key, _, _ in rows if kind == "missing"} == {
        key for key in own if key.endswith("num_batches_tracked")
    }:
        # The BatchNorm of PyTorch before 0.4.1 did not count batches.
        rows = [row for row in rows if row[0] != "missing"]
    bad = {key for _, key, _, _ in rows}
    taken = [key for key in own if key in saved and key not in bad]
    made = OrderedDict((key, saved[key] if key in taken else own[key]) for key in own)
    of_file = {key[:dot] for key in taken for dot in (0, *_dots(key))}
    made._metadata = {  # type: ignore[attr-defined]
        path: versions.get(path, {}) if path in of_file else version
        for path, version in getattr(own, "_metadata", {}).items()
    }
    return made, taken, rows


def _dots(key: str) -> list[int]:
    return [at for at, character in enumerate(key) if character == "."]


def _path(key: str) -> str:
    """Return the path of the submodule that an entry of a state dict belongs to."""
    return key.rpartition(".")[0]


def _place(tensor: torch.Tensor) -> tuple[int, int, tuple[int, ...]]:
    empty = tensor.numel() == 0 or tensor.layout is not torch.strided
    return (
        (id(tensor), 0, ())
        if empty
        else (dtensors.plain(tensor).data_ptr(), int(tensor.storage_offset()), tuple(tensor.shape))
    )


def _hint(module: nn.Module, saved: Mapping[str, Any]) -> str:
    """Suggest a renaming with which more tensors fit, or return "".

    The renaming removes a prefix from the saved names, or adds one of the module's.
    """
    own = module.state_dict()
    heads = dict.fromkeys(f"{key.partition('.')[0]}." for key in saved if "." in key)
    candidates = {
        f"'^{re.escape(head)}': ''": {key.removeprefix(head): value for key, value in saved.items()}
        for head in heads
    }
    for head in dict.fromkeys(f"{key.partition('.')[0]}." for key in own if "." in key):
        candidates[f"'^': '{head}'"] = {f"{head}{key}": value for key, value in saved.items()}
    count = len(_fitted(module, saved)[1])
    best, fitting = max(
        ((text, len(_fitted(module, new)[1])) for text, new in candidates.items()),
        key=lambda pair: pair[1],
        default=("", 0),
    )
    return (
        f'With "init.rename={{{best}}}" {fitting} of {len(own)} would.' if fitting > count else ""
    )
