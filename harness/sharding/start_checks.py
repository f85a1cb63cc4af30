"""Checks of sharded state before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness import state
from harness.arguments import Settings
from harness.distributed.ranks import World
from harness.errors import NonFiniteError, UsageError
from harness.sharding.memory_room import machines


def check_start(tracked: Mapping[str, Any], world: World, settings: Settings) -> None:
    """Refuse sharded state that could not be trained or saved as it is.

    Collective: every rank must call it.

    Args:
        tracked: the tracked objects, by name.
        world: the ranks of this attempt.
        settings: validated arguments of `harness.init`.

    Raises:
        UsageError: The ranks that need the same samples are not known, the memory tier cannot hold
            the state, or parameters were not initialised.
    """
    if not world.sharding:
        raise UsageError(
            "sharded state is tracked, and it cannot be told which ranks need the same samples",
            "found: no sharded module, neither tracked nor in an attribute of what is tracked",
            "Track the model itself: run.track(model=model, optimizer=optimizer).",
        )
    if settings.memory_every_steps and (count := machines(world)) > 1:
        raise UsageError(
            "sharded state is kept with checkpoint.memory on one machine only",
            f"found: ranks on {count} machines",
            "Leave it out.",
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
