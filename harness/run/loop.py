"""The loop of a run: its step boundaries, and the decisions that all ranks agree on there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import harness.run.usage_checks as usage_checks
from harness import preemption
from harness.data.plan import Border, Position, Share, end_step

if TYPE_CHECKING:
    from harness.run.protocols import LoopParts
    from harness.run.work import Work
    from harness.state import Captured
    from harness.tracking.payload import Given


class Loop:
    """The state of a run's loop on one rank, and what happens between two steps of the user's."""

    def __init__(self, parts: LoopParts) -> None:
        world, resume_point = parts.world, parts.resume_point
        self.world, self.rank = world, world.rank
        self.world_size, self.device = world.size, world.device
        self.epoch = 0
        self.state: dict[str, Any] = {}
        self.weights: tuple[float, ...] = (1.0,)
        self.tracked: dict[str, Any] = {}
        self.finished = self._finish = self._looping = self._in_epochs = False
        self.origin, self.suspects = resume_point.manifest, parts.suspects
        # This run holds the only reference: the memory is free once the state is restored.
        self._payload = resume_point.take_payload()
        # `_share` is that of the step that is being made.
        self._position = Position()
        self._share = Share(0, 0, (), (), Position(), last=False)
        self._settings, self._counter = parts.settings, parts.counter
        self._console, self._goodput = parts.console, parts.goodput
        self._throughput = parts.throughput
        self._metric_buffer, self._traces = parts.metric_buffer, parts.traces
        self._checkpointer, self._kept_state = parts.checkpointer, parts.kept_state
        self.store = parts.checkpointer.stores[0]
        self._stop_agreement, self._step_timeouts = parts.stop_agreement, parts.step_timeouts
        self._exit_record = parts.exit_record
        self._work_builder, self._evaluate = parts.work_builder, parts.evaluate
        for note in resume_point.notes:
            self.say(f"harness: {note}")
        if self._payload is not None:
            self._take_up(self._payload)

    @property
    def step(self) -> int:
        """The number of the step that is being made, from 1 on; after the loop, of the last one."""
        return self._counter.step

    def say(self, text: str) -> None:
        """Print a line on the writer; do nothing on other ranks."""
        if self.world.is_writer:
            self._console.say(text)

    def _take_up(self, payload: dict[str, Any]) -> None:
        """Check the config against the checkpoint's; restore all but tracked objects from it."""
        self._kept_state.check_config(payload)
        self.state = self._kept_state.restored_values(payload)
        self._counter.resume_at(payload["step"])
        self.epoch = payload["epoch"]
        self._metric_buffer.restore(payload)
        self._position = Position(payload["data"]["epoch"], payload["data"]["sample"])

    def _loop(self, begin: Callable[[], Work], by_epoch: bool) -> Iterator[Any]:
        usage_checks.check_single_loop(
            self._looping, self._checkpointer.attempt is not None or self.finished
        )
        self._work = begin()
        before = self._payload["data"] if self._payload else None
        self._work.source.begin(
            self._position,
            self._work.epochs,
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
            if self._exit_record.is_here:  # else the program has forked this process
                if self.world.size == 1:  # what it has logged since the last look
                    with contextlib.suppress(Exception):  # a device may be gone
                        self._show()
                self._goodput.closed.set()
                self._kept_state.close()
                self._step_timeouts.saving()  # a save in flight may take longer than a step
                self._checkpointer.close()
                self._step_timeouts.close()
                self._stop_agreement.close()

    def _at_head(self, is_ahead: bool) -> None:
        """Prepare the head of a loop over epochs, whose first batch may be there already."""
        self._payload = self._kept_state.at_head(self.tracked, self.state, self._payload, is_ahead)

    def _put_back(self) -> None:
        """Put back what the head of a loop over epochs has changed, where that ran once more.

        A loop that resumes inside an epoch begins with the head of its outer loop, and a
        checkpoint from inside the epoch holds what the head did before.

        Collective: every rank must call it.
        """
        self._kept_state.head_over()
        if self._payload is not None:
            self._work.source.put_back()
            self._kept_state.put_back(self.tracked, self.state, self._payload)
            self._metric_buffer.begin_step()
            self._metric_buffer.restore(self._payload)
            self._payload = None

    def _steps(self) -> Iterator[Any]:
        if self._stop_agreement.agree_at_once():  # before the first step of this attempt
            self._stop()
        self._step_timeouts.first_step()
        self._goodput.on("data")
        is_begun = False
        for share, micro_batches in self._work.shares(self._position):
            if not is_begun:
                self._counter.next()
                self._metric_buffer.begin_step()
            self.epoch = share.epoch
            if not isinstance(share, Border):
                self._share, self.weights = share, share.weights
            batch = self._work.to_device(micro_batches)
            step = self.step
            self._goodput.train(step)
            # In a loop over epochs, the outer loop runs between the border and the loading of the
            # samples; this already belongs to the next step.
            if is_begun := isinstance(share, Border):
                self._checkpointer.background.release()
                yield share
                self._goodput.on("data")
                continue
            self._traces.step_begins(step)
            handed_out = self._work.handed_out(batch)
            self._checkpointer.background.release()
            yield handed_out
            self._step_made(step, share, batch)
            if self._finish or share.last or step == self._end_step:
                self._complete()
                return
            met, stopping, timed = self._stop_agreement.agree(step, self._end_step)
            if met and self._metric_buffer.holds:
                self._show()
            if stopping:
                self._stop()
            if self._kept_state.may_save(
                timed or self._metric_buffer.new_best or self._settings.saves_at(step),
                self._metric_buffer.new_best,
            ):
                self._save()
                self._throughput.pause(step)
            elif self._settings.remembers_at(step):
                self._save(in_memory=True)
            self._step_timeouts.step()
            self._goodput.on("data")

    def _step_made(self, step: int, share: Share, batch: Any) -> None:
        """Record a finished step and look at what it has changed."""
        self._counter.complete()
        self._goodput.step_made()
        logged = self._metric_buffer.logged
        self._traces.step_made(step, share, batch, logged, self.tracked)
        self._checkpointer.at_boundary(self.tracked)
        self._kept_state.at_boundary(self.tracked, self.state, self.epoch)
        self._checkpointer.recomputed.step_made(step, share.digest, logged)
        self._position, self.epoch = share.after, share.after.epoch
        self._checkpointer.alive(step)
        if step % self._settings.log_every_steps == 0:
            self._metric_buffer.hold(step)

    def _begin(self) -> bool:
        """Claim the attempt and set the generators.

        Return False if the run is already finished; then no attempt is claimed, and only a
        checkpoint that the remote store lacks is uploaded.
        """
        payload, origin = self._payload or {}, self.origin
        self._checkpointer.look_at(self.tracked)
        for warning in (
            *self._kept_state.check(self.tracked, payload, self._work.data),
            *self._work.notes,
        ):
            self.say(f"harness: warning: {warning}")
        if origin is not None and self._checkpointer.has_reached(self._work.end):
            self.finished, self._payload = True, None
            self._work.source.close()
            try:
                done = self._checkpointer.hand_in(preemption.requested)
            finally:
                self._stop_agreement.close()
            self.say(
                f"harness: the run in {self.store} is finished: "
                f"step {self.step} ({origin.name}); {done or 'nothing to do'}"
            )
            return False
        if self._stop_agreement.agree_at_once():
            # No attempt is claimed yet: this is the end of the launch.
            self._exit_record.record("stopped", self._checkpointer.stores)
            self._stop_agreement.leave("stopped before training began; start again", self.say)
        self._traces.point("startup", self.step)
        attempt = self._checkpointer.begin(self._console, preemption.requested)
        self._traces.begun(attempt.number, self.step)
        self._stop_agreement.listen(attempt.number)
        for note in self._kept_state.begin(self.tracked, payload, self._work.source):
            self.say(f"harness: {note}")
        if not (self._in_epochs and self._position.sample):
            self._payload = None  # frees the memory: the live objects are the only copy
        self._throughput.begin(self.step, self._goodput.steps_per_s)
        self._checkpointer.watch_updates(self.tracked)
        source = f"resumes from step {self.step} ({origin.name})" if origin else "begins at step 0"
        self.say(
            f"harness: attempt {attempt.number} {source} in "
            f"{' and '.join(map(str, self._checkpointer.stores))}{self._checkpointer.resumed}"
        )
        return True

    def _complete(self) -> None:
        usage_checks.check_some_steps(self.step, self._work.data["global_batch_size"])
        if not self._save(final=True, wait=True):
            raise self._checkpointer.failure(
                f"the last checkpoint, of step {self.step}, was not saved",
                "Fix the cause and start again.",
            )
        self._checkpointer.end("finished", preemption.requested, step=self.step)
        self.finished = True
        self.say(f"harness: finished at step {self.step}{self._stop_agreement.too_late()}")
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
        self._stop_agreement.stop(self.step, lambda: self._save(wait=True), self.say)

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
        with self._goodput.during("save"):
            self._show()
            of_ranks = self._kept_state.of_ranks(
                self.tracked, self.state, self._work.source.state()
            )
            capture = partial(self._capture, self._work.at(self._position), of_ranks)
            about = partial(
                self._checkpointer.about,
                self._kept_state.class_names(self.tracked),
                self._metric_buffer.of_this_step,
                self._work.end if final else None,
            )
            saved = (
                self._checkpointer.tier.remember(capture, about)
                if in_memory
                else self._checkpointer.save(capture, about, preemption.requested, wait=wait)
            )
        self._step_timeouts.rest()  # what follows has time-outs of its own
        return saved

    def _capture(self, data: dict[str, Any], of_ranks: Given) -> Captured:
        values = {"step": self.step, "epoch": self.epoch, "state": self.state}
        values |= {"config": self._settings.config, **self._metric_buffer.state()}
        return self._kept_state.captured(of_ranks, data, values, self.tracked)

    def _show(self) -> None:
        """Record and print the buffered metrics. Collective: every rank must call it."""
        work, rate = self._work, self._throughput.steps_per_s(self.step)
        held = self._metric_buffer.read(self.world)
        self._checkpointer.recomputed.gathered(self._metric_buffer.by_rank)
        if held and self.world.is_writer:
            rows = [{"step": step, "time": at} | values for step, at, values in held]
            self._checkpointer.note("step", *rows, of=self._end_step)
            self._console.show(
                held[-1][0],
                self._end_step,
                self.epoch,
                work.epochs,
                held[-1][2],
                rate,
                work.rate(rate),
                self._checkpointer.status_line,
            )
