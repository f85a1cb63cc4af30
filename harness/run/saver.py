"""The writer's side of an attempt: claim it, commit its checkpoints, let the old ones go."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from harness import config
from harness.checkpoint import attempts, load, retention
from harness.checkpoint import format as fmt
from harness.checkpoint.attempts import Attempt
from harness.checkpoint.format import Manifest
from harness.checkpoint.history import going_on_from
from harness.checkpoint.save import About, commit
from harness.errors import SaveError, StorageError, UsageError
from harness.events import Ledger, Progress
from harness.ranks import World
from harness.run.ending import Ending
from harness.store import LocalStore

SHARED_WITHIN_S = 10.0


class Saver:
    """Everything that is written in an attempt goes through here; on the other ranks it only keeps count."""

    def __init__(
        self, store: LocalStore, world: World, choice: load.Choice, policy: retention.Policy, ending: Ending, clock: Callable[[], float]
    ) -> None:
        self.store, self.world, self.policy, self.clock = store, world, policy, clock
        self.origin = choice.manifest
        self.saved_step: int | None = choice.manifest.step if choice.manifest else None
        self.words = f"saved step {self.saved_step}" if choice.manifest else "nothing saved yet"
        self.attempt: Attempt | None = None
        self.ledger: Ledger | None = None
        self._choice, self._ending = choice, ending
        self._saved_at = clock()
        self._committed = False
        self._verified = {choice.manifest.name} if choice.manifest else set()

    def begin(self, settings: dict[str, Any], progress: Progress, give_up: Callable[[], object]) -> Attempt:
        """Claim the next attempt. Raises SupersededError, StorageError, UsageError. Collective: every rank must call it."""

        def claim() -> list[Any]:
            assert self._choice.survey is not None, "the writer has listed the store"
            self.store.prepare(fmt.FOLDERS)
            attempt = attempts.claim(self.store, self._choice.survey, self.origin, self.world.size)
            self.store.sweep(fmt.FOLDERS, attempt.number)
            for key in self._choice.damaged:
                load.set_aside(self.store, key)
                progress.say(f"harness: set aside: {key}")
            self.store.write("config.yaml", config.to_yaml(settings).encode(), attempt.number)
            self.ledger = Ledger(self.store, fmt.events_key(attempt.number))
            name = self.origin.name if self.origin else None
            self.ledger.write("begun", step=self.saved_step or 0, world_size=self.world.size, went_on_from=name)
            return [attempt.number, attempt.run_id, attempt.nonce]

        number, run_id, nonce = self.world.on_writer(claim, give_up=give_up)
        self.attempt = Attempt(number, run_id, nonce)
        self._ending.begun(self.store, self.attempt, self.world)
        self._check_shared(self.attempt)
        self._saved_at = self.clock()
        return self.attempt

    def _check_shared(self, attempt: Attempt) -> None:
        """Several nodes with a run directory each would be several runs: refuse unless every rank sees the claim."""
        until = time.monotonic() + (SHARED_WITHIN_S if self.world.size > 1 else 0)  # network file systems show it late
        while not (seen := attempts.holds(self.store, attempt)) and time.monotonic() < until:
            time.sleep(0.1)
        blind = [rank for rank, sees in enumerate(self.world.gather(seen)) if not sees]
        if blind:
            raise UsageError(
                f"the run directory is not shared: rank(s) {blind} do not see what rank 0 wrote",
                f"found: {self.store}",
                "Put run.dir on a file system that all nodes share.",
            )

    def is_due(self, every_s: float | None) -> bool:
        """Whether it is time to save, by the clock or because what the attempt went on from is gone."""
        if every_s is not None and self.clock() - self._saved_at >= every_s:
            return True
        try:  # until our first commit nothing but the origin holds the run: a zombie may have deleted it
            return self.origin is not None and not self._committed and not self.store.exists(self.origin.key)
        except StorageError:
            return False

    def save(self, step: int, payload: Callable[[], dict[str, Any]], about: Callable[[], About], give_up: Callable[[], object]) -> bool:
        """Commit a checkpoint of `step`; returns whether that succeeded, `words` say how.

        Raises SupersededError, NonFiniteError. Collective: every rank must call it.
        """
        began_at = self.clock()
        failure = self.world.on_writer(lambda: self._write(payload(), about()), give_up=give_up)
        self._saved_at = self.clock()
        if failure:
            self.words = failure
            return False
        self.saved_step, self._committed = step, True
        self.words = f"saved step {step} in {self._saved_at - began_at:.2g} s"
        return True

    def _write(self, payload: dict[str, Any], about: About) -> str:
        assert self.attempt is not None and self.ledger is not None
        try:
            manifest = commit(self.store, self.attempt, payload, about)
        except SaveError as error:
            self.ledger.write("not_saved", step=payload["step"], error=str(error))
            return " ".join(str(error).split("\n"))
        self._verified.add(manifest.name)
        self.ledger.write("saved", step=manifest.step, checkpoint=manifest.name, size_bytes=manifest.size_bytes)
        self._let_go(manifest)
        return ""

    def _let_go(self, newest: Manifest) -> None:
        assert self.attempt is not None and self.ledger is not None
        try:
            gone = retention.apply(self.store, self.attempt, self._verified, self.policy)
            if gone:
                self.ledger.write("deleted", names=gone)
        except StorageError as error:
            self.ledger.write("not_deleted", error=str(error))

    def about(
        self, classes: dict[str, str], settings: dict[str, Any], metrics: dict[str, float], final: dict[str, int | None] | None
    ) -> About:
        """What goes into the manifest beside the state; `metrics` are those of this very step."""
        lineage = going_on_from(self.origin)
        return About(self.world.size, lineage, classes, config.digest(settings), final, metrics, read_back=not self._committed)

    @property
    def failed(self) -> bool:
        """Whether an uncaught error is ending this process."""
        return self._ending.failed

    def note(self, kind: str, **fields: Any) -> None:
        """Add an event to the run's ledger; on the writer only."""
        if self.ledger:
            self.ledger.write(kind, **fields)

    def ended(self, why: str, **details: Any) -> None:
        """Record how the attempt ended."""
        self.note(why, **details)
        self._ending.record(why, saved_step=self.saved_step, **details)
