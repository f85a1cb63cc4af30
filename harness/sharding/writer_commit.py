"""How the writer ends a save of a sharded state: the main file and the manifest."""

from __future__ import annotations

import dataclasses

from harness.checkpoint.commit import HEAD, About
from harness.checkpoint.format import DataFile
from harness.sharding.main_file import MainFile
from harness.sharding.save_protocols import Costs, RankCheckpointer
from harness.state import Captured


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

    def commit(self, files: tuple[DataFile, ...], costs: Costs | None) -> tuple[str, bool]:
        """Commit the checkpoint of these shards.

        Returns:
            "" or why there is none, and whether to try again in another way.
        """
        about, slow = dataclasses.replace(self._about, shards=files), self._main.slow_reason
        problem = self._checkpointer.commit(
            self._head, about, self._began_at, self._main.write, costs=costs
        )
        return problem, bool(problem) and self._main.slow_reason != slow

    def not_saved(self, problem: str) -> str:
        """Report why there is no checkpoint, and return it."""
        self._main.forget()
        is_final = self._about.final is not None
        return self._checkpointer.not_saved(self._head["step"], problem, is_final=is_final)
