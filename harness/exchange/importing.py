"""Import a checkpoint that somebody else's script wrote as step k of a new run.

The task is built as for training. The recognised parts of the file are loaded into its modules and
optimizers. The result is committed as an ordinary checkpoint, so a run that resumes from it needs
no knowledge of its source.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness import config as configuration
from harness import state, task
from harness.checkpoint import attempts, commit
from harness.checkpoint import format as fmt
from harness.checkpoint.catalog import Catalog, read_catalog
from harness.checkpoint.commit import About
from harness.checkpoint.fresh_start import is_half_imported
from harness.config import Config, stored_form
from harness.data import loading
from harness.data.fingerprint import describe
from harness.data.plan import Plan
from harness.distributed.ranks import World
from harness.ema import Ema
from harness.errors import UsageError
from harness.exchange import files, rebuild, recognise, weights
from harness.exchange.describe import Where, assignment_table, position
from harness.exchange.files import Loaded
from harness.exchange.recognise import MODULE, OPTIMIZER, SCHEDULER, Part
from harness.exchange.training_state import Assignment, load_training_state
from harness.step import Stepper
from harness.store import Store, open_store
from harness.supervision import run_address


@dataclass(frozen=True)
class ImportOptions:
    """The options of `import_checkpoint`, which describes them, and those of the command alone.

    Args:
        config: YAML file with the settings of the run.
        dry_run: Write nothing; only report.
    """

    settings: Sequence[str]
    parts: Mapping[str, str]
    without: Collection[str]
    epoch: int | None
    step: int | None
    trust: bool
    config: str | None = None
    dry_run: bool = False

    @property
    def names_task(self) -> bool:
        """Return whether the settings may name the task."""
        return bool(self.config) or any(word.startswith("task.name=") for word in self.settings)

    @property
    def numbers(self) -> set[str]:
        """Return the names of the numbers that are taken from the file."""
        given = {"epoch": self.epoch, "step": self.step}
        return {"epoch", "step", "loss"} - {name for name, n in given.items() if n is not None}


def import_checkpoint(
    file: str | Path,
    run: str | Path,
    *,
    settings: Sequence[str] = (),
    parts: Mapping[str, str] | None = None,
    without: Collection[str] = (),
    epoch: int | None = None,
    step: int | None = None,
    trust: bool = False,
) -> str:
    """Create a run whose first checkpoint is made from somebody else's checkpoint file.

    The commit is the last step. Nothing has been written if an error occurs before it.

    Args:
        file: Path or URL of the file to import.
        run: Directory or URL of the new run; it must not hold a run yet.
        settings: Settings of the run as a list: ["task.name=…", "init.strict=false"].
        parts: Part of the file for an object of the task, by the object's name, where the
            assignment is ambiguous.
        without: Names of objects of the task that take no state from the file: optimizers,
            schedulers, the gradient scaler, averages.
        epoch: Epoch to resume with, counted from 0; by default the file's.
        step: Number of updates made so far; by default the file's.
        trust: Let a pickle run the code that it names.

    Returns:
        A text on what was recognised in the file and what was taken from it.

    Raises:
        UsageError: The arguments, the settings, the file or the run directory cannot be used, or
            the file does not fit the task.
        DamagedError: The file is damaged or cut short.
        StorageError: A store cannot be read or written.
        NonFiniteError: An imported parameter is not finite.
    """
    asked = ImportOptions(settings, parts or {}, without, epoch, step, trust)
    return import_as_asked(file, run, asked)


def import_as_asked(file: str | Path, run: str | Path, asked: ImportOptions) -> str:
    """Import a file as `import_checkpoint` does."""
    if files.is_ours(str(file)):
        run_address.checkpoint(str(file))  # raises if the checkpoint is invalid
        raise UsageError(
            f"{file} cannot be imported with settings",
            "found: a checkpoint of this harness, which has its own",
            "Copy it to a new run: harness import FILE RUN, without settings and --config.",
        )
    store, catalog = empty_store(run)
    chosen, stored = configuration.load(asked.config, list(asked.settings))
    loaded = files.read_any(file, trust=asked.trust)
    stored = _run_settings(stored, chosen, store, run)
    import_ = Import(loaded, chosen, asked.parts, asked.without)
    try:
        where = import_.position(asked.epoch, asked.step)
        import_.load(where)
    except UsageError as error:
        if asked.names_task:
            raise
        raise UsageError(
            error.what,
            error.found,
            f"{error.remedy} No task was named, so it is {chosen.task.name}: task.name=…",
        ) from error
    state.check_finite(import_.tracked)
    payload = state.plain_data(import_.payload(where, stored)) | state.capture(import_.tracked)
    payload["format_version"] = fmt.version_of(payload)
    report = import_.report(asked.numbers)
    if asked.dry_run:
        return f"{report}\n\nnothing was written"
    manifest = _commit(store, catalog, payload, import_.tracked)
    return f"{report}\n\n{store} begins with {manifest.name}, at epoch {where.epoch}"


def empty_store(run: str | Path) -> tuple[Store, Catalog]:
    """Open a store for a new run and read its catalog, which must be empty.

    Imports that did not come to their end may have begun there: an import may be repeated.

    Raises:
        UsageError: The store holds a run already.
    """
    store = open_store(run)
    catalog = read_catalog(store)
    if (catalog.greatest or catalog.manifests) and not is_half_imported(catalog):
        raise UsageError(
            f"{store} holds a run already",
            f"found: attempt {catalog.greatest}",
            "Choose another directory.",
        )
    return store, catalog


def _run_settings(
    stored: dict[str, Any], chosen: Config, store: Store, run: str | Path
) -> dict[str, Any]:
    """Return the settings to store: with all arguments of the task, and with the run's place.

    Args:
        stored: The settings as they were given.
        chosen: The same settings, validated.
        store: Store of the new run.
        run: Directory or URL of the new run.
    """
    built = task.find(chosen.task.name, chosen.task.args, stored["task"]["args"])
    arguments = task.defaults(built) | stored["task"]["args"]
    place = {"dir": str(run)} if store.is_local else {"dir": None, "remote": str(store)}
    return stored | {"task": stored["task"] | {"args": arguments}, "run": stored["run"] | place}


def _commit(
    store: Store, catalog: Catalog, payload: dict[str, Any], tracked: Mapping[str, Any]
) -> fmt.Manifest:
    classes = {name: state.class_name(obj) for name, obj in tracked.items()}
    store.prepare(fmt.FOLDERS)
    attempt = attempts.claim(catalog, None, 1, kind="import")
    about = About(1, (), classes, stored_form.digest(payload["config"]), metrics={}, read_back=True)
    manifest = commit.commit(store, attempt, payload, about)
    attempts.end_copied(store, attempt, manifest, by="import")
    return manifest


class Import:
    """A task, built as for training, whose objects take their state from a file."""

    def __init__(
        self, loaded: Loaded, settings: Config, named: Mapping[str, str], without: Collection[str]
    ) -> None:
        self.settings = settings
        parts = recognise.recognise(loaded)
        self.job = rebuild.build(settings)
        world = World(0, 1, torch.device("cpu"), settings.run.timeout_s)
        self.stepper = Stepper(self.job, settings.train, world)
        self.tracked = self.stepper.tracked
        counts = {OPTIMIZER: len(self.stepper.optimizers), SCHEDULER: len(self.stepper.schedulers)}
        self.assignment = Assignment(
            loaded.file.where, parts, dict(named), set(without), counts, settings.init.rename
        )
        self._check_names()

    def _check_names(self) -> None:
        wanted = (*self.assignment.named, *self.assignment.without)
        if unknown := [name for name in wanted if name not in self.tracked]:
            raise UsageError(
                f"the task has no {', '.join(unknown)}, which --as or --without names",
                f"the task has: {', '.join(self.tracked)}",
                "Take one of these names.",
            )

    def position(self, epoch: int | None, step: int | None) -> Where:
        """Determine the epoch and the step to resume with; the arguments override the file.

        Raises:
            UsageError: They cannot be determined, or are out of range.
        """
        where, note = position(self.assignment.parts, self._steps_per_epoch(), epoch, step)
        if where.epoch >= self.settings.train.epochs:
            note = (
                f"nothing is left to train: epoch {where.epoch} of "
                f"train.epochs={self.settings.train.epochs}; set more. {note}"
            ).rstrip()
        if note:
            self.assignment.notes.append(note)
        return where

    def _steps_per_epoch(self) -> int | None:
        data, train = self.job.train_data, self.settings.train
        if loading.is_iterable(data):
            return None
        plan = Plan(
            len(data),
            train.global_batch_size,
            1,
            0,
            1,
            train.seed,
            True,
            self.settings.data.drop_last,
        )
        plan.check()
        return plan.steps_per_epoch

    def load(self, where: Where) -> None:
        """Load the file's state into the task's objects.

        Raises:
            UsageError: The file does not fit the task, or the assignment of its parts is ambiguous.
        """
        self._load_modules()
        for name, average in self.stepper.averages.items():
            self._load_average(name, average)
        load_training_state(self.stepper, self.assignment, where.step)

    def _load_modules(self) -> None:
        modules, init, assigned = self.stepper.modules, self.settings.init, self.assignment
        if wanted := [name for name in modules if name not in assigned.without]:
            chosen = weights.choose(
                wanted, assigned.parts, assigned.named, assigned.where, partly=not init.strict
            )
            pairs = {name: (modules[name], part) for name, part in chosen.items()}
            fitted = weights.fit(
                pairs, strict=init.strict, rename=init.rename, where=assigned.where
            )
            assigned.notes.append(fitted)
            assigned.taken.update(chosen)
        anew = [name for name in modules if name not in assigned.taken]
        assigned.notes.extend(f"{name}: not taken from the file; begins anew" for name in anew)

    def _load_average(self, name: str, average: Ema) -> None:
        assigned = self.assignment
        part: Part | None
        if name in assigned.named:
            part = recognise.called(assigned.parts, MODULE, assigned.named[name])
        else:
            alike = (each for each in assigned.parts if each.kind == MODULE and each.name == name)
            part = next(alike, None)
        if part is None or name in assigned.without:
            average.module.load_state_dict(average.source.state_dict())
            assigned.notes.append(f"{name}: begins with the imported weights")
        else:
            assigned.taken[name] = part
            weights.fit(
                {name: (average.module, part)},
                strict=True,
                rename=self.settings.init.rename,
                where=assigned.where,
            )

    def payload(self, where: Where, stored: dict[str, Any]) -> dict[str, Any]:
        """Return the entries of a checkpoint other than the state of the tracked objects.

        The docstring of `harness/state` lists them.
        """
        train, loss = self.settings.train, recognise.number_of(self.assignment.parts, "loss")
        data = describe(
            self.job.train_data,
            train.global_batch_size,
            True,
            self.settings.data.drop_last,
            train.seed,
        )
        return {
            "format_version": 1,
            "step": where.step,
            "epoch": where.epoch,
            "loss": None if loss is None else float(loss),
            "metrics": {},
            "best": None,
            "rng": [],
            "state": {},
            "config": stored,
            "data": data | {"epoch": where.epoch, "sample": 0, "iterators": []},
        }

    def report(self, numbers: Collection[str]) -> str:
        """Return the table of the file's parts and what they become, and the notes.

        Args:
            numbers: Names of the numbers that are taken from the file.
        """
        shown = assignment_table(self.assignment.parts, self.assignment.taken, numbers)
        return f"{shown}\n\n" + "\n".join(self.assignment.notes)
