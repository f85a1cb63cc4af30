"""The ranks of one attempt: join, agree, broadcast, who writes. The only door to torch.distributed.

Control messages travel on a CPU (gloo) group of their own, so that they never mix with gradients. What may take long on the
writer (a slow disk) is not waited for in a collective, whose time-out cannot tell slow from dead, but beside the writer's
heartbeat: see `World.on_writer`.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from harness.errors import EXIT_FAILED, HarnessError, LostRankError, UsageError, by_exit_code

T = TypeVar("T")
HEARTBEAT_S = 1.0
SHARED_AT_ONCE_BYTES = 16 << 20
FEW = 63  # numbers in one message
ALONE_S = 5.0  # for so long after a stop signal a rank waits for others to join
LISTENS_WITHIN_S = 10.0
LAG = 100  # calls; long before, a save has brought all ranks together

_joined = itertools.count(1)  # a process may train one run after another; each gets a name space of its own in the store


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

    @property
    def is_writer(self) -> bool:
        return self.rank == 0

    @property
    def joined(self) -> bool:
        """Whether there is a process group, be it of one; without one this stands for a process that does not train."""
        return self._group is not None

    def agree(self, values: list[int]) -> list[int]:
        """Element-wise maximum over all ranks. Collective: every rank must call it."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        with _lost_rank_said():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return [int(value) for value in tensor.tolist()]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, on every rank. Collective: every rank must call it."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _lost_rank_said():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def to_writer(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, on the writer; nothing elsewhere. Collective: every rank must call it."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_writer else None
        with _lost_rank_said():
            dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def gather_numbers(self, numbers: dict[str, float]) -> list[dict[str, float]]:
        """`gather` for a few named numbers, in one small message if all ranks name the same. Collective: every rank must call it."""
        if self.size == 1:
            return [numbers]
        names = repr(list(numbers)).encode()
        name = int.from_bytes(hashlib.blake2b(names, digest_size=6).digest(), "big") if len(numbers) <= FEW else -1
        row = torch.tensor([name, *numbers.values(), *[0.0] * FEW][: 1 + FEW], dtype=torch.float64)
        rows = [torch.empty_like(row) for _ in range(self.size)]
        with _lost_rank_said():
            dist.all_gather(rows, row, group=self._group)
        found = [[float(number) for number in row.tolist()] for row in rows]
        if name == -1 or any(named != name for named, *_ in found):  # all ranks see the same, and go the same way
            return self.gather(numbers)
        return [dict(zip(numbers, values, strict=False)) for _, *values in found]

    def share_buffers(self, module: nn.Module) -> None:
        """Give every rank the writer's buffers, as DDP does before each forward pass. Collective: every rank must call it."""
        if self.size > 1:
            with _lost_rank_said():
                for buffer in module.buffers():
                    dist.broadcast(buffer, 0)

    def share_state(self, module: nn.Module) -> None:
        """Give every rank the writer's parameters and buffers. Collective: every rank must call it."""
        if self.size > 1:
            with _lost_rank_said():
                for tensor in (*module.parameters(), *module.buffers()):
                    dist.broadcast(tensor.detach(), 0)

    def on_writer(self, work: Callable[[], T], *, give_up: Callable[[], object] = lambda: None) -> T:
        """Run `work` on the writer and give every rank its result (which JSON must be able to hold).

        The others wait as long as the writer's heartbeat goes on: a slow disk may take hours, a stopped or dead writer is
        noticed within `timeout_s`, or within seconds once `give_up` returns something true (the launcher is ending us).
        An error of `work` is raised on every rank. Collective: every rank must call it.
        """
        if self.size == 1:
            return work()
        self._calls += 1
        key = f"result/{self._calls}"
        if not self.is_writer:
            return self._await(key, give_up)  # type: ignore[no-any-return]
        with _heart(lambda: self._store.add("heartbeat", 1)):
            try:
                result = work()
            except HarnessError as error:
                self._store.set(key, json.dumps({"code": error.exit_code, "error": str(error)}))
                raise
            except BaseException as error:
                self._store.set(key, json.dumps({"code": EXIT_FAILED, "error": f"rank 0: {type(error).__name__}: {error}"}))
                raise
            self._store.set(key, json.dumps({"result": result}))
        if self._calls > LAG:  # this is no barrier: the writer may be some calls ahead of those who still have to read
            self._store.delete_key(f"result/{self._calls - LAG}")
        return result

    def _await(self, key: str, give_up: Callable[[], object]) -> Any:
        beat, beat_at, pause_s = -1, time.monotonic(), 0.0005
        with _lost_rank_said():
            while not self._store.check([key]):
                time.sleep(pause_s)
                pause_s = min(pause_s * 1.5, 0.05)
                if (now := self._store.add("heartbeat", 0)) != beat:
                    beat, beat_at = now, time.monotonic()
                limit_s = min(5.0, self.timeout_s) if give_up() else self.timeout_s
                if time.monotonic() - beat_at > limit_s:
                    raise LostRankError("the writing rank does not answer", f"no sign of life for {limit_s:.0f} s", "See its log.")
            reply = json.loads(self._store.get(key))
        if "error" in reply:
            raise by_exit_code(reply["code"], reply["error"])
        return reply["result"]

    def share(self, file: BinaryIO | None, size_bytes: int) -> Iterator[bytes]:
        """What the writer's `file` holds, which stands at its beginning and is `size_bytes` long, part by part. Collective: every rank must
        call it, and take all parts."""
        buffer = torch.empty(min(SHARED_AT_ONCE_BYTES, size_bytes), dtype=torch.uint8)
        for at in range(0, size_bytes, SHARED_AT_ONCE_BYTES):
            part = buffer[: size_bytes - at]
            if self.is_writer and file is not None:
                part.numpy()[:] = bytearray(file.read(len(part)))
            with _lost_rank_said():
                dist.broadcast(part, 0, group=self._group)
            yield part.numpy().tobytes()

    def leave(self) -> None:
        """Take the process group down. Collective: every rank must call it."""
        self._group = self._store = None  # gloo's threads end with the last reference, not later with the interpreter
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def _heart(beat: Callable[[], object]) -> Iterator[None]:
    """While the block runs, a thread shows that this process is alive."""
    done = threading.Event()

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone with the launcher; the main thread will see it too
            while not done.wait(HEARTBEAT_S):
                beat()

    thread = threading.Thread(target=run, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def _lost_rank_said() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        line = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise LostRankError("another rank of this attempt is lost", f"found: {line}", "The first error is in that rank's log.") from error


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says no more than that another rank is gone: gloo's and NCCL's words for it, from inside DDP, say."""
    told = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Connection refused",
        "NCCL communicator was aborted",
        "Timed out waiting",
    )
    return isinstance(error, LostRankError) or (isinstance(error, RuntimeError) and any(words in str(error) for words in told))


def last_collective() -> str:
    """The last collective that this rank began, as PyTorch's flight recorder has it; "" if it does not tell. From any thread."""
    try:
        from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined] # no public way to the newest one

        entries = json.loads(_dump_fr_trace_json(includeCollectives=True, onlyActive=False)).get("entries", [])
        last = max(entries, key=lambda entry: entry["record_id"])
        return f"{last['profiling_name']}, {last['state']}, shapes {last['input_sizes']}"
    except (ImportError, AttributeError, TypeError, KeyError, ValueError, RuntimeError):
        return ""


def own_rank() -> int:
    """This process's rank as the environment tells it, before anything is joined."""
    return int(os.environ.get("RANK", "0"))


def prints() -> bool:
    """Whether this process is the rank whose output people read, before anything is joined."""
    return own_rank() == 0


def check_environment() -> None:
    """Refuse what would start rivals instead of ranks. Raises UsageError."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "RANK" not in os.environ:
        raise UsageError(
            f"{tasks} SLURM tasks were started without torchrun: they would be {tasks} rivals for one run, not {tasks} ranks",
            "found: SLURM_STEP_NUM_TASKS is set, RANK is not",
            "Start one torchrun a node: srun --ntasks-per-node=1 torchrun --nnodes=$SLURM_NNODES --nproc-per-node=GPUS "
            "--rdzv-backend=c10d --rdzv-endpoint=$HEAD_NODE:29500 --rdzv-id=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0} harness/train.py …",
        )


def join(timeout_s: float, give_up: Callable[[], object] = lambda: None, leave: Callable[[], object] = lambda: None) -> World:
    """Join the process group that torchrun describes, or the one that is there already, or be alone.

    A rank that waits for others cannot be interrupted. `leave` is called, from another thread, when it still waits some seconds after
    `give_up` has returned something true: the others may have died of what only asks this one to stop. Raises UsageError. Collective:
    every rank must call it.
    """
    check_environment()
    device = _device()
    join_number = next(_joined)
    limit = datetime.timedelta(seconds=timeout_s)
    with _lost_rank_said(), _not_for_ever(give_up, leave):
        if not dist.is_initialized():
            backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
            rank, size = own_rank(), int(os.environ.get("WORLD_SIZE", "1"))
            if "RANK" not in os.environ:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)  # type: ignore[attr-defined]
            elif (store := _restart_safe_store(limit, join_number)) is not None:
                dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
            else:
                _await_store(rank)
                dist.init_process_group(backend, timeout=limit)
        group = dist.new_group(backend="gloo", timeout=limit)
    default_store = dist.distributed_c10d._get_default_store()  # no public way; every large trainer does this
    store = dist.PrefixStore(f"harness-{join_number}", default_store)  # type: ignore[attr-defined]
    return World(dist.get_rank(), dist.get_world_size(), device, timeout_s, group, store)


@contextlib.contextmanager
def _not_for_ever(give_up: Callable[[], object], leave: Callable[[], object]) -> Iterator[None]:
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            if give_up():
                if not over.wait(ALONE_S):
                    leave()
                return

    threading.Thread(target=watch, daemon=True, name="join").start()
    try:
        yield
    finally:
        over.set()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"local rank {local_rank} has no GPU of its own",
            f"found: {torch.cuda.device_count()} visible GPUs",
            "Start no more processes a node than it has GPUs (--nproc-per-node).",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _await_store(rank: int) -> None:
    """Wait until the first rank listens, where it does so itself: who dials too early is made to wait half a second."""
    until = time.monotonic() + LISTENS_WITHIN_S
    address = os.environ.get("MASTER_ADDR"), int(os.environ.get("MASTER_PORT", "0"))
    while rank > 0 and address[0] and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=1.0):
            return
        time.sleep(0.005)


def _restart_safe_store(limit: datetime.timedelta, join_number: int) -> Any:
    """A fresh name space for each restart in place, or None where the default is right.

    torchrun keeps one store over all its restarts, and a restarted group stumbles over the keys of the dead one: it hangs, or
    dials addresses where nobody listens. On several nodes each agent counts restarts by itself, so there the count is no
    common name.
    """
    env = os.environ
    shared = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not shared or env.get("LOCAL_WORLD_SIZE") != env.get("WORLD_SIZE"):
        return None
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False, timeout=limit)  # type: ignore[attr-defined]
    return dist.PrefixStore(f"restart-{env.get('TORCHELASTIC_RESTART_COUNT', '0')}-{join_number}", store)  # type: ignore[attr-defined]
