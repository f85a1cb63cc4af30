"""Build a run's task anew and give its modules the weights of a checkpoint: a model that is ready to be used."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from torch import nn

from harness import state
from harness.config import Config
from harness.config.stored import restored
from harness.errors import UsageError
from harness.exchange import files, recognise
from harness.exchange.files import Loaded
from harness.exchange.recognise import MODULE, Part
from harness.task import Task, find, named


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
    """The model of a run, on the CPU, in eval mode, ready for inference.

    `source` is a run (directory or URL) or one of its checkpoints; `which` its newest, its best, or the number of a step. The module is
    rebuilt by its task, with the arguments that the run's settings hold: a task of this package is called as they name it, one of your
    own only if you name it (`task="package.module:build"`) or trust whoever wrote the file to name it (`trust`). `into` takes a module of
    your own instead, as for a run with a loop of its own.
    Of several modules `module` names one, without it a dict of all is returned. `ema`: the averaged
    weights. The generators of random numbers are left as they are. Raises UsageError, DamagedError, StorageError.
    """
    loaded = files.read_any(source, which)
    if into is not None:
        into_name = module or "model"
        fill({into_name: into}, loaded, ema=ema)
        return into.eval()
    settings = settings_of(loaded)
    if task is not None:
        settings = dataclasses.replace(settings, task=dataclasses.replace(settings.task, name=task))
    modules = named(build(settings, named_by_file=task is None and not trust).modules, "model")
    chosen = pick(modules, module, loaded.file.where)
    fill(chosen, loaded, ema=ema)
    for each in chosen.values():
        each.eval()
    return next(iter(chosen.values())) if module is not None or len(modules) == 1 else chosen


def settings_of(loaded: Loaded) -> Config:
    """The settings that a checkpoint was trained with. Raises UsageError if it holds none, or names no task."""
    stored = loaded.value.get("config") if isinstance(loaded.value, Mapping) else None
    if not names_task(stored):
        raise UsageError(
            f"{loaded.file.where} does not say which task it is of, so its model cannot be built",
            "found: the checkpoint of a loop of its own, or a file that somebody else's script wrote",
            "Name the task (task.name=package.module:build), or in Python give a module: load_model(…, into=module).",
        )
    return restored(stored)


def names_task(stored: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether these are settings of this harness, and not what a loop of its own, or somebody's script, kept as its own."""
    return isinstance(stored, Mapping) and isinstance(stored.get("task"), Mapping) and "name" in stored["task"]


def build(settings: Config, *, named_by_file: bool = False) -> Task:
    """The task that the settings name. This process's generators are as before afterwards.

    Settings that came with a file may name anything that can be called: only the tasks of this package are. Raises UsageError.
    """
    if named_by_file:
        _check_named(settings.task.name)  # first: to import it is to run it
    found = find(settings.task.name, settings.task.args)
    module = settings.task.name.partition(":")[0]
    if named_by_file and not (inspect.isfunction(found) and found.__module__ == module):
        raise UsageError(f"{settings.task.name}, which the file names, is no task", f"found: something that {module} only imports")
    with state.kept_generators():
        state.seed_rank(settings.train.seed, "build")  # as in training: data that is made up in `build` is the same
        return found(**settings.task.args)


def _check_named(name: str) -> None:
    """Refuse a name out of a file unless it is of the tasks that come with this package; it is not imported. Raises UsageError."""
    parts = name.partition(":")[0].split(".")
    if parts[:-1] != ["harness", "tasks"] or not parts[-1].isidentifier():
        raise UsageError(
            f"{name!r}, which the file names as its task, is code of your own or somebody else's, so it is not run unasked",
            "found: a name in a file; of those only harness.tasks.* are called",
            f"Confirm it: load_model(…, task={name!r}), export(…, trust=True), or --trust; or name another: task.name=…, into=module.",
        )


def pick(things: Mapping[str, Any], name: str | None, where: str) -> dict[str, Any]:
    """The one of that name, or all. Raises UsageError."""
    if name is not None and name not in things:
        raise UsageError(f"{where} has no module {name!r}", f"found: {', '.join(things)}")
    return dict(things) if name is None else {name: things[name]}


def states(loaded: Loaded, *, ema: bool = False) -> dict[str, Part]:
    """The state dicts of a file's modules, or their averages, by the modules' names. Raises UsageError."""
    modules = {part.name: part for part in recognise.recognise(loaded) if part.kind == MODULE}
    classes = loaded.manifest.classes if loaded.manifest else {}
    of_weights = [name for name in modules if (name == "ema" or name.endswith("_ema")) and classes.get(name, "Ema") == "Ema"]
    averages = {"model" if name == "ema" else name.removesuffix("_ema"): name for name in of_weights}
    if not ema:
        return {name: part for name, part in modules.items() if name not in averages.values()}
    if not averages:
        raise UsageError(
            f"{loaded.file.where} holds no averaged weights",
            f"found: {', '.join(modules)}",
            "They are kept when train.ema_decay is set.",
        )
    return {name: modules[average] for name, average in averages.items()}


def fill(modules: Mapping[str, nn.Module], loaded: Loaded, *, ema: bool = False) -> None:
    """Load each module's weights, or their averages. Raises UsageError with a table if they do not fit."""
    held = states(loaded, ema=ema)
    modules = {name: each for name, each in modules.items() if each.state_dict()}
    for name in modules:
        if name not in held and len(modules) == len(held) == 1:
            held = {name: next(iter(held.values()))}
        if name not in held:
            raise UsageError(f"{loaded.file.where} holds no weights of {name!r}", f"found: {', '.join(held)}")
    saved = {name: state.to_live(each, held[name].value) for name, each in modules.items()}
    for name, each in modules.items():
        state.check_tensors(name, each.state_dict(), saved[name], loaded.file.where)
    for name, each in modules.items():
        each.load_state_dict(saved[name])
