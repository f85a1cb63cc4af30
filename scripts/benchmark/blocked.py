"""How long a save blocks training that goes on: timed around the step boundary and in front of the
optimizer's update."""

from __future__ import annotations

import json
import math
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmark.bench import Bench
from benchmark.findings import HARNESS, Finding

ROW = "blocked"
SAVES = 4  # a process; the first, which allocates, does not count
SPACE = 8  # between two saves lies so much time as torch.save takes, times this


def measure(bench: Bench) -> list[Finding]:
    pace = bench.sample("blocked", "pace", size_mb=bench.size_mb)
    # An odd number: at steps 2, 4, 8 … a run also looks at what the program holds.
    every = max(4, math.ceil(SPACE * pace["save_s"] / pace["step_s"])) | 1
    longer = pace["forward_backward_s"] / pace["copy_s"]
    is_long = (
        "longer than a copy, as required"
        if longer > 1
        else "SHORTER THAN A COPY: training cannot hide it"
    )
    bench.say(
        f"forward and backward take {longer:.1f} copies, {is_long}; "
        f"a copy takes {pace['copy_s']:.3f} s; saving every {every} steps"
    )
    sample = partial(bench.sample, "blocked", "by_harness", size_mb=bench.size_mb, every=every)
    taken = bench.turns({HARNESS: sample}, math.ceil(bench.repeats / (SAVES - 1)))[HARNESS]
    note = f"forward and backward: {longer:.1f} copies"
    if missed := sum(SAVES - sample["saved"] for sample in taken):
        note += f"; {missed} saves left out, because the one before was not durable yet"
    found = [
        _finding(
            "training blocked by a save",
            [of / s["copy_s"] for s in taken for of in s["blocked_s"]],
            "copies",
            note,
            0.1,
        )
    ]
    told = [of / sample["copy_s"] for sample in taken for of in sample["told_s"]]
    if told:
        found.append(
            _finding(
                "training blocked by a save, as the run's events say", told, "copies", note, 0.1
            )
        )
    slower = [of / sample["copy_s"] for sample in taken for of in sample["update_s"]]
    found.append(
        _finding(
            "the next update is slower by (the wait, and what shares the memory)",
            slower,
            "copies",
            "",
        )
    )
    found.append(
        _finding(
            "from the boundary until it is durable, while training",
            [s for t in taken for s in t["durable_s"]],
            "s",
            "",
        )
    )
    return [finding for finding in found if finding.samples]


def _finding(
    what: str, samples: list[float], unit: str, note: str, most: float | None = None
) -> Finding:
    return Finding(ROW, what, HARNESS, unit, tuple(samples), most=most, note=note)


# From here on: what runs in a sample's own process.


def pace(folder: str, size_mb: int) -> dict[str, float]:
    """How long things take here, roughly: a copy, a step, a save."""
    from benchmark import ddp, workload
    from benchmark.savers import write

    work = workload.build(size_mb)
    if ddp.world_size() > 1:
        ddp.join()
        work = workload.Workload(ddp.wrap(work.model), work.optimizer, work.dataset)
    work.settle()
    tokens, halves, whole = work.dataset.tensors[0][:1], [], []
    for _ in range(4):
        began_at = time.perf_counter()
        work.forward_backward(tokens)
        halves.append(time.perf_counter() - began_at)
        work.optimizer.step()
        whole.append(time.perf_counter() - began_at)
    copy_s = workload.copy_s(work.payload())
    began_at = time.perf_counter()
    if ddp.rank() == 0:
        write(work.payload(), Path(folder, "pace.pt"))
    save_s = time.perf_counter() - began_at
    ddp.leave()
    return {
        "copy_s": copy_s,
        "save_s": save_s,
        "forward_backward_s": median(halves[1:]),
        "step_s": median(whole[1:]),
    }


class Wait:
    """Times what others put in front of the optimizer's update: from the call of `step` to a hook
    that is always the last."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.reached_at = optimizer, 0.0

    def step(self) -> tuple[float, float]:
        """Update; returns how long it was waited, and how long the whole call took."""
        last = self.optimizer.register_step_pre_hook(
            lambda *_: setattr(self, "reached_at", time.perf_counter())
        )
        began_at = time.perf_counter()
        self.optimizer.step()
        took_s = time.perf_counter() - began_at
        last.remove()
        return self.reached_at - began_at, took_s


def by_harness(folder: str, size_mb: int, every: int) -> dict[str, Any]:
    """Trains with a save every so many steps."""
    import harness
    from benchmark import workload

    work = workload.build(size_mb)
    work.settle()
    copy_s = workload.copy_s(work.payload())
    directory = Path(folder, "run")
    run = harness.init(directory, save_every_s=None, save_every_steps=every, keep_last=1)
    run.track(model=work.model, optimizer=work.optimizer)
    wait, nexts, waits, updates = Wait(work.optimizer), [], [], []
    batches: Any = run.batches(work.dataset, 1, epochs=1000)
    for _ in range((SAVES + 1) * every):
        began_at = time.perf_counter()
        (tokens,) = next(batches)
        nexts.append(time.perf_counter() - began_at)
        work.forward_backward(tokens)
        waited_s, took_s = wait.step()
        waits.append(waited_s)
        updates.append(took_s)
    batches.close()
    # the call with this index makes the boundary of the step of this number
    saving = [every * number for number in range(1, SAVES + 1)]
    plain = [at for at in range(2, len(nexts)) if at not in saving]
    usual_next_s, usual_wait_s, usual_s = (
        median(times[at] for at in plain) for times in (nexts, waits, updates)
    )
    events = saved_events(directory)
    return {
        "copy_s": copy_s,
        "blocked_s": [nexts[at] - usual_next_s + waits[at] - usual_wait_s for at in saving[1:]],
        "update_s": [updates[at] - usual_s for at in saving[1:]],
        "told_s": [event["blocked_s"] for event in events[1:] if "blocked_s" in event],
        "saved": len(events),
        "durable_s": [event["seconds"] for event in events[1:] if "seconds" in event],
        "step_s": median(nexts[at] + updates[at] for at in plain),
    }


def saved_events(directory: Path) -> list[dict[str, Any]]:
    """What the run's own record says of its checkpoints."""
    lines = (directory / "events/0001.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "saved"]
