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
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from harness.checkpoint import records
from harness.checkpoint.catalog import Catalog
from harness.errors import UsageError
from harness.store import LocalStore, Store
from harness.supervision import attempt_history

CLOSE_S = 10.0
READ_S, AT_ONCE = 60.0, 32  # seconds to read events in at a start; attempts read concurrently
# The kinds of events that hold numbers, and the prefix of their names.
KINDS = {"step": "", "evaluated": "eval/"}
Values = dict[str, float]
Before = Callable[[int], Mapping[int, Values]]  # the values of the steps from one step on


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


def history(
    catalog: Catalog,
    until: int,
    since: int = 0,
    say: Callable[[str], object] = lambda text: None,
) -> dict[int, Values]:
    """Return the logged values of the steps from `since` up to `until`, in the order of steps.

    If several attempts made a step, its values are those of the last one. The attempts are read
    from the newest on, without those of which nothing is left. After `READ_S` the others are left
    out, which is said.

    Args:
        catalog: Catalog of the run's stores.
        until: Last step.
        since: First step.
        say: Prints a line.
    """
    limits, limit = dict[int, int](), until
    for number in sorted(catalog.attempts, reverse=True):
        began = (catalog.attempts[number].get("from") or {}).get("step", 0)
        if began < limit and limit >= since:
            limits[number] = limit  # its steps after this one were made again
        limit = min(limit, began)
    steps = dict[int, Values]()
    numbers, until_s = list(limits), time.monotonic() + READ_S
    for at in range(0, len(numbers), AT_ONCE):
        if at and time.monotonic() > until_s:
            say(
                f"harness: warning: the curve up to step {limits[numbers[at]]} is not told again: "
                f"reading the later events took {READ_S:.0f} s"
            )
            break
        read = attempt_history.logs(catalog, dict.fromkeys(numbers[at : at + AT_ONCE], math.inf))
        for number, events in read.items():
            own: dict[int, Values] = {}
            for event in events:
                values, step = values_of(event), event.get("step")
                if values and isinstance(step, int) and since <= step <= limits[number]:
                    own[step] = own.get(step, {}) | values
            for step, values in own.items():
                steps[step] = values | steps.get(step, {})
    return {step: steps[step] for step in sorted(steps)}


class TensorBoard:
    """Event files of TensorBoard in a folder of the run directory.

    The file of each attempt holds the whole curve, and makes TensorBoard discard earlier files.

    Raises:
        OSError: The store is remote, but TensorBoard's files need a disk.
    """

    def __init__(self, store: Store, run_id: str, before: Before) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if not isinstance(store, LocalStore):
            raise OSError("its files need a disk, and this run has no directory")
        self._writer: Any = SummaryWriter(store.where("tensorboard"), purge_step=0, flush_secs=10)
        for step, values in before(0).items():
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

    def __init__(self, store: Store, run_id: str, before: Before) -> None:
        import wandb

        folder = str(store) if isinstance(store, LocalStore) else None
        self._run: Any = wandb.init(
            id=run_id,
            resume="allow",
            dir=folder,
            project=os.environ.get("WANDB_PROJECT", "harness"),
        )
        for step, values in before(int(self._run.starting_step or 0)).items():
            self.log(step, values)

    def log(self, step: int, values: Values) -> None:
        """Log the values of a step."""
        self._run.log(values, step=step)

    def close(self, exit_code: int) -> None:
        """Upload buffered values and end the session; W&B shows a code other than 0 as failed."""
        self._run.finish(exit_code=exit_code)


MAKERS: dict[str, Callable[[Store, str, Before], TensorBoard | WeightsAndBiases]] = {
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

        def before(since: int) -> dict[int, Values]:
            return history(catalog, step, since, say)

        for name in names:
            self._safely(name, partial(self._open, name, catalog.stores[0], run_id, before))

    def _open(self, name: str, store: Store, run_id: str, before: Before) -> None:
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
