"""The library that `harness/train.py` and a user's own loop are written with.

    run = harness.init("runs/a", save_every_s=60, seed=1)
    run.track(model=model, optimizer=optimizer)
    for x, y in run.batches(dataset, global_batch_size=64, epochs=5):
        …
        run.log(loss=loss)

What follows the `yield` in `batches` runs after the user's step. That is the step boundary, the one place where saving and
stopping are agreed on by all ranks and done.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from harness import config, evaluation, ranks, resume, state, stop
from harness.checkpoint import load, retention
from harness.checkpoint.format import CHECKPOINTS, FORMAT_VERSION
from harness.checkpoint.history import survey
from harness.data import loading
from harness.data.fingerprint import fingerprint
from harness.data.order import Position
from harness.ending import Ending
from harness.errors import SaveError, UsageError
from harness.events import Moment, Progress
from harness.ranks import World
from harness.saver import Saver
from harness.store import LocalStore

AGREE_EVERY_S = 0.25


@dataclass(frozen=True)
class Settings:
    """What `init` was told."""

    seed: int = 0
    save_every_s: float | None = 60.0
    save_every_steps: int | None = None
    policy: retention.Policy = field(default_factory=retention.Policy)
    config: dict[str, Any] = field(default_factory=dict)
    accept: tuple[str, ...] = ()
    override: tuple[str, ...] = ()
    log_every_steps: int = 10


def init(
    directory: str | Path,
    *,
    remote: str | None = None,
    seed: int = 0,
    save_every_s: float | None = 60.0,
    save_every_steps: int | None = None,
    keep_last: int = 3,
    keep_every_steps: int | None = None,
    keep_best: int = 1,
    best: str = "val_loss:min",
    config: Mapping[str, Any] | None = None,
    accept: Sequence[str] = (),
    override: Sequence[str] = (),
    deterministic: bool = False,
    timeout_s: float = 600.0,
    log_every_steps: int = 10,
) -> Run:
    """Join the other ranks, catch signals, seed all generators, and find the newest checkpoint of the run in `directory`.

    Everything here only reads; the run is claimed when training begins. `config` is any dict of plain values that training
    depends on: it is kept in each checkpoint, and a run refuses to go on with another one unless `accept=["config"]`.
    Raises UsageError, StorageError, DamagedError. Collective: every rank must call it.
    """
    if remote is not None:
        raise UsageError("remote storage is not supported by this version", f"found: remote={remote!r}", "Leave it out.")
    if deterministic:
        _be_deterministic()
    metric, _, direction = best.rpartition(":")
    stop.install()
    stop.die_with_launcher()
    ending = Ending()
    world = ranks.join(timeout_s)
    state.seed_rank(seed, "build")  # alike on all ranks, so that they build the same model
    store = LocalStore(directory)
    choice = load.choose(store, world, give_up=stop.requested)
    policy = retention.Policy(keep_last, keep_every_steps, keep_best, metric or best, direction == "max")
    settings = Settings(seed, save_every_s, save_every_steps, policy, dict(config or {}), tuple(accept), tuple(override), log_every_steps)
    return Run(world, store, choice, settings, ending)


def _be_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ.setdefault("NCCL_PROTO", "Simple")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


class Run:
    """One training job, as seen from one rank of its present attempt."""

    def __init__(
        self,
        world: World,
        store: LocalStore,
        choice: load.Choice,
        settings: Settings,
        ending: Ending,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.world, self.store, self.clock = world, store, clock
        self.step = 0  # in the loop: the number of the step being made, from 1 on; afterwards: of the last one made
        self.epoch = 0
        self.state: dict[str, Any] = {}  # plain values of the user's that are saved with each checkpoint
        self.metrics: dict[str, float] = {}  # what the last evaluation found
        self.weights: tuple[float, ...] = (1.0,)  # what to multiply each micro-batch's mean loss with
        self.tracked: dict[str, Any] = {}
        self.finished = False
        self._settings, self._origin, self._payload = settings, choice.manifest, choice.payload
        self._position = Position()
        self._loss: float | None = None
        self._best: float | None = None
        self._logged: dict[str, Any] = {}
        self._new_best = self._finish = self._looping = False
        self._next_agreement = 0
        self._saver = Saver(store, world, choice, settings.policy, ending, clock)
        self._progress = Progress(clock)
        for note in choice.notes:
            self.say(f"harness: {note}")
        if self._payload is not None:
            self._take_up(self._payload)

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def world_size(self) -> int:
        return self.world.size

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def is_writer(self) -> bool:
        """Whether this is the one rank that writes and prints."""
        return self.world.is_writer

    def say(self, text: str) -> None:
        """Print a line, on the writer only."""
        if self.is_writer:
            self._progress.say(text)

    # -- before the loop ------------------------------------------------------------------------------------------------------

    def _take_up(self, payload: dict[str, Any]) -> None:
        """Check the settings against the checkpoint's, and take over from it what is not a tracked object."""
        settings = self._settings
        for change in config.check_changes(payload["config"], settings.config, settings.accept, settings.override):
            self.say(f"harness: setting changed: {change}")
        self.step, self.epoch = payload["step"], payload["epoch"]
        self.state, self.metrics, self._loss, self._best = payload["state"], payload["metrics"], payload["loss"], payload["best"]
        self._position = Position(payload["data"]["epoch"], payload["data"]["sample"])

    def track(self, **objects: Any) -> None:
        """Name what has to survive: modules, optimizers, schedulers, anything with `state_dict` and `load_state_dict`.

        If the run has a checkpoint, each object gets its state back here, bit for bit. Call it after wrapping modules in
        DistributedDataParallel and before `batches`. Raises UsageError. Collective: every rank must call it.
        """
        if self._looping or self.finished:
            raise UsageError(f"track({', '.join(objects)}) came after the first batch", remedy="Track everything before the loop.")
        for name, thing in objects.items():
            resume.check_trackable(name, thing, self.tracked)
            ranks.check_resumable(name, thing, self.world)
        self.tracked |= objects
        for thing in objects.values():
            ranks.settle_buckets(thing)
        if self._payload is not None and self._origin is not None:
            built = {name: state.as_built(thing) for name, thing in objects.items()} if self._settings.override else None
            state.restore(objects, self._origin.classes, self._payload, self._origin.name)
            for line in state.apply_override(built, objects) if built else ():
                self.say(f"harness: overridden: {line}")

    # -- the loop -------------------------------------------------------------------------------------------------------------

    def batches(
        self,
        dataset: Any,
        global_batch_size: int,
        *,
        accumulate: int = 1,
        epochs: int = 1,
        max_steps: int | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        order: Callable[[int], Sequence[int]] | None = None,
    ) -> Iterator[Any]:
        """Yield this rank's share of one optimizer step after another, on `run.device`, from where the run stands to its end.

        `global_batch_size` counts samples over all ranks and micro-batches. With `accumulate` > 1 a share is a list of that
        many micro-batches. `order(epoch)` gives the sample numbers in the order to use them, in place of a shuffle. With
        `drop_last=False` multiply each micro-batch's mean loss with its entry of `run.weights`.

        When a stop was requested, the state is saved and SystemExit(0) raised: code after the loop is reached only when
        training is complete. Raises UsageError, SaveError, SupersededError. Collective: every rank must call it.
        """
        if self._looping:
            raise UsageError("batches() is called inside the loop over another batches()", remedy="Use evaluate() for evaluation.")
        self._source = loading.source(
            dataset, self.world, self._settings.seed, global_batch_size,
            accumulate=accumulate, shuffle=shuffle, drop_last=drop_last, order=order, collate=collate_fn, num_workers=num_workers,
        )  # fmt: skip
        self._data = {
            "fingerprint": fingerprint(dataset), "size": None if loading.is_iterable(dataset) else len(dataset),
            "global_batch_size": global_batch_size, "shuffle": shuffle and order is None, "drop_last": drop_last, "seed": self._settings.seed,
        }  # fmt: skip
        self._global_batch_size = global_batch_size
        self._end = {"epochs": epochs, "max_steps": max_steps}
        self._end_step = _end_step(self.step, self._source.steps_after(self._position, epochs), max_steps)
        if not self._begin():
            return
        self._looping = True
        try:
            if self._end_step is None or self.step < self._end_step:
                yield from self._steps(epochs, accumulate)
            if not self.finished:  # there was nothing left to do
                self._complete()
        finally:
            self._looping = False
            stop.unwatch()

    def _steps(self, epochs: int, accumulate: int) -> Iterator[Any]:
        self._stop_if(bool(self.world.agree([int(stop.requested() is not None)])[0]))  # before this attempt's first step
        pace = Pace(self.clock, self.step)
        for share, micro_batches in self._source.shares(self._position, epochs):
            self.step, self.epoch, self.weights = self.step + 1, share.epoch, share.weights
            self._new_best, self._logged = False, {}
            batch = loading.to_device(micro_batches, self.device)
            yield batch if accumulate > 1 else batch[0]
            self._position, self.epoch = share.after, share.after.epoch
            if self.step % self._settings.log_every_steps == 0:
                self._show(pace, epochs)
            if self._finish or share.last or self.step == self._end_step:
                self._complete()
                return
            stopping, timed = self._agree(pace) if self.step >= self._next_agreement else (False, False)
            every = self._settings.save_every_steps
            if stopping or timed or self._new_best or (every and self.step % every == 0):
                self._save(final=False)
                pace.pause(self.step)
            self._stop_if(stopping)

    def due(self, every_steps: int | None) -> bool:
        """Whether something done every so many steps is due in this one; always so in the last step of the run."""
        return self.step == self._end_step or bool(every_steps and self.step % every_steps == 0)

    def finish(self) -> None:
        """End the run with this step, as complete: early stopping. Collective: every rank must call it in the same step."""
        self._finish = True

    def log(self, **values: Any) -> None:
        """Say how this step went. A tensor is read only when it is shown or saved. Every rank should call it alike."""
        self._logged = {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in values.items()}

    def evaluate(
        self,
        dataset: Any,
        fn: Callable[[Any], Mapping[str, Any]],
        *,
        batch_size: int = 256,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> dict[str, float]:
        """Evaluate on all ranks, each sample once; returns, and keeps in `run.metrics`, the means over all samples.

        `fn(batch)` returns sums over the batch's samples: {"val_loss": …, "val_acc": …}. It is called without gradients and
        with all tracked modules in eval mode; afterwards their modes and the generators are as they were, also if it raises.
        Collective: every rank must call it.
        """
        stop.unwatch()
        self.metrics = evaluation.evaluate(self.world, list(self.tracked.values()), dataset, fn, batch_size, collate_fn)
        value = self.metrics.get(self._settings.policy.metric)
        if value is not None:
            sign = 1 if self._settings.policy.higher_is_better else -1
            if self._best is None or sign * value > sign * self._best:
                self._best, self._new_best = value, self._settings.policy.best > 0
        self._saver.note("evaluated", step=self.step, **self.metrics)
        return self.metrics

    # -- the beginning and the end of an attempt ------------------------------------------------------------------------------

    def _begin(self) -> bool:
        """Claim the attempt and set the generators; False if the run is finished, and then nothing was written."""
        payload, origin = self._payload or {}, self._origin
        resume.check_tracked(self.tracked, payload)
        if payload:
            resume.check_data(self._data, payload["data"], self._settings.accept)
        if origin is not None and origin.final is not None and resume.reaches(origin.final, self._end):
            self.finished, self._payload = True, None
            self.say(f"harness: the run in {self.store} is finished: step {self.step} ({origin.name}); nothing to do")
            return False
        attempt = self._saver.begin(self._settings.config, self._progress, stop.requested)
        self._set_generators(payload)
        self._payload = None  # from here on the live objects are the only copy
        source = f"goes on from step {self.step} ({origin.name})" if origin else "begins at step 0"
        self.say(f"harness: attempt {attempt.number} {source} in {self.store}")
        return True

    def _set_generators(self, payload: dict[str, Any]) -> None:
        """Each rank gets its own generators back; a rank that was not there before gets new ones, as all do in a fresh run."""
        entries = payload.get("rng", [])
        if entries and len(entries) != self.world.size:
            if any(iterator is not None for iterator in payload["data"]["iterators"]):
                raise UsageError(
                    "an iterable dataset keeps its state per rank, so the number of ranks cannot change",
                    f"found: {self.world.size} rank(s), expected: {len(entries)}",
                    "Start as many as before.",
                )
            self.say(
                f"harness: {len(entries)} rank(s) before, {self.world.size} now: the same samples in the same global batches, not bit for bit"
            )
        if self.rank < len(entries):
            state.set_rng_state(entries[self.rank])
            self._source.restore(payload["data"]["iterators"][self.rank])
        else:
            state.seed_rank(self._settings.seed, "rank", self.rank, self.step)

    def _complete(self) -> None:
        if not self._save(final=True):
            raise SaveError(
                f"the last checkpoint, of step {self.step}, was not saved", self._saver.words, "Mend the cause and start again."
            )
        self.finished = True
        self._saver.ended("finished", step=self.step)
        self.say(f"harness: finished at step {self.step}")

    def _stop_if(self, agreed: bool) -> None:
        """If so agreed, leave, on all ranks at this step, with the state saved. Raises SystemExit(0), or SaveError."""
        if not agreed:
            return
        names = sorted({name for name in self.world.gather(stop.requested()) if name})
        saved = self.step in (0, self._saver.saved_step)
        self._saver.ended("stopped", step=self.step, saved=saved, signals=names)
        if not saved:
            raise SaveError(
                f"stopped by {'/'.join(names)} at step {self.step}, and not saved",
                self._saver.words,
                "Start again: the previous checkpoint is whole.",
            )
        self.say(f"harness: stopped by {'/'.join(names)} at step {self.step}, everything saved; start again to go on")
        self.world.on_writer(lambda: None)  # all leave together, after the writer has said all
        self.world.leave()
        raise SystemExit(0)

    # -- the step boundary ----------------------------------------------------------------------------------------------------

    def _agree(self, pace: Pace) -> tuple[bool, bool]:
        """Whether all stop now, whether all save now. Collective: every rank must call it."""
        interval = 1 if self.world.size == 1 else pace.steps_within(AGREE_EVERY_S, self.step)
        timed = self.is_writer and self._saver.is_due(self._settings.save_every_s)
        stopping, saving, interval = self.world.agree([int(stop.requested() is not None), int(timed), interval if self.is_writer else 0])
        self._next_agreement = self.step + interval
        stop.watch(self.world.timeout_s)
        return bool(stopping), bool(saving)

    def _save(self, *, final: bool) -> bool:
        """Commit a checkpoint of this step; returns whether it was. Collective: every rank must call it."""
        stop.unwatch()
        self._loss = self._read_log().get("loss", self._loss)
        generators = self.world.gather((state.rng_state(), self._source.state()))
        classes = {name: state.class_name(thing) for name, thing in self.tracked.items()}
        saved = self._saver.save(
            self.step,
            lambda: self._capture(generators),
            lambda: self._saver.about(classes, self._settings.config, self._end if final else None),
            stop.requested,
        )
        if not saved and not final:
            self.say(f"harness: NOT SAVED, training goes on: {self._saver.words}")
        return saved

    def _capture(self, generators: list[Any]) -> dict[str, Any]:
        """The whole checkpoint; `harness/state.py` says what belongs to it."""
        values = {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "epoch": self.epoch,
            "loss": self._loss,
            "metrics": self.metrics,
            "rng": [generator for generator, _ in generators],
            "data": self._data
            | {"epoch": self._position.epoch, "sample": self._position.sample, "iterators": [it for _, it in generators]},
            "state": self.state,
            "best": self._best,
            "config": self._settings.config,
        }
        return state.plain_data(values) | state.capture(self.tracked)

    def _read_log(self) -> dict[str, float]:
        """The means over ranks of what was logged in this step. Collective: every rank must call it."""
        parts = self.world.gather({name: float(value) for name, value in self._logged.items()})
        return {name: sum(part[name] for part in parts if name in part) / sum(name in part for part in parts) for name in parts[0]}

    def _show(self, pace: Pace, epochs: int) -> None:
        values = self._read_log()
        self._saver.note("step", step=self.step, **values)
        if self.is_writer:
            rate = pace.steps_per_s(self.step)
            samples_per_s = rate * self._global_batch_size
            self._progress.show(Moment(self.step, self._end_step, self.epoch, epochs, values, samples_per_s, self._saver.words), rate)

    def best_checkpoint(self) -> Path | None:
        """The file of the best checkpoint of the run so far by the metric that `init` was told, or None."""
        ranked = retention.best(survey(self.store).history, self._settings.policy)
        return self.store.path(f"{CHECKPOINTS}/{ranked[0].data.name}") if ranked else None


class Pace:
    """How fast steps are being made, what is done at their boundaries left out of the short view."""

    def __init__(self, clock: Callable[[], float], step: int) -> None:
        self._clock = clock
        self._first = self._recent = (clock(), step)

    def pause(self, step: int) -> None:
        """Something that is no step took time just now."""
        self._recent = (self._clock(), step)

    def steps_within(self, seconds: float, step: int) -> int:
        """How many steps fit into so many seconds, from 1 to 1000, by those since the last call."""
        at, before = self._recent
        step_s = (self._clock() - at) / max(1, step - before)
        self._recent = (self._clock(), step)
        return max(1, min(1000, int(seconds / max(step_s, 1e-6))))

    def steps_per_s(self, step: int) -> float:
        at, before = self._first
        return (step - before) / max(1e-9, self._clock() - at)


def _end_step(step: int, steps_left: int | None, max_steps: int | None) -> int | None:
    ends = ([] if steps_left is None else [step + steps_left]) + ([] if max_steps is None else [max(step, max_steps)])
    return min(ends, default=None)
