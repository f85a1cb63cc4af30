"""The parts that a training loop works with, each as the loop sees it.

`assembly` builds the parts; their classes are named at each protocol.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from os import PathLike

    from harness.arguments import Settings
    from harness.checkpoint.attempts import Attempt
    from harness.checkpoint.commit import About
    from harness.checkpoint.resume import ResumePoint
    from harness.data.plan import Share
    from harness.data.source import Source
    from harness.distributed.ranks import World
    from harness.errors import HarnessError
    from harness.monitoring.console import Console
    from harness.monitoring.goodput import Goodput
    from harness.monitoring.metric_buffer import MetricBuffer
    from harness.monitoring.throughput import Throughput
    from harness.run.work import DataArguments, Work
    from harness.saving.async_saver import AsyncSaver
    from harness.saving.memory_tier import MemoryTier
    from harness.selfcheck.recomputed import RecomputedSteps
    from harness.state import Captured
    from harness.store import Store
    from harness.tracking.payload import Given


@dataclass
class StepCounter:
    """The number of the step that is being made; several parts read it."""

    step: int = 0
    made: int = 0  # the last step that is complete

    def resume_at(self, step: int) -> None:
        """Set the number of the last step that was made."""
        self.step = self.made = step

    def next(self) -> None:
        """Count the step that begins."""
        self.step += 1

    def complete(self) -> None:
        """Note that the step under way is complete."""
        self.made = self.step


class Checkpointer(Protocol):
    """Saves checkpoints and records the attempt (`saving/checkpointer.py`)."""

    stores: tuple[Store, ...]
    attempt: Attempt | None  # None until `begin` has claimed one
    resumed: str  # how much is recomputed, for the first line
    background: AsyncSaver
    tier: MemoryTier
    recomputed: RecomputedSteps

    @property
    def status_line(self) -> str:
        """The state of saving and uploading, for the progress line."""

    def has_reached(self, end: dict[str, int | None]) -> bool:
        """Return whether the resume point is the end of a run of this length."""

    def hand_in(self, give_up: Callable[[], object]) -> str:
        """Upload the last checkpoint of a finished run if it is missing. Collective."""

    def begin(self, progress: Console, give_up: Callable[[], object]) -> Attempt:
        """Claim the next attempt. Collective."""

    def look_at(self, tracked: Mapping[str, Any]) -> None:
        """Note whether tracked state is sharded."""

    def watch_updates(self, tracked: Mapping[str, Any]) -> None:
        """Finish each copy before the optimizers change the state."""

    def at_boundary(self, tracked: Mapping[str, Any]) -> None:
        """Account for a finished step."""

    def about(
        self, classes: dict[str, str], metrics: dict[str, float], final: dict[str, Any] | None
    ) -> About:
        """Return the entries of a manifest that are not part of the state."""

    def save(
        self,
        capture: Callable[[], Captured],
        about: Callable[[], About],
        give_up: Callable[[], object],
        *,
        wait: bool,
    ) -> bool:
        """Begin to commit a checkpoint; return False if there is none. Collective."""

    def settle(self, give_up: Callable[[], object]) -> None:
        """Wait for the save in flight. Collective."""

    def failure(self, what: str, remedy: str) -> HarnessError:
        """Return the error that ends the run after a failed save."""

    def alive(self, step: int) -> None:
        """Show a sign of life in the event log, unless it has a recent event."""

    def note(self, kind: str, *rows: Mapping[str, Any], **fields: Any) -> None:
        """Add an event to the event log, or one for each row of further fields."""

    def keep(self, name: str | PathLike[str], data: bytes) -> None:
        """Write a file of the user's to every store."""

    def best_file(self) -> str | None:
        """Return the path or URL of the best checkpoint so far. Collective."""

    def end(self, why: str, give_up: Callable[[], object], *, step: int) -> None:
        """Wait until everything is saved and uploaded, and record the end. Collective."""

    def close(self) -> None:
        """End the background work."""


class KeptState(Protocol):
    """The state of the user's program that a checkpoint holds (`kept_state.py`)."""

    def check_config(self, payload: Mapping[str, Any]) -> None:
        """Check the config against the checkpoint's; print what has changed."""

    def restored_values(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Select this rank's values in the payload, in place, and return `run.state`."""

    def track(
        self,
        tracked: dict[str, Any],
        objects: Mapping[str, Any],
        payload: Mapping[str, Any] | None,
        *,
        is_late: bool,
    ) -> list[str]:
        """Track and restore objects; return messages. Collective."""

    def check(
        self, tracked: Mapping[str, Any], payload: Mapping[str, Any], data: Mapping[str, Any]
    ) -> list[str]:
        """Refuse a run that could not resume exactly; return warnings."""

    def begin(
        self, tracked: Mapping[str, Any], payload: Mapping[str, Any], source: Source
    ) -> list[str]:
        """Restore everything that is not tracked; return notices."""

    def at_head(
        self,
        tracked: Mapping[str, Any],
        values: dict[str, Any],
        payload: dict[str, Any] | None,
        is_ahead: bool,
    ) -> dict[str, Any] | None:
        """Set the generators for the head of an epoch; return the checkpoint for `put_back`."""

    def head_over(self) -> None:
        """Keep what the head of an epoch has drawn from; check what it has changed too late."""

    def put_back(
        self, tracked: Mapping[str, Any], values: dict[str, Any], payload: dict[str, Any]
    ) -> None:
        """Restore everything once more that was changed since `begin`. Collective."""

    def at_boundary(
        self, tracked: Mapping[str, Any], values: Mapping[str, Any], epoch: int
    ) -> None:
        """Check `run.state`, and look for state that is not saved."""

    def may_save(self, is_due: bool, cannot_wait: bool) -> bool:
        """Return whether to save now; it may have to wait for the next update."""

    def of_ranks(
        self, tracked: Mapping[str, Any], values: Mapping[str, Any], iterator: Any
    ) -> Given:
        """Collect the state of each rank. Collective."""

    def captured(
        self,
        of_ranks: Given,
        data: dict[str, Any],
        values: dict[str, Any],
        tracked: Mapping[str, Any],
    ) -> Captured:
        """Capture the contents of a checkpoint."""

    def class_names(self, tracked: Mapping[str, Any]) -> dict[str, str]:
        """Return the class of each tracked object, for the manifest."""

    def close(self) -> None:
        """Release the hooks."""


class StopAgreement(Protocol):
    """The agreement of all ranks on when to save and when to stop (`stop_agreement.py`)."""

    def listen(self, attempt: int) -> None:
        """Start to poll for requests that come without a signal."""

    def agree_at_once(self) -> bool:
        """Return whether any rank was asked to stop. Collective."""

    def agree(self, step: int, end_step: int | None) -> tuple[bool, bool, bool]:
        """Return whether the ranks communicated, whether all stop, whether all save. Collective."""

    def too_late(self) -> str:
        """Return an addition to the message of the run's end, if a signal came too late for it."""

    def stop(self, step: int, save: Callable[[], bool], say: Callable[[str], None]) -> None:
        """Save if there is time, and leave. Collective."""

    def leave(self, message: str, say: Callable[[str], None]) -> None:
        """Leave with exit code 0. Collective."""

    def close(self) -> None:
        """Stop polling: the run is over."""


class StepTimeouts(Protocol):
    """The time-out of each kind of work (`monitoring/step_timeouts.py`)."""

    def first_step(self) -> None:
        """Start the time-out of the first step."""

    def step(self) -> None:
        """Start the time-out of the next step."""

    def saving(self) -> None:
        """Start the time-out of a save."""

    def evaluation(self) -> None:
        """Start the time-out of a batch of an evaluation."""

    def evaluated(self) -> None:
        """Start the time-out of the rest of the step."""

    def rest(self) -> None:
        """Stop the time-out."""

    def close(self) -> None:
        """End the watchdog."""


class Traces(Protocol):
    """What a drill injects and records (`drill_hooks.py`); outside of one, nothing."""

    def end_step(self, end_step: int | None) -> int | None:
        """Return the number of the last step."""

    def begun(self, attempt: int, step: int) -> None:
        """Record where an attempt resumes."""

    def step_begins(self, step: int) -> None:
        """Note that the loop is about to receive a batch."""

    def step_made(
        self,
        step: int,
        share: Share,
        batch: Any,
        logged: Mapping[str, Any],
        tracked: Mapping[str, Any],
    ) -> None:
        """Trace a finished step."""

    def point(self, name: str, step: int) -> None:
        """Mark a point where a fault may be injected."""


class ExitRecord(Protocol):
    """Records how the attempt ends (`supervision/exit_record.py`)."""

    @property
    def is_here(self) -> bool:
        """Return whether this is the process that joined the run, not one that it has forked."""

    def left(self, say: Callable[[str], None], *, is_finishing: bool) -> None:
        """Handle a loop that was left before its end."""

    def record(self, why: str, stores: tuple[Store, ...]) -> None:
        """Record the end of a launch that has no attempt yet."""


class WorkBuilder(Protocol):
    """Builds what a loop goes over (`build_work.py`)."""

    def of_data(
        self, dataset: Any, arguments: DataArguments, before: Mapping[str, Any] | None
    ) -> Work:
        """Build the work of a loop over a dataset. Collective."""

    def check_batches(self, batches: Any) -> None:
        """Refuse for `by_epoch` what cannot be the batches of a run."""

    def of_own(self, max_steps: int, number: Callable[[], int]) -> Work:
        """Build the work of a loop that produces its own data."""


class Evaluate(Protocol):
    """Evaluates a dataset on all ranks (`evaluation.py`)."""

    def __call__(
        self,
        tracked: list[Any],
        dataset: Any,
        fn: Callable[[Any], Mapping[str, Any]],
        batch_size: int,
        collate: Callable[[list[Any]], Any] | None,
        beat: Callable[[], object],
    ) -> dict[str, float]:
        """Return the means over all samples. Collective."""


@dataclass(frozen=True)
class LoopParts:
    """Everything that the loop of a run needs; `assembly` puts it together."""

    world: World
    settings: Settings
    resume_point: ResumePoint
    suspects: list[str]  # possible causes of a difference between recomputed steps
    counter: StepCounter
    console: Console
    goodput: Goodput
    metric_buffer: MetricBuffer
    throughput: Throughput
    checkpointer: Checkpointer
    kept_state: KeptState
    stop_agreement: StopAgreement
    step_timeouts: StepTimeouts
    traces: Traces
    exit_record: ExitRecord
    work_builder: WorkBuilder
    evaluate: Evaluate
