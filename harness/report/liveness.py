"""Determine from outside, by the records in the stores of a run, whether the run is alive."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from harness.checkpoint import records
from harness.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, EXIT_STORAGE
from harness.supervision.attempt_history import AttemptSummary
from harness.supervision.restart_policy import Outcome
from harness.text import duration

# A run that trains writes an event after each step that takes 30 s or longer, and uploads it.
ALIVE_S = 120.0
# With longer steps or evaluations, the silence may be twice the longest one between the last
# events, but no longer than an hour.
LAST_EVENTS, TIMES, MOST_S = 100, 2.0, 3600.0


def alive(
    stands: Outcome,
    attempts: Sequence[AttemptSummary],
    events: Sequence[dict[str, Any]],
    unread: str = "",
) -> Outcome:
    """Distinguish a run that trains from one that was killed, by its last sign of life.

    That is the last event, or the start of the attempt. Its age compares the clocks of two
    machines, which may differ.

    Args:
        stands: State of the run by its records alone.
        attempts: Summaries of the attempts, oldest first.
        events: Events of the last attempt.
        unread: Why the run's remote store was not read; "" if it was, or there is none.

    Returns:
        "running" if the last sign of life is not older than `silence_s`, else "to be continued".
        `stands` unchanged, if it is not that of an attempt without an end, or if no time is
        recorded. "cannot tell" in place of an end that only the unread store could confirm.
    """
    if unread and stands.exit_code in (EXIT_FINISHED, EXIT_FAILED):
        return Outcome(
            "cannot tell", f"{stands.state} by the run directory alone; {unread}", EXIT_STORAGE
        )
    if (
        stands.exit_code != EXIT_STOPPED
        or not attempts
        or attempts[-1].end is not None
        or not stands.why.startswith("no end")
    ):
        return stands
    times = [*(event.get("time") for event in events), attempts[-1].began]
    heard = [at for value in times if (at := records.seconds(value)) is not None]
    if not heard:
        return stands
    ago_s = time.time() - max(heard)
    if ago_s <= silence_s(events):
        return Outcome(
            "running",
            f"heard of {duration(max(0, ago_s))} ago, at step {attempts[-1].reached}",
            EXIT_STOPPED,
        )
    return Outcome(
        "to be continued",
        f"no end is recorded, and nothing was heard for {duration(ago_s)}: "
        "in a long step, hung, or killed",
        EXIT_STOPPED,
    )


def silence_s(events: Sequence[dict[str, Any]]) -> float:
    """Return how many seconds without an event still count as running.

    That is twice the longest gap between recent events, within limits.

    Args:
        events: Events of the attempt.
    """
    times = sorted(
        at
        for event in events[-LAST_EVENTS:]
        if (at := records.seconds(event.get("time"))) is not None
    )
    longest_s = max((later - earlier for earlier, later in pairwise(times)), default=0.0)
    return max(ALIVE_S, min(MOST_S, TIMES * longest_s))
