"""Keep the newest step of a sharded state in the memory tier: each rank its part, the writer last.

Each machine has the shards of its ranks in its memory. A start takes such a step if every rank
finds its shard there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from harness import preemption, state
from harness.checkpoint.attempts import Attempt
from harness.checkpoint.commit import About
from harness.distributed.ranks import World
from harness.errors import HarnessError
from harness.sharding.save_protocols import Costs, RankCheckpointer, Request, ShardSaves, Tier
from harness.sharding.start_checks import on_this_machine
from harness.state import Captured
from harness.store import Sink, Store


class TierSaves:
    """Saves of sharded state to the memory tier; takes the checkpointer's place in such a save.

    Args:
        world: the ranks of this attempt.
        checkpointer: the checkpointer of this rank, with its background saver.
        saves: makes the saves of the sharded state.
        tier: the memory tier.
    """

    def __init__(
        self, world: World, checkpointer: RankCheckpointer, saves: ShardSaves, tier: Tier
    ) -> None:
        self._world, self._checkpointer, self._saves, self._tier = world, checkpointer, saves, tier
        self.background, self.is_apart = checkpointer.background, True
        self._kept: object = None  # the newest save for the tier

    @property
    def is_writing(self) -> bool:
        """Return whether the save in flight is one for the tier."""
        return self._kept is not None and self._kept is self._saves.current

    @property
    def attempt(self) -> Attempt | None:
        """Return the attempt that saves."""
        return self._checkpointer.attempt

    def remember(self, capture: Callable[[], Captured], about: Callable[[], About]) -> bool:
        """Begin to keep this step in memory; return whether it was begun.

        It is left out where any rank has a save in flight or one that has failed, or gradients that
        no state holds. Collective: every rank must call it.
        """
        saver = self.background
        is_left_out = self._world.is_writer and not self._tier.is_on
        is_left_out = is_left_out or saver.is_busy or saver.is_unable or saver.has_failed
        is_left_out = is_left_out or saver.must_repeat or self._saves.must_go_on()
        if self._world.agree([int(is_left_out)])[0] or not self._is_ready():
            return False
        request = Request(capture, about, time.perf_counter(), wait=False)
        self._saves.save(self, request, preemption.requested)
        self._kept = self._saves.current
        return True

    def _is_ready(self) -> bool:
        """Make the tier's folders; return False, and turn it off, if there is no room for it.

        Collective: every rank must call it.
        """
        sizes_bytes = on_this_machine(self._world, state.size_bytes(self._saves.tracked))
        problems = self._world.on_each(
            lambda: self._made(sum(sizes_bytes)), give_up=preemption.requested
        )
        if problem := next(filter(None, problems), ""):
            self._tier.turn_off(problem)
        return not problem

    def _made(self, size_bytes: int) -> str:
        try:
            self._tier.check_room(size_bytes)
            self._tier.make()
        except (HarnessError, OSError) as error:
            return str(error)
        return ""

    def check(self) -> None:
        """Raise the error of the background work that ends the run, if there is one."""
        self._checkpointer.check()

    def commit(
        self,
        payload: Mapping[str, Any],
        about: About,
        began_at: float,
        write: Callable[[Sink], None] | None = None,
        *,
        costs: Costs | None = None,
    ) -> str:
        """Commit the checkpoint in memory and delete older ones; return "" or why there is none."""
        return self._tier.commit(payload, about, write)

    def store_for(self, about: About) -> Store:
        """Return the tier's store."""
        return self._tier.store

    def not_saved(self, step: int, error: str, *, is_final: bool = False) -> str:
        """Turn the tier off: a step that cannot be kept in memory costs the run nothing."""
        self._tier.turn_off(error)
        return error

    def reply(self, problem: str) -> list[Any]:
        """Return what the other ranks learn of a save; nothing of this one is kept."""
        return [problem, None, ""]

    def say_once(self, text: str) -> None:
        """Print a line, unless that was done."""
        self._checkpointer.say_once(text)
