"""Compare recomputed steps with the original ones.

After a kill, the steps since the checkpoint are recomputed, and each is compared with the step log.
The log has the digest of the sample numbers of each step, and the logged losses (every value with
"loss" in its name): on a CPU at once, on a GPU as far as they were read for the log. Equal samples
with a different loss mean that some state is in no checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

import harness.selfcheck.identity as identity
from harness.arguments import Settings
from harness.checkpoint.attempts import Attempt
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Manifest
from harness.distributed.ranks import World
from harness.errors import StorageError, UsageError
from harness.monitoring.event_log import EventLog
from harness.selfcheck import step_records
from harness.selfcheck.known_steps import MEAN, KnownSteps
from harness.selfcheck.step_comparison import LossTolerance, StepComparison, StepDifference
from harness.selfcheck.step_log import StepLog
from harness.store import LocalStore
from harness.supervision.restart_messages import (
    DIFFERENT,
    EXPECTED,
    LOSS,
    SAME,
    describe_replay,
)

READ_S = 10.0  # retry limit of one request for step records


class RecomputedSteps:
    """Records each step and compares recomputed steps with the original ones.

    It is active on rank 0 (the writer); on the other ranks it does nothing.
    """

    def __init__(
        self, world: World, settings: Settings, halt: Callable[[], object], suspects: list[str]
    ) -> None:
        """Create the comparison; it does nothing until `read` and `begin` are called on rank 0.

        Args:
            world: The process group.
            settings: Validated arguments of `harness.init`.
            halt: Called when a difference must end the run.
            suspects: Possible causes of a difference, in words; more may be added later.
        """
        self.suspects = suspects
        self.log: StepLog | None = None
        self._world, self._settings, self._halt = world, settings, halt
        self._tolerance = LossTolerance(
            identity.setting(settings.config, "train", "precision"), world.device
        )
        self._failure: UsageError | None = None
        self._step = self._origin = self._until = 0
        self._is_on = self._samples_only = False
        # The result if nothing else differs: losses that were expected to.
        self._interim: dict[str, Any] | None = None
        # By what is logged: its short name if it is a loss, else None.
        self._names: dict[str, int | None] = {}

    def read(
        self,
        catalog: Catalog,
        origin: Manifest | None,
        attempt: Attempt,
        say: Callable[[str], object],
    ) -> int:
        """Read the step records of earlier attempts after the resume point; called on rank 0.

        Args:
            catalog: Catalog of the run's stores.
            origin: The resume point; None for step 0.
            attempt: The current attempt.
            say: Prints a line for the user.

        Returns:
            The last recorded step, or 0.
        """
        self._say, self._attempt, self._stores = say, attempt.number, catalog.stores
        self._origin = self._step = origin.step if origin else 0
        self._left, problem = step_records.before(
            (store.with_retry_limit(READ_S) for store in catalog.stores),
            attempt.number,
            catalog.event_files,
        )
        if problem:
            say(
                "harness: warning: recomputed steps cannot be compared, their records are "
                f"unreadable: {problem}"
            )
        self._identities = identity.AttemptIdentities(
            attempt.number,
            identity.of_machine(self._world),
            {number: log.about for number, log in self._left.logs.items()},
            catalog.attempts | {attempt.number: identity.of_program(self._settings)},
            [number for number, _ in origin.lineage] if origin else [],
        )
        own, machines = self._identities.machine, self._identities.machines
        known = KnownSteps(self._left, self._origin, machines, own)
        self._left.logs.clear()
        self._comparison = StepComparison(known, self._origin, self._identities, self._tolerance)
        return known.last

    def begin(self, event_log: EventLog, until: int) -> None:
        """Begin to record and compare steps; called on rank 0.

        Args:
            event_log: Event log, which receives the result.
            until: Last step that an earlier attempt has made.
        """
        self._event_log, self._until = event_log, max(until, self._comparison.known.last)
        self._is_on = self._until > self._origin
        local = self._stores[0] if isinstance(self._stores[0], LocalStore) else None
        self._remote = self._stores[-1] if local is None or len(self._stores) > 1 else None
        about = {"attempt": self._attempt, **self._identities.machine}
        log = self.log = StepLog(local, self._remote is not None, self._attempt, about, self._left)
        event_log.listeners.append(log.on_event)

    def look_at(self, tracked: Mapping[str, Any]) -> None:
        """Set the loss tolerance for half precision if a tracked object uses it."""
        self._tolerance.look_at(tracked)

    def step_made(self, step: int, samples: bytes | None, logged: Mapping[str, Any]) -> None:
        """Record a finished step, and compare it if it is a recomputed one.

        Called by the training thread. Values on an accelerator are skipped, because reading them
        would block on the device.

        Args:
            step: Number of the step.
            samples: Digest of its sample numbers, or None.
            logged: Values that the step has logged.
        """
        if (log := self.log) is None or self._failure is not None:
            return
        self._step, rank, losses = step, self._world.rank, []
        for name, value in logged.items():
            short = self._names[name] if name in self._names else self._name(name)
            if short is not None and not (isinstance(value, torch.Tensor) and not value.is_cpu):
                losses.append((short, name, float(value)))
        if self._is_on:
            self._judge(self._comparison.samples(step, samples))
            for short, name, loss in losses:
                self._compare_loss(step, rank, short, name, loss)
                if self._world.size == 1:
                    self._compare_loss(step, MEAN, short, name, loss)
            is_last = self._samples_only or not self._comparison.known.has_losses
            if self._is_on and step >= self._until and is_last:
                self._over()
            if self._failure is not None:
                return  # a step that differs must not become the reference
        first = losses[0] if losses else (0, "", None)
        log.add(step_records.Line(step, samples, rank, first[0], first[2]))
        for short, _, loss in losses[1:]:
            log.add(step_records.Line(step, None, rank, short, loss))

    def gathered(self, values: Iterable[tuple[int, int, str, float]]) -> None:
        """Compare and record losses that were gathered from all ranks for the log.

        `values` are tuples of step, rank, name and value. Called by the training thread.
        """
        if self.log is None or self._failure is not None:
            return
        ranks: dict[tuple[int, str], list[float]] = {}
        for step, rank, name, value in values:
            if (short := self._name(name)) is None:
                continue
            ranks.setdefault((step, name), []).append(value)
            if rank == self._world.rank and self._world.device.type == "cpu":
                continue  # `step_made` has recorded it
            self._compare_loss(step, rank, short, name, value)
            if self._failure is None:
                self.log.add(step_records.Line(step, None, rank, short, value))
        for (step, name), all_ranks in ranks.items():
            if len(all_ranks) == self._world.size:
                self._compare_loss(
                    step, MEAN, step_records.name_of(name), name, sum(all_ranks) / len(all_ranks)
                )
        if self._is_on and self._step >= self._until:
            self._over()

    def _name(self, name: str) -> int | None:
        """Return the short name of a loss, or None for a value that is no loss."""
        if name not in self._names:
            self._names[name] = step_records.name_of(name) if "loss" in name.lower() else None
        return self._names[name]

    def _compare_loss(self, step: int, rank: int, short: int, name: str, loss: float) -> None:
        if self._is_on and not self._samples_only:
            self._judge(self._comparison.loss(step, rank, short, name, loss))

    def _judge(self, difference: StepDifference | None) -> None:
        """Report a difference once, and end the run before its next save if required.

        The run ends only if resume.on_mismatch is "stop", the comparison was exact, and no
        deliberate change explains the difference. Nothing is done if there is no difference (None).
        """
        if difference is None:
            return
        record = self._record_of(difference)
        is_expected = record["verdict"] == EXPECTED
        record |= {} if difference.is_exact else {"tolerance": self._tolerance.relative}
        # Samples do not depend on the number of ranks, so they are still compared.
        goes_on = self._samples_only = is_expected and record["what"] == LOSS
        self._report(record, goes_on=goes_on)
        if self._settings.on_mismatch == "stop" and difference.is_exact and not is_expected:
            first, *values, _ = describe_replay(record).split("\n")
            self._failure = UsageError(
                f"{first.partition(': ')[2]}; nothing was saved since",
                "\n".join(values),
                "To go on all the same: resume.on_mismatch=warn, or init(on_mismatch='warn').",
            )
            self._halt()

    def _record_of(self, difference: StepDifference) -> dict[str, Any]:
        """Return the result of a comparison that has found a difference."""
        number, now = difference.before, self._identities.machine
        was, expected = self._identities.machines[number], self._identities.expected(number)
        if difference.fields["what"] == LOSS:
            expected += self._identities.other_ranks(number)
        return difference.fields | {
            "verdict": EXPECTED if expected else DIFFERENT,
            "attempt": self._attempt,
            "before": number,
            "hosts": [was.get("host"), now["host"]],
            "devices": [was.get("device"), now["device"]],
            "suspects": [*self._identities.unlike(number), *self.suspects],
            "expected": expected,
        }

    def _report(self, record: dict[str, Any], *, goes_on: bool = False) -> None:
        assert self.log is not None
        self._is_on = goes_on
        if goes_on:
            self._interim = record
        else:
            self._comparison.known.clear()
            self.log.tell(record)
        self._event_log.write("replayed" if record["verdict"] == SAME else "mismatch", **record)
        self._say(f"harness: {describe_replay(record)}")

    def _over(self) -> None:
        """Report that the recomputed steps are equal to the original ones.

        If the losses were expected to differ, that is the result, as the samples were equal.
        """
        self._is_on, made = False, min(self._step, self._until) - self._origin
        if self._interim is not None and self.log is not None:
            self.log.tell(self._interim)
        if made <= 0 or self._samples_only:
            return
        record = {
            "verdict": SAME,
            "attempt": self._attempt,
            "step": self._step,
            "recomputed": made,
        }
        self._report(record | self._comparison.counts())

    def check(self) -> None:
        """Raise UsageError if the run must end because a recomputed step differs.

        The result is sent to the remote store first.
        """
        if self._failure is None:
            return
        if self.log is not None and (remote := self._remote) is not None:
            with contextlib.suppress(StorageError):  # no later call sends it
                self.log.send(lambda: remote.with_retry_limit(READ_S))
        raise self._failure

    @property
    def has_failed(self) -> bool:
        """Return whether `check` would raise."""
        return self._failure is not None

    def close(self) -> None:
        """Report the result, if it is still open, and close the step log."""
        if self.log is not None:
            if self._is_on:
                self._over()
            self.log.close()
