"""The cost of a resume as text: the checkpoint's age and the number of steps to recompute."""

from __future__ import annotations

from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Manifest
from harness.monitoring.goodput import Goodput
from harness.supervision import attempt_history
from harness.text import duration


def resumed(catalog: Catalog, origin: Manifest | None, goodput: Goodput, last: int) -> str:
    """Return the cost of a resume as text; "" if there is no resume point.

    This also sets two values of `goodput`: the last step that an earlier attempt had made, and the
    throughput at the end of the newest attempt.

    Args:
        catalog: The catalog of the run's stores.
        origin: The resume point; None for step 0.
        goodput: The goodput accounting.
        last: A step that is known to have been made, even if no event shows it; or 0.
    """
    newest = attempt_history.first_log(catalog, catalog.greatest) if catalog.greatest else []
    again = max(
        attempt_history.steps_again(catalog, origin, newest), last - (origin.step if origin else 0)
    )
    goodput.resumes(again + (origin.step if origin else 0), attempt_history.steps_per_s(newest))
    if origin is None:
        return ""
    steps = "1 step" if again == 1 else f"{again} steps"
    return f"; saved {duration(attempt_history.age_s(origin))} ago, {steps} to recompute"
