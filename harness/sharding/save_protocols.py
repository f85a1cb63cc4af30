"""What a save of sharded state is asked for, and what it needs of the parts around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from harness.checkpoint.attempts import Attempt
from harness.checkpoint.commit import About
from harness.state import Captured
from harness.store import Sink, Store

WAIT = "saves make training wait: {}"
Costs = Callable[[], dict[str, float]]


class RankCheckpointer(Protocol):
    """What a save needs of the rank's checkpointer."""

    background: Any
    is_apart: bool  # each machine may have a store of its own

    @property
    def attempt(self) -> Attempt | None:
        """Return the attempt that saves."""

    def check(self) -> None:
        """Raise the error of the background work that ends the run, if there is one."""

    def commit(
        self,
        payload: Mapping[str, Any],
        about: About,
        began_at: float,
        write: Callable[[Sink], None] | None = None,
        *,
        costs: Costs | None = None,
    ) -> str:
        """Commit a state; return "" or why there is no checkpoint."""

    def store_for(self, about: About) -> Store:
        """Return the store of a save, with its retry limit."""

    def not_saved(self, step: int, error: str, *, is_final: bool = False) -> str:
        """Report that a save has failed and return why."""

    def reply(self, problem: str) -> list[Any]:
        """Return what the other ranks learn of a save."""

    def say_once(self, text: str) -> None:
        """Print a line, unless that was done; "" for nothing."""


class Job(Protocol):
    """A save in flight of the background saver."""

    problem: str
    failure: BaseException | None

    def costs(self, more_blocked_s: float = 0.0) -> dict[str, float]:
        """Return what the save has cost so far, and what it has blocked training in other ways."""


class Saver(Protocol):
    """The background saver of a rank."""

    is_unable: bool
    must_repeat: bool
    slow_reason: str

    def start(
        self,
        captured: Captured,
        about: About,
        began_at: float,
        finish: Callable[[Any, Callable[[Sink], None], Callable[[], None]], None],
        ended: Callable[[Any], tuple[str, bool]],
    ) -> None:
        """Begin to save a captured state."""

    def wait(self) -> str:
        """Wait for the save in flight; return why there is no checkpoint, or ""."""

    def saved_otherwise(self) -> None:
        """Note that a save that was dropped need not be repeated."""


class ShardSaves(Protocol):
    """Makes saves of sharded state (`sharded_save.ShardedSave`)."""

    @property
    def tracked(self) -> Mapping[str, Any]:
        """Return the tracked objects, by name."""

    @property
    def current(self) -> object:
        """Return the newest save of this rank."""

    def must_go_on(self) -> bool:
        """Return whether no state holds the gradients now."""

    def save(
        self, checkpointer: RankCheckpointer, request: Request, give_up: Callable[[], object]
    ) -> list[Any]:
        """Begin to save a checkpoint. Collective: every rank must call it."""


class Tier(Protocol):
    """The memory tier of a run (`saving/memory_tier.py`)."""

    is_on: bool

    @property
    def store(self) -> Store:
        """Return the store in memory."""

    def check_room(self, size_bytes: int) -> None:
        """Raise StorageError if checkpoints of a state of that size do not fit."""

    def make(self) -> None:
        """Make the folders. Raises StorageError and OSError."""

    def turn_off(self, problem: object) -> None:
        """Keep no further step, and say why."""

    def commit(
        self, payload: Mapping[str, Any], about: About, write: Callable[[Sink], None] | None
    ) -> str:
        """Commit a checkpoint and delete older ones; return why there is none, or ""."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A save that the loop asks for.

    Args:
        capture: returns the state to save.
        about: returns the manifest entries that are not part of the state; for the writer.
        began_at: when the save began, by `time.perf_counter`.
        wait: wait until the checkpoint is committed.
    """

    capture: Callable[[], Captured]
    about: Callable[[], About]
    began_at: float
    wait: bool
