"""How the writer ends a save of a sharded state: the main file and the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from harness.checkpoint.attempts import Attempt
from harness.checkpoint.commit import HEAD, About
from harness.checkpoint.format import DataFile
from harness.sharding.main_file import MainFile
from harness.state import Captured
from harness.store import Sink, Store

Costs = Callable[[], dict[str, float]]


class RankCheckpointer(Protocol):
    """What a save needs of the rank's checkpointer."""

    attempt: Attempt | None
    background: Any

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

    def report_wait(self, reason: str) -> None:
        """Say why saves make training wait, unless that was said."""


class WriterCommit:
    """How the writer ends a save.

    Args:
        checkpointer: commits the main file and the manifest.
        main: the copy of the main file.
        whole: the captured state.
        about: the manifest entries that are not part of the state.
        began_at: when the save began, by `time.perf_counter`.
    """

    def __init__(
        self,
        checkpointer: RankCheckpointer,
        main: MainFile,
        whole: Captured,
        about: About,
        began_at: float,
    ) -> None:
        self._checkpointer, self._main, self._began_at = checkpointer, main, began_at
        self._head = {name: whole.payload[name] for name in HEAD}
        self._about = about

    def commit(self, files: tuple[DataFile, ...], costs: Costs | None) -> str:
        """Commit the checkpoint of these shards; return "" or why there is none."""
        about = dataclasses.replace(self._about, shards=files)
        return self._checkpointer.commit(
            self._head, about, self._began_at, self._main.write, costs=costs
        )

    def not_saved(self, problem: str) -> str:
        """Report why there is no checkpoint, and return it."""
        is_final = self._about.final is not None
        return self._checkpointer.not_saved(self._head["step"], problem, is_final=is_final)
