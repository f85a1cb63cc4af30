"""Let a checkpoint that somebody else's script wrote become step k of a run.

The task is built as for training, what was recognised in the file is fitted into its modules and optimizers, and all of it is committed
as an ordinary checkpoint: whoever goes on from it needs to know nothing of where it came from.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from harness import config as configuration
from harness import state, task
from harness.checkpoint import attempts, commit
from harness.checkpoint import format as fmt
from harness.checkpoint.catalog import Catalog, read_catalog
from harness.checkpoint.commit import About
from harness.config import Config
from harness.data import loading
from harness.data.fingerprint import describe
from harness.data.plan import Plan
from harness.distributed.ranks import World
from harness.errors import UsageError
from harness.exchange import files, rebuild, recognise, weights
from harness.exchange.files import Loaded
from harness.exchange.progress import Where, position
from harness.exchange.recognise import OPTIMIZER, SCALER, SCHEDULER, Part
from harness.step import Ema, Stepper
from harness.store import Store, open_store
from harness.supervision import run_address
from harness.text import muted, table

BOOKKEEPING = {"last_epoch", "verbose", "_step_count", "_last_lr", "_is_initial", "_get_lr_called_within_step"}


def import_checkpoint(
    file: str | Path,
    run: str | Path,
    *,
    config: str | None = None,
    settings: Sequence[str] = (),
    parts: Mapping[str, str] | None = None,
    without: Collection[str] = (),
    epoch: int | None = None,
    step: int | None = None,
    trust: bool = False,
    dry_run: bool = False,
) -> str:
    """Make `run`, a directory or URL without a run in it, begin with the checkpoint in `file`; returns what was recognised and taken.

    `config` (a YAML file) and `settings` (["task.name=…", "init.strict=false"]) are those that the run will have. `parts` says which
    part of the file is which of the task's, where that cannot be told, `without` what to leave out. `epoch`, counted from 0, is the one
    to go on with, `step` the number of updates made. `dry_run`: only tell. Raises UsageError, DamagedError, StorageError, and then
    nothing was written.
    """
    if files.is_ours(str(file)):
        run_address.checkpoint(str(file))  # or it says what is wrong with it
        raise UsageError(f"{file} is a checkpoint of this harness", remedy="harness import FILE RUN without settings copies it: a fork.")
    store, found = empty_store(run)
    chosen, stored = configuration.load(config, list(settings))
    loaded = files.read_any(file, trust=trust)
    built = task.find(chosen.task.name, chosen.task.args, stored["task"]["args"])
    stored["task"]["args"] = task.defaults(built) | stored["task"]["args"]
    stored["run"] |= {"dir": None, "remote": str(store)} if not store.is_local else {"dir": str(run)}
    import_ = Import(loaded, chosen, parts or {}, without)
    try:
        where = import_.position(epoch, step)
    except UsageError as error:
        if config or any(setting.startswith("task.name=") for setting in settings):
            raise
        raise UsageError(error.what, error.found, f"{error.remedy} No task was named, so it is {chosen.task.name}: task.name=…") from error
    state.check_finite(import_.tracked)
    payload = state.plain_data(import_.payload(where, stored)) | state.capture(import_.tracked)
    payload["format_version"] = fmt.version_of(payload)
    words = f"{import_.shown()}\n\n" + "\n".join(import_.notes)
    if dry_run:
        return f"{words}\n\nnothing was written"
    manifest = _commit(store, found, payload, {name: state.class_name(thing) for name, thing in import_.tracked.items()})
    return f"{words}\n\n{store} begins with {manifest.name}, at epoch {where.epoch}"


def empty_store(run: str | Path) -> tuple[Store, Catalog]:
    """A place where a run may begin, and that nothing is in it. Raises UsageError."""
    store = open_store(run)
    found = read_catalog(store)
    if found.greatest or found.manifests:
        raise UsageError(f"{store} holds a run already", f"found: attempt {found.greatest}", "Choose another directory.")
    return store, found


def _commit(store: Store, found: Catalog, payload: dict[str, Any], classes: dict[str, str]) -> fmt.Manifest:
    store.prepare(fmt.FOLDERS)
    attempt = attempts.claim(found, None, 1, kind="import")
    about = About(1, (), classes, configuration.digest(payload["config"]), metrics={}, read_back=True)
    manifest = commit.commit(store, attempt, payload, about)
    attempts.end(store, attempt, "stopped", step=manifest.step, saved=True, saved_step=manifest.step, by="import")
    return manifest


class Import:
    """A task whose objects have taken what a file holds."""

    def __init__(self, loaded: Loaded, settings: Config, named: Mapping[str, str], without: Collection[str]) -> None:
        self.loaded, self.settings, self.named, self.without = loaded, settings, dict(named), set(without)
        self.parts = recognise.recognise(loaded)
        self.job = rebuild.build(settings)
        world = World(0, 1, torch.device("cpu"), settings.run.timeout_s)
        self.stepper = Stepper(self.job, settings.train, world)
        self.tracked = self.stepper.tracked
        self.taken: dict[str, Part] = {}
        self.notes: list[str] = []
        self._check_names()

    def _check_names(self) -> None:
        if unknown := [name for name in (*self.named, *self.without) if name not in self.tracked]:
            raise UsageError(f"the task has no {', '.join(unknown)}", f"found: {', '.join(self.tracked)}")

    def position(self, epoch: int | None, step: int | None) -> Where:
        """Epoch and step: as told, or as in the file. Then everything is taken over."""
        self._told = {name for name, value in (("epoch", epoch), ("step", step)) if value is not None}
        where, note = position(self.parts, self._steps_per_epoch(), epoch, step)
        if where.epoch >= self.settings.train.epochs:
            note = f"nothing is left to train: epoch {where.epoch} of train.epochs={self.settings.train.epochs}; set more. {note}".rstrip()
        self.notes += [note] if note else []
        self._take(where)
        return where

    def _steps_per_epoch(self) -> int | None:
        data, train = self.job.train_data, self.settings.train
        if loading.is_iterable(data):
            return None
        plan = Plan(len(data), train.global_batch_size, 1, 0, 1, train.seed, True, self.settings.data.drop_last)
        plan.check()
        return plan.steps_per_epoch

    def _take(self, where: Where) -> None:
        modules = self.stepper.modules
        init, wanted = self.settings.init, [name for name in modules if name not in self.without]
        if wanted:
            chosen = weights.choose(wanted, self.parts, self.named, self.loaded.file.where, partly=not init.strict)
            pairs = {name: (modules[name], part) for name, part in chosen.items()}
            self.notes.append(weights.fit(pairs, strict=init.strict, rename=init.rename, where=self.loaded.file.where))
            self.taken |= chosen
        self.notes += [f"{name}: not taken from the file; begins anew" for name in modules if name not in self.taken]
        for name, average in self.stepper.averages.items():
            self._take_average(name, average)
        held = {name: self._schedule(name, scheduler, where.step) for name, scheduler in self.stepper.schedulers.items()}
        own_rates = {id(s.optimizer) for name, s in self.stepper.schedulers.items() if held[name] is None and hasattr(s, "optimizer")}
        for name, optimizer in self.stepper.optimizers.items():
            self._take_optimizer(name, optimizer, keeps_rate=id(optimizer) in own_rates)
        for name, part in held.items():
            if part is not None:
                self._take_scheduler(name, part)
        if "scaler" in self.tracked and (part := self._held("scaler", SCALER)):
            self.tracked["scaler"].load_state_dict(part.value)

    def _schedule(self, name: str, scheduler: Any, step: int) -> Part | None:
        """The file's state for a scheduler, if it counts updates as ours do; else the scheduler is brought to this step by itself."""
        part = self._held(name, SCHEDULER)
        of = next((own for own, optimizer in self.stepper.optimizers.items() if optimizer is getattr(scheduler, "optimizer", None)), None)
        if part is not None and of is not None and self._held(of, OPTIMIZER) is None:
            part = None  # the rates that it holds are another optimizer's
        if part is not None and (name in self.named or part.value["last_epoch"] == step):
            return part
        self.taken.pop(name, None)
        with muted():  # it would warn that no optimizer step came before
            for _ in range(step):
                scheduler.step()
        why = f"the file's counts {part.value['last_epoch']}, epochs perhaps, not updates" if part else "not taken from the file"
        self.notes.append(f"{name}: {why}; the task's own is brought to step {step}")
        return None

    def _held(self, name: str, kind: str) -> Part | None:
        """The part of the file for a thing of the task's, or None."""
        if name in self.without:
            return None
        of_kind = [part for part in self.parts if part.kind == kind]
        if name in self.named:
            found = self._called(name, kind)
        else:
            several = {OPTIMIZER: self.stepper.optimizers, SCHEDULER: self.stepper.schedulers}.get(kind, {})
            found = [part for part in of_kind if part.name == name] or (of_kind if len(of_kind) == 1 and len(several) < 2 else [])
            if not found and of_kind:
                raise UsageError(
                    f"which {kind} of the file is {name!r} cannot be told",
                    f"found: {', '.join(part.key for part in of_kind)}",
                    f"Name it: --as {name}={of_kind[0].key}, or leave it out: --without {name}.",
                )
        if found:
            self.taken[name] = found[0]
        return found[0] if found else None

    def _called(self, name: str, kind: str) -> list[Part]:
        """The parts of the file that were said to be a thing of the task's. Raises UsageError if there is none."""
        of_kind = [part for part in self.parts if part.kind == kind]
        found = [part for part in of_kind if self.named[name] in (part.key, part.name)]
        if not found:
            raise UsageError(f"the file has no {kind} {self.named[name]!r}", f"found: {', '.join(p.key for p in of_kind) or 'none'}")
        return found

    def _take_average(self, name: str, average: Ema) -> None:
        alike = [part for part in self.parts if part.kind == recognise.MODULE and part.name == name]
        part = next(iter(self._called(name, recognise.MODULE) if name in self.named else alike), None)
        if part is None or name in self.without:
            average.module.load_state_dict(average.source.state_dict())
            self.notes.append(f"{name}: begins with the imported weights")
        else:
            self.taken[name] = part
            weights.fit({name: (average.module, part)}, strict=True, rename=self.settings.init.rename, where=self.loaded.file.where)

    def _take_optimizer(self, name: str, optimizer: torch.optim.Optimizer, *, keeps_rate: bool) -> None:
        part = self._held(name, OPTIMIZER)
        if part is None:
            self.notes.append(f"{name}: not taken from the file; begins anew")
            return
        fresh = optimizer.state_dict()
        _check_optimizer(name, optimizer, part)
        state.restore_one(name, optimizer, part.value, self.loaded.file.where)
        for group, before in zip(optimizer.param_groups, fresh["param_groups"], strict=True):
            for key, value in before.items():
                if key not in group or (keeps_rate and key in ("lr", "initial_lr")):
                    group[key] = value

    def _take_scheduler(self, name: str, part: Part) -> None:
        scheduler = self.stepper.schedulers[name]
        own, theirs = (set(each) - BOOKKEEPING for each in (scheduler.state_dict(), part.value))
        if own != theirs:
            raise UsageError(
                f"{name} is a {type(scheduler).__name__}, and what the file holds is of another kind",
                f"found: {', '.join(sorted(theirs - own)) or 'nothing'}; expected: {', '.join(sorted(own - theirs)) or 'nothing'}",
                f"Begin it anew: --without {name}.",
            )
        before = dict(scheduler.state_dict())
        state.restore_one(name, scheduler, part.value, self.loaded.file.where)
        changed = [f"{key} {before[key]} -> {part.value[key]}" for key in sorted(own) if _plainly(before[key]) != _plainly(part.value[key])]
        self.notes += [f"{name}: as in the file: {', '.join(changed)}"] if changed else []

    def payload(self, where: Where, stored: dict[str, Any]) -> dict[str, Any]:
        """Everything of a checkpoint but the tracked objects; `harness/state` has the list."""
        train, loss = self.settings.train, recognise.number_of(self.parts, "loss")
        data = describe(self.job.train_data, train.global_batch_size, True, self.settings.data.drop_last, train.seed)
        return {
            "format_version": 1,
            "step": where.step, "epoch": where.epoch, "loss": None if loss is None else float(loss),
            "metrics": {}, "best": None, "rng": [], "state": {}, "config": stored,
            "data": data | {"epoch": where.epoch, "sample": 0, "iterators": []},
        }  # fmt: skip

    def shown(self) -> str:
        """What was recognised, and what of it was taken, as a table."""
        goes = {id(part): name for name, part in self.taken.items()}
        used = {"epoch", "step", "loss"} - self._told
        rows = [
            (
                part.name,
                part.key or "(the whole file)",
                recognise.summary(part),
                goes.get(id(part), part.name if part.name in used else "-"),
            )
            for part in self.parts
        ]
        return table(("part", "in the file", "what", "becomes"), rows)


def _check_optimizer(name: str, optimizer: torch.optim.Optimizer, part: Part) -> None:
    """Raises UsageError for the state of another kind of optimizer, or of other parameters."""
    kind = recognise.optimizer_kind(optimizer.state_dict())
    if kind != part.note:
        raise UsageError(
            f"{name} is {type(optimizer).__name__}, and what the file holds is of another kind", f"found: {part.note}",
            f"Take the task's old optimizer, or begin anew: --without {name}.",
        )  # fmt: skip
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in part.value["param_groups"] for number in group["params"]]
    held = part.value["state"]
    bad = [at for at, number in enumerate(numbers[: len(own)]) if _misshaped(held.get(number, {}), own[at])]
    if len(own) != len(numbers) or bad:
        shapes = f"; of another shape: parameter(s) {', '.join(map(str, bad[:5]))}" if bad else ""
        raise UsageError(
            f"{name} is of other parameters than the task's",
            f"found: {len(numbers)} parameters, expected: {len(own)}{shapes}",
            f"Begin anew: --without {name}.",
        )


def _misshaped(held: Any, parameter: torch.Tensor) -> bool:
    kept = held.values() if isinstance(held, Mapping) else ()
    return any(isinstance(item, torch.Tensor) and item.dim() == parameter.dim() > 0 and item.shape != parameter.shape for item in kept)


def _plainly(value: Any) -> str:
    return str(sorted(value.items())) if isinstance(value, Mapping) else str(value)
