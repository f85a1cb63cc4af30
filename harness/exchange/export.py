"""Write a model for others: in the documents' own formats, for everybody's tools, or as a program that needs none of the code.

Each is written to a temporary file, read back, compared with what it was made of, and only then appears, whole, under its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn

from harness.checkpoint.load import first_line
from harness.config import Config
from harness.config import load as load_settings
from harness.errors import HarnessError, StorageError, UsageError
from harness.exchange import compare, files, program, rebuild, recognise
from harness.exchange.files import Loaded
from harness.exchange.recognise import OPTIMIZER, Part
from harness.state import kept_generators
from harness.store import CHUNK_BYTES, LocalStore, Store, is_url, open_store
from harness.supervision.run_address import WAIT_S, is_checkpoint
from harness.task import Task, named
from harness.text import muted, number

PROGRAMS = ("torchscript", "exported")
FORMATS = ("weights", "full", "module", "safetensors", *PROGRAMS)
EVAL = "model.eval()  # or Dropout and BatchNorm go on as in training, and the answers are wrong"

Write = Callable[[Path], list[str]]  # writes the file, checks it, and returns how to load it


def export(
    checkpoint: str | Path,
    out: str | Path,
    format: str = "weights",
    *,
    which: str | int = "newest",
    ema: bool = False,
    module: str | None = None,
    legacy: bool = False,
    overwrite: bool = False,
    trust: bool = False,
    config: str | None = None,
    settings: Sequence[str] = (),
) -> str:
    """Write the model of a run, of a checkpoint or of anybody's file to a path or URL, whole or not at all; returns how to load it.

    `format`: "weights" (the state dict), "full" (model, optimizer, epoch and loss under the keys of PyTorch's tutorial), "module" (the
    pickled module), "safetensors", "torchscript" or "exported" (`torch.export`). Of several modules `module` names one. `ema`: the
    averaged weights. `legacy`: as PyTorch before 1.6 wrote. `config` (a YAML file) and `settings` (["task.name=…"]) name the task where the
    file does not; `trust` lets the file name a task that is not of this package, and a pickle run its code.
    Raises UsageError, DamagedError, StorageError.
    """
    out = str(out)
    _check_asked(format, out, legacy, ema)
    store, key = _destination(out, overwrite)
    loaded = files.read_any(checkpoint, which, trust=trust)
    held = rebuild.pick(rebuild.states(loaded, ema=ema), module, loaded.file.where)
    if len(held) > 1 and format not in ("weights", "full"):
        raise UsageError(f"{format} holds one module", f"found: {', '.join(held)}", f"Name one: --module {next(iter(held))}.")
    with kept_generators(), _scratch(store, key) as path:  # data and modules may draw random numbers
        if format in ("module", *PROGRAMS):
            by_file = not (config or settings)
            chosen = rebuild.settings_of(loaded) if by_file else load_settings(config, list(settings))[0]
            write = _of_code(
                loaded, chosen, rebuild.build(chosen, named_by_file=by_file and not trust), format, next(iter(held)), ema, legacy
            )
        else:
            write = _of_data(loaded, held, format, lone=module is not None or len(held) == 1, legacy=legacy)
        try:
            lines = write(path)
        except OSError as error:
            raise StorageError(f"cannot write {out}", f"found: {error}", "Free some space, or name another place.") from error
        _put(path, store, key)
    name = json.dumps(Path(out).name, ensure_ascii=False)
    return "\n".join([_origin(loaded), "", *(line.replace('"OUT"', name) for line in lines)])


def _origin(loaded: Loaded) -> str:
    metrics = loaded.manifest.metrics if loaded.manifest else {}
    return f"from {loaded.file.where}" + "".join(f", {name} {number(value)}" for name, value in metrics.items())


def _check_asked(format: str, out: str, legacy: bool, ema: bool) -> None:
    if format not in FORMATS:
        raise UsageError(f"there is no format {format!r}", f"expected: {', '.join(FORMATS)}")
    if legacy and format not in ("weights", "full", "module"):
        raise UsageError(f"{format} has no older form", remedy="--legacy is for weights, full and module.")
    if format == "exported" and not out.endswith(".pt2"):
        raise UsageError(f"torch.export.load reads no file that is called {Path(out).name}", remedy="Let its name end with .pt2.")
    if ema and format == "full":
        raise UsageError("the optimizer does not belong to the averaged weights", remedy="Take --format weights with --ema.")


def _destination(out: str, overwrite: bool) -> tuple[Store, str]:
    if is_checkpoint(out):
        raise UsageError(f"{out} is where a run keeps its checkpoints", remedy="Name a file elsewhere.")
    if is_url(out):
        if not urlsplit(out).path.strip("/") or out.endswith("/"):
            raise UsageError(f"{out} names no file", remedy="Name one: s3://bucket/model.pt.")
        folder, _, key = out.rpartition("/")
        store = open_store(folder, WAIT_S)
        is_there = store.exists(key)
    else:
        path = Path(os.path.realpath(Path(out).expanduser()))  # what a link leads to
        store, key, is_there = open_store(path.parent, WAIT_S), path.name, os.path.lexists(out)
        if path.exists() and not path.is_file():
            raise UsageError(f"{out} is {'a directory' if path.is_dir() else 'no plain file'}", remedy="Name a file.")
        if not path.parent.is_dir():
            raise UsageError(f"there is no folder {path.parent}", remedy="Make it first.")
    if is_there and not overwrite:
        raise UsageError(f"{out} is there already", remedy="Name another file, or insist: --force (overwrite=True).")
    return store, key


def _of_data(loaded: Loaded, held: Mapping[str, Part], format: str, *, lone: bool, legacy: bool) -> Write:
    """What needs no code: state dicts as they are."""
    first = next(iter(held.values())).value
    if format == "safetensors":
        return lambda path: _write_safetensors(path, loaded, first)
    states = {f"{name}_state_dict": part.value for name, part in ({"model": next(iter(held.values()))} if lone else held).items()}
    if format == "weights":
        value = first if lone else states
        places = {name: "" if lone else f'["{name}"]' for name in states}
        lines = ["import torch", *_reading('torch.load("OUT", weights_only=True){}', places)]
        return lambda path: _write_torch(path, value, legacy, lines)
    parts = recognise.recognise(loaded)
    optimizers = {f"{part.name}_state_dict": part.value for part in parts if part.kind == OPTIMIZER}
    if not optimizers:
        raise UsageError(f"{loaded.file.where} holds no optimizer", remedy="Take --format weights.")
    full = {"epoch": recognise.number_of(parts, "epoch")} | states | optimizers | {"loss": recognise.number_of(parts, "loss")}
    begin, end = 'checkpoint = torch.load("OUT", weights_only=True)', 'epoch, loss = checkpoint["epoch"], checkpoint["loss"]'
    lines = ["import torch", begin, *_reading("checkpoint{}", {name: f'["{name}"]' for name in (*states, *optimizers)}, tuple(states)), end]
    return lambda path: _write_torch(path, full, legacy, lines)


def _reading(source: str, places: Mapping[str, str], modules: tuple[str, ...] = ()) -> list[str]:
    """The lines that load each state dict from its place in a source; a module's also say what must not be forgotten."""
    names = {key: key.removesuffix("_state_dict") for key in places}
    return [
        *(f"{name} = …  # built as for training" for name in names.values()),
        *(f"{name}.load_state_dict({source.format(places[key])})" for key, name in names.items()),
        *(EVAL.replace("model", name) for key, name in names.items() if not modules or key in modules),
    ]


def _of_code(loaded: Loaded, settings: Config, job: Task, format: str, name: str, ema: bool, legacy: bool) -> Write:
    """What is made by running the task's code."""
    modules = named(job.modules, "model")
    name = name if name in modules or len(modules) > 1 else next(iter(modules))
    chosen = rebuild.pick(modules, name, settings.task.name)
    rebuild.fill(chosen, loaded, ema=ema)
    model = chosen[name].eval()
    if format == "module":
        return lambda path: _write_module(path, model, legacy)
    given = program.example(job, name, model, settings.task.name)
    make, line = {
        "torchscript": (program.script, 'model = torch.jit.load("OUT")  # in eval mode; torch::jit::load in C++'),
        "exported": (program.exported, 'model = torch.export.load("OUT").module()  # in eval mode, for good'),
    }[format]
    return lambda path: [*make(path, model, given), "import torch", line]


def _save(path: Path, value: Any, legacy: bool) -> None:
    with path.open("wb") as file:  # by a name, torch would write it itself, and have no word for a full disk
        try:
            torch.save(value, file, _use_new_zipfile_serialization=not legacy)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError | KeyboardInterrupt):  # the zip format hides it behind what it meets next
                raise error.__context__ from None
            if "write()" in str(error):  # the old format's words for it
                raise OSError(str(error)) from error
            raise


def _write_torch(path: Path, value: Any, legacy: bool, lines: list[str]) -> list[str]:
    _save(path, value, legacy)
    back = torch.load(path, map_location="cpu", weights_only=True)
    _check_equal(path, value, back)
    return lines


def _write_safetensors(path: Path, loaded: Loaded, value: Mapping[str, Any]) -> list[str]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    strange = [
        k for k, item in value.items() if not isinstance(item, torch.Tensor) or item.layout is not torch.strided or item.is_quantized
    ]
    if strange:
        raise UsageError("safetensors holds plain tensors only", f"found: {', '.join(strange[:5])}", "Take --format weights.")
    manifest = loaded.manifest
    facts = {"run": manifest.run_id, "step": manifest.step, "epoch": manifest.epoch, "loss": manifest.loss} if manifest else {}
    apart = {key: item.clone().contiguous() for key, item in value.items()}  # the format keeps no tensor twice; tied ones are written out
    try:
        save_file(apart, path, {"format": "pt"} | {name: str(fact) for name, fact in facts.items()})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    _check_equal(path, apart, load_file(path))
    return ["from safetensors.torch import load_file", *_reading('load_file("OUT")', {"model": ""})]


def _write_module(path: Path, model: nn.Module, legacy: bool) -> list[str]:
    try:
        with muted():
            _save(path, model, legacy)
            back = torch.load(path, map_location="cpu", weights_only=False)  # our own, just written
    except (pickle.PickleError, AttributeError, TypeError, RuntimeError, ValueError, LookupError) as error:
        raise UsageError("the module cannot be pickled", f"found: {first_line(error)}", "Take --format weights.") from error
    _check_equal(path, model.state_dict(), back.state_dict())
    return [
        f"WARNING: this file is tied to the very code that it was made with, of {type(model).__module__}, which must be there to load it.",
        "Loading it runs whatever is in it: give it to nobody who does not trust you. --format weights has neither fault.",
        "import torch",
        'model = torch.load("OUT", weights_only=False)',
        EVAL,
    ]


def _check_equal(path: Path, wanted: Any, found: Any) -> None:
    if wrong := list(compare.differences(wanted, found)):
        raise HarnessError(f"{path} does not read back as it was written", f"found: {wrong[0][0]} differs", "Is the disk sound?")


@contextlib.contextmanager
def _scratch(store: Store, key: str) -> Iterator[Path]:
    """The path of a temporary file: beside its destination, or, of a remote one, where this machine keeps such."""
    name = f"{key}.tmp-0000-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory() if not isinstance(store, LocalStore) else contextlib.nullcontext(store.root) as folder:
        path = Path(folder, name)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


def _put(path: Path, store: Store, key: str) -> None:
    with path.open("rb") as file, store.writer(key, 0) as sink:
        while chunk := file.read(CHUNK_BYTES):
            sink.write(chunk)
        sink.commit()
