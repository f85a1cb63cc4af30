"""The loop of a run: batches, step boundaries, and what is agreed on there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import harness.run.resume_checks as resume_checks
from harness import config, preemption, state
from harness.arguments import Settings
from harness.checkpoint import load, retention
from harness.checkpoint.catalog import reaches
from harness.data import loading
from harness.data.plan import Border, Position, Share, end_step
from harness.distributed.ranks import World
from harness.monitoring.console import Console, StepSummary
from harness.monitoring.goodput import DATA, EVALUATION, RESTORE, SAVE, Goodput
from harness.monitoring.metric_buffer import MetricBuffer
from harness.monitoring.step_timeouts import StepTimeouts
from harness.monitoring.store_health import StoreHealth
from harness.monitoring.throughput import Throughput
from harness.run.drill_hooks import Traces
from harness.run.epochs import Batches, by_epoch
from harness.run.evaluation import evaluate
from harness.run.kept_state import KeptState
from harness.run.stop_agreement import StopAgreement
from harness.run.work import Work, of_data, of_own
from harness.saving.checkpointer import Checkpointer
from harness.store import Store
from harness.supervision.exit_record import ExitRecord
from harness.tracking.payload import OfRank
from harness.tracking.rank_differences import give_own


class Run:
    """One training job, as seen from one rank of its present attempt."""

    def __init__(
        self, world: World, stores: tuple[Store, ...], choice: load.ResumePoint, settings: Settings, ending: ExitRecord,
        outage: StoreHealth, account: Goodput, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.world, self.store, self.clock = world, stores[0], clock
        self.rank, self.world_size, self.device = world.rank, world.size, world.device
        self.step = 0  # in the loop: the number of the step being made, from 1 on; afterwards: of the last one made
        self.epoch = 0  # counted from 0
        self.state: dict[str, Any] = {}  # plain values of the user's that are saved with each checkpoint
        self.weights: tuple[float, ...] = (1.0,)  # what to multiply each micro-batch's mean loss with
        self.tracked: dict[str, Any] = {}
        self.finished = self._finish = self._looping = False
        self._settings, self.origin, self._payload = settings, choice.manifest, choice.payload
        choice.payload = None  # held here until it is restored, and by nobody else
        self._position, self._share = Position(), Share(0, 0, (), (), Position(), last=False)  # the latter of the step being made
        self._measured, self._account, self._ending = MetricBuffer(), account, ending
        self._traces = Traces(world)
        self._stopping = StopAgreement(world, settings, clock)
        self._watch = StepTimeouts(world.timeout_s, settings.step_timeout_s, ending.hung, clock)
        ending.of(self)
        self._saver = Checkpointer(stores, world, choice, settings, ending, outage, account, clock)
        self._saver.at_save = partial(self._traces.point, "save")
        self._keeping = KeptState(world, lambda: self.step, self.say, self._saver.note)
        self.suspects = self._saver.replay.suspects = self._keeping.suspects
        self._progress = Console(clock)
        account.say = self._progress.say
        for note in choice.notes:
            self.say(f"harness: {note}")
        if self._payload is not None:
            self._take_up(give_own(self._payload, world))

    @property
    def metrics(self) -> dict[str, float]:
        """What the last evaluation found."""
        return self._measured.metrics

    @property
    def is_writer(self) -> bool:
        """Whether this is the one rank that writes and prints."""
        return self.world.is_writer

    def say(self, text: str) -> None:
        """Print a line, on the writer only."""
        if self.is_writer:
            self._progress.say(text)

    def _take_up(self, payload: dict[str, Any]) -> None:
        """Check the settings against the checkpoint's, and take over from it what is not a tracked object."""
        settings = self._settings
        for change in config.check_changes(payload["config"], settings.config, settings.accept, settings.override):
            self.say(f"harness: setting changed: {change}")
        self.step, self.epoch, self.state = payload["step"], payload["epoch"], state.rebuilt(payload, "state")
        self._measured.restore(payload)
        self._position = Position(payload["data"]["epoch"], payload["data"]["sample"])

    def track(self, **objects: Any) -> Run:
        """Name what has to survive: modules, optimizers, schedulers, anything with `state_dict` and `load_state_dict`.

        If the run has a checkpoint, each object gets its state back here, bit for bit. Call it after wrapping modules in
        DistributedDataParallel and before the loop. Returns the run. Raises UsageError. Collective: every rank must call it.
        """
        late = self._looping or self.finished
        with self._account.during(RESTORE):
            for line in self._keeping.track(self.tracked, objects, self.origin, self._payload, self._settings, is_late=late):
                self.say(f"harness: {line}")
        return self

    def batches(
        self, dataset: Any, global_batch_size: int | None = None, *, accumulate: int = 1, epochs: int, max_steps: int | None = None,
        shuffle: bool = True, drop_last: bool = True, collate_fn: Callable[[list[Any]], Any] | None = None, num_workers: int = 0,
        order: Callable[[int], Sequence[int]] | None = None, beside: Mapping[str, Any] | None = None, check_stream: bool = True,
    ) -> Iterator[Any]:  # fmt: skip
        """Yield this rank's share of one optimizer step after another, on `run.device`, from where the run stands to its end.

        Loop once: `epochs` is their total. `global_batch_size` counts samples over all ranks and micro-batches. With
        `accumulate` > 1 a share is a list of that many micro-batches. `order(epoch)` gives the sample numbers in the order to
        use them, in place of a shuffle. With `drop_last=False` multiply each micro-batch's mean loss with its entry of
        `run.weights`. In place of a dataset a DataLoader may be given, alone: its dataset is dealt out as it would do it, its batch size
        being that of a micro-batch on one rank.

        `beside={"unlabelled": other}` adds datasets or DataLoaders that go round in epochs of their own, in whole batches: a step yields
        (batch, {"unlabelled": batch}). A stream is tried in copies before training, unless `check_stream=False`: is its state exact?

        When a stop was requested, the state is saved and SystemExit(0) raised: code after the loop is reached only when
        training is complete. Raises UsageError, SaveError, SupersededError. Collective: every rank must call it.
        """
        return Batches(lambda: of_data(
            dataset, self.world, self._settings.seed, global_batch_size, self._traces.workers,
            accumulate=accumulate, epochs=epochs, max_steps=max_steps, shuffle=shuffle, drop_last=drop_last, collate=collate_fn,
            num_workers=num_workers, order=order, beside=beside or {}, check_stream=check_stream, before=(self._payload or {}).get("data"),
        ), self._loop)  # fmt: skip

    def by_epoch(self, batches: Iterator[Any]) -> Iterator[tuple[int, Iterator[Any]]]:
        """Yield each epoch with its batches, of all that `batches` yields: for a loop in a loop.

        What the outer loop does after the inner one (a scheduler's step, an evaluation) belongs to the epoch's last step, and is saved
        with it. The epoch in which a run goes on yields what is left of it: count with `run.step`, not with `enumerate`. Run the inner
        loop to its end. Raises UsageError, and as `batches`. Collective: every rank must call it.
        """
        return by_epoch(batches, lambda: self._share)

    def steps(self, max_steps: int) -> Iterator[int]:
        """Yield the numbers of the steps that are left of `range(max_steps)`, for a loop that finds its data itself.

        It has to do so anew in each step, from the generators of Python, NumPy and torch, which are saved for each rank, or from what is
        tracked: what a step leaves to the next in a variable is lost. Otherwise as `batches`. Collective: every rank must call it.
        """
        return Batches(lambda: of_own(self._settings.seed, max_steps, lambda: self.step - 1), self._loop)

    def _loop(self, begin: Callable[[], Work], by_epoch: bool) -> Iterator[Any]:
        resume_checks.check_one_loop(self._looping, self._saver.attempt is not None or self.finished)
        self._work = begin()
        before = self._payload["data"] if self._payload else None
        self._work.source.begin(self._position, before, lambda text: self.say(f"harness: warning: {text}"), by_epoch=by_epoch)
        self._end_step = self._traces.end_step(end_step(self.step, self._work.steps_after(self._position), self._work.max_steps))
        if not self._begin():
            return
        self._looping = True
        try:
            if self._end_step is None or self.step < self._end_step:
                yield from self._steps()
            if not self.finished:  # there was nothing left to do
                self._complete()
        except GeneratorExit:
            self._ending.left(self.say, is_finishing=self._finish)
            raise
        finally:
            self._looping = False
            self._account.closed.set()
            for part in (self._keeping, self._saver.background, self._saver.replay, self._watch, self._stopping):
                part.close()

    def _steps(self) -> Iterator[Any]:
        if self._stopping.agree_at_once():  # before this attempt's first step
            self._stop()
        self._watch.first_step()
        self._account.on(DATA)
        is_begun = False
        for share, micro_batches in self._work.shares(self._position, self.tracked, self.say):
            if not is_begun:
                self.step, self.epoch = self.step + 1, share.epoch
                self._measured.begin_step()
            if not isinstance(share, Border):
                self._share, self.weights = share, share.weights
            batch = loading.to_device(micro_batches, self.device)
            self._saver.background.release()
            self._account.train(self.step)
            if is_begun := isinstance(share, Border):  # of this step the outer loop has something to do before its samples are loaded
                yield share
                self._account.on(DATA)
                continue
            self._traces.step_begins(self.step)
            yield self._work.handed_out(batch)
            self._account.step_made()
            self._traces.step_made(self.step, share, batch, self._measured.logged, self.tracked)
            self._saver.at_boundary(self.tracked)
            self._keeping.at_boundary(self.state)
            self._saver.replay.step_made(self.step, share.digest, self._measured.logged)
            self._position, self.epoch = share.after, share.after.epoch
            if self.step % self._settings.log_every_steps == 0:
                self._measured.hold(self.step)
            if self._finish or share.last or self.step == self._end_step:
                self._complete()
                return
            met, stopping, timed = self._stopping.agree(self.step, self._end_step, self._pace, self._saver, self._watch)
            if met and self._measured.holds:
                self._show()
            if stopping:
                self._stop()
            if self._keeping.is_time(timed or self._measured.new_best or self._settings.saves_at(self.step), self._measured.new_best):
                self._save()
                self._pace.pause(self.step)
            elif self._settings.remembers_at(self.step):
                self._save(in_memory=True)
            self._watch.step()
            self._account.on(DATA)

    def due(self, every_steps: int | None) -> bool:
        """Whether something done every so many steps is due in this one; always so in the last step of the run."""
        resume_checks.check_begun(self._looping or self.finished or self._saver.attempt is not None)
        return self.step == self._end_step or bool(every_steps and self.step % every_steps == 0)

    def finish(self) -> None:
        """End the run with this step, as complete: early stopping. Collective: every rank must call it in the same step."""
        self._finish = True

    def log(self, **values: Any) -> None:
        """Say how this step went, in numbers. A tensor is read only when it is shown or saved. Every rank should call it alike."""
        resume_checks.check_loggable(values)
        self._measured.log(values)

    def keep(self, name: str, data: bytes) -> None:
        """Keep a small file of yours with the run (a picture, a table): atomic, in every store of the run, as `files/NAME`.

        On the writer only; elsewhere nothing happens. `name` may have subfolders; what was kept under it is replaced. A write that
        fails does not stop training: it is said, and an event. Raises UsageError for a name that leads out, and outside the loop.
        """
        self._saver.keep(name, data)

    def evaluate(
        self, dataset: Any, fn: Callable[[Any], Mapping[str, Any]], *, batch_size: int = 256,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Evaluate on all ranks, each sample once; returns, and keeps in `run.metrics`, the means over all samples.

        `fn(batch)` returns sums over the batch's samples: {"val_loss": …, "val_acc": …}. It is called without gradients and
        with all tracked modules in eval mode; afterwards their modes and the generators are as they were, also if it raises.
        Collective: every rank must call it.
        """
        self._traces.point("evaluation", self.step)
        with self._account.during(EVALUATION):
            found = evaluate(self.world, list(self.tracked.values()), dataset, fn, batch_size, collate_fn, self._watch.evaluation)
        self._watch.evaluated() if self._looping else self._watch.rest()
        self._measured.evaluated(found, self._settings.policy)
        self._saver.note("evaluated", step=self.step, **found)
        return found

    def _begin(self) -> bool:
        """Claim the attempt and set the generators; False if the run is finished, and then nothing was written."""
        payload, origin = self._payload or {}, self.origin
        for warning in (*resume_checks.check(self.tracked, payload, self._work.data, self._settings.accept), *self._work.notes):
            self.say(f"harness: warning: {warning}")
        if origin is not None and origin.final is not None and reaches(origin.final, self._work.end):
            self.finished, self._payload = True, None
            self._work.source.close()
            done = self._saver.hand_in(preemption.requested)
            self.say(f"harness: the run in {self.store} is finished: step {self.step} ({origin.name}); {done or 'nothing to do'}")
            return False
        if self._stopping.agree_at_once():
            self._ending.record("stopped", self._saver.stores)  # of a launch that has claimed no attempt
            self._stopping.leave("stopped before training began; start again", self.say)
        self._traces.point("startup", self.step)
        attempt = self._saver.begin(self._progress, preemption.requested)
        self._traces.begun(attempt.number, self.step)
        self._stopping.listen(self._saver.stores, attempt.number)
        notes = resume_checks.restore_generators(payload, self.world, self._work.source, self._settings.seed, self.step)
        for note in (*notes, *self._keeping.begin(self.tracked, payload, self._work.source)):
            self.say(f"harness: {note}")
        self._payload = None  # from here on the live objects are the only copy
        self._pace = Throughput(self.clock, self.step, self._account.steps_per_s)
        if self.is_writer:
            self._saver.background.watch_updates(self.tracked, self.say)
        source = f"goes on from step {self.step} ({origin.name})" if origin else "begins at step 0"
        self.say(f"harness: attempt {attempt.number} {source} in {' and '.join(map(str, self._saver.stores))}{self._saver.resumed}")
        return True

    def _complete(self) -> None:
        resume_checks.check_some_steps(self.step, self._work.data["global_batch_size"])
        if not self._save(final=True, wait=True):
            raise self._saver.failure(f"the last checkpoint, of step {self.step}, was not saved", "Mend the cause and start again.")
        self._saver.end("finished", preemption.requested, step=self.step)
        self.finished = True
        self.say(f"harness: finished at step {self.step}")
        self.world.agree([0])  # all leave together: the writer may hold the store that the others read from

    def _stop(self) -> None:
        """Leave, on all ranks at this step, with the state saved if there is time. Raises SystemExit(0), or SaveError."""
        self._watch.saving()
        self._saver.settle(preemption.requested)
        self._watch.rest()
        self._stopping.stop(self._saver, self.step, lambda: self._save(wait=True), self.say)

    def _save(self, *, final: bool = False, wait: bool = False, in_memory: bool = False) -> bool:
        """Begin to commit a checkpoint of this step, or `wait` for it, or to keep it `in_memory` only; False if nothing came of it.
        Collective: every rank must call it."""
        self._watch.saving()
        with self._account.during(SAVE):
            self._show()
            of_ranks = self._keeping.of_ranks(self.tracked, self.state, self._work.source.state())
            capture = partial(self._capture, self._work.at(self._position), of_ranks)
            classes = {name: state.class_name(thing) for name, thing in self.tracked.items()}
            about = partial(self._saver.about, classes, self._measured.of_this_step, self._work.end if final else None)
            save = self._saver.save
            saved = self._saver.tier.remember(capture, about) if in_memory else save(capture, about, preemption.requested, wait=wait)
        self._watch.rest()  # what may follow is bounded by itself
        return saved

    def _capture(self, data: dict[str, Any], of_ranks: list[OfRank]) -> state.Captured:
        values = {"step": self.step, "epoch": self.epoch, "state": self.state, "config": self._settings.config}
        return self._keeping.captured(of_ranks, data, values | self._measured.state(), self.tracked)

    def _show(self) -> None:
        """Tell of the steps that were held. Collective: every rank must call it."""
        work, rate = self._work, self._pace.steps_per_s(self.step)
        held = self._measured.read(self.world)
        self._saver.replay.gathered(self._measured.by_rank)
        for step, at, values in held:
            self._saver.note("step", step=step, time=at, of=self._end_step, **values)
            if self.is_writer:
                shown = StepSummary(step, self._end_step, self.epoch, work.epochs, values, work.rate(rate), self._saver.words)
                self._progress.show(shown, rate)

    def best_checkpoint(self) -> str | None:
        """The path or URL of the best checkpoint of the run so far by the metric that `init` was told, or None.

        Collective: every rank must call it.
        """
        return self.world.on_writer(lambda: retention.best_file(self._saver.stores, self._settings.policy), give_up=preemption.requested)
