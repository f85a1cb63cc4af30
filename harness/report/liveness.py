"""Whether a run is alive, for people who look at it from outside."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from harness.errors import EXIT_STOPPED
from harness.supervision.attempt_history import AttemptSummary
from harness.supervision.restart_policy import Outcome
from harness.text import duration

ALIVE_S = 120.0  # events are written at least so often, or sent, while a run trains


def alive(stands: Outcome, lives: Sequence[AttemptSummary], told: Sequence[dict[str, Any]]) -> Outcome:
    """Tell a run that trains from one that was killed, by how long ago it was last heard of; the clocks of two machines may differ.
    `told` are the last attempt's events."""
    if stands.exit_code != EXIT_STOPPED or not lives or lives[-1].end is not None or not stands.why.startswith("no end"):
        return stands
    heard = [event["time"] for event in told if "time" in event] + [lives[-1].began or ""]
    try:
        ago_s = (datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(max(heard))).total_seconds()
    except ValueError:
        return stands
    if ago_s <= ALIVE_S:
        return Outcome("running", f"heard of {duration(max(0, ago_s))} ago, at step {lives[-1].reached}", EXIT_STOPPED)
    return Outcome("to be continued", f"no end is recorded, and nothing was heard for {duration(ago_s)}: hung, or killed", EXIT_STOPPED)
