"""One save of a sharded state as a single rank makes it, in the background.

The saving thread of each rank writes the shard and leaves a word for the writer: the entry for the
manifest, or why there is none. The saving thread of the writer receives all words, commits the main
file and the manifest, and answers. No thread uses a collective.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from harness.checkpoint import format as fmt
from harness.checkpoint import memory_copy, retention
from harness.checkpoint.attempts import Attempt
from harness.checkpoint.commit import CLEAN_UP_S, check_readable, write_shard
from harness.checkpoint.format import DataFile
from harness.distributed.ranks import World
from harness.distributed.words import as_word, raise_word
from harness.errors import StorageError
from harness.sharding.save_protocols import Costs
from harness.sharding.writer_commit import WriterCommit
from harness.store import LocalStore, Sink, Store

NOT_BEGUN = "not all ranks have begun this save"


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a save goes.

    Args:
        store: the store of the save.
        is_apart: whether it is a directory, or memory, that each machine may have for itself: ranks
            then delete on theirs what the writer has deleted on its own.
        tier: the memory tier of this machine, if what it holds is outdated by the save.
    """

    store: Store
    is_apart: bool
    tier: LocalStore | None

    def standing(self) -> list[str]:
        """Return the names of the checkpoints with shards on this machine. Raises StorageError."""
        return [fmt.stem_of(folder) for folder in self.store.listing(fmt.CHECKPOINTS)[1]]

    def follow(self, standing: Sequence[str], order: tuple[int, int]) -> None:
        """Delete older shards on this machine. Raises StorageError.

        Args:
            standing: the names of those that stand on the writer's machine.
            order: the (attempt, step) that is saved.
        """
        if self.is_apart:
            retention.follow(self.store, standing, order)
        if self.tier is not None and memory_copy.is_ours(self.tier):
            retention.follow(self.tier, (), order)
            memory_copy.drop_if_empty(self.tier)


class RankSave:
    """A save of sharded state on one rank.

    Args:
        number: the number of this save; the same on all ranks.
        step: the step that is saved.
        world: the ranks of this attempt.
        target: where the save goes.
        attempt: the attempt that saves.
        commit: how to commit the checkpoint, on the writer; None on other ranks.
        give_up: returns a true value if a rank that gives no sign of life is waited for only a few
            seconds.
    """

    def __init__(
        self,
        number: int,
        step: int,
        world: World,
        target: Target,
        attempt: Attempt,
        commit: WriterCommit | None,
        give_up: Callable[[], object],
    ) -> None:
        self._number, self._step, self._world = number, step, world
        self._target, self._store, self._attempt = target, target.store, attempt
        self._commit, self._give_up = commit, give_up
        self._decided, self._is_on = threading.Event(), False
        self._file: DataFile | None = None
        self._error: BaseException | None = None  # of the commit, on the writer
        self._begun_at = time.perf_counter()
        self.waited_s = 0.0  # how long training has waited until all ranks had begun
        self.problem = ""  # why there is no checkpoint, although training goes on
        self.must_repeat = False
        self._heart = contextlib.ExitStack()
        if world.size > 1:
            self._heart.enter_context(world.words.beating(f"saving/{world.rank}"))

    def begun(self) -> None:
        """Note that this rank has begun, and waits for the others."""
        self._begun_at = time.perf_counter()

    def decide(self, *, is_on: bool) -> None:
        """Go on with the save, which all ranks have begun, or drop it."""
        self.waited_s = time.perf_counter() - self._begun_at
        self._is_on = is_on
        self._decided.set()
        if not is_on:
            self._heart.close()

    def write(self, write: Callable[[Sink], None], check: Callable[[], None]) -> None:
        """Write the shard durably, once all ranks have begun.

        Args:
            write: writes the content of the file.
            check: called when it is durable; its errors pass through.
        """
        self._decided.wait()
        if not self._is_on:
            return
        try:
            file = write_shard(self._store, self._attempt, self._step, self._world.rank, write)
            if self._number == 1:  # as the writer looks at its first main file
                check_readable(self._store, file.key, self._attempt)
        except StorageError as error:
            self.problem = str(error)
            return
        check()
        self._file = file

    def end(
        self,
        *,
        problem: str = "",
        must_repeat: bool = False,
        failure: BaseException | None = None,
        costs: Costs | None = None,
    ) -> None:
        """Tell the writer about the shard, and learn whether there is a checkpoint.

        `problem` and `must_repeat` are those of all ranks afterwards.

        Args:
            problem: why the state could not be copied, if it could not.
            must_repeat: whether the next step is to be saved in its place.
            failure: the error that ends training, if there is one.
            costs: returns what the save has cost; None if training has waited.

        Raises:
            LostRankError: a rank gives no sign of life.
            HarnessError: the error that ends training on any rank.
        """
        self._decided.wait()
        try:
            if not self._is_on:
                self.problem = NOT_BEGUN
                return
            word = self._word(self.problem or problem, must_repeat, failure)
            if self._commit is not None:
                answer = self._answer(word, self._commit, costs)
            else:
                self._world.words.tell(self._key(str(self._world.rank)), word)
                answer = self._world.words.receive(
                    self._key("answer"), "saving/0", "the writing rank", self._give_up
                )
            if answer["is_left_over"]:
                self._clean_up()
            if self._error is not None:
                raise self._error
            raise_word(answer)
            self.problem, self.must_repeat = answer["problem"], answer["must_repeat"]
            if self._commit is None and not self.problem:
                with contextlib.suppress(StorageError):  # the next save deletes it
                    self._target.follow(answer["standing"], (self._attempt.number, self._step))
        finally:
            self._heart.close()

    def _key(self, name: str) -> str:
        return f"save/{self._attempt.number}/{self._number}/{name}"

    def _word(
        self, problem: str, must_repeat: bool, failure: BaseException | None
    ) -> dict[str, Any]:
        """Return what the writer learns of this rank's shard."""
        if failure is not None:
            return as_word(failure, self._world.rank)
        if self._file is None:
            return {"problem": f"rank {self._world.rank}: {problem}", "must_repeat": must_repeat}
        return dataclasses.asdict(self._file)

    def _answer(
        self, own: dict[str, Any], commit: WriterCommit, costs: Costs | None
    ) -> dict[str, Any]:
        """Commit the checkpoint if every rank has written its shard; return what all ranks learn.

        An error ends training, on all ranks: it is in the answer.
        """
        words = self._world.words
        # A request to create the manifest in a bucket may still be carried out after it has failed.
        may_exist = False
        try:
            heard = [own, *map(self._heard, range(1, self._world.size))]
            for word in heard:
                raise_word(word)
            lacking = [word for word in heard if "problem" in word]
            may_exist = not (lacking or self._store.is_local)
            answer = _outcome(heard, commit, costs) | {"standing": []}
            if self._target.is_apart and not answer["problem"]:
                with contextlib.suppress(StorageError):
                    answer["standing"] = self._target.standing()
        except BaseException as error:  # noqa: BLE001 - `end` raises it, on every rank
            answer, self._error = as_word(error, None), error
        failed = bool("error" in answer or answer["problem"])
        answer["is_left_over"] = failed and not may_exist
        if self._world.size > 1:
            words.tell(self._key("answer"), answer)
            words.drop(f"save/{self._attempt.number}/{self._number - 1}/answer")  # all have it
        return answer

    def _heard(self, rank: int) -> dict[str, Any]:
        words, key = self._world.words, self._key(str(rank))
        word: dict[str, Any] = words.receive(key, f"saving/{rank}", f"rank {rank}", self._give_up)
        words.drop(key)
        return word

    def _clean_up(self) -> None:
        """Delete this rank's shard of a checkpoint that was not committed."""
        store = self._store.with_retry_limit(CLEAN_UP_S)
        with contextlib.suppress(StorageError):
            if not store.exists(fmt.manifest_key(self._step, self._attempt.number)):
                name = fmt.shard_name(self._step, self._attempt.number, self._world.rank)
                store.delete(f"{fmt.CHECKPOINTS}/{name}")
                store.drop_folder(fmt.folder_key(self._step, self._attempt.number))


def _outcome(
    heard: Sequence[dict[str, Any]], commit: WriterCommit, costs: Costs | None
) -> dict[str, Any]:
    """Commit the shards that all ranks have written, or report why one has not."""
    if lacking := [word for word in heard if "problem" in word]:
        # A state that changed while it was copied is saved again at the next step.
        must_repeat = any(word["must_repeat"] for word in lacking)
        problem = lacking[0]["problem"]
        if not must_repeat:
            commit.not_saved(problem)
        return {"problem": problem, "must_repeat": must_repeat}
    files = tuple(DataFile(word["name"], word["size_bytes"], word["digest"]) for word in heard)
    problem, must_repeat = commit.commit(files, costs)
    return {"problem": problem, "must_repeat": must_repeat}
