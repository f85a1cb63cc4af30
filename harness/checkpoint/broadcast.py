"""Give every rank a checkpoint's verified bytes, with one copy of them on each machine."""

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
    """The `size_bytes` that the writer has verified in its `memory`, and told all ranks of by `offer`, on each of them.

    Ranks on the writer's machine parse the very pages that it has verified and sealed. On another machine one rank `read`s the data
    itself, if it sees it, or `receive`s it from the writer; both verify. The others there parse that rank's pages. Whoever cannot open
    another's memory gets its own. Raises HarnessError on a rank that cannot have it. Collective: every rank must call it.
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
            with contextlib.suppress(HarnessError):  # what is wrong with it here does not matter if it can be sent
                memory = read()
        if any(world.gather(leads and memory is None)):
            received, problem = _sent(world, memory, size_bytes, receive if leads and memory is None else None)
            memory = memory or received
        offers = world.gather(memory.offer if leads and memory is not None else None)
        found = None if own is None else offers[lacking.index(own)]
        if memory is None and found is not None:
            memory = attached(found, size_bytes)
    if memory is None:
        raise problem or HarnessError("the checkpoint did not reach this rank")
    return memory


def _machine() -> str:
    """The same text on ranks that may see each other's memory under /proc."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _sent(
    world: World, memory: SealedMemory | None, size_bytes: int, receive: Callable[[Iterator[bytes]], SealedMemory] | None
) -> tuple[SealedMemory | None, HarnessError | None]:
    """What the writer sends, for a rank that wants to `receive` it, or what is wrong; the others take part all the same."""
    received, problem = None, None
    with memory.open() if memory is not None else contextlib.nullcontext() as source:
        parts = world.share(source, size_bytes)
        try:
            received = receive(parts) if receive is not None else None
        except LostRankError:
            raise
        except HarnessError as error:
            problem = error
        for _ in parts:  # to the end, also where nothing is wanted, or no more: the others wait
            pass
    return received, problem
