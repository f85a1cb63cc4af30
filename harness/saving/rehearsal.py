"""Rehearse the next start once per attempt, at its first save.

State that a restart could not load is then reported at once, not after a kill. The rehearsal has
two parts:

* The file is read back in the process that wrote it, and compared with the captured state.
* The state is loaded. For torch's own modules and optimizers this happens in the background, into
  copies whose tensors have no data. Any other object that holds no tensors is copied and loaded on
  the training thread. Such an object may set random generators, and only the training thread can
  restore them.

Objects that cannot be copied are not rehearsed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

import harness.selfcheck.trial_load as trial_load
from harness import state
from harness.checkpoint.format import Manifest
from harness.distributed.wrappers import unwrap
from harness.ema import Ema
from harness.preemption import children
from harness.saving import readback
from harness.saving.writer_process import WriterProcess
from harness.state import Captured
from harness.store import LocalStore, Store

MOST_PRINTED = 5
ENDS_WITHIN_S = 1.0
READ_WITHIN_S = 600.0


class Rehearsal:
    """The rehearsal of one attempt, on the writer.

    Args:
        writer: the handle on the writer process.
        say: prints a line to the user.
        note: adds an event to the event log.
        is_on: whether to rehearse at all.
    """

    def __init__(
        self,
        writer: WriterProcess,
        say: Callable[[str], None],
        note: Callable[..., None],
        *,
        is_on: bool,
    ) -> None:
        self._is_on = is_on
        self._writer, self._say, self._note = writer, say, note
        self._captured: Captured | None = None
        self._step = 0
        self._problems: list[str] = []
        self._skipped: list[str] = []
        self._thread: threading.Thread | None = None
        self._tried_s, self._is_over = 0.0, False

    def take(self, captured: Captured) -> None:
        """Rehearse the objects that need the training thread, at the step boundary of the save."""
        if self._thread is not None or not self._is_on:
            return
        # If an earlier save failed, its objects were rehearsed already.
        is_tried, self._captured = self._captured is not None, captured
        if is_tried:
            return
        began = time.perf_counter()
        for name, obj in captured.tracked.items():
            key, inner = f"{name}_state_dict", _inner(obj)
            if key in captured.payload and not isinstance(
                inner, torch.nn.Module | torch.optim.Optimizer
            ):
                saved = state.rebuilt(captured.payload, key)
                self._add(*trial_load.of_object(name, inner, saved))
        self._tried_s = time.perf_counter() - began

    def begin(self, store: Store, manifest: Manifest, places: Mapping[int, int]) -> None:
        """Start a thread that reads the committed checkpoint back and loads its state into copies.

        The copies are of torch's own modules and optimizers; `take` has tried all other objects.
        Nothing is done if the rehearsal of this attempt has begun.

        Args:
            store: the store of the checkpoint.
            manifest: the manifest of the checkpoint.
            places: offset in the file of each tensor storage, by the storage's address in memory;
                empty if `torch.save` wrote the file.
        """
        captured, self._captured = self._captured, None
        if captured is not None:
            self._thread = threading.Thread(
                target=self._run,
                args=(store, manifest, captured, dict(places)),
                daemon=True,
                name="rehearsal",
            )
            self._thread.start()

    def close(self) -> None:
        """Abandon the rehearsal, as training is over."""
        self._is_over = True
        if self._thread is not None:
            self._thread.join(ENDS_WITHIN_S)

    def _add(self, problems: list[str], skipped: str) -> None:
        self._problems += problems
        self._skipped += [skipped] if skipped else []

    def _run(
        self, store: Store, manifest: Manifest, captured: Captured, places: dict[int, int]
    ) -> None:
        children.hold_back()
        began = time.perf_counter()
        try:
            rows = readback.rows(captured.payload, lambda value: _content(value, places))
            objects = {
                name: _inner(obj)
                for name, obj in captured.tracked.items()
                if f"{name}_state_dict" in captured.payload
            }
            shapes = {
                name: trial_load.without_data(captured.payload[f"{name}_state_dict"])
                for name in objects
            }
            del captured  # training may have dropped some of its tensors meanwhile
            self._add(*self._read(store, manifest, rows, bool(places)))
            for name, obj in objects.items():
                if self._is_over:
                    break
                if isinstance(obj, torch.nn.Module) and set(obj.state_dict()) != set(shapes[name]):
                    self._skipped.append(f"{name} (the program has changed its layers since)")
                elif isinstance(obj, torch.nn.Module | torch.optim.Optimizer):
                    self._add(*trial_load.of_torchs(name, obj, shapes[name]))
        except Exception as error:  # noqa: BLE001 - a failed rehearsal must not end training
            self._skipped.append(f"the rest ({type(error).__name__}: {error})")
        if not self._is_over:
            self._tell(manifest, time.perf_counter() - began)

    def _read(
        self, store: Store, manifest: Manifest, rows: list[readback.Row], has_places: bool
    ) -> tuple[list[str], str]:
        """Read the file back.

        Returns:
            The problems found and "", or no problems and the reason why the file was not read.

        Args:
            store: the store of the checkpoint.
            manifest: the manifest of the checkpoint.
            rows: the rows of the captured state.
            has_places: whether the rows hold the position of each tensor in the file.
        """
        if not isinstance(store, LocalStore):
            return [], f"{manifest.data.name} (it lies in {store})"
        path, reply = str(store.path(manifest.data_key)), dict[str, Any]()
        until = time.monotonic() + READ_WITHIN_S
        while "digest" not in reply:
            if time.monotonic() > until:
                return (
                    [],
                    f"{manifest.data.name} (to read it takes more than {READ_WITHIN_S:.0f} s)",
                )
            answer = self._writer.reread(path)
            if answer is None or "error" in answer or self._is_over:
                return (
                    [],
                    f"{manifest.data.name} "
                    f"({(answer or {}).get('error', 'there is no process to read it')})",
                )
            reply = answer
        if reply["digest"] != manifest.data.digest:
            return [
                f"{manifest.data.name} is not read as it was written: "
                f"{reply['digest']}, expected {manifest.data.digest}"
            ], ""
        if not has_places:  # `torch.save` has written the file directly
            for row in (*rows, *reply["rows"]):
                if row[1] == "tensor":
                    row[2] = row[2][:3]
        return readback.unlike(rows, reply["rows"]), ""

    def _tell(self, manifest: Manifest, seconds: float) -> None:
        for problem in self._problems[:MOST_PRINTED]:
            self._say(
                f"harness: warning: a restart from step {manifest.step} "
                f"would fail or not be exact: {problem}"
            )
        if len(self._problems) > MOST_PRINTED:
            self._say(
                f"harness: warning: … and {len(self._problems) - MOST_PRINTED} more, "
                "in the run's events"
            )
        if self._skipped:
            self._say(
                "harness: not rehearsed, so a restart will show whether it loads again: "
                f"{', '.join(self._skipped)}"
            )
        costs = {
            "seconds": round(seconds, 6),
            "training_s": round(self._tried_s, 6),
            "size_bytes": manifest.size_bytes,
        }
        self._note(
            "rehearsed",
            step=manifest.step,
            problems=self._problems,
            not_rehearsed=self._skipped,
            **costs,
        )


def _inner(obj: Any) -> Any:
    """Return the object inside the wrappers, whose state is saved; of `Ema`, its module."""
    return obj.module if isinstance(obj, Ema) else unwrap(obj)


def _content(value: Any, places: Mapping[int, int]) -> list[Any] | None:
    """Return the content of a tensor's row; None for anything else."""
    if not isinstance(value, torch.Tensor):
        return None
    if value.layout is not torch.strided or type(value) is not torch.Tensor or value.is_quantized:
        return ["other"]
    storage = value.untyped_storage()
    place = places.get(storage.data_ptr(), -1) if storage.nbytes() else 0
    dtype = str(value.dtype).removeprefix("torch.")
    return [dtype, list(value.shape), list(value.stride()), value.storage_offset(), place]
