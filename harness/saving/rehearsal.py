"""A rehearsal of the next start, once an attempt, at its first save: what could not be gone on from is said then, not after a kill.

In two parts. The file is read back in the process that wrote it, and compared with what was captured. And the state is loaded: of torch's
own modules and optimizers in the background, into copies whose tensors have no data; of all else that holds no tensors into a copy, on the
training thread, as only there the generators can be kept, which such an object may set. What cannot be copied is not rehearsed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

import harness.saving.trial_load as trial_load
from harness import preemption
from harness.checkpoint.format import Manifest
from harness.distributed.ddp import plain
from harness.saving import readback
from harness.saving.writer_process import WriterProcess
from harness.state import Captured
from harness.step import Ema
from harness.store import LocalStore, Store

MOST_SAID = 5
ENDS_WITHIN_S = 1.0
READ_WITHIN_S = 600.0


class Rehearsal:
    """Of one attempt, on the writer."""

    def __init__(self, scribe: WriterProcess, say: Callable[[str], None], note: Callable[..., None], *, is_on: bool) -> None:
        self._is_on = is_on
        self._scribe, self._say, self._note = scribe, say, note
        self._captured: Captured | None = None
        self._step = 0
        self._problems: list[str] = []
        self._skipped: list[str] = []
        self._thread: threading.Thread | None = None
        self._tried_s, self._is_over = 0.0, False

    def take(self, captured: Captured) -> None:
        """Try what has to be tried on the training thread, at the step boundary of the save."""
        if self._thread is not None or not self._is_on:
            return
        is_tried, self._captured = self._captured is not None, captured  # a save before this one came to nothing
        if is_tried:
            return
        began = time.perf_counter()
        for name, thing in captured.tracked.items():
            saved = _as_loaded(captured.payload, f"{name}_state_dict")
            if saved is not None and not isinstance(_inner(thing), torch.nn.Module | torch.optim.Optimizer):
                self._add(*trial_load.of_object(name, _inner(thing), saved))
        self._tried_s = time.perf_counter() - began

    def begin(self, store: Store, manifest: Manifest, places: Mapping[int, int]) -> None:
        """What was taken is committed: read it back, and try the rest. `places` tells where in the file the memory with an address is."""
        captured, self._captured = self._captured, None
        if captured is not None:
            self._thread = threading.Thread(target=self._run, args=(store, manifest, captured, dict(places)), daemon=True, name="rehearsal")
            self._thread.start()

    def close(self) -> None:
        """Let it be: training is over."""
        self._is_over = True
        if self._thread is not None:
            self._thread.join(ENDS_WITHIN_S)

    def _add(self, problems: list[str], skipped: str) -> None:
        self._problems += problems
        self._skipped += [skipped] if skipped else []

    def _run(self, store: Store, manifest: Manifest, captured: Captured, places: dict[int, int]) -> None:
        preemption.hold_back()
        began = time.perf_counter()
        try:
            rows = readback.rows(captured.payload, lambda value: _content(value, places))
            things = {name: _inner(thing) for name, thing in captured.tracked.items() if f"{name}_state_dict" in captured.payload}
            shapes = {name: trial_load.without_data(captured.payload[f"{name}_state_dict"]) for name in things}
            del captured  # its tensors may be ones that training has let go meanwhile
            self._add(*self._read(store, manifest, rows, bool(places)))
            for name, thing in things.items():
                if isinstance(thing, torch.nn.Module | torch.optim.Optimizer) and not self._is_over:
                    self._add(*trial_load.of_torchs(name, thing, shapes[name]))
        except Exception as error:  # noqa: BLE001 - whatever goes wrong here is no reason to end training
            self._skipped.append(f"the rest ({type(error).__name__}: {error})")
        if not self._is_over:
            self._tell(manifest, time.perf_counter() - began)

    def _read(self, store: Store, manifest: Manifest, rows: list[readback.Row], has_places: bool) -> tuple[list[str], str]:
        """Read the file back; returns what is wrong with it, and why it was not read."""
        if not isinstance(store, LocalStore):
            return [], f"{manifest.data.name} (it lies in {store})"
        path, reply = str(store.path(manifest.data_key)), dict[str, Any]()
        until = time.monotonic() + READ_WITHIN_S
        while "digest" not in reply:
            if time.monotonic() > until:
                return [], f"{manifest.data.name} (to read it takes more than {READ_WITHIN_S:.0f} s)"
            answer = self._scribe.reread(path)
            if answer is None or "error" in answer or self._is_over:
                return [], f"{manifest.data.name} ({(answer or {}).get('error', 'there is no process to read it')})"
            reply = answer
        if reply["digest"] != manifest.data.digest:
            return [f"{manifest.data.name} is not read as it was written: {reply['digest']}, expected {manifest.data.digest}"], ""
        if not has_places:  # `torch.save` has written it by itself
            for row in (*rows, *reply["rows"]):
                if row[1] == "tensor":
                    row[2] = row[2][:3]
        return readback.unlike(rows, reply["rows"]), ""

    def _tell(self, manifest: Manifest, seconds: float) -> None:
        for problem in self._problems[:MOST_SAID]:
            self._say(f"harness: warning: a restart from step {manifest.step} would fail or not be exact: {problem}")
        if len(self._problems) > MOST_SAID:
            self._say(f"harness: warning: … and {len(self._problems) - MOST_SAID} more, in the run's events")
        if self._skipped:
            self._say(f"harness: not rehearsed, so a restart will show whether it loads again: {', '.join(self._skipped)}")
        costs = {"seconds": round(seconds, 6), "training_s": round(self._tried_s, 6), "size_bytes": manifest.size_bytes}
        self._note("rehearsed", step=manifest.step, problems=self._problems, not_rehearsed=self._skipped, **costs)


def _as_loaded(payload: Mapping[str, Any], key: str) -> Any:
    """What a restart would give an object to load; None if the checkpoint has nothing of it under that name."""
    return payload.get(key)


def _inner(thing: Any) -> Any:
    """What gives a tracked object's state, inside its shells; of the averages of `step`, which is ours, the module."""
    return thing.module if isinstance(thing, Ema) else plain(thing)


def _content(value: Any, places: Mapping[int, int]) -> list[Any] | None:
    """A tensor's row."""
    if not isinstance(value, torch.Tensor):
        return None
    if value.layout is not torch.strided or type(value) is not torch.Tensor or value.is_quantized:
        return ["other"]
    storage = value.untyped_storage()
    place = places.get(storage.data_ptr(), -1) if storage.nbytes() else 0
    dtype = str(value.dtype).removeprefix("torch.")
    return [dtype, list(value.shape), list(value.stride()), value.storage_offset(), place]
