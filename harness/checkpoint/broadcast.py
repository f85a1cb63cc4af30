"""Broadcast the verified bytes of a checkpoint to all ranks, with one copy per machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from harness.distributed.ranks import World
from harness.errors import HarnessError, LostRankError
from harness.store import Handle, SealedMemory, attached


def broadcast(
    world: World,
    memory: SealedMemory | None,
    offer: Handle,
    size_bytes: int,
    read: Callable[[], SealedMemory | None],
    receive: Callable[[Iterator[bytes]], SealedMemory],
) -> SealedMemory:
    """Return, on every rank, the bytes that rank 0 (the writer) has verified.

    Ranks on the writer's machine map the same pages that the writer has verified and sealed. On
    every other machine one rank reads the data from the store if it can, or receives it from the
    writer; both ways verify the data. The other ranks of that machine map this rank's pages. A rank
    that cannot open another rank's memory gets its own copy.
    Collective: every rank must call it.

    Args:
        world: The process group.
        memory: The verified data on the writer; None on the other ranks.
        offer: Handle of the writer's memory, known to all ranks.
        size_bytes: Size of the data.
        read: Reads and verifies the data from the store; returns None if this rank does not see it.
        receive: Verifies and keeps the data that the writer sends in parts.

    Raises:
        HarnessError: This rank cannot get the data.
    """
    problem: HarnessError | None = None
    memory = memory or attached(offer, size_bytes)
    for is_last in (False, True):
        lacking = world.gather(_machine() if memory is None else None)
        if not any(lacking):
            break
        own = lacking[world.rank]
        leads = own is not None and (is_last or lacking.index(own) == world.rank)
        if leads:
            # A read error does not matter if the writer can send the data.
            with contextlib.suppress(HarnessError):
                memory = read()
        lacks = leads and memory is None
        if any(world.gather(lacks)):
            received, problem = _sent(world, memory, size_bytes, receive if lacks else None)
            memory = memory or received
        offers = world.gather(memory.offer if leads and memory is not None else None)
        handle = None if own is None else offers[lacking.index(own)]
        if memory is None and handle is not None:
            memory = attached(handle, size_bytes)
    if memory is None:
        raise problem or HarnessError("the checkpoint did not reach this rank")
    return memory


def _machine() -> str:
    """Return a text that is equal on ranks that may see each other's memory under /proc."""
    return (
        f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} "
        f"{os.readlink('/proc/self/ns/pid')}"
    )


def _sent(
    world: World,
    memory: SealedMemory | None,
    size_bytes: int,
    receive: Callable[[Iterator[bytes]], SealedMemory] | None,
) -> tuple[SealedMemory | None, HarnessError | None]:
    """Send the writer's data to all ranks; keep it on ranks that have a `receive`.

    All ranks must take part.

    Args:
        world: The process group.
        memory: The verified data; rank 0 sends it.
        size_bytes: Size of the data.
        receive: Verifies and keeps the received data; None on ranks that do not need it.

    Returns:
        The received data, or None, and the error of `receive`, or None.

    Raises:
        LostRankError: Another rank is lost.
    """
    received, problem = None, None
    with memory.open() if memory is not None else contextlib.nullcontext() as source:
        parts = world.share(source, size_bytes)
        try:
            received = receive(parts) if receive is not None else None
        except LostRankError:
            raise
        except HarnessError as error:
            problem = error
        for _ in parts:  # every rank must take all parts, or the other ranks hang
            pass
    return received, problem
