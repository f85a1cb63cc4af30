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
from typing import Any, Protocol

import torch

from harness import preemption, state
from harness.arguments import Settings
from harness.checkpoint.attempts import Attempt
from harness.checkpoint.commit import About
from harness.distributed import dtensors
from harness.distributed.ranks import World
from harness.errors import HarnessError, UsageError
from harness.sharding import shards
from harness.sharding.main_file import MainFile
from harness.sharding.rank_save import RankSave
from harness.sharding.shard_uploads import ShardUploads
from harness.sharding.writer_commit import RankCheckpointer, WriterCommit
from harness.state import Captured
from harness.store import Sink, Store


class Job(Protocol):
    """A save in flight of the background saver."""

    problem: str
    failure: BaseException | None

    def costs(self) -> dict[str, float]:
        """Return what the save has cost so far."""


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


class ShardedSave:
    """The saves of an attempt whose tracked state is sharded.

    Args:
        world: the ranks of this attempt.
        stores: the stores of the run; all ranks see the first one, in which a save is committed.
    """

    def __init__(self, world: World, stores: tuple[Store, ...]) -> None:
        self._world = world
        self.uploads = ShardUploads(world, *stores) if len(stores) > 1 else None
        self._main, self._count, self._is_checked = MainFile(), 0, False
        self._current: RankSave | None = None
        self._is_background = self._is_left = False

    def begin(self, attempt: Attempt) -> None:
        """Take part in the uploads from now on."""
        if self.uploads:
            self.uploads.begin(attempt)

    def save(
        self, checkpointer: RankCheckpointer, request: Request, give_up: Callable[[], object]
    ) -> list[Any]:
        """Begin to save a checkpoint; return the writer's reply, with the problem if there is none.

        Collective: every rank must call it.

        Args:
            checkpointer: the checkpointer of this rank.
            request: the save.
            give_up: returns a true value if this process was asked to stop.

        Raises:
            NonFiniteError: a parameter is not finite. This and the next errors may come from the
                previous save.
            UsageError: the state of a rank cannot be saved, or the ranks hold other tensors.
            LostRankError: a rank does not answer.
        """
        self._current, self._count = None, self._count + 1
        captured, is_on = list[Captured](), False
        try:
            replies = self._world.on_each(
                lambda: self._begin(checkpointer, request, captured), give_up=give_up
            )
            _check_same(replies)
            problem = next((reply["problem"] for reply in replies if reply["problem"]), "")
            self._is_checked = is_on = not problem
        finally:
            if self._current is not None:
                self._current.decide(is_on=is_on)
        if problem:
            return self._world.on_writer(
                lambda: checkpointer.reply(_not_saved(checkpointer, request, captured[0], problem)),
                give_up=give_up,
            )
        slow = [f"rank {rank}: {it['slow']}" for rank, it in enumerate(replies) if it["slow"]]
        checkpointer.report_wait(slow[0] if slow else "")
        if not request.wait and not any(reply["is_unable"] for reply in replies):
            return list(replies[0]["reply"])
        problems = self._world.on_each(
            lambda: self._finished(checkpointer, captured[0]), give_up=give_up
        )
        return self._world.on_writer(lambda: checkpointer.reply(problems[0]), give_up=give_up)

    def settle(self, checkpointer: RankCheckpointer, give_up: Callable[[], object]) -> list[Any]:
        """Wait for the save in flight, and return the writer's reply.

        Collective: every rank must call it.
        """
        problems = self._world.on_each(checkpointer.background.wait, give_up=give_up)
        return self._world.on_writer(lambda: checkpointer.reply(problems[0]), give_up=give_up)

    def __enter__(self) -> None:
        """Begin to close: from now on a silent rank is waited for only a few seconds."""
        self._is_left = True

    def __exit__(self, *error: object) -> None:
        """Free the memory, as no save is in flight any more."""
        self._main.close()
        if self.uploads:
            self.uploads.close()

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
        reply = {"reply": checkpointer.reply(""), "slow": saver.slow_reason}
        whole = request.capture()
        captured.append(whole)
        reply["problem"] = self._check(whole)
        if reply["problem"]:
            return reply
        assert checkpointer.attempt is not None, "a loop runs"
        step, rank = int(whole.payload["step"]), self._world.rank
        about, commit = request.about(), None
        if self._world.is_writer:
            self._main.take(whole)
            commit = WriterCommit(checkpointer, self._main, whole, about, request.began_at)
        save = self._current = RankSave(
            self._count,
            step,
            self._world,
            checkpointer.store_for(about),
            checkpointer.attempt,
            commit,
            self._gives_up,
        )
        if not saver.is_unable:
            own = dataclasses.replace(whole, payload=shards.content(step, rank, whole.parts))
            saver.start(
                own,
                about,
                request.began_at,
                lambda job, write, check: save.write(write, check),
                partial(_ended, save, saver),
            )
        self._is_background = not saver.is_unable
        save.begun()
        return reply | {
            "is_unable": saver.is_unable,
            "slow": saver.slow_reason,
            "table": _table(whole),
        }

    def _finished(self, checkpointer: RankCheckpointer, whole: Captured) -> str:
        """Wait for the save, or make it here; return why there is no checkpoint, or ""."""
        saver: Saver = checkpointer.background
        save = self._current
        assert save is not None, "all ranks have begun"
        if self._is_background:
            return saver.wait()
        # There is no memory for a copy of this rank's parts.
        saver.saved_otherwise()
        own = shards.content(int(whole.payload["step"]), self._world.rank, whole.parts)
        try:
            state.check_finite(whole.tracked)
            whole.fill()
            save.write(lambda sink: torch.save(own, sink), lambda: None)  # type: ignore[arg-type]
        except BaseException as error:
            with contextlib.suppress(HarnessError):
                save.end(failure=error)
            raise
        save.end()
        return save.problem

    def _check(self, whole: Captured) -> str:
        """Check that the parts hold the state; return a problem that costs this checkpoint, or "".

        Raises:
            UsageError: They do not hold it.
        """
        waiting = [
            f"{name}.{key}"
            for name, obj in whole.tracked.items()
            for key in dtensors.unsharded_gradients(obj)
        ]
        if waiting:
            return (
                f"rank {self._world.rank}: gradients are accumulated that are in no state "
                f"({waiting[0]} …): save after set_requires_gradient_sync(True)"
            )
        if not self._is_checked:
            shards.check_covered(whole.parts)
            for name, obj in whole.tracked.items():
                dtensors.check_optimizer_state(name, obj)
        return ""

    def _gives_up(self) -> object:
        return self._is_left or preemption.requested()


def _ended(save: RankSave, saver: Saver, job: Job) -> tuple[str, bool]:
    """End a save that was made in the background; return its problem, and whether to repeat it."""
    save.end(
        problem=job.problem,
        must_repeat=bool(job.problem) and saver.must_repeat,
        failure=job.failure,
        costs=lambda: _with_wait(job.costs(), save.waited_s),
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
        UsageError: State is sharded, and the memory tier cannot hold it yet.
    """
    objects = tracked.values()
    if not (dtensors.holds_sharded(objects) or dtensors.holds_sharded_state(objects)):
        return None
    if settings.memory_every_steps:
        raise UsageError(
            "sharded state is not yet kept with checkpoint.memory",
            "found: tensors that are sharded (DTensor), tracked",
            "Leave it out.",
        )
    return ShardedSave(world, stores)


def _not_saved(
    checkpointer: RankCheckpointer, request: Request, whole: Captured, problem: str
) -> str:
    is_final = request.about().final is not None
    return checkpointer.not_saved(int(whole.payload["step"]), problem, is_final=is_final)


def _with_wait(costs: dict[str, float], waited_s: float) -> dict[str, float]:
    """Add the time for which training has waited until all ranks had begun."""
    return costs | {"blocked_s": round(costs["blocked_s"] + waited_s, 6)}


def _table(captured: Captured) -> str:
    """Return a digest of which tensors are sharded, and how: the same on every rank."""
    rows = [(path, part.layout, part.shape) for path, part in captured.parts.items()]
    return hashlib.blake2b(repr(rows).encode(), digest_size=8).hexdigest()


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
