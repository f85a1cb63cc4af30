"""Checks of sharded state before the first step, and of the memory for copies after it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from harness import state
from harness.distributed.ranks import World
from harness.errors import NonFiniteError, UsageError
from harness.store.staging_buffer import SPARE, free_memory_bytes
from harness.text import size

T = TypeVar("T")


def check_start(tracked: Mapping[str, Any], world: World) -> None:
    """Refuse sharded state that could not be trained or saved as it is.

    Collective: every rank must call it.

    Args:
        tracked: the tracked objects, by name.
        world: the ranks of this attempt.

    Raises:
        UsageError: The ranks that need the same samples are not known, or parameters were not
            initialised.
    """
    if not world.sharding:
        raise UsageError(
            "sharded state is tracked, and it cannot be told which ranks need the same samples",
            "found: no sharded module, neither tracked nor in an attribute of what is tracked",
            "Track the model itself: run.track(model=model, optimizer=optimizer).",
        )
    _check_initialised(tracked, world)


def _check_initialised(tracked: Mapping[str, Any], world: World) -> None:
    """Refuse to train what is not finite: `to_empty` leaves parameters as the memory was.

    Collective: every rank must call it.
    """
    found = ""
    try:
        state.check_finite(tracked)
    except NonFiniteError as error:
        found = error.found
    if problems := [problem for problem in world.gather(found) if problem]:
        raise UsageError(
            "parameters are not finite before the first step",
            problems[0],
            "Initialise all of them; after to_empty() they are what the memory held.",
        )


def on_this_machine(world: World, value: T) -> list[T]:
    """Return the values of the ranks that are on this rank's machine.

    Collective: every rank must call it.
    """
    rows = world.gather((_machine(), value))
    return [other for machine, other in rows if machine == rows[world.rank][0]]


def lacking_memory(world: World, size_bytes: int) -> str:
    """Return why this machine has no memory for a copy of each rank's state, or "".

    Collective: every rank must call it.

    Args:
        world: the ranks.
        size_bytes: the size of the state of this rank.
    """
    here = on_this_machine(world, (size_bytes, free_memory_bytes()))
    needed, free = sum(row[0] for row in here), min(row[1] for row in here)
    if needed <= SPARE * free:
        return ""
    return (
        f"there is no memory for copies of the parts of {len(here)} rank(s): "
        f"{size(needed)} are needed, {size(free)} are free"
    )


def _machine() -> str:
    """Return the name of this machine, with what tells it from others where the kernel says so."""
    boot_id = ""
    with contextlib.suppress(OSError):
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot_id}"
