"""Save a sharded state: each rank its own shard, then the writer the main file and the manifest.

A checkpoint exists when its manifest does, and that is written last: a rank that dies before, or
whose disk refuses, leaves shards that count for nothing. All ranks begin a save together, at a
boundary (here). The rest is done in the background, see `rank_save`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from harness import preemption, state
from harness.arguments import Settings
from harness.checkpoint import memory_copy
from harness.checkpoint.attempts import Attempt
from harness.checkpoint.commit import About
from harness.distributed import dtensors
from harness.distributed.layout import Layout
from harness.distributed.parts import Shape, check_covered, hold_parts
from harness.distributed.ranks import World
from harness.errors import HarnessError, UsageError
from harness.sharding import shards
from harness.sharding.copies import samples_of_copies, unlike_copies
from harness.sharding.main_file import MainFile
from harness.sharding.rank_save import RankSave, Target
from harness.sharding.save_protocols import WAIT, Job, RankCheckpointer, Request, Saver
from harness.sharding.shard_uploads import ShardUploads
from harness.sharding.start_checks import check_start, lacking_memory
from harness.sharding.writer_commit import WriterCommit
from harness.state import Captured
from harness.store import Store


class ShardedSave:
    """The saves of an attempt whose tracked state is sharded.

    Args:
        world: the ranks of this attempt.
        stores: the stores of the run; a save is committed in the first one.
        tracked: the tracked objects, by name.
    """

    def __init__(self, world: World, stores: tuple[Store, ...], tracked: Mapping[str, Any]) -> None:
        self._world, self.tracked, self._tier = world, tracked, memory_copy.place(stores[0])
        self.uploads = ShardUploads(world, *stores) if len(stores) > 1 else None
        self._main, self._count = MainFile(), 0
        # Which tensors are sharded, and how, as it was checked; a digest that is the same on every
        # rank.
        self._checked_table, self._digest = list[tuple[str, Layout, Shape]](), ""
        self.current: RankSave | None = None  # the newest save of this rank
        self._is_background = self._is_left = False
        self._no_room = ""  # why parts cannot be copied, if they cannot

    def begin(self, attempt: Attempt) -> None:
        """Take part in the uploads from now on."""
        if self.uploads:
            self.uploads.begin(attempt)

    def save(
        self,
        checkpointer: RankCheckpointer,
        request: Request,
        give_up: Callable[[], object],
        *,
        is_repeated: bool = False,
    ) -> list[Any]:
        """Begin to save a checkpoint; return the writer's reply, with the problem if there is none.

        Collective: every rank must call it.

        Args:
            checkpointer: the checkpointer of this rank.
            request: the save.
            give_up: returns a true value if this process was asked to stop.
            is_repeated: whether this is the second try of a save that is waited for.

        Raises:
            NonFiniteError: a parameter is not finite. This and the next errors may come from the
                previous save.
            UsageError: the state of a rank cannot be saved, or the ranks hold other tensors.
            LostRankError: a rank does not answer.
        """
        self.current = None
        replies, whole = self._begun(checkpointer, request, give_up)

        def reply(problem: str, *, is_reported: bool) -> list[Any]:
            if problem and not is_reported:
                is_final = request.about().final is not None
                step = int(whole.payload["step"])
                problem = checkpointer.not_saved(step, problem, is_final=is_final)
            return checkpointer.reply(problem)

        if problem := next((each["problem"] for each in replies if each["problem"]), ""):
            return self._world.on_writer(lambda: reply(problem, is_reported=False), give_up=give_up)
        slow = [f"rank {rank}: {it['slow']}" for rank, it in enumerate(replies) if it["slow"]]
        checkpointer.say_once(WAIT.format(slow[0]) if slow else "")
        for text in (unlike_copies(replies), *(reply["warning"] for reply in replies)):
            checkpointer.say_once(text)
        if not request.wait and not any(reply["is_unable"] for reply in replies):
            return list(replies[0]["reply"])
        ends = self._world.on_each(lambda: self._finished(checkpointer, whole), give_up=give_up)
        problem, must_repeat = ends[0]
        if must_repeat and not is_repeated:  # it will not be copied as before
            return self.save(checkpointer, request, give_up, is_repeated=True)
        return self._world.on_writer(
            lambda: reply(problem, is_reported=not must_repeat), give_up=give_up
        )

    def _begun(
        self, checkpointer: RankCheckpointer, request: Request, give_up: Callable[[], object]
    ) -> tuple[list[dict[str, Any]], Captured]:
        """Begin a save on all ranks; return their replies, and the state as this rank has it.

        Collective: every rank must call it.
        """
        captured, is_on = list[Captured](), False
        try:
            replies = self._world.on_each(
                lambda: self._begin(checkpointer, request, captured), give_up=give_up
            )
            _check_same(replies)
            is_on = not any(reply["problem"] for reply in replies)
            self._count += is_on
        finally:
            if self.current is not None:
                self.current.decide(is_on=is_on)
            if not is_on:
                self._main.forget()
        return replies, captured[0]

    def has_room(self, size_bytes: int) -> bool:
        """Return whether there is memory for the copies of all ranks of this machine.

        Collective: every rank must call it.

        Args:
            size_bytes: the size of the state of this rank.
        """
        self._no_room = lacking_memory(self._world, size_bytes)
        return not self._no_room

    def settle(self, checkpointer: RankCheckpointer, give_up: Callable[[], object]) -> list[Any]:
        """Wait for the save in flight, and return the writer's reply.

        Collective: every rank must call it.
        """
        problems = self._world.on_each(checkpointer.background.wait, give_up=give_up)
        return self._world.on_writer(lambda: checkpointer.reply(problems[0]), give_up=give_up)

    def __enter__(self) -> None:
        """Begin to close: a silent rank is waited for only a few seconds, and sends no shard."""
        self._is_left = True
        if self.uploads:
            self.uploads.close()

    def __exit__(self, *error: object) -> None:
        """Free the memory, as no save is in flight any more."""
        self._main.close()

    def _begin(
        self, checkpointer: RankCheckpointer, request: Request, captured: list[Captured]
    ) -> dict[str, Any]:
        """Begin this rank's part of a save, after the one in flight; return what all ranks learn.

        Args:
            checkpointer: the checkpointer of this rank.
            request: the save.
            captured: the state is added to it.
        """
        saver: Saver = checkpointer.background
        saver.wait()
        checkpointer.check()
        reply: dict[str, Any] = {"reply": checkpointer.reply(""), "slow": saver.slow_reason}
        whole = request.capture()
        captured.append(whole)
        about = request.about()
        reply["problem"], reply["warning"] = self._checked(whole, is_final=about.final is not None)
        if reply["problem"]:
            return reply
        if request.wait or (self._count + 1).bit_count() == 1:  # saves 1, 2, 4, 8 …
            reply["copies"] = samples_of_copies(whole.parts, self._world.rank)
        self._start(checkpointer, request.began_at, whole, about)
        return reply | {
            "is_unable": not self._is_background or bool(self._main.slow_reason),
            "slow": self._no_room or saver.slow_reason or self._main.slow_reason,
            "table": self._digest,
        }

    def _start(
        self, checkpointer: RankCheckpointer, began_at: float, whole: Captured, about: About
    ) -> None:
        """Begin to copy the state, as far as there is memory for copies.

        Args:
            checkpointer: the checkpointer of this rank.
            began_at: when the save began, by `time.perf_counter`.
            whole: the captured state.
            about: the manifest entries that are not part of the state.
        """
        assert checkpointer.attempt is not None, "a loop runs"
        saver: Saver = checkpointer.background
        step, rank = int(whole.payload["step"]), self._world.rank
        commit = None
        if self._world.is_writer:
            commit = WriterCommit(checkpointer, self._main, whole, about, began_at)
        save = self.current = RankSave(
            self._count + 1,
            step,
            self._world,
            self._target(checkpointer, about),
            checkpointer.attempt,
            commit,
            self._gives_up,
        )
        self._is_background = not (saver.is_unable or self._no_room)
        if self._is_background:
            own = dataclasses.replace(whole, payload=shards.content(step, rank, whole))
            saver.start(
                own,
                about,
                began_at,
                lambda job, write, check: save.write(write, check),
                partial(_ended, save, saver),
            )
            self._is_background = not saver.is_unable
        if self._world.is_writer:
            self._main.take(whole)  # after the saver has ordered the copies after all updates
        save.begun()

    def _target(self, checkpointer: RankCheckpointer, about: About) -> Target:
        store = checkpointer.store_for(about)
        is_tier = str(store) == str(self._tier)
        return Target(store, checkpointer.is_apart, None if is_tier else self._tier)

    def _finished(self, checkpointer: RankCheckpointer, whole: Captured) -> tuple[str, bool]:
        """Wait for the save, or make it here.

        Returns:
            Why there is no checkpoint, or "", and whether to try again.
        """
        saver: Saver = checkpointer.background
        save = self.current
        assert save is not None, "all ranks have begun"
        if self._is_background:
            return saver.wait(), save.must_repeat
        # There is no memory for a copy of this rank's parts.
        saver.saved_otherwise()
        own = shards.content(int(whole.payload["step"]), self._world.rank, whole)
        try:
            state.check_finite(whole.tracked)
            whole.fill()
            save.write(lambda sink: torch.save(own, sink), lambda: None)  # type: ignore[arg-type]
        except BaseException as error:
            with contextlib.suppress(HarnessError):
                save.end(failure=error)
            raise
        save.end()
        return save.problem, save.must_repeat

    def _checked(self, whole: Captured, *, is_final: bool) -> tuple[str, str]:
        """Return a problem that costs this checkpoint, and a warning; "" for none.

        Raises:
            UsageError: The parts do not hold the state.
        """
        table = [(path, part.layout, part.shape) for path, part in whole.parts.items()]
        if table != self._checked_table:
            check_covered(whole.parts)
            for name, obj in whole.tracked.items():
                dtensors.check_optimizer_state(name, obj)
            self._checked_table = table
            self._digest = hashlib.blake2b(repr(table).encode(), digest_size=8).hexdigest()
        if not self.must_go_on():
            return "", ""
        found = f"rank {self._world.rank}: gradients are accumulated that are in no state"
        if is_final:
            return "", f"warning: {found}: a longer run would begin without them"
        return f"{found}: save after set_requires_gradient_sync(True)", ""

    def must_go_on(self) -> bool:
        """Return whether a stop should wait for an update: no state holds the gradients now."""
        return any(map(dtensors.hidden_gradients, self.tracked.values()))

    def _gives_up(self) -> object:
        return self._is_left or preemption.requested()


def _ended(save: RankSave, saver: Saver, job: Job) -> tuple[str, bool]:
    """End a save that was made in the background; return its problem, and whether to repeat it."""
    save.end(
        problem=job.problem,
        must_repeat=bool(job.problem) and saver.must_repeat,
        failure=job.failure,
        costs=lambda: job.costs(more_blocked_s=save.waited_s),
    )
    return save.problem, save.must_repeat


def sharded_save(
    tracked: Mapping[str, Any],
    world: World,
    stores: tuple[Store, ...],
    settings: Settings,
) -> ShardedSave | None:
    """Return how the tracked objects are saved if any of their state is sharded, else None.

    Args:
        tracked: the tracked objects, by name.
        world: the ranks of this attempt.
        stores: the stores of the run.
        settings: validated arguments of `harness.init`.

    Raises:
        UsageError: State is sharded, and it cannot be trained or saved as it is.
    """
    if not hold_parts(tracked.values()):
        return None
    check_start(tracked, world)
    return ShardedSave(world, stores, tracked)


def _check_same(replies: list[dict[str, Any]]) -> None:
    tables = {rank: reply["table"] for rank, reply in enumerate(replies) if "table" in reply}
    if len(set(tables.values())) > 1:
        first = tables[min(tables)]
        other = next(rank for rank, table in tables.items() if table != first)
        raise UsageError(
            "the ranks do not track the same sharded tensors",
            f"found: rank {other} has others than rank {min(tables)}, or cut otherwise",
            "Track the same model on every rank; pipeline parallelism is not supported yet.",
        )
