"""Log the values of a run to TensorBoard and Weights & Biases, as one curve over all attempts.

The events are authoritative. At each start, the values of the steps up to the resume point are read
from the events and logged again: a tracker may have lost some of them, or may have logged steps
that will be recomputed. A tracker cannot stop the run: if one fails, that is reported once, and the
tracker is not used any more.
"""

from __future__ import annotations

import importlib.util
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from harness.checkpoint import records
from harness.checkpoint.catalog import Catalog
from harness.errors import UsageError
from harness.store import LocalStore, Store
from harness.supervision import attempt_history

CLOSE_S = 10.0
# The kinds of events that hold numbers, and the prefix of their names.
KINDS = {"step": "", "evaluated": "eval/"}
Values = dict[str, float]


def values_of(event: Mapping[str, Any]) -> Values:
    """Return the numbers of an event by the names of their curves; {} if it holds none."""
    prefix = KINDS.get(str(event.get("event")))
    if prefix is None:
        return {}
    return {
        prefix + name: float(value)
        for name, value in event.items()
        if name not in ("step", "of") and type(value) in (int, float) and records.is_value(value)
    }


def history(catalog: Catalog, until: int) -> dict[int, Values]:
    """Return the logged values of the steps up to `until`, in the order of steps.

    If several attempts made a step, its values are those of the last one.
    """
    steps: dict[int, Values] = {}
    for number in sorted(catalog.attempts):
        began = (catalog.attempts[number].get("from") or {}).get("step", 0)
        steps = {step: values for step, values in steps.items() if step <= began}
        for event in attempt_history.first_log(catalog, number, math.inf):
            if (values := values_of(event)) and isinstance(step := event.get("step"), int):
                steps[step] = steps.get(step, {}) | values
    return {step: steps[step] for step in sorted(steps) if step <= until}


class TensorBoard:
    """Event files of TensorBoard in a folder of the run directory.

    The file of each attempt holds the whole curve, and makes TensorBoard discard earlier files.

    Raises:
        OSError: The store is remote, but TensorBoard's files need a disk.
    """

    def __init__(self, store: Store, run_id: str, before: Mapping[int, Values]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if not isinstance(store, LocalStore):
            raise OSError("its files need a disk, and this run has no directory")
        self._writer: Any = SummaryWriter(store.where("tensorboard"), purge_step=0, flush_secs=10)
        for step, values in before.items():
            self.log(step, values)

    def log(self, step: int, values: Values) -> None:
        """Log the values of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, exit_code: int) -> None:
        """Write buffered values and close the file."""
        self._writer.close()


class WeightsAndBiases:
    """The curves of a run in Weights & Biases, in one W&B run for all attempts.

    Project (by default "harness"), entity and key come from the environment variables of W&B. W&B
    accepts each step once and ignores recomputed steps, whose values are the same.
    """

    def __init__(self, store: Store, run_id: str, before: Mapping[int, Values]) -> None:
        import wandb

        folder = str(store) if isinstance(store, LocalStore) else None
        self._run: Any = wandb.init(
            id=run_id,
            resume="allow",
            dir=folder,
            project=os.environ.get("WANDB_PROJECT", "harness"),
        )
        known = int(self._run.starting_step or 0)
        for step, values in before.items():
            if step >= known:
                self.log(step, values)

    def log(self, step: int, values: Values) -> None:
        """Log the values of a step."""
        self._run.log(values, step=step)

    def close(self, exit_code: int) -> None:
        """Upload buffered values and end the session; W&B shows a code other than 0 as failed."""
        self._run.finish(exit_code=exit_code)


MAKERS: dict[str, Callable[[Store, str, Mapping[int, Values]], TensorBoard | WeightsAndBiases]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def check(names: Sequence[str]) -> None:
    """Check the names of trackers.

    Raises:
        UsageError: A name is unknown, or its library is not installed.
    """
    for name in names:
        if name not in MAKERS:
            raise UsageError(f"log_to: {name!r} is none of {', '.join(MAKERS)}")
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"log_to: {name} is not installed", remedy=f"pip install {name}")


class Trackers:
    """The trackers of a run, on the writer.

    `on_event` is called by other threads, too, but only events of the training thread hold numbers.
    """

    def __init__(
        self,
        names: Sequence[str],
        catalog: Catalog,
        run_id: str,
        step: int,
        say: Callable[[str], object],
    ) -> None:
        """Open the trackers, and log the values up to the resume point.

        Args:
            names: Names of the trackers.
            catalog: The catalog of the run's stores.
            run_id: Id of the run.
            step: Step of the resume point.
            say: Prints a line.
        """
        self._say = say
        self._trackers: dict[str, TensorBoard | WeightsAndBiases] = {}
        before = history(catalog, step) if names else {}
        for name in names:
            self._safely(name, partial(self._open, name, catalog.stores[0], run_id, before))

    def _open(self, name: str, store: Store, run_id: str, before: Mapping[int, Values]) -> None:
        self._trackers[name] = MAKERS[name](store, run_id, before)

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Log the numbers of an event to all trackers, if it holds any."""
        if self._trackers and (values := values_of(event)):
            for name, teller in list(self._trackers.items()):
                self._safely(name, partial(teller.log, int(event["step"]), values))

    def close(self, exit_code: int = 0) -> None:
        """Close the trackers, which write buffered values; wait at most `CLOSE_S` for each.

        The exit code is not 0 if the attempt has failed, or its loop was left.
        """
        for name, teller in list(self._trackers.items()):
            close = partial(teller.close, exit_code)
            thread = threading.Thread(
                target=self._safely, args=(name, close), daemon=True, name=name
            )
            thread.start()
            thread.join(CLOSE_S)
        self._trackers.clear()

    def _safely(self, name: str, work: Callable[[], object]) -> None:
        try:
            work()
        # The errors of these libraries are not known, and training does not depend on them.
        except Exception as error:  # noqa: BLE001
            self._trackers.pop(name, None)
            self._say(
                f"harness: warning: nothing more is told to {name}: {type(error).__name__}: {error}"
            )
