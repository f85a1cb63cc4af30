"""What a run logs, also for TensorBoard and Weights & Biases: one curve over all attempts, whatever was killed in between.

The events are the truth. At each start what they tell of the steps that count is given anew to who may have lost some of it, or has seen
steps that are to be made again. Nothing here can hurt the run: what fails is said once, and then left alone.
"""

from __future__ import annotations

import importlib.util
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from harness.checkpoint.catalog import Catalog
from harness.errors import UsageError
from harness.store import LocalStore, Store
from harness.supervision import attempt_history

CLOSE_S = 10.0
KINDS = {"step": "", "evaluated": "eval/"}  # the events that hold numbers, and what their names are prefixed with
Values = dict[str, float]


def values_of(event: Mapping[str, Any]) -> Values:
    """The numbers of an event, by the names that a curve has."""
    prefix = KINDS.get(str(event.get("event")))
    if prefix is None:
        return {}
    return {prefix + name: float(value) for name, value in event.items() if name not in ("step", "of") and type(value) in (int, float)}


def history(found: Catalog, until: int) -> dict[int, Values]:
    """What the steps up to that one logged, each as the last attempt has it that made it, in their order."""
    steps: dict[int, Values] = {}
    for number in sorted(found.attempts):
        began = (found.attempts[number].get("from") or {}).get("step", 0)
        steps = {step: values for step, values in steps.items() if step <= began}
        for event in attempt_history.told(found.stores, number, math.inf):
            if (values := values_of(event)) and isinstance(step := event.get("step"), int):
                steps[step] = steps.get(step, {}) | values
    return {step: steps[step] for step in sorted(steps) if step <= until}


class TensorBoard:
    """A folder of the run directory. Each attempt's file tells all of it, and makes TensorBoard forget the files before."""

    def __init__(self, store: Store, run_id: str, before: Mapping[int, Values]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if not isinstance(store, LocalStore):
            raise OSError("its files need a disk, and this run has no directory")
        self._writer: Any = SummaryWriter(store.where("tensorboard"), purge_step=0, flush_secs=10)
        for step, values in before.items():
            self.log(step, values)

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run there, named by this run's id; project, entity and key come from the standard environment (WANDB_PROJECT …). It takes
    each step once: what is made again, and comes out the same, it leaves out."""

    def __init__(self, store: Store, run_id: str, before: Mapping[int, Values]) -> None:
        import wandb

        folder = str(store) if isinstance(store, LocalStore) else None
        self._run: Any = wandb.init(id=run_id, resume="allow", dir=folder, project=os.environ.get("WANDB_PROJECT", "harness"))
        known = int(self._run.starting_step or 0)
        for step, values in before.items():
            if step >= known:
                self.log(step, values)

    def log(self, step: int, values: Values) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


MAKERS: dict[str, Callable[[Store, str, Mapping[int, Values]], TensorBoard | WeightsAndBiases]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def check(names: Sequence[str]) -> None:
    """Raises UsageError for a name that is not known, or whose library is not installed."""
    for name in names:
        if name not in MAKERS:
            raise UsageError(f"log_to: {name!r} is none of {', '.join(MAKERS)}")
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"log_to: {name} is not installed", remedy=f"pip install {name}")


class Trackers:
    """All who are told; for the writer. `on_event` is called by threads, too, but only the training thread's events hold numbers."""

    def __init__(self, names: Sequence[str], found: Catalog, run_id: str, step: int, say: Callable[[str], object]) -> None:
        """Open them, and tell them what was logged up to the step that the run goes on from."""
        self._say = say
        self._told: dict[str, TensorBoard | WeightsAndBiases] = {}
        before = history(found, step) if names else {}
        for name in names:
            self._safely(name, partial(self._open, name, found.stores[0], run_id, before))

    def _open(self, name: str, store: Store, run_id: str, before: Mapping[int, Values]) -> None:
        self._told[name] = MAKERS[name](store, run_id, before)

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Tell of an event, if it holds numbers."""
        if self._told and (values := values_of(event)):
            for name, teller in list(self._told.items()):
                self._safely(name, partial(teller.log, int(event["step"]), values))

    def close(self) -> None:
        """Let them write what they still hold, if that is quick."""
        for name, teller in list(self._told.items()):
            thread = threading.Thread(target=self._safely, args=(name, teller.close), daemon=True, name=name)
            thread.start()
            thread.join(CLOSE_S)
        self._told.clear()

    def _safely(self, name: str, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - somebody else's library, and training does not depend on it
            self._told.pop(name, None)
            self._say(f"harness: warning: nothing more is told to {name}: {type(error).__name__}: {error}")
