"""The ranks of one attempt: join, agree, broadcast, and run work on rank 0 (the writer).

No other module uses torch.distributed. Control messages use a separate CPU (gloo) group, so that
they never mix with gradients. The time-out of a collective cannot distinguish a slow rank from a
dead one. Therefore ranks do not wait in a collective for work that may take long on the writer (a
slow disk); they watch the writer's heartbeat instead: see `World.on_writer`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeVar

import torch
import torch.distributed as dist

from harness.distributed.words import Words, as_word, lost_rank_errors, raise_word
from harness.errors import LostRankError, UsageError

T = TypeVar("T")
LAG = 100  # calls; within fewer calls, a save synchronises all ranks
SHARED_AT_ONCE_BYTES = 16 << 20
HEARD_WITHIN_S = 2.0
FEW = 63  # numbers in one message


@dataclass
class World:
    """The processes of one attempt, as seen from one of them."""

    rank: int
    size: int
    device: torch.device
    timeout_s: float
    _group: Any = None
    _store: Any = None
    _calls: int = field(default=0)
    _parts: int = field(default=0)
    _data_ranks: tuple[int, ...] = ()
    _is_read: bool = False
    sharding: str = ""  # of the tracked tensors; "" if none is sharded

    @property
    def is_writer(self) -> bool:
        """Return whether this is rank 0 (the writer)."""
        return self.rank == 0

    @property
    def data_ranks(self) -> tuple[int, ...]:
        """Return the data rank of each rank; those with the same number train on the same samples.

        It is the rank itself, unless tensor parallelism has several ranks compute a step together.
        """
        return self._data_ranks or tuple(range(self.size))

    @property
    def data_rank(self) -> int:
        """Return the number of this rank among those that train on different samples."""
        return self.data_ranks[self.rank]

    @property
    def data_size(self) -> int:
        """Return the number of ranks that train on different samples."""
        self._is_read = True
        return max(self.data_ranks) + 1

    def deal_to(self, data_ranks: tuple[int, ...], sharding: str) -> None:
        """Set the data rank of each rank, and in words how tracked tensors are sharded.

        Raises:
            UsageError: Samples were dealt out otherwise already.
        """
        if self._is_read and data_ranks != self.data_ranks:
            raise UsageError(
                "the data was dealt out before the model was tracked, whose ranks need the same "
                "samples",
                f"found: data ranks {list(self.data_ranks)}, then {list(data_ranks)}",
                "Call run.track(…) before len(batches) and before run.evaluate(…).",
            )
        self._data_ranks, self.sharding = data_ranks, sharding

    @property
    def joined(self) -> bool:
        """Return whether there is a process group, possibly of one rank.

        Without one, this object represents a process that does not train.
        """
        return self._group is not None

    @property
    def words(self) -> Words:
        """Return the messages between the ranks; there are none without a process group."""
        return Words(self._store, self.timeout_s)

    def agree(self, values: list[int]) -> list[int]:
        """Return the element-wise maximum over all ranks. Collective: every rank must call it."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.int64, device="cpu")
        with lost_rank_errors():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return [int(value) for value in tensor.tolist()]

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in the order of ranks, on every rank.

        Collective: every rank must call it.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with lost_rank_errors():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def to_writer(self, value: T) -> list[T]:
        """Return every rank's value, in the order of ranks, on the writer; [] on other ranks.

        Collective: every rank must call it.
        """
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_writer else None
        with lost_rank_errors():
            dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def gather_numbers(self, numbers: dict[str, float]) -> list[dict[str, float]]:
        """Gather a few named numbers, in one small message if all ranks use the same names.

        Otherwise, or for more than `FEW` numbers, this falls back on `gather`.
        Collective: every rank must call it.
        """
        if self.size == 1:
            return [numbers]
        names = repr(list(numbers)).encode()
        name = (
            int.from_bytes(hashlib.blake2b(names, digest_size=6).digest(), "big")
            if len(numbers) <= FEW
            else -1
        )
        numbered = [name, *numbers.values(), *[0.0] * FEW][: 1 + FEW]
        row = torch.tensor(numbered, dtype=torch.float64, device="cpu")
        rows = [torch.empty_like(row) for _ in range(self.size)]
        with lost_rank_errors():
            dist.all_gather(rows, row, group=self._group)
        gathered = [[float(number) for number in row.tolist()] for row in rows]
        # All ranks see the same rows, so they take the same branch.
        if name == -1 or any(named != name for named, *_ in gathered):
            return self.gather(numbers)
        return [dict(zip(numbers, values, strict=False)) for _, *values in gathered]

    def from_writer(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a contiguous copy of the writer's tensor; each rank gives one of that shape.

        Backends send memory as it lies, and take no account of strides.
        Collective: every rank must call it.
        """
        copy = tensor.detach().clone(memory_format=torch.contiguous_format)
        if self.size > 1:
            with lost_rank_errors():
                dist.broadcast(copy.view(-1).view(torch.uint8), 0)
        return copy

    def on_writer(
        self, work: Callable[[], T], *, give_up: Callable[[], object] = lambda: None
    ) -> T:
        """Run `work` on the writer and return its result (JSON-serialisable) on every rank.

        The other ranks wait as long as the writer's heartbeat continues. A slow disk may take
        hours. A stopped or dead writer is noticed within `timeout_s`, or within seconds once
        `give_up` returns something true (the launcher is ending this process).

        Raises LostRankError if the heartbeat stops. An error of `work` is raised on every rank.
        Collective: every rank must call it.
        """
        if self.size == 1:
            return work()
        self._calls += 1
        key = f"result/{self._calls}"
        if not self.is_writer:
            return self._await(key, give_up)  # type: ignore[no-any-return]
        with self.words.beating("heartbeat"):
            try:
                result = work()
            except BaseException as error:
                self.words.tell(key, as_word(error, None))
                self._all_hear(key)
                raise
            self.words.tell(key, {"result": result})
        # This is no barrier: the writer may be some calls ahead of ranks that still have to read.
        if self._calls > LAG:
            self.words.drop(f"result/{self._calls - LAG}")
        return result

    def on_each(
        self, work: Callable[[], T], *, give_up: Callable[[], object] = lambda: None
    ) -> list[T]:
        """Run `work` on every rank; return all results (JSON-serialisable) on every rank.

        No rank waits in a collective meanwhile: see `on_writer`. A rank that is lost is noticed by
        its own heartbeat.

        Raises LostRankError if a heartbeat stops. An error of `work` on any rank is raised on every
        rank, that of the lowest rank first.
        Collective: every rank must call it.
        """
        if self.size == 1:
            return [work()]
        self._parts += 1
        number, own = self._parts, [f"heartbeat/{self.rank}"]
        if self.is_writer:  # ranks that are done wait for its answer already
            own.append("heartbeat")
        failure: BaseException | None = None
        with self.words.beating(*own):
            try:
                part: dict[str, Any] = {"result": work()}
            except BaseException as error:  # noqa: BLE001 - raised below, on every rank
                part, failure = as_word(error, self.rank), error
            self.words.tell(f"part/{number}/{self.rank}", part)
        parts = self.on_writer(lambda: self._heard(number, give_up), give_up=give_up)
        if any("error" in part for part in parts):
            self._all_hear(f"part/{number}")
        if failure is not None:
            raise failure
        for part in parts:
            raise_word(part)
        return [part["result"] for part in parts]

    def _all_hear(self, key: str) -> None:
        """Let every rank hear of an error before the writer leaves, which may host the store."""
        heard, until = f"{key}/heard", time.monotonic() + HEARD_WITHIN_S
        with contextlib.suppress(LostRankError):
            if not self.is_writer:
                self.words.beat(heard)
                return
            while self.words.beats(heard) < self.size - 1 and time.monotonic() < until:
                time.sleep(0.005)

    def _heard(self, number: int, give_up: Callable[[], object]) -> list[Any]:
        """Wait for each rank's part of `on_each`, and return them; called on the writer."""
        keys = [f"part/{number}/{rank}" for rank in range(self.size)]
        parts = [
            self.words.receive(key, f"heartbeat/{rank}", f"rank {rank}", give_up)
            for rank, key in enumerate(keys)
        ]
        for key in keys:
            self.words.drop(key)
        return parts

    def _await(self, key: str, give_up: Callable[[], object]) -> Any:
        """Wait for the writer's result under a key, as long as its heartbeat continues."""
        reply = self.words.receive(key, "heartbeat", "the writing rank", give_up)
        if "error" in reply:
            self._all_hear(key)
        raise_word(reply)
        return reply["result"]

    def share(self, file: BinaryIO | None, size_bytes: int) -> Iterator[bytes]:
        """Broadcast the content of the writer's `file`, and yield it part by part on every rank.

        The file has to be at its beginning and `size_bytes` long.
        Collective: every rank must call it, and take all parts.
        """
        length = min(SHARED_AT_ONCE_BYTES, size_bytes)
        buffer = torch.empty(length, dtype=torch.uint8, device="cpu")
        for at in range(0, size_bytes, SHARED_AT_ONCE_BYTES):
            part = buffer[: size_bytes - at]
            if self.is_writer and file is not None:
                part.numpy()[:] = bytearray(file.read(len(part)))
            with lost_rank_errors():
                dist.broadcast(part, 0, group=self._group)
            yield part.numpy().tobytes()

    def leave(self) -> None:
        """Destroy the process group. Collective: every rank must call it."""
        # gloo's threads end with the last reference, not only with the interpreter.
        self._group = self._store = None
        if dist.is_initialized():
            dist.destroy_process_group()


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an error only reports that another rank is gone.

    Such an error contains a message of gloo or NCCL, and may come from inside DDP.
    """
    messages = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Connection refused",
        "NCCL communicator was aborted",
        "Timed out waiting",
    )
    return isinstance(error, LostRankError) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in messages)
    )


def last_collective() -> str:
    """Return the last collective that this rank began, or "" if it is unknown.

    The source is PyTorch's flight recorder. Any thread may call this.
    """
    try:
        # There is no public way to the newest entry.
        from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined]

        entries = json.loads(_dump_fr_trace_json(includeCollectives=True, onlyActive=False)).get(
            "entries", []
        )
        last = max(entries, key=lambda entry: entry["record_id"])
        return f"{last['profiling_name']}, {last['state']}, shapes {last['input_sizes']}"
    except (ImportError, AttributeError, TypeError, KeyError, ValueError, RuntimeError):
        return ""


def gathered(value: T) -> list[T]:
    """Return every process's value, in the order of ranks, without a `World`.

    Collective: every rank must call it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    with lost_rank_errors():
        dist.all_gather_object(values, value)
    return values


def own_rank() -> int:
    """Return this process's rank from the environment; no process group is needed."""
    return int(os.environ.get("RANK", "0"))


def prints() -> bool:
    """Return whether people read the output of this rank; no process group is needed."""
    return own_rank() == 0
