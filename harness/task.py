"""The task that a user defines: modules, optimizers, data and loss.

A task is found by its import path; there is no registry.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from harness.errors import UsageError


@dataclass
class Task:
    """A task to train. A single module, optimizer or scheduler needs no dict around it.

    * The schedulers are stepped once in each step.
    * `loss(modules, batch)` returns the mean loss of the batch, a scalar. It gets the modules in
      the form in which they are given here (one, or a dict), wrapped for training on all ranks.
    * `evaluate(modules, batch)` returns sums over the samples of the batch, as
      {"val_loss": …, "val_acc": …}; each sum is divided by the number of samples. Without it, the
      mean of `loss` is used as "val_loss".
    * `modules` may be made under torch.device("meta"): they are sharded first, if they are to be,
      and then initialised part by part, as `harness.materialize` does.
    * `blocks` are the parts of the modules that are sharded (train.shard), and whose activations
      are computed again (train.checkpoint_activations), one by one; by default, the modules of one
      class in each ModuleList and Sequential.
    * `step(run, batch)` replaces forward, backward and update for a task with several optimizers.
      It returns the values to log.
    """

    modules: Any
    optimizers: Any
    train_data: Any
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    eval_data: Any = None
    evaluate: Callable[[Any, Any], Mapping[str, Any]] | None = None
    schedulers: Any = field(default_factory=dict)
    step: Callable[[Any, Any], Mapping[str, Any]] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    blocks: Sequence[Any] = ()


def named(given: Any, name: str) -> dict[str, Any]:
    """Return a dict of objects: {name: given} for a single object that is not in a dict."""
    return dict(given) if isinstance(given, Mapping) else {name: given}


def find(
    name: str, args: Mapping[str, Any], written: Mapping[str, Any] | None = None
) -> Callable[..., Task]:
    """Import the callable that `package.module:callable` names, and check its arguments.

    Modules can be imported from the working directory, however the process was started.

    Args:
        name: Import path, package.module:callable.
        args: Arguments of the callable.
        written: The arguments as they may be printed: before secrets from the environment were
            inserted. None: `args`.

    Raises:
        UsageError: The module cannot be imported, it has no such callable, or the callable does not
            take these arguments.
    """
    _extend_path()
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (
            module_name == error.name or module_name.startswith(f"{error.name}.")
        ):
            raise UsageError(
                f"task.name={name}: importing {module_name} failed",
                f"found: {error}",
                "Install what is missing.",
            ) from error
        raise UsageError(
            f"task.name={name}: there is no module {module_name}",
            f"searched from {os.getcwd()}",
            "Leave out the .py."
            if module_name.endswith(".py")
            else "Start from the folder that holds it, or install its package.",
        ) from error
    build = getattr(module, attribute, None)
    if not callable(build):
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"Did you mean {near[0]}?" if near else "Write package.module:callable."
        raise UsageError(
            f"task.name={name}: {module_name} has no callable {attribute!r}", remedy=hint
        )
    _check_args(name, build, args, args if written is None else written)
    return build  # type: ignore[no-any-return]


def _extend_path() -> None:
    """Let modules be imported from the code copy of a job, and from the working directory."""
    # The code copy of a submitted job comes before the working directory, which may have changed.
    pinned = os.environ.get("HARNESS_CODE")
    # torchrun puts the folder of the program on sys.path, not the working directory.
    for folder in filter(None, (os.getcwd(), pinned)):
        if folder not in sys.path or folder == pinned:
            sys.path.insert(0, folder)
    package = str(Path(__file__).resolve().parents[1])
    # For an editable install: in a spawned loader worker, a plain folder `harness` would be found
    # before the package.
    if package not in sys.path:
        sys.path.append(package)


def defaults(build: Callable[..., Any]) -> dict[str, Any]:
    """Return the default arguments of `build` that are plain values.

    They belong to the settings of a run, too.
    """
    arguments = {p.name: p.default for p in inspect.signature(build).parameters.values()}
    return {
        name: value
        for name, value in arguments.items()
        if value is None or type(value) in (bool, int, float, str)
    }


def _check_args(
    name: str, build: Callable[..., Any], args: Mapping[str, Any], written: Mapping[str, Any]
) -> None:
    signature = inspect.signature(build)
    takes = [
        p.name
        for p in signature.parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    unknown = [] if takes_any else [key for key in args if key not in takes]
    missing = [
        p.name
        for p in signature.parameters.values()
        if p.name in takes and p.default is p.empty and p.name not in args
    ]
    problems = [f"  task.args.{key}={written.get(key)!r}: unknown" for key in unknown] + [
        f"  task.args.{key}: missing" for key in missing
    ]
    for key, value in args.items():
        default = signature.parameters[key].default if key in signature.parameters else None
        if isinstance(default, int | float | str) and not _fits(value, default):
            problems.append(
                f"  task.args.{key}={written.get(key)!r}: expected a {type(default).__name__}, "
                f"such as {default!r}"
            )
    if problems:
        raise UsageError(
            f"{name} does not take these arguments:", "\n".join(problems), f"It takes: {signature}."
        )


def _fits(value: Any, default: Any) -> bool:
    if value is None:
        return True
    if isinstance(default, float) and not isinstance(value, bool):
        return isinstance(value, int | float)
    return isinstance(value, type(default)) and (
        isinstance(value, bool) == isinstance(default, bool)
    )
