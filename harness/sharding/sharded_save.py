"""Save a sharded state: each rank its own shard, then the writer the main file and the manifest.

Training waits meanwhile. A checkpoint exists when its manifest does, and that is written last: a
rank that dies before, or whose disk refuses, leaves shards that count for nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from harness import state
from harness.arguments import Settings
from harness.checkpoint import format as fmt
from harness.checkpoint.attempts import Attempt
from harness.checkpoint.commit import About
from harness.checkpoint.format import DataFile, Manifest
from harness.distributed import dtensors
from harness.distributed.ranks import World
from harness.errors import HarnessError, LostRankError, StorageError, UsageError
from harness.sharding import shards
from harness.state import Captured
from harness.store import Store

CLEAN_UP_S = 5.0  # retry limit for deleting what a failed save has left


class Comparison(Protocol):
    """The comparison of recomputed steps."""

    def check(self) -> None:
        """Raise the error of a step that differs, if it ends the run."""


class OfWriter(Protocol):
    """What a save needs of the writer's checkpointer."""

    attempt: Attempt | None

    @property
    def recomputed(self) -> Comparison:
        """Return the comparison of recomputed steps."""

    def commit_at_once(self, payload: Mapping[str, Any], about: About, began_at: float) -> str:
        """Commit a state that `torch.save` writes; return "" or why there is no checkpoint."""

    def not_saved(self, step: int, error: str, *, is_final: bool = False) -> str:
        """Report that a save has failed and return why."""

    def reply(self, problem: str) -> list[Any]:
        """Return what the other ranks learn of a save."""


class ShardedSave:
    """The saves of an attempt whose tracked state is sharded.

    Args:
        world: the ranks of this attempt.
        store: the store of the run, which all ranks see.
    """

    def __init__(self, world: World, store: Store) -> None:
        self._world, self._store = world, store
        self._is_checked = False

    def save(
        self,
        checkpointer: OfWriter,
        capture: Callable[[], Captured],
        about: Callable[[], About],
        began_at: float,
        give_up: Callable[[], object],
    ) -> list[Any]:
        """Write a checkpoint and return the writer's reply, with the problem if there is none.

        Collective: every rank must call it.

        Args:
            checkpointer: commits the main file and the manifest, on the writer.
            capture: returns the state to save.
            about: returns the manifest entries that are not part of the state.
            began_at: when the save began, by `time.perf_counter`.
            give_up: returns a true value if this process was asked to stop.

        Raises:
            NonFiniteError: a parameter is not finite.
            UsageError: the state of a rank cannot be saved, or the ranks hold other tensors.
            LostRankError: a rank does not answer.
        """
        assert checkpointer.attempt is not None, "a loop runs"
        attempt, captured = checkpointer.attempt, list[Captured]()

        def write() -> dict[str, Any]:
            checkpointer.recomputed.check()
            captured.append(capture())
            return self._written(attempt, captured[0])

        try:
            replies = self._world.on_each(write, give_up=give_up)
            _check_same(replies)
            self._is_checked = True
            reply = self._world.on_writer(
                lambda: _committed(checkpointer, captured[0], replies, about(), began_at),
                give_up=give_up,
            )
        except LostRankError:
            raise  # the writer may be about to commit
        except HarnessError:
            self._clean_up(attempt, captured)
            raise
        if reply[0]:
            self._clean_up(attempt, captured)
        return reply

    def _written(self, attempt: Attempt, captured: Captured) -> dict[str, Any]:
        """Write this rank's shard; return its entry in the manifest, or the problem."""
        waiting = [
            f"{name}.{key}"
            for name, obj in captured.tracked.items()
            for key in dtensors.unsharded_gradients(obj)
        ]
        if waiting:
            return {
                "problem": f"rank {self._world.rank}: gradients are accumulated that are in no "
                f"state ({waiting[0]} …): save after set_requires_gradient_sync(True)"
            }
        state.check_finite(captured.tracked)
        if not self._is_checked:
            shards.check_covered(captured.parts)
            for name, obj in captured.tracked.items():
                dtensors.check_optimizer_state(name, obj)
        captured.fill()
        step, rank = int(captured.payload["step"]), self._world.rank
        try:
            file = shards.write(self._store, attempt, step, rank, captured.parts)
        except StorageError as error:
            return {"problem": f"rank {rank}: {error}"}
        return dataclasses.asdict(file) | {"table": _table(captured)}

    def _clean_up(self, attempt: Attempt, captured: list[Captured]) -> None:
        """Delete this rank's shard of a checkpoint that was not committed."""
        if not captured:
            return
        step = int(captured[0].payload["step"])
        folder = fmt.folder_key(step, attempt.number)
        store = self._store.with_retry_limit(CLEAN_UP_S)
        with contextlib.suppress(StorageError):
            if not store.exists(fmt.manifest_key(step, attempt.number)):
                name = fmt.shard_name(step, attempt.number, self._world.rank)
                store.delete(f"{fmt.CHECKPOINTS}/{name}")
                store.drop_folder(folder)


def sharded_save(
    tracked: Mapping[str, Any],
    world: World,
    stores: tuple[Store, ...],
    settings: Settings,
    origin: Manifest | None,
) -> ShardedSave | None:
    """Return how the tracked objects are saved if any of their state is sharded, else None.

    Args:
        tracked: the tracked objects, by name.
        world: the ranks of this attempt.
        stores: the stores of the run.
        settings: validated arguments of `harness.init`.
        origin: the checkpoint that the attempt resumes from.

    Raises:
        UsageError: State is sharded, or was, and the stores of the run cannot hold it yet.
    """
    objects = tracked.values()
    is_sharded = dtensors.holds_sharded(objects) or dtensors.holds_sharded_state(objects)
    if not is_sharded and not (origin is not None and origin.shards and len(stores) > 1):
        return None
    lacking = [
        name
        for name, is_asked in (
            ("run.remote", len(stores) > 1 or not stores[0].is_local),
            ("checkpoint.memory", is_sharded and bool(settings.memory_every_steps)),
        )
        if is_asked
    ]
    if lacking:
        raise UsageError(
            f"sharded state is not yet kept with {' and '.join(lacking)}",
            "found: tensors that are sharded (DTensor), tracked or in the checkpoint",
            "Leave it out, and put run.dir on a file system that all nodes share.",
        )
    return ShardedSave(world, stores[0])


def _committed(
    checkpointer: OfWriter,
    captured: Captured,
    replies: list[dict[str, Any]],
    about: About,
    began_at: float,
) -> list[Any]:
    """Commit the main file and the manifest, on the writer, if every shard is written.

    Args:
        checkpointer: commits them.
        captured: the state, as the writer has it.
        replies: the entry of each rank's shard in the manifest, or its problem.
        about: the manifest entries that are not part of the state.
        began_at: when the save began, by `time.perf_counter`.

    Returns:
        The reply for all ranks.
    """
    for reply in replies:
        if "problem" in reply:
            is_final = about.final is not None
            step = int(captured.payload["step"])
            problem = checkpointer.not_saved(step, reply["problem"], is_final=is_final)
            return checkpointer.reply(problem)
    files = tuple(
        DataFile(reply["name"], reply["size_bytes"], reply["digest"]) for reply in replies
    )
    details = dataclasses.replace(about, shards=files)
    problem = checkpointer.commit_at_once(captured.payload, details, began_at)
    return checkpointer.reply(problem)


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
