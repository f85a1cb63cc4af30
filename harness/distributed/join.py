"""Join the process group of a run, whatever launched the process."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from harness.distributed.ranks import World, own_rank
from harness.distributed.words import lost_rank_errors
from harness.errors import UsageError

ALONE_S = 5.0  # how long a rank waits for others to join after a stop signal


LISTENS_WITHIN_S = 10.0


# A process may train one run after another. Each run gets its own prefix in the store.
_joined = itertools.count(1)


def check_environment() -> None:
    """Refuse SLURM tasks without torchrun, which would be rival runs instead of ranks.

    Raises:
        UsageError: SLURM started several tasks, and RANK is not set.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "RANK" not in os.environ:
        raise UsageError(
            f"{tasks} SLURM tasks were started without torchrun: they would be {tasks} rivals for"
            f" one run, not {tasks} ranks",
            "found: SLURM_STEP_NUM_TASKS is set, RANK is not",
            "Start one torchrun a node: srun --ntasks-per-node=1 torchrun --nnodes=$SLURM_NNODES"
            " --nproc-per-node=GPUS --rdzv-backend=c10d --rdzv-endpoint=$HEAD_NODE:29500"
            " --rdzv-id=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0} harness/train.py …",
        )


def join(
    timeout_s: float,
    give_up: Callable[[], object] = lambda: None,
    leave: Callable[[], object] = lambda: None,
) -> World:
    """Join the process group that torchrun describes, or the existing one, or form one of one rank.

    A rank that waits for others cannot be interrupted. If it still waits `ALONE_S` seconds after
    `give_up` has returned something true, `leave` is called from another thread: the signal that
    only asks this rank to stop may have killed the others.

    Raises UsageError for SLURM tasks without torchrun and for a rank without a GPU of its own.
    Collective: every rank must call it.
    """
    check_environment()
    device = _device()
    join_number = next(_joined)
    limit = datetime.timedelta(seconds=timeout_s)
    with lost_rank_errors(), _not_for_ever(give_up, leave):
        if not dist.is_initialized():
            backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
            rank, size = own_rank(), int(os.environ.get("WORLD_SIZE", "1"))
            if "RANK" not in os.environ:
                dist.init_process_group(
                    backend,
                    store=dist.HashStore(),  # type: ignore[attr-defined]
                    rank=0,
                    world_size=1,
                    timeout=limit,
                )
            elif (store := _restart_safe_store(limit, join_number)) is not None:
                dist.init_process_group(
                    backend, store=store, rank=rank, world_size=size, timeout=limit
                )
            else:
                _await_store(rank)
                dist.init_process_group(backend, timeout=limit)
        group = dist.new_group(backend="gloo", timeout=limit)
    # There is no public way to the store; every large trainer does this.
    default_store = dist.distributed_c10d._get_default_store()
    store = dist.PrefixStore(f"harness-{join_number}", default_store)  # type: ignore[attr-defined]
    return World(dist.get_rank(), dist.get_world_size(), device, timeout_s, group, store)


@contextlib.contextmanager
def _not_for_ever(give_up: Callable[[], object], leave: Callable[[], object]) -> Iterator[None]:
    """Call `leave` if the block still runs `ALONE_S` seconds after `give_up` returned true."""
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
    """Select this rank's GPU, or the CPU; raise UsageError if the rank has no GPU of its own."""
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
    """Wait, for at most `LISTENS_WITHIN_S` seconds, until rank 0 listens, if it hosts the store.

    A rank that connects too early would have to wait half a second.
    """
    until = time.monotonic() + LISTENS_WITHIN_S
    address = os.environ.get("MASTER_ADDR"), int(os.environ.get("MASTER_PORT", "0"))
    while (
        rank  # rank 0 listens itself
        and address[0]
        and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        and time.monotonic() < until
    ):
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=1.0):
            return
        time.sleep(0.005)


def _restart_safe_store(limit: datetime.timedelta, join_number: int) -> Any:
    """Return a store with a fresh prefix for each in-place restart, or None to use the default.

    torchrun keeps one store over all its restarts. The keys of the dead group break a restarted
    one: it hangs, or connects to addresses where nobody listens. On several nodes each agent counts
    restarts by itself, so the count cannot serve as a common prefix there.
    """
    env = os.environ
    shared = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not shared or env.get("LOCAL_WORLD_SIZE") != env.get("WORLD_SIZE"):
        return None
    store = dist.TCPStore(  # type: ignore[attr-defined]
        env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False, timeout=limit
    )
    return dist.PrefixStore(  # type: ignore[attr-defined]
        f"restart-{env.get('TORCHELASTIC_RESTART_COUNT', '0')}-{join_number}", store
    )
