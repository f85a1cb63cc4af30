"""Refuse calls of a run's methods that come at the wrong time or with wrong values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from harness.errors import UsageError

# Names that every event has.
EVERYWHERE = ("event", "kind", "time", "step", "of", "spent")


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


def check_begun(begun: bool) -> None:
    """Raise UsageError if `run.due` is called before the loop."""
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


def check_loggable(values: Mapping[str, Any]) -> None:
    """Raise UsageError if a value is not one number, or has a name that every event has.

    No value is read from the device.
    """
    for name, value in values.items():
        if name in EVERYWHERE:
            raise UsageError(
                f"nothing that is logged can be called {name!r}",
                f"reserved, because every event has them: {', '.join(EVERYWHERE)}",
                "Give it another name.",
            )
        is_number = (
            value.numel() == 1 if isinstance(value, torch.Tensor) else hasattr(value, "__float__")
        )
        if not is_number:
            raise UsageError(
                f"log({name}=…) takes one number",
                f"found: {str(value)[:200]}",
                "Log a number or a tensor with one element.",
            )
