"""Export a model to a file for use outside this harness.

The formats are those of PyTorch's documentation, safetensors, and programs that need none of the
model's code (TorchScript, torch.export). Each file is written to a temporary file, read back and
compared with its source. Only then does it appear, complete, under its final name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.distributed.parts import save_dcp
from harness.errors import StorageError, UsageError
from harness.exchange import compare, files, formats, program, rebuild, recognise
from harness.exchange.files import Loaded
from harness.exchange.rebuild import Rebuilt
from harness.exchange.recognise import OPTIMIZER, Part
from harness.hf import hf_folder, safetensors_file
from harness.sharding import dcp_folder
from harness.sharding.dcp_state import loading_code, optimizers_by_name
from harness.state import kept_generators
from harness.text import number

PROGRAMS = ("torchscript", "exported")
FOLDERS = ("hf", "dcp")  # formats that are a folder
FORMATS = ("weights", "full", "module", "safetensors", *FOLDERS, *PROGRAMS)

# Writes the file, checks it, and returns the lines of code that load it.
Write = Callable[[Path], list[str]]


@dataclass(frozen=True)
class ExportOptions:
    """The options of `export`, which describes them, and those of the command alone.

    Args:
        legacy: Write the format of PyTorch before 1.6.
        file_bytes: Size of the tensors in one file of "hf".
        config: YAML file of settings that name the task, where the file does not name it.
        settings: The same as a list: ["task.name=…"].
    """

    format: str
    which: str | int
    ema: bool
    module: str | None
    overwrite: bool
    trust: bool
    legacy: bool = False
    file_bytes: int = 5_000_000_000
    config: str | None = None
    settings: Sequence[str] = ()


def export(
    checkpoint: str | Path,
    out: str | Path,
    format: str = "weights",
    *,
    which: str | int = "newest",
    ema: bool = False,
    module: str | None = None,
    overwrite: bool = False,
    trust: bool = False,
) -> str:
    """Write the model of a run, a checkpoint or any model file to a path or URL.

    The file is written completely or not at all.

    Args:
        checkpoint: Path or URL of a run, a checkpoint or a file.
        out: Path or URL of the file to write.
        format: "weights" (the state dict), "full" (model, optimizer, epoch and loss under the keys
            of PyTorch's tutorial), "module" (the pickled module), "safetensors", "hf" (a folder of
            them as Hugging Face has it), "dcp" (a folder of torch.distributed.checkpoint, with the
            optimizers), "torchscript" or "exported" (`torch.export`).
        which: Checkpoint of a run: "newest", "best" or a step.
        ema: Export the averaged weights.
        module: Name of the module to export, where there are several.
        overwrite: Replace `out` if it exists.
        trust: Let the file name a task from outside this package, and let a pickle run its code.

    Returns:
        A text with the source of the model and the lines of code that load the file.

    Raises:
        UsageError: The arguments, the source or the destination cannot be used.
        DamagedError: The source is damaged or cut short.
        StorageError: A store cannot be read or written.
        HarnessError: The written file or program differs from its source, or memory is short.
    """
    asked = ExportOptions(format, which, ema, module, overwrite, trust)
    return export_as_asked(checkpoint, str(out), asked)


def export_as_asked(checkpoint: str | Path, out: str, asked: ExportOptions) -> str:
    """Export a model as `export` does, after a check of what is asked."""
    _check_asked(asked, out)
    store, key = formats.destination(out, asked.overwrite, is_folder=asked.format in FOLDERS)
    weights_only = asked.format not in ("full", "dcp")
    loaded = files.read_any(checkpoint, asked.which, trust=asked.trust, weights_only=weights_only)
    held = rebuild.pick(rebuild.states(loaded, ema=asked.ema), asked.module, loaded.file.where)
    if len(held) > 1 and asked.format not in ("weights", "full"):
        raise UsageError(
            f"{asked.format} holds one module",
            f"found: {', '.join(held)}",
            f"Name one: --module {next(iter(held))}.",
        )
    # Data and modules may draw random numbers, so the generators are restored afterwards.
    with kept_generators(), formats.scratch(store, key) as path:
        write, notes = _writer(loaded, held, asked)
        lines = _written(write, path, out)
        formats.put(path, store, key)
    name = json.dumps(Path(out).name, ensure_ascii=False)
    return "\n".join(
        [_origin(loaded), *notes, "", *(line.replace('"OUT"', name) for line in lines)]
    )


def _writer(
    loaded: Loaded, held: Mapping[str, Part], asked: ExportOptions
) -> tuple[Write, list[str]]:
    """Return a writer for the format that is asked for, and notes on what is not in its file.

    The task is built if the format needs it.
    """
    if asked.format not in ("module", *PROGRAMS):
        notes = rebuild.missing_in_weights(loaded, held)
        if asked.format == "dcp":
            write, more = _of_dcp(loaded, held, asked)
            return write, [*notes, *more]
        lone = asked.module is not None or len(held) == 1
        return _of_data(loaded, held, asked, lone=lone), notes
    rebuilt = rebuild.build_module(
        loaded,
        next(iter(held)),
        config=asked.config,
        settings=asked.settings,
        ema=asked.ema,
        trust=asked.trust,
    )
    return _of_code(rebuilt, asked.format, asked.legacy), list(rebuilt.notes)


def _written(write: Write, path: Path, out: str) -> list[str]:
    """Write and check the temporary file at `path`; `out` is named in error messages.

    Raises:
        StorageError: The disk is full or fails.
    """
    try:
        return write(path)
    except OSError as error:
        raise StorageError(
            f"cannot write {out}", f"found: {error}", "Free some space, or name another place."
        ) from error


def _origin(loaded: Loaded) -> str:
    metrics = loaded.manifest.metrics if loaded.manifest else {}
    return f"from {loaded.file.where}" + "".join(
        f", {name} {number(value)}" for name, value in metrics.items()
    )


def _check_asked(asked: ExportOptions, out: str) -> None:
    format = asked.format
    if format not in FORMATS:
        raise UsageError(f"there is no format {format!r}", f"expected: {', '.join(FORMATS)}")
    if asked.legacy and format not in ("weights", "full", "module"):
        raise UsageError(
            f"{format} has no older form", remedy="--legacy is for weights, full and module."
        )
    if format == "exported" and not out.endswith(".pt2"):
        raise UsageError(
            f"torch.export.load reads no file that is called {Path(out).name}",
            remedy="Let its name end with .pt2.",
        )
    if asked.ema and format == "full":
        raise UsageError(
            "--format full does not go together with --ema",
            "found: an optimizer of the weights in training, not of their average",
            "Take --format weights with --ema, or --format full without --ema.",
        )


def _of_data(
    loaded: Loaded, held: Mapping[str, Part], asked: ExportOptions, *, lone: bool
) -> Write:
    """Return a writer for a format that holds only state dicts and needs no task code.

    Args:
        loaded: The source file.
        held: The module states to write, by module name.
        asked: The options; the format is "weights", "full", "safetensors" or "hf".
        lone: Write only the first module, as "model".

    Raises:
        UsageError: The format is "full" and the source holds no optimizer.
    """
    first, format, legacy = next(iter(held.values())).value, asked.format, asked.legacy
    if format == "safetensors":
        return lambda path: _write_safetensors(path, loaded, first)
    if format == "hf":
        return lambda path: _write_hf(path, loaded, first, asked.file_bytes)
    states = {
        f"{name}_state_dict": part.value
        for name, part in ({"model": next(iter(held.values()))} if lone else held).items()
    }
    if format == "weights":
        value = first if lone else states
        places = {name: "" if lone else f'["{name}"]' for name in states}
        lines = ["import torch", *_reading('torch.load("OUT", weights_only=True){}', places)]
        return lambda path: _write_torch(path, value, legacy, lines)
    parts = recognise.recognise(loaded)
    optimizers = {f"{part.name}_state_dict": part.value for part in parts if part.kind == OPTIMIZER}
    if not optimizers:
        raise UsageError(f"{loaded.file.where} holds no optimizer", remedy="Take --format weights.")
    full = {
        "epoch": recognise.number_of(parts, "epoch"),
        **states,
        **optimizers,
        "loss": recognise.number_of(parts, "loss"),
    }
    places = {name: f'["{name}"]' for name in (*states, *optimizers)}
    lines = [
        "import torch",
        'checkpoint = torch.load("OUT", weights_only=True)',
        *_reading("checkpoint{}", places, tuple(states)),
        'epoch, loss = checkpoint["epoch"], checkpoint["loss"]',
    ]
    return lambda path: _write_torch(path, full, legacy, lines)


def _reading(source: str, places: Mapping[str, str], modules: tuple[str, ...] = ()) -> list[str]:
    """Return the lines of code that load each state dict.

    A module gets a further line that calls `eval()`.

    Args:
        source: Expression that reads the file, with `{}` where a place is inserted.
        places: Subscript of each state dict in that expression, by key.
        modules: Keys of the state dicts of modules; all of them if empty.
    """
    names = {key: key.removesuffix("_state_dict") for key in places}
    return [
        *(f"{name} = …  # built as for training" for name in names.values()),
        *(f"{name}.load_state_dict({source.format(places[key])})" for key, name in names.items()),
        *(
            program.EVAL.replace("model", name)
            for key, name in names.items()
            if not modules or key in modules
        ),
    ]


def _of_code(rebuilt: Rebuilt, format: str, legacy: bool) -> Write:
    """Return a writer for a format that is made by running the task's code.

    Args:
        rebuilt: The module to write.
        format: "module", "torchscript" or "exported".
        legacy: Write the format of PyTorch before 1.6.

    Raises:
        UsageError: The task's evaluation does not tell what goes into the module.
    """
    if format == "module":
        return lambda path: program.pickled(path, rebuilt.module, legacy)
    given = program.example(rebuilt.job, rebuilt.name, rebuilt.module, rebuilt.task_name)
    make = {"torchscript": program.script, "exported": program.exported}[format]
    return lambda path: make(path, rebuilt.module, given)


def _write_torch(path: Path, value: Any, legacy: bool, lines: list[str]) -> list[str]:
    formats.save_torch(path, value, legacy)
    back = torch.load(path, map_location="cpu", weights_only=True)
    compare.check_equal(path, value, back)
    return lines


def _facts(loaded: Loaded) -> dict[str, str]:
    """Return the metadata of a safetensors file: the run and the step."""
    of_run = loaded.manifest
    facts = (
        {"run": of_run.run_id, "step": of_run.step, "epoch": of_run.epoch, "loss": of_run.loss}
        if of_run
        else {}
    )
    return {"format": "pt"} | {name: str(fact) for name, fact in facts.items()}


def _write_safetensors(path: Path, loaded: Loaded, value: Mapping[str, Any]) -> list[str]:
    written = safetensors_file.save_safetensors(path, value, _facts(loaded))
    compare.check_equal(path, written, safetensors_file.load_safetensors(path)[0])
    return ["from safetensors.torch import load_file", *_reading('load_file("OUT")', {"model": ""})]


def _write_hf(path: Path, loaded: Loaded, value: Mapping[str, Any], file_bytes: int) -> list[str]:
    path.mkdir()
    for name, tensors in hf_folder.save_hf(path, value, _facts(loaded), file_bytes).items():
        compare.check_equal(path / name, tensors, safetensors_file.load_safetensors(path / name)[0])
    return [
        "from transformers import AutoModel  # or the class of your model",
        'model.config.save_pretrained("OUT")  # once: a checkpoint has no config.json',
        'model = AutoModel.from_pretrained("OUT")',
    ]


def _of_dcp(
    loaded: Loaded, held: Mapping[str, Part], asked: ExportOptions
) -> tuple[Write, list[str]]:
    """Return a writer of a folder of DCP, and notes on optimizers that it does not hold."""
    ((name, part), *_) = held.items()
    has_more = recognise.is_ours(loaded.value) and not asked.ema
    optimizers, left_out = optimizers_by_name(loaded.value, name) if has_more else ({}, [])
    notes = [
        f"{optimizer} is left out: it cannot be told which tensors are its parameters"
        for optimizer in left_out
    ]
    return lambda path: _write_dcp(path, {"model": part.value} | optimizers), notes


def _write_dcp(path: Path, value: dict[str, Any]) -> list[str]:
    path.mkdir()
    save_dcp(path, value)
    compare.check_equal(path, value, dcp_folder.read_dcp(path)[0])
    return loading_code([name for name in value if name != "model"])
