"""What a resume costs, in words: how old the checkpoint is, and how many steps are to be recomputed."""

from __future__ import annotations

from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Manifest
from harness.monitoring.goodput import Goodput
from harness.supervision import attempt_history
from harness.text import duration


def resumed(found: Catalog, origin: Manifest | None, account: Goodput, last: int) -> str:
    """What it has cost that an attempt ended, in words; "" if there is nothing to go on from. The account is told of it, and how fast
    the last attempt was. Step `last` is known to have been made, whatever the events tell."""
    newest = attempt_history.told(found.stores, found.greatest) if found.greatest else []
    account.steps_per_s = attempt_history.steps_per_s(newest)
    again = max(attempt_history.steps_again(found, origin, newest), last - (origin.step if origin else 0))
    account.redone_until = again + (origin.step if origin else 0)
    if origin is None:
        return ""
    steps = {0: "no step is", 1: "one step is"}.get(again, f"{again} steps are")
    return f"; saved {duration(attempt_history.age_s(origin))} ago, {steps} made again"
