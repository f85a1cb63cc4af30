"""Upload the shards of a checkpoint to the remote store, from all ranks at once.

The upload thread of the writer decides which checkpoint is sent. It leaves each rank a request with
the shards that this rank is to send, sends its own, and waits for the answers; then it creates the
manifest there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from harness.checkpoint import format as fmt
from harness.checkpoint.attempts import Attempt
from harness.checkpoint.format import DataFile, Manifest
from harness.checkpoint.load import check_bytes
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
        _send(shipment, file)
    _complete(shipment)


def _send(shipment: Shipment, file: DataFile) -> None:
    send_shard(shipment.source, file, shipment.remote, shipment.attempt, shipment.sent)


def _complete(shipment: Shipment) -> None:
    """Send what has vanished from the remote store since it was sent: others may delete there."""
    folder = fmt.folder_key(shipment.manifest.step, shipment.manifest.attempt)
    there = {entry.key: entry.size_bytes for entry in shipment.remote.entries(folder)}
    for file in shipment.manifest.shards:
        if there.get(file.key) != file.size_bytes:
            _send(shipment, file)


class ShardUploads:
    """One rank's part in the uploads of sharded checkpoints.

    Args:
        world: the ranks of this attempt.
        source: the store in which checkpoints are committed; each rank sees its own shards in it.
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
        """End the thread; an upload in flight is given up. The writer sends alone from now on."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(2 * LOOK_S)

    def send(self, shipment: Shipment) -> None:
        """Have all ranks send the shards of a checkpoint. For the upload thread of the writer.

        Raises:
            DamagedError: a shard does not match the manifest.
            StorageError: a store fails for a rank, or a rank does not answer.
        """
        if self._over.is_set():
            send_alone(shipment)
            return
        files, words = shipment.manifest.shards, self._world.words
        shares = [files[rank :: self._world.size] for rank in range(self._world.size)]
        self._number += 1
        for rank, share in list(enumerate(shares))[1:]:
            named = [dataclasses.asdict(file) for file in share]
            words.tell(_request(shipment.attempt, rank), {"number": self._number, "files": named})
        self._send_share(shares[0], partial(_send, shipment))
        for rank, share in list(enumerate(shares))[1:]:
            answer = self._heard(shipment, rank)
            if answer is None or (self._over.is_set() and answer.get("problem")):
                for file in share:
                    _send(shipment, file)
                continue
            raise_word(answer)
            if answer["problem"] and answer["is_damaged"]:
                if not all(shipment.source.exists(file.key) for file in share):
                    what = f"rank {rank}: {answer['problem']}"
                    raise DamagedError(what, answer["found"], answer["remedy"])
                # Raises if it is damaged for all.
                check_bytes(shipment.source, share, lambda *_: shipment.sent())
                for file in share:
                    _send(shipment, file)
            elif answer["problem"]:
                what = f"rank {rank}: {answer['problem']}"
                raise StorageError(what, answer["found"], answer["remedy"])
        _complete(shipment)

    def _heard(self, shipment: Shipment, rank: int) -> dict[str, Any] | None:
        """Return the answer of a rank; None if it is silent, or this process has left the loop."""
        words, seen = self._world.words, -1

        def look() -> None:
            nonlocal seen
            if self._over.is_set():
                raise _LeftError
            if shipment.is_given_up():
                raise StorageError(f"the upload of {shipment.manifest.name} is given up")
            if (now := words.beats(PROGRESS)) != seen:
                seen = now
                shipment.sent()

        try:
            answer: dict[str, Any] = words.receive(
                f"{_request(shipment.attempt, rank)}/sent",
                f"sending/{rank}",
                f"rank {rank}",
                look,
                lambda word: word["number"] == self._number,
            )
        except (LostRankError, _LeftError):
            return None
        return answer

    def _send_share(self, files: Sequence[DataFile], send: Callable[[DataFile], object]) -> None:
        """Send these shards, but for those that have arrived in an earlier try."""
        self._arrived &= {file.name for file in files}
        for file in files:
            if file.name not in self._arrived:
                send(file)
                self._arrived.add(file.name)

    def _run(self) -> None:
        assert self._attempt is not None, "it has begun"
        words, rank = self._world.words, self._world.rank
        key = _request(self._attempt, rank)
        while not self._over.wait(LOOK_S):
            with contextlib.suppress(LostRankError):  # the main thread will notice that too
                request = words.peek(key)
                if request is None or request["number"] == self._number:
                    continue
                with words.beating(f"sending/{rank}"):
                    answer = self._answer(key, request, self._attempt)
                words.tell(f"{key}/sent", answer | {"number": request["number"]})
                self._number = request["number"]

    def _answer(self, key: str, request: dict[str, Any], attempt: Attempt) -> dict[str, Any]:
        """Send what a request of the writer names; return the answer to it."""
        words, counted_at, looked_at, is_dropped = self._world.words, 0.0, time.monotonic(), False

        def count() -> None:
            nonlocal counted_at
            if time.monotonic() > counted_at + 1:
                counted_at = time.monotonic()
                with contextlib.suppress(LostRankError):
                    words.beat(PROGRESS)

        def drops() -> bool:
            """Return whether the writer has asked for other shards meanwhile, or has ended."""
            nonlocal looked_at, is_dropped
            if time.monotonic() > looked_at + LOOK_S and not is_dropped:
                looked_at = time.monotonic()
                try:
                    is_dropped = words.peek(key)["files"] != request["files"]
                except LostRankError:
                    is_dropped = True
            return is_dropped or self._over.is_set()

        try:
            files = [DataFile(**file) for file in request["files"]]
            remote = self._remote.with_retry_limit(RETRIED_S, drops, drops)
            remote.listen(lambda *retried: None, count)
            self._send_share(
                files, lambda file: send_shard(self._source, file, remote, attempt, count)
            )
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


class _LeftError(Exception):
    """The writer has left the loop, and waits for no other rank."""


def _request(attempt: Attempt, rank: int) -> str:
    return f"send/{attempt.number}/{rank}"
