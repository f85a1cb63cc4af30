"""Whether the ranks of a machine have memory for copies of their parts, all at the same time."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

from harness.distributed.ranks import World
from harness.store.staging_buffer import SPARE, free_memory_bytes
from harness.text import size


def lacking_memory(world: World, size_bytes: int) -> str:
    """Return why this machine has no memory for a copy of each rank's state, or "".

    Collective: every rank must call it.

    Args:
        world: the ranks.
        size_bytes: the size of the state of this rank.
    """
    own = _machine(), size_bytes, free_memory_bytes()
    here = [row for row in world.gather(own) if row[0] == own[0]]
    needed, free = sum(row[1] for row in here), min(row[2] for row in here)
    if needed <= SPARE * free:
        return ""
    return (
        f"there is no memory for copies of the parts of {len(here)} rank(s): "
        f"{size(needed)} are needed, {size(free)} are free"
    )


def machines(world: World) -> int:
    """Return on how many machines the ranks are. Collective: every rank must call it."""
    return len(set(world.gather(_machine())))


def _machine() -> str:
    """Return the name of this machine, with what tells it from others where the kernel says so."""
    boot_id = ""
    with contextlib.suppress(OSError):
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot_id}"
