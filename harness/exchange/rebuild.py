"""Rebuild a run's model for inference: build its task and load a checkpoint's weights into it."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from torch import nn

from harness import state
from harness.config import Config
from harness.config import load as load_settings
from harness.config.stored import restored
from harness.errors import UsageError
from harness.exchange import files, recognise
from harness.exchange.files import Loaded
from harness.exchange.recognise import MODULE, Part
from harness.task import Task, find, named
from harness.text import say
from harness.tracking.attribute_values import BUFFER
from harness.tracking.attributes import (
    Changed,
    as_built,
    containers_in,
    restore_changed,
)
from harness.tracking.payload import changed_in, spelled_out


def load_model(
    source: str | Path,
    which: str | int = "newest",
    *,
    ema: bool = False,
    module: str | None = None,
    into: nn.Module | None = None,
    task: str | None = None,
    trust: bool = False,
) -> Any:
    """Load the model of a run on the CPU, in eval mode, ready for inference.

    The run's task rebuilds the module with the arguments stored in the run's settings. A task of
    this package is called by the name in the settings. Any other task is called only if the caller
    names it (`task`) or trusts the file (`trust`). The random number generators are unchanged.

    Plain attributes and non-persistent buffers that training changed are set too; if the module is
    built with other values than it was then, these stand, and a warning names them.

    Args:
        source: Directory or URL of a run, or one of its checkpoints.
        which: Checkpoint of a run: "newest", "best" or a step.
        ema: Load the averaged weights.
        module: Name of the module to return, where there are several.
        into: Module to load the weights into, instead of building the task; for a run with a
            training loop of its own.
        task: Task to build instead of the stored one: "package.module:build".
        trust: Let the file name a task that is not of this package.

    Returns:
        The module, or a dict of all modules if there are several and `module` is None.

    Raises:
        UsageError: The source cannot be used, names no task, or does not fit the module.
        DamagedError: The checkpoint is damaged.
        StorageError: The store cannot be read.
    """
    loaded = files.read_any(source, which, weights_only=True)
    if into is not None:
        _warn(fill({module or "model": into}, loaded, ema=ema))
        return into.eval()
    settings = settings_of(loaded)
    if task is not None:
        settings = dataclasses.replace(settings, task=dataclasses.replace(settings.task, name=task))
    modules = named(build(settings, named_by_file=task is None and not trust).modules, "model")
    chosen = pick(modules, module, loaded.file.where)
    _warn(fill(chosen, loaded, ema=ema))
    for each in chosen.values():
        each.eval()
    return next(iter(chosen.values())) if module is not None or len(modules) == 1 else chosen


def _warn(messages: Sequence[str]) -> None:
    for message in messages:
        say(f"harness: warning: {message}", sys.stderr)


@dataclass(frozen=True)
class Rebuilt:
    """One module of a task, in eval mode and with the weights of a file.

    `notes` name what training changed of the module and could not be set.
    """

    job: Task
    task_name: str
    name: str
    module: nn.Module
    notes: Sequence[str]


def build_module(
    loaded: Loaded,
    name: str,
    *,
    config: str | None,
    settings: Sequence[str],
    ema: bool,
    trust: bool,
) -> Rebuilt:
    """Build the task of a file and load the file's weights into one of its modules.

    Args:
        loaded: The source file.
        name: Name of the module; a task's only module may have another name.
        config: YAML file of settings that name the task; by default the file names it.
        settings: The same as a list: ["task.name=…"].
        ema: Load the averaged weights.
        trust: Let the file name a task from outside this package.

    Raises:
        UsageError: No task is named, the task cannot be built or has no such module, or the weights
            do not fit into it.
    """
    by_file = not (config or settings)
    chosen = settings_of(loaded) if by_file else load_settings(config, list(settings))[0]
    job = build(chosen, named_by_file=by_file and not trust)
    modules = named(job.modules, "model")
    asked, name = name, name if name in modules or len(modules) > 1 else next(iter(modules))
    picked = pick(modules, name, chosen.task.name)
    notes = fill(picked, loaded, ema=ema, called={name: asked})
    return Rebuilt(job, chosen.task.name, name, picked[name].eval(), notes)


def settings_of(loaded: Loaded) -> Config:
    """Return the settings that a checkpoint was trained with.

    Raises:
        UsageError: The file holds no settings, or they name no task.
    """
    stored = loaded.value.get("config") if isinstance(loaded.value, Mapping) else None
    if not names_task(stored):
        raise UsageError(
            f"{loaded.file.where} does not say which task it is of, so its model cannot be built",
            "found: the checkpoint of a loop of its own, "
            "or a file that somebody else's script wrote",
            "Name the task (task.name=package.module:build), "
            "or in Python give a module: load_model(…, into=module).",
        )
    return restored(stored)


def names_task(stored: Any) -> TypeGuard[Mapping[str, Any]]:
    """Return whether these are settings of this harness that name a task.

    A custom training loop or somebody else's script may store a "config" of another form.
    """
    return (
        isinstance(stored, Mapping)
        and isinstance(stored.get("task"), Mapping)
        and "name" in stored["task"]
    )


def build(settings: Config, *, named_by_file: bool = False) -> Task:
    """Build the task that the settings name; leave this process's random generators unchanged.

    Args:
        settings: The settings, with the task's name and arguments.
        named_by_file: The name came with a file. Such a name may stand for any callable, so only
            tasks of this package are called.

    Raises:
        UsageError: The task cannot be found, or the file may not name it.
    """
    if named_by_file:
        _check_named(settings.task.name)  # check before the import, which runs code
    builder = find(settings.task.name, settings.task.args)
    module = settings.task.name.partition(":")[0]
    if named_by_file and not (inspect.isfunction(builder) and builder.__module__ == module):
        raise UsageError(
            f"{settings.task.name}, which the file names, is no task",
            f"found: something that {module} only imports",
        )
    with state.kept_generators():
        # Seed as in training, so that data generated in `build` is the same.
        state.seed_rank(settings.train.seed, "build")
        return builder(**settings.task.args)


def _check_named(name: str) -> None:
    """Refuse a task named by a file unless it comes with this package; import nothing.

    Raises:
        UsageError: The task is not in `harness.tasks`.
    """
    parts = name.partition(":")[0].split(".")
    if parts[:-1] != ["harness", "tasks"] or not parts[-1].isidentifier():
        raise UsageError(
            f"{name!r}, which the file names as its task, is code of your own or somebody else's, "
            "so it is not run unasked",
            "found: a name in a file; of those only harness.tasks.* are called",
            f"Confirm it: load_model(…, task={name!r}), export(…, trust=True), or --trust; "
            "or name another: task.name=…, into=module.",
        )


def pick(entries: Mapping[str, Any], name: str | None, where: str) -> dict[str, Any]:
    """Return the entry called `name`, or all if it is None; raise UsageError if it is missing."""
    if name is not None and name not in entries:
        raise UsageError(f"{where} has no module {name!r}", f"found: {', '.join(entries)}")
    return dict(entries) if name is None else {name: entries[name]}


def states(loaded: Loaded, *, ema: bool = False) -> dict[str, Part]:
    """Return the state dicts of a file's modules, or of their averages, by module name.

    Raises:
        UsageError: The file holds no module, or no averaged weights with `ema`.
    """
    modules = {part.name: part for part in recognise.recognise(loaded) if part.kind == MODULE}
    classes = loaded.manifest.classes if loaded.manifest else {}
    of_weights = [
        name
        for name in modules
        if (name == "ema" or name.endswith("_ema")) and classes.get(name, "Ema") == "Ema"
    ]
    averages = {
        "model" if name == "ema" else name.removesuffix("_ema"): name for name in of_weights
    }
    if not ema:
        return {name: part for name, part in modules.items() if name not in of_weights}
    if len(averages) < len(of_weights):
        raise UsageError(
            f"{loaded.file.where}: which of its averaged weights are meant cannot be told",
            f"found: {', '.join(of_weights)}",
            f"Name it: load_weights(model, FILE, part={of_weights[0]!r}) in Python.",
        )
    if not averages:
        raise UsageError(
            f"{loaded.file.where} holds no averaged weights",
            f"found: {', '.join(modules)}",
            "They are kept when train.ema_decay is set.",
        )
    return {
        name: dataclasses.replace(modules[average], note=spelled_out(_of_average(loaded, name)))
        for name, average in averages.items()
    }


def missing_in_weights(loaded: Loaded, held: Mapping[str, Part]) -> list[str]:
    """Return a line for each module of which a file of weights cannot hold everything."""
    return [
        f"not in the file: {name}, {part.note}; set it after loading, or take --format module"
        for name, part in held.items()
        if part.note and recognise.is_ours(loaded.value)
    ]


def _changed(loaded: Loaded, name: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Return what training changed of a module and its state dict does not hold."""
    return changed_in(loaded.value, name) if recognise.is_ours(loaded.value) else {}


def _of_average(loaded: Loaded, name: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Return what training changed of a module and its average took over: its buffers."""
    kept = {
        path: {key: entry for key, entry in of_part.items() if key.startswith(BUFFER)}
        for path, of_part in _changed(loaded, name).items()
    }
    return {path: of_part for path, of_part in kept.items() if of_part}


def fill(
    modules: Mapping[str, nn.Module],
    loaded: Loaded,
    *,
    ema: bool = False,
    called: Mapping[str, str] | None = None,
) -> list[str]:
    """Load a file's weights, or their averages, into the modules, and what training changed beside.

    Args:
        modules: The modules by name.
        loaded: The file.
        ema: Load the averaged weights.
        called: Names of modules in the file, where they are others.

    Returns:
        A message for each attribute that keeps the value of the module as built.

    Raises:
        UsageError: A module has no weights in the file, or they do not fit; the message then holds
            a table. No module has been changed.
    """
    held = states(loaded, ema=ema)
    every, modules = modules, {name: each for name, each in modules.items() if each.state_dict()}
    in_file = {name: (called or {}).get(name, name) for name in every}
    for name in modules:
        if in_file[name] not in held and len(modules) == len(held) == 1:
            in_file[name] = next(iter(held))
        if in_file[name] not in held:
            raise UsageError(
                f"{loaded.file.where} holds no weights of {in_file[name]!r}",
                f"found: {', '.join(held)}",
                f"Name it: --module {next(iter(held))} of `harness export`, "
                "load_model(…, into=module, module=…).",
            )
    saved = {name: state.to_live(each, held[in_file[name]].value) for name, each in modules.items()}
    for name, each in modules.items():
        state.check_tensors(name, each.state_dict(), saved[name], loaded.file.where)
    changed: Changed = {
        name: _of_average(loaded, source) if ema else _changed(loaded, source)
        for name, source in in_file.items()
    }
    # Before the weights: a module's own load_state_dict may set more than tensors.
    objects = {name: every[name] for name, kept in changed.items() if kept}
    built, containers = as_built(objects), containers_in(objects)
    for name, each in modules.items():
        each.load_state_dict(saved[name])
    return restore_changed(every, built, changed, containers)
