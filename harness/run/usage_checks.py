"""Refuse calls of a run's methods that come at the wrong time or with wrong values."""

from __future__ import annotations

from numbers import Real
from typing import Any

from harness.errors import UsageError


def check_single_loop(looping: bool, looped: bool) -> None:
    """Raise UsageError for a second loop, inside the first one or after it."""
    if looping:
        raise UsageError(
            "batches() is called inside the loop over another batches()",
            remedy="Use evaluate() for evaluation.",
        )
    if looped:
        raise UsageError(
            "a run has one loop, and a second one begins",
            "found: batches() or steps() is looped over again",
            "Loop once, over all epochs: run.batches(…, epochs=5). A loop over epochs "
            "around it: run.by_epoch(run.batches(…)).",
        )


def check_due(every_steps: Any, begun: bool) -> None:
    """Raise UsageError if `run.due` is called before the loop, or with what is no number."""
    if not isinstance(every_steps, Real | None):
        raise UsageError(
            "run.due(…) takes a number of steps",
            f"found: {every_steps!r:.200}",
            "As in run.due(100); None asks only for the last step.",
        )
    if not begun:
        raise UsageError(
            "run.due(…) was asked before the loop",
            remedy="Ask it in the loop over run.batches(…): there is no step before.",
        )


def check_some_steps(step: int, global_batch_size: int | None) -> None:
    """Raise UsageError if the data ended before the first step of the run.

    Without this check, a run without any step would count as finished.
    """
    if step == 0:
        raise UsageError(
            "the dataset ended before the first step",
            f"found: fewer samples than a share of the global batch of {global_batch_size}, on at "
            "least one rank",
            "Take a smaller batch, or more data.",
        )
