"""Upload the shards of a checkpoint to the remote store, from all ranks at once.

The upload thread of the writer decides which checkpoint is sent. It leaves each rank a request with
the shards that this rank is to send, sends its own, and waits for the answers; then it creates the
manifest there.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from harness.checkpoint.attempts import Attempt
from harness.checkpoint.format import DataFile, Manifest
from harness.checkpoint.replicate import send_shard
from harness.distributed.ranks import World
from harness.distributed.words import as_word, raise_word
from harness.errors import DamagedError, LostRankError, StorageError
from harness.store import Store

RETRIED_S = 60.0  # retry limit of one request, as for the uploads of the writer
LOOK_S = 0.2  # interval at which a rank looks for a request
PROGRESS = "sending"  # counts what all ranks have sent


@dataclasses.dataclass(frozen=True)
class Shipment:
    """One upload of a checkpoint's shards."""

    manifest: Manifest
    source: Store  # has the checkpoint
    remote: Store  # receives the copies, with the retry limit of this upload
    attempt: Attempt  # uploads
    sent: Callable[[], object]  # called when the remote store has taken data, from any rank
    is_given_up: Callable[[], object]  # whether to stop waiting for other ranks


def send_alone(shipment: Shipment) -> None:
    """Send the shards of a checkpoint from this process alone.

    Raises:
        DamagedError: a shard does not match the manifest.
        StorageError: a store fails.
    """
    for file in shipment.manifest.shards:
        send_shard(shipment.source, file, shipment.remote, shipment.attempt, shipment.sent)


class ShardUploads:
    """One rank's part in the uploads of sharded checkpoints.

    Args:
        world: the ranks of this attempt.
        source: the store in which checkpoints are committed; all ranks see it.
        remote: the store that receives copies.
    """

    def __init__(self, world: World, source: Store, remote: Store) -> None:
        self._world, self._source, self._remote = world, source, remote
        self._attempt: Attempt | None = None
        self._number = 0  # of the request that is, or was, carried out
        self._arrived: set[str] = set()  # shards that this rank has sent
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="shard sender")

    def begin(self, attempt: Attempt) -> None:
        """Look for requests of the writer from now on, if this rank is another one."""
        self._attempt = attempt
        if not self._world.is_writer:
            self._thread.start()

    def close(self) -> None:
        """End the thread; an upload in flight is given up."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(2 * LOOK_S)

    def send(self, shipment: Shipment) -> None:
        """Have all ranks send the shards of a checkpoint. For the upload thread of the writer.

        Raises:
            DamagedError: a shard does not match the manifest.
            StorageError: a store fails for a rank, or a rank does not answer.
        """
        files = shipment.manifest.shards
        words, size = self._world.words, self._world.size
        self._number += 1
        for rank in range(1, size):
            share = [dataclasses.asdict(file) for file in files[rank::size]]
            words.tell(f"send/{rank}", {"number": self._number, "files": share})
        self._send(files[::size], shipment.attempt, shipment.remote, shipment.sent)
        seen = [-1]

        def look() -> None:
            if shipment.is_given_up():
                raise StorageError(f"the upload of {shipment.manifest.name} is given up")
            if (now := words.beats(PROGRESS)) != seen[0]:
                seen[0] = now
                shipment.sent()

        for rank in range(1, size):
            try:
                answer = words.receive(
                    f"sent/{rank}",
                    f"sending/{rank}",
                    f"rank {rank}",
                    look,
                    lambda word: word["number"] == self._number,
                )
            except LostRankError as error:
                raise StorageError(error.what, error.found, error.remedy) from error
            raise_word(answer)
            if answer["problem"]:
                kind = DamagedError if answer["is_damaged"] else StorageError
                raise kind(f"rank {rank}: {answer['problem']}", answer["found"], answer["remedy"])

    def _send(
        self,
        files: Sequence[DataFile],
        attempt: Attempt,
        remote: Store,
        sent: Callable[[], object],
    ) -> None:
        """Send these shards, but for those that have arrived in an earlier try."""
        self._arrived &= {file.name for file in files}
        for file in files:
            if file.name not in self._arrived:
                send_shard(self._source, file, remote, attempt, sent)
                self._arrived.add(file.name)

    def _run(self) -> None:
        words, rank = self._world.words, self._world.rank
        try:
            while not self._over.wait(LOOK_S):
                request = words.peek(f"send/{rank}")
                if request is None or request["number"] == self._number:
                    continue
                self._number = request["number"]
                with words.beating(f"sending/{rank}"):
                    answer = self._answer(request)
                words.tell(f"sent/{rank}", answer | {"number": self._number})
        except LostRankError:
            return  # the writer has ended; the main thread will notice that too

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send what a request of the writer names; return the answer to it."""
        words = self._world.words
        counted_at, looked_at, is_dropped = 0.0, time.monotonic(), False

        def count() -> None:
            nonlocal counted_at
            if time.monotonic() > counted_at + 1:
                counted_at = time.monotonic()
                words.beat(PROGRESS)

        def drops() -> bool:
            """Return whether the writer has asked for something else meanwhile."""
            nonlocal looked_at, is_dropped
            if time.monotonic() > looked_at + LOOK_S:
                looked_at = time.monotonic()
                newer = words.peek(f"send/{self._world.rank}")
                is_dropped = newer is not None and newer["number"] != request["number"]
            return is_dropped or self._over.is_set()

        assert self._attempt is not None, "it has begun"
        files = [DataFile(**file) for file in request["files"]]
        remote = self._remote.with_retry_limit(RETRIED_S, drops, drops)
        try:
            self._send(files, self._attempt, remote, count)
        except (StorageError, DamagedError) as error:
            return {
                "problem": error.what,
                "found": error.found,
                "remedy": error.remedy,
                "is_damaged": isinstance(error, DamagedError),
            }
        except BaseException as error:  # noqa: BLE001 - the writer raises it
            return as_word(error, self._world.rank)
        return {"problem": ""}
