"""A resume that checks itself: after a kill the steps since the checkpoint are made again, and each is compared with what it was.

Of each step the digest of its samples' numbers is known, and the losses that were logged (whatever has "loss" in its name), on a CPU at
once, on a GPU as far as they were read for the log. Equal samples and another loss mean that something lives that no checkpoint holds.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
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
from harness.selfcheck.step_log import StepLog
from harness.store import LocalStore
from harness.supervision.restart_policy import DATA, DIFFERENT, EXPECTED, LOSS, SAME, replayed_in_words

READ_S = 10.0  # for how long one request for what the steps were is tried
FEW = 10  # so many steps are compared where two runs that nobody interrupts differ, too
TOLERANCE, HALF_TOLERANCE = 1e-3, 1e-2  # relative
HALF = (torch.float16, torch.bfloat16)
MEAN = -1  # in place of a rank


@dataclass
class Known:
    """What one step was, each value with the newest attempt that has it."""

    samples: tuple[int, bytes] | None = None
    losses: dict[tuple[int, int], tuple[int, float]] = field(default_factory=dict)  # by rank, or MEAN, and short name


class RecomputedSteps:
    """Writes down what each step is, and compares those that are made again; on the other ranks it does nothing."""

    def __init__(self, world: World, settings: Settings, halt: Callable[[], object]) -> None:
        """`halt` is called when a difference is to end the run."""
        self.suspects: list[str] = []  # what may be the cause of a difference, in words: filled by whoever finds any
        self.log: StepLog | None = None
        self._world, self._settings, self._halt = world, settings, halt
        precision = identity.setting(settings.config, "train", "precision")
        # Whether a loop of the user's own computes under autocast cannot be seen from here, and on a GPU most do.
        self._is_half = precision in ("bf16", "fp16") or (precision is None and world.device.type != "cpu")
        self._failure: UsageError | None = None
        self._known: dict[int, Known] = {}
        self._step = self._origin = self._until = 0
        self._is_on = self._samples_only = False
        self._of_samples: set[int] = set()  # the steps whose samples were compared
        self._of_losses: set[int] = set()
        self._loose: list[str] = []  # why losses were compared with a tolerance
        self._names: dict[str, int | None] = {}  # by what is logged: its short name, if it is a loss

    def read(self, found: Catalog, origin: Manifest | None, attempt: Attempt, say: Callable[[str], object]) -> int:
        """Read what earlier attempts have left of the steps after the checkpoint; for the writer. Returns the last of them, or 0."""
        self._say, self._attempt, self._stores = say, attempt.number, found.stores
        self._about = identity.of_machine(self._world)
        self._records = found.attempts | {attempt.number: identity.of_program(self._settings)}
        self._left, problem = step_records.before((store.patient(READ_S) for store in found.stores), attempt.number)
        if problem:
            say(f"harness: warning: what the steps were that are made again cannot be read: {problem}")
        self._abouts = {number: log.about for number, log in self._left.logs.items()}
        self._origin = self._step = origin.step if origin else 0
        self._known = self._before(self._left)
        self._left.logs.clear()
        return max(self._known, default=0)

    def begin(self, ledger: EventLog, until: int) -> None:
        """Begin to write down and to compare; steps up to `until` were made before. For the writer."""
        self._ledger, self._until = ledger, max([until, *self._known])
        self._is_on = self._until > self._origin
        local = self._stores[0] if isinstance(self._stores[0], LocalStore) else None
        self._remote = self._stores[-1] if local is None or len(self._stores) > 1 else None
        about = {"attempt": self._attempt} | self._about
        log = self.log = StepLog(local, self._remote is not None, self._attempt, about, self._left)
        ledger.listeners.append(log.on_event)

    def _before(self, before: step_records.Before) -> dict[int, Known]:
        """What each step was; of an attempt with as many ranks each rank's losses, of another one their means."""
        known: dict[int, Known] = {}
        for step, lines in before.after(self._origin).items():
            this = known[step] = Known()
            ranks: dict[tuple[int, int], dict[int, float]] = {}
            for number, line in lines:
                if line.samples is not None:
                    this.samples = number, line.samples
                if line.loss is not None and self._abouts[number].get("world_size") == self._world.size:
                    this.losses[line.rank, line.name] = number, line.loss
                elif line.loss is not None:
                    ranks.setdefault((number, line.name), {})[line.rank] = line.loss
            for (number, name), values in ranks.items():
                if len(values) == self._abouts[number].get("world_size"):
                    this.losses[MEAN, name] = number, sum(values.values()) / len(values)
        return known

    def look_at(self, tracked: Mapping[str, Any]) -> None:
        """Take in how exact the numbers of what is tracked are."""
        for thing in tracked.values():
            if isinstance(thing, torch.nn.Module):
                self._is_half = self._is_half or any(parameter.dtype in HALF for parameter in thing.parameters())
            self._is_half = self._is_half or type(thing).__name__ == "GradScaler"

    def step_made(self, step: int, samples: bytes | None, logged: Mapping[str, Any]) -> None:
        """A step is over, and has logged that; what lies on a device is not asked for. For the thread that trains."""
        if (log := self.log) is None or self._failure is not None:
            return
        self._step, rank, losses = step, self._world.rank, []
        for name, value in logged.items():
            short = self._names[name] if name in self._names else self._name(name)
            if short is not None and not (isinstance(value, torch.Tensor) and not value.is_cpu):
                losses.append((short, name, float(value)))
        if self._is_on:
            self._compare_samples(step, samples)
            for short, name, loss in losses:
                self._compare_loss(step, rank, short, name, loss)
                if self._world.size == 1:
                    self._compare_loss(step, MEAN, short, name, loss)
            if self._is_on and step >= self._until and not any(known.losses for known in self._known.values()):
                self._over()
            if self._failure is not None:
                return  # what this step is now is not what it is to be compared with
        first = losses[0] if losses else (0, "", None)
        log.add(step_records.Line(step, samples, rank, first[0], first[2]))
        for short, _, loss in losses[1:]:
            log.add(step_records.Line(step, None, rank, short, loss))

    def gathered(self, values: Iterable[tuple[int, int, str, float]]) -> None:
        """Take in what the ranks have told each other for the log: step, rank, name and value. For the thread that trains."""
        if self.log is None or self._failure is not None:
            return
        ranks: dict[tuple[int, str], list[float]] = {}
        for step, rank, name, value in values:
            if (short := self._name(name)) is None:
                continue
            ranks.setdefault((step, name), []).append(value)
            if rank == self._world.rank and self._world.device.type == "cpu":
                continue  # known at once
            self._compare_loss(step, rank, short, name, value)
            if self._failure is None:
                self.log.add(step_records.Line(step, None, rank, short, value))
        for (step, name), all_ranks in ranks.items():
            if len(all_ranks) == self._world.size:
                self._compare_loss(step, MEAN, step_records.name_of(name), name, sum(all_ranks) / len(all_ranks))
        if self._is_on and self._step >= self._until:
            self._over()

    def _name(self, name: str) -> int | None:
        """The short name of a loss; None for what is no loss."""
        if name not in self._names:
            self._names[name] = step_records.name_of(name) if "loss" in name.lower() else None
        return self._names[name]

    def _compare_samples(self, step: int, samples: bytes | None) -> None:
        known = self._known.get(step)
        if known is None or known.samples is None or samples is None:
            return
        (number, was), known.samples = known.samples, None
        self._of_samples.add(step)
        if was != samples:
            self._differs(number, {"step": step, "what": DATA, "was": was.hex(), "now": samples.hex()}, is_exact=True)

    def _compare_loss(self, step: int, rank: int, short: int, name: str, loss: float) -> None:
        known = self._known.get(step)
        if known is None or not self._is_on or self._samples_only or (rank, short) not in known.losses:
            return
        number, was = known.losses.pop((rank, short))
        is_exact = identity.is_exact(self._abouts[number], self._about)
        if not is_exact and step > self._origin + FEW:
            return
        self._of_losses.add(step)
        if not is_exact:
            self._loose = identity.unlike(self._abouts[number], self._about) or ["without deterministic"]
        if not _equal(was, loss, 0.0 if is_exact else self._tolerance):
            where = {} if rank == MEAN else {"rank": rank}
            self._differs(number, {"step": step, "what": LOSS, "name": name, "was": was, "now": loss} | where, is_exact=is_exact)

    @property
    def _tolerance(self) -> float:
        return HALF_TOLERANCE if self._is_half else TOLERANCE

    def _differs(self, number: int, found: dict[str, Any], *, is_exact: bool) -> None:
        """Say, once, that a step is another one, and end the run before its next save if that is wanted."""
        about = self._abouts[number]
        expected = self._expected(number)
        if found["what"] == LOSS and about.get("world_size") != self._about["world_size"]:
            expected.append(f"{about.get('world_size')} rank(s) before, {self._about['world_size']} now")
        alike = identity.unlike(about, self._about)
        record = found | {
            "verdict": EXPECTED if expected else DIFFERENT,
            "attempt": self._attempt,
            "before": number,
            "hosts": [about.get("host"), self._about["host"]],
            "devices": [about.get("device"), self._about["device"]],
            "suspects": [*alike, *self.suspects],
            "expected": expected,
        }
        if expected and found["what"] == LOSS:
            self._samples_only = True  # which do not depend on the number of ranks
        self._told(record | ({} if is_exact else {"tolerance": self._tolerance}), goes_on=self._samples_only)
        if self._settings.on_mismatch == "stop" and is_exact and not expected:
            first, *values, _ = replayed_in_words(record).split("\n")
            self._failure = UsageError(
                f"{first.partition(': ')[2]}; nothing was saved since",
                "\n".join(values),
                "To go on all the same: resume.on_mismatch=warn, or init(on_mismatch='warn').",
            )
            self._halt()

    def _expected(self, number: int) -> list[str]:
        """Why the steps of this attempt may differ from that one's by somebody's wish."""
        later = [self._records[other] for other in sorted(self._records) if number < other <= self._attempt]
        insisted = [str(what) for record in later for what in record.get("insisted") or ()]
        rolled = ["rollback" for record in later if record.get("kind") == "rollback"]
        return list(dict.fromkeys(insisted + rolled + identity.changed(self._records.get(number, {}), self._records[self._attempt])))

    def _told(self, record: dict[str, Any], *, goes_on: bool = False) -> None:
        assert self.log is not None
        self._is_on, self._known = goes_on, self._known if goes_on else {}
        self.log.tell(record)
        self._ledger.write("replayed" if record["verdict"] == SAME else "mismatch", **record)
        self._say(f"harness: {replayed_in_words(record)}")

    def _over(self) -> None:
        """Say that the steps that were made again are equal."""
        self._is_on, made = False, min(self._step, self._until) - self._origin
        if made <= 0 or self._samples_only:
            return
        compared = self._of_losses or self._of_samples
        record: dict[str, Any] = {"verdict": SAME, "attempt": self._attempt, "step": self._step, "recomputed": made}
        record |= {"compared": len(compared), "of_samples": len(self._of_samples), "of_losses": len(self._of_losses)}
        self._told(record | ({"tolerance": self._tolerance, "why": self._loose} if self._loose else {}))

    def check(self) -> None:
        """Raises UsageError if the run is to end because a step is another one."""
        if self._failure is None:
            return
        if self.log is not None and (remote := self._remote) is not None:
            with contextlib.suppress(StorageError):  # nobody sends anything after this
                self.log.send(lambda: remote.patient(READ_S))
        raise self._failure

    @property
    def has_failed(self) -> bool:
        """Whether `check` would raise."""
        return self._failure is not None

    def close(self) -> None:
        """Nothing more is made."""
        if self.log is not None:
            if self._is_on:
                self._over()
            self.log.close()


def _equal(was: float, now: float, tolerance: float) -> bool:
    if was == now or (math.isnan(was) and math.isnan(now)):
        return True
    return bool(tolerance) and abs(was - now) <= tolerance * max(abs(was), abs(now))
