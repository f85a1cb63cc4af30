"""The loop of a run: batches, step boundaries, and the decisions that all ranks agree on there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import harness.run.resume_checks as resume_checks
from harness import config, preemption, state
from harness.arguments import Settings
from harness.checkpoint import resume, retention
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
    """One training job, as seen from one rank of its present attempt.

    Attributes that a user's loop reads: `rank`, `world_size`, `device`; `step`, the number of the
    step that is being made, from 1 on (after the loop: of the last one); `epoch`, from 0 on;
    `state`, plain values that are saved with each checkpoint; `weights`, the factors for the mean
    loss of each micro-batch; `finished`, True once training is complete.
    """

    def __init__(
        self,
        world: World,
        stores: tuple[Store, ...],
        resume_point: resume.ResumePoint,
        settings: Settings,
        exit_record: ExitRecord,
        store_health: StoreHealth,
        goodput: Goodput,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.world, self.store, self.clock = world, stores[0], clock
        self.rank, self.world_size, self.device = world.rank, world.size, world.device
        self.step = 0
        self.epoch = 0
        self.state: dict[str, Any] = {}
        self.weights: tuple[float, ...] = (1.0,)
        self.tracked: dict[str, Any] = {}
        self.finished = self._finish = self._looping = False
        self._settings, self.origin, self._payload = (
            settings,
            resume_point.manifest,
            resume_point.payload,
        )
        # This run holds the only reference: the memory is free once the state is restored.
        resume_point.payload = None
        # `_share` is that of the step that is being made.
        self._position = Position()
        self._share = Share(0, 0, (), (), Position(), last=False)
        self._metric_buffer, self._goodput, self._exit_record = MetricBuffer(), goodput, exit_record
        self._traces = Traces(world)
        self._stop_agreement = StopAgreement(world, settings, clock)
        self._step_timeouts = StepTimeouts(
            world.timeout_s, settings.step_timeout_s, exit_record.hung, clock
        )
        exit_record.of(self)
        self._checkpointer = Checkpointer(
            stores, world, resume_point, settings, exit_record, store_health, goodput, clock
        )
        self._checkpointer.at_save = partial(self._traces.point, "save")
        self._kept_state = KeptState(world, lambda: self.step, self.say, self._checkpointer.note)
        self.suspects = self._checkpointer.replay.suspects = self._kept_state.suspects
        self._progress = Console(clock)
        goodput.say = self._progress.say
        for note in resume_point.notes:
            self.say(f"harness: {note}")
        if self._payload is not None:
            self._take_up(give_own(self._payload, world))

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the last evaluation."""
        return self._metric_buffer.metrics

    @property
    def is_writer(self) -> bool:
        """Whether this rank is the writer (rank 0), which writes and prints."""
        return self.world.is_writer

    def say(self, text: str) -> None:
        """Print a line on the writer; do nothing on other ranks."""
        if self.is_writer:
            self._progress.say(text)

    def _take_up(self, payload: dict[str, Any]) -> None:
        """Check the config against the checkpoint's; restore all but tracked objects from it.

        Raises:
            UsageError: A changed setting would alter the training and is not accepted.
        """
        settings = self._settings
        for change in config.check_changes(
            payload["config"], settings.config, settings.accept, settings.override
        ):
            self.say(f"harness: setting changed: {change}")
        self.step = payload["step"]
        self.epoch = payload["epoch"]
        self.state = state.rebuilt(payload, "state")
        self._metric_buffer.restore(payload)
        self._position = Position(payload["data"]["epoch"], payload["data"]["sample"])

    def track(self, **objects: Any) -> Run:
        """Track objects whose state must survive a restart.

        These are modules, optimizers, schedulers, generators of random numbers, and any object with
        `state_dict` and `load_state_dict`. If the run has a checkpoint, the state of each object is
        restored here, bit for bit. Call it after wrapping modules in DistributedDataParallel and
        before the loop.

        Collective: every rank must call it.

        Returns:
            The run.

        Raises:
            UsageError: An object cannot be tracked, or the checkpoint does not fit it.
        """
        late = self._looping or self.finished
        with self._goodput.during(RESTORE):
            for line in self._kept_state.track(
                self.tracked, objects, self.origin, self._payload, self._settings, is_late=late
            ):
                self.say(f"harness: {line}")
        return self

    def batches(
        self,
        dataset: Any,
        global_batch_size: int | None = None,
        *,
        accumulate: int = 1,
        epochs: int,
        max_steps: int | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        order: Callable[[int], Sequence[int]] | None = None,
        beside: Mapping[str, Any] | None = None,
        check_stream: bool = True,
    ) -> Iterator[Any]:
        """Yield this rank's samples of each optimizer step, on `run.device`.

        The steps run from the resume point to the end of the run. Loop once, over all epochs. When
        a stop is requested, the state is saved and SystemExit(0) is raised: code after the loop
        runs only when training is complete.

        Collective: every rank must call it.

        Args:
            dataset: A dataset with `__len__` and `__getitem__`, an iterable dataset with
                `state_dict` and `load_state_dict` (a stream), or a DataLoader. A DataLoader is
                given without `global_batch_size`, `collate_fn`, `num_workers` and `order`: its
                dataset is sharded by its own settings, and its batch size is that of a micro-batch
                on one rank.
            global_batch_size: Samples in one optimizer step, over all ranks and micro-batches.
                Required for a dataset; None for a DataLoader.
            accumulate: Micro-batches in one step of one rank. 1 (default): a step yields one batch.
                More: a step yields a list of that many micro-batches.
            epochs: Total number of epochs of the run, over all attempts.
            max_steps: Total number of steps after which the run ends even if epochs are left. None:
                no limit.
            shuffle: Shuffle the samples of each epoch anew, as a function of the seed and the
                epoch. False: the order of the dataset.
            drop_last: Leave out the last batch of an epoch if it is not whole. False: use it, and
                multiply the mean loss of each micro-batch by its entry of `run.weights`.
            collate_fn: Function from a list of samples to a batch. None: the default of PyTorch.
            num_workers: Number of processes that load samples for this rank. 0: samples are loaded
                in this process.
            order: Function from an epoch to its sample numbers, in the order to use them, in place
                of a shuffle. None: see `shuffle`.
            beside: Further datasets or DataLoaders by name, as in {"unlabelled": other}. Each has
                epochs of its own and yields whole batches only: a step yields
                (batch, {"unlabelled": batch}). A dataset has the global batch size of the main
                data. None: no further data.
            check_stream: Before training, test in copies whether the state of a stream restores
                exactly what it would have read next. False: skip the test.

        Raises:
            UsageError: An argument is invalid, or the run cannot resume with this data exactly.
            SaveError: The last checkpoint could not be committed.
            StorageError: The last checkpoint is not in the remote store.
            NonFiniteError: A parameter is not finite when a checkpoint is made.
            SupersededError: A newer attempt of the run has begun.
        """
        return Batches(
            lambda: of_data(
                dataset,
                self.world,
                self._settings.seed,
                global_batch_size,
                self._traces.workers,
                accumulate=accumulate,
                epochs=epochs,
                max_steps=max_steps,
                shuffle=shuffle,
                drop_last=drop_last,
                collate=collate_fn,
                num_workers=num_workers,
                order=order,
                beside=beside or {},
                check_stream=check_stream,
                before=(self._payload or {}).get("data"),
            ),
            self._loop,
        )

    def by_epoch(self, batches: Iterator[Any]) -> Iterator[tuple[int, Iterator[Any]]]:
        """Yield each epoch with its batches, for a loop over epochs around a loop over batches.

        The code of the outer loop after the inner loop (a scheduler's step, an evaluation) belongs
        to the last step of the epoch and is saved with it. The epoch in which a run resumes yields
        only the rest of its batches: count with `run.step`, not with `enumerate`. Run the inner
        loop to its end.

        Collective: every rank must call it.

        Raises:
            UsageError: The inner loop was left before its end; otherwise as `batches`.
            SaveError, StorageError, NonFiniteError, SupersededError: As `batches`.
        """
        return by_epoch(batches, lambda: self._share)

    def steps(self, max_steps: int) -> Iterator[int]:
        """Yield the rest of `range(max_steps)`, for a loop that produces its own data.

        The loop must produce its data anew in each step, from tracked objects or from the global
        generators of Python, NumPy and torch, which are saved for each rank. A value that one step
        leaves to the next in a variable is lost at a restart. Otherwise as `batches`.

        Collective: every rank must call it.
        """
        return Batches(
            lambda: of_own(self._settings.seed, max_steps, lambda: self.step - 1), self._loop
        )

    def _loop(self, begin: Callable[[], Work], by_epoch: bool) -> Iterator[Any]:
        resume_checks.check_one_loop(
            self._looping, self._checkpointer.attempt is not None or self.finished
        )
        self._work = begin()
        before = self._payload["data"] if self._payload else None
        self._work.source.begin(
            self._position,
            before,
            lambda text: self.say(f"harness: warning: {text}"),
            by_epoch=by_epoch,
        )
        self._end_step = self._traces.end_step(
            end_step(self.step, self._work.steps_after(self._position), self._work.max_steps)
        )
        if not self._begin():
            return
        self._looping = True
        try:
            if self._end_step is None or self.step < self._end_step:
                yield from self._steps()
            if not self.finished:  # no step was left
                self._complete()
        except GeneratorExit:
            self._exit_record.left(self.say, is_finishing=self._finish)
            raise
        finally:
            self._looping = False
            self._goodput.closed.set()
            for part in (
                self._kept_state,
                self._checkpointer.background,
                self._checkpointer.replay,
                self._step_timeouts,
                self._stop_agreement,
            ):
                part.close()

    def _steps(self) -> Iterator[Any]:
        if self._stop_agreement.agree_at_once():  # before the first step of this attempt
            self._stop()
        self._step_timeouts.first_step()
        self._goodput.on(DATA)
        is_begun = False
        for share, micro_batches in self._work.shares(self._position, self.tracked, self.say):
            if not is_begun:
                self.step, self.epoch = self.step + 1, share.epoch
                self._metric_buffer.begin_step()
            if not isinstance(share, Border):
                self._share, self.weights = share, share.weights
            batch = loading.to_device(micro_batches, self.device)
            self._checkpointer.background.release()
            self._goodput.train(self.step)
            # In a loop over epochs, the outer loop runs between the border and the loading of the
            # samples; this already belongs to the next step.
            if is_begun := isinstance(share, Border):
                yield share
                self._goodput.on(DATA)
                continue
            self._traces.step_begins(self.step)
            yield self._work.handed_out(batch)
            self._step_made(share, batch)
            if self._finish or share.last or self.step == self._end_step:
                self._complete()
                return
            met, stopping, timed = self._stop_agreement.agree(
                self.step, self._end_step, self._throughput, self._checkpointer, self._step_timeouts
            )
            if met and self._metric_buffer.holds:
                self._show()
            if stopping:
                self._stop()
            if self._kept_state.is_time(
                timed or self._metric_buffer.new_best or self._settings.saves_at(self.step),
                self._metric_buffer.new_best,
            ):
                self._save()
                self._throughput.pause(self.step)
            elif self._settings.remembers_at(self.step):
                self._save(in_memory=True)
            self._step_timeouts.step()
            self._goodput.on(DATA)

    def _step_made(self, share: Share, batch: Any) -> None:
        """Record a finished step and look at what it has changed."""
        self._goodput.step_made()
        self._traces.step_made(self.step, share, batch, self._metric_buffer.logged, self.tracked)
        self._checkpointer.at_boundary(self.tracked)
        self._kept_state.at_boundary(self.state)
        self._checkpointer.replay.step_made(self.step, share.digest, self._metric_buffer.logged)
        self._position, self.epoch = share.after, share.after.epoch
        if self.step % self._settings.log_every_steps == 0:
            self._metric_buffer.hold(self.step)

    def due(self, every_steps: int | None) -> bool:
        """Return True every `every_steps` steps, and always in the last step of the run.

        Raises:
            UsageError: It was called before the loop.
        """
        resume_checks.check_begun(
            self._looping or self.finished or self._checkpointer.attempt is not None
        )
        return self.step == self._end_step or bool(every_steps and self.step % every_steps == 0)

    def finish(self) -> None:
        """End the run as complete after this step (early stopping).

        Collective: every rank must call it in the same step.
        """
        self._finish = True

    def log(self, **values: Any) -> None:
        """Log numbers of this step. Every rank should log the same names.

        A tensor is read from the device only when it is printed or saved.

        Raises:
            UsageError: A value is not one number, or its name is one that every event has.
        """
        resume_checks.check_loggable(values)
        self._metric_buffer.log(values)

    def keep(self, name: str, data: bytes) -> None:
        """Write a small file (a picture, a table) atomically to every store, as `files/NAME`.

        Only the writer writes; other ranks do nothing. `name` may have subfolders; an existing file
        of this name is replaced. A write that fails does not stop training: it is printed, and
        recorded as an event.

        Raises:
            UsageError: The name leads out of `files`, `data` is not bytes, or it was called outside
                the loop.
        """
        self._checkpointer.keep(name, data)

    def evaluate(
        self,
        dataset: Any,
        fn: Callable[[Any], Mapping[str, Any]],
        *,
        batch_size: int = 256,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> dict[str, float]:
        """Evaluate on all ranks, each sample once; the means over all samples go to `run.metrics`.

        Afterwards the modes of the modules and the generators are restored, also if `fn` raises.

        Collective: every rank must call it.

        Args:
            dataset: A dataset with `__len__` and `__getitem__`.
            fn: Function from a batch to sums over its samples: {"val_loss": …, "val_acc": …}. It is
                called without gradients and with all tracked modules in eval mode.
            batch_size: Samples in one batch of one rank.
            collate_fn: Function from a list of samples to a batch. None: the default of PyTorch.

        Returns:
            The means over all samples, by name.
        """
        self._traces.point("evaluation", self.step)
        with self._goodput.during(EVALUATION):
            found = evaluate(
                self.world,
                list(self.tracked.values()),
                dataset,
                fn,
                batch_size,
                collate_fn,
                self._step_timeouts.evaluation,
            )
        self._step_timeouts.evaluated() if self._looping else self._step_timeouts.rest()
        self._metric_buffer.evaluated(found, self._settings.policy)
        self._checkpointer.note("evaluated", step=self.step, **found)
        return found

    def _begin(self) -> bool:
        """Claim the attempt and set the generators.

        Return False if the run is already finished; then no attempt is claimed, and only a
        checkpoint that the remote store lacks is uploaded.
        """
        payload, origin = self._payload or {}, self.origin
        for warning in (
            *resume_checks.check(self.tracked, payload, self._work.data, self._settings.accept),
            *self._work.notes,
        ):
            self.say(f"harness: warning: {warning}")
        if (
            origin is not None
            and origin.final is not None
            and reaches(origin.final, self._work.end)
        ):
            self.finished, self._payload = True, None
            self._work.source.close()
            done = self._checkpointer.hand_in(preemption.requested)
            self.say(
                f"harness: the run in {self.store} is finished: step {self.step} ({origin.name}); "
                f"{done or 'nothing to do'}"
            )
            return False
        if self._stop_agreement.agree_at_once():
            # No attempt is claimed yet: this is the end of the launch.
            self._exit_record.record("stopped", self._checkpointer.stores)
            self._stop_agreement.leave("stopped before training began; start again", self.say)
        self._traces.point("startup", self.step)
        attempt = self._checkpointer.begin(self._progress, preemption.requested)
        self._traces.begun(attempt.number, self.step)
        self._stop_agreement.listen(self._checkpointer.stores, attempt.number)
        notes = resume_checks.restore_generators(
            payload, self.world, self._work.source, self._settings.seed, self.step
        )
        for note in (*notes, *self._kept_state.begin(self.tracked, payload, self._work.source)):
            self.say(f"harness: {note}")
        self._payload = None  # frees the memory: from here on the live objects are the only copy
        self._throughput = Throughput(self.clock, self.step, self._goodput.steps_per_s)
        if self.is_writer:
            self._checkpointer.background.watch_updates(self.tracked, self.say)
        source = f"resumes from step {self.step} ({origin.name})" if origin else "begins at step 0"
        self.say(
            f"harness: attempt {attempt.number} {source} in "
            f"{' and '.join(map(str, self._checkpointer.stores))}{self._checkpointer.resumed}"
        )
        return True

    def _complete(self) -> None:
        resume_checks.check_some_steps(self.step, self._work.data["global_batch_size"])
        if not self._save(final=True, wait=True):
            raise self._checkpointer.failure(
                f"the last checkpoint, of step {self.step}, was not saved",
                "Mend the cause and start again.",
            )
        self._checkpointer.end("finished", preemption.requested, step=self.step)
        self.finished = True
        self.say(f"harness: finished at step {self.step}")
        # All ranks leave together: the writer may host the store that the others still read from.
        self.world.agree([0])

    def _stop(self) -> None:
        """Save if there is time, and leave on all ranks at this step.

        Raises:
            SystemExit: With code 0, if everything is saved or there was nothing to save.
            SaveError: The state could not be saved.
            StorageError: The same, if there is only a remote store; or the upload is incomplete.
        """
        self._step_timeouts.saving()
        self._checkpointer.settle(preemption.requested)
        self._step_timeouts.rest()
        self._stop_agreement.stop(
            self._checkpointer, self.step, lambda: self._save(wait=True), self.say
        )

    def _save(self, *, final: bool = False, wait: bool = False, in_memory: bool = False) -> bool:
        """Begin to commit a checkpoint of this step.

        Return False if none was begun or, with `wait`, committed.

        Collective: every rank must call it.

        Args:
            final: The run is complete.
            wait: Wait until the checkpoint is committed.
            in_memory: Write it to the memory tier only.
        """
        self._step_timeouts.saving()
        with self._goodput.during(SAVE):
            self._show()
            of_ranks = self._kept_state.of_ranks(
                self.tracked, self.state, self._work.source.state()
            )
            capture = partial(self._capture, self._work.at(self._position), of_ranks)
            classes = {name: state.class_name(thing) for name, thing in self.tracked.items()}
            about = partial(
                self._checkpointer.about,
                classes,
                self._metric_buffer.of_this_step,
                self._work.end if final else None,
            )
            save = self._checkpointer.save
            saved = (
                self._checkpointer.tier.remember(capture, about)
                if in_memory
                else save(capture, about, preemption.requested, wait=wait)
            )
        self._step_timeouts.rest()  # what follows has time-outs of its own
        return saved

    def _capture(self, data: dict[str, Any], of_ranks: list[OfRank]) -> state.Captured:
        values = {
            "step": self.step,
            "epoch": self.epoch,
            "state": self.state,
            "config": self._settings.config,
        }
        return self._kept_state.captured(
            of_ranks, data, values | self._metric_buffer.state(), self.tracked
        )

    def _show(self) -> None:
        """Record and print the buffered metrics. Collective: every rank must call it."""
        work, rate = self._work, self._throughput.steps_per_s(self.step)
        held = self._metric_buffer.read(self.world)
        self._checkpointer.replay.gathered(self._metric_buffer.by_rank)
        for step, at, values in held:
            self._checkpointer.note("step", step=step, time=at, of=self._end_step, **values)
            if self.is_writer:
                shown = StepSummary(
                    step,
                    self._end_step,
                    self.epoch,
                    work.epochs,
                    values,
                    work.rate(rate),
                    self._checkpointer.words,
                )
                self._progress.show(shown, rate)

    def best_checkpoint(self) -> str | None:
        """Return the path or URL of the best checkpoint so far, or None if there is none.

        The metric is the argument `best` of `harness.init`.

        Collective: every rank must call it.

        Raises:
            StorageError: A store cannot be listed or read.
        """
        return self.world.on_writer(
            lambda: retention.best_file(self._checkpointer.stores, self._settings.policy),
            give_up=preemption.requested,
        )
